"""From a checkpoint to a version of a registered model: what to register, and where from."""

from __future__ import annotations

import tempfile
from pathlib import Path

from runner.errors import UsageError
from runner.job import Tracking, missing_tracker
from runner.supervisor.exporting import export_for_use
from runner.supervisor.lookup import KnownRun
from runner.tracking.state import read_state


def promote(run: KnownRun, which: str, name: str, alias: str | None, *, ema: bool) -> str:
    """Register a checkpoint of a run under a name; the version. UsageError if that cannot be."""
    job = (run.ledger.run() or {}).get("job") or {}
    section = (job.get("tracking") or {}).get("mlflow")
    if section is None:
        raise UsageError(f"run {run.run_id} is not shown to MLflow: its job has no tracking.mlflow")
    tracking = Tracking.model_validate({"mlflow": section})
    if problem := missing_tracker(tracking):
        raise UsageError(problem)
    known = read_state(run.store, run.run_id, "mlflow").id
    if known is None:
        raise UsageError(
            f"MLflow does not know run {run.run_id} yet; send it with `runner track {run.run_id}`"
        )
    from runner.tracking.registry import Promotion, register

    with tempfile.TemporaryDirectory(prefix="runner-promote-") as folder:
        export = Path(folder) / "export"
        manifest = export_for_use(run, which, export, ema=ema)
        metrics = {f"metric.{k}": f"{v:.6g}" for k, v in manifest.moment.metrics.items()}
        git = manifest.provenance.get("git") or {}
        tags = {
            "runner.run_id": run.run_id,
            "runner.checkpoint": f"{run.store.url}/{run.run_id}/checkpoints/{manifest.name}",
            "runner.step": str(manifest.moment.step),
            "runner.commit": str(git.get("commit")),
            **metrics,
        }
        promotion = Promotion(name, alias, str(job.get("name")), known, manifest.name, tags)
        uri = None if tracking.mlflow is None else tracking.mlflow.uri
        return register(export, promotion, uri, Path(job["workdir"]))
