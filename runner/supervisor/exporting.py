"""Checkpoints on their way to deployment: exported into a folder, as ONNX too if it is asked."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from runner.checkpoint.copies import appearing
from runner.checkpoint.export import Wanted, export_model
from runner.checkpoint.manifest import Manifest
from runner.errors import RunnerError, UsageError
from runner.job import Export
from runner.supervisor.lookup import KnownRun

_ONNX_SECONDS = 1800.0


def export_for_use(
    run: KnownRun, which: str, folder: Path, *, ema: bool = False, onnx: bool = False
) -> Manifest:
    """Write what deployment needs of a checkpoint into a folder that is new or empty.

    UsageError if that cannot be; nothing is left behind then.
    """
    job = (run.ledger.run() or {}).get("job") or {}
    export = _section(run, job)
    if onnx:
        _check_onnx(run, export)
    manifest = run.find_checkpoint(which)
    component = export.ema if ema else export.model
    with appearing(folder) as partial:
        wanted = Wanted(component, export.state, job.get("params"))
        export_model(run.archive, manifest, wanted, partial)
        if onnx:
            _write_onnx(partial, str(export.onnx), Path(job["workdir"]))
    return manifest


def _section(run: KnownRun, job: dict[str, Any]) -> Export:
    try:
        return Export.model_validate(job.get("export") or {})
    except ValidationError as error:
        raise UsageError(f"run.json of run {run.run_id} has no usable section export") from error


def _check_onnx(run: KnownRun, export: Export) -> None:
    if export.onnx is None:
        raise UsageError(
            f"the job of run {run.run_id} names no function for ONNX: say it in export.onnx, as"
            " module:function, and submit the run once more"
        )
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not _is_installed(name)]
    if missing:
        raise UsageError(
            f"{missing[0]} is not installed; install it with: pip install 'runner[onnx]'"
        )


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _write_onnx(folder: Path, entrypoint: str, workdir: Path) -> None:
    """In a process of its own, which has torch and the job's code."""
    done = subprocess.run(
        [sys.executable, "-m", "runner.training.onnx", str(folder), entrypoint],
        cwd=workdir,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_ONNX_SECONDS,
        check=False,
    )
    lines = done.stdout.decode(errors="replace").splitlines() or [""]
    try:
        reply = json.loads(lines[-1])
    except ValueError:
        raise RunnerError(f"{entrypoint} ended with code {done.returncode}: {lines[-1]}") from None
    if "problem" in reply:
        raise RunnerError(f"no ONNX was written with {entrypoint}: {reply['problem']}")
