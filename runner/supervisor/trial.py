"""The job's own function in a process of its own, which it is tried with: started, awaited, killed.

What that process does is in `runner.training.validate`. It imports torch, so that the supervisor
does not; it has the trainer's interpreter, workdir and environment, without credentials and without
a GPU, and one thread. A function that hangs or dies harms nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import UsageError
from runner.job import Job
from runner.job_launch import import_folders, interpreter
from runner.launch.process import build_environment
from runner.launch.process_tree import MARK_VARIABLE, mark_prefix, read_entry
from runner.units import format_duration

_LOOK_SECONDS = 0.05
_CHECK_SECONDS = 120.0
_PATIENCE = 6  # times the limit, for a process that is hardly ever given a processor
_TAIL_BYTES = 2000
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_NO_GPU = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Answer:
    """What a function came to: metrics, or a `problem` of what it was tried with.

    `unusable` says why that is not known: it could not be called, had no time, or said nothing.
    """

    metrics: Mapping[str, float] | None = None
    problem: str = ""
    unusable: str = ""


@dataclass(frozen=True)
class Workplace:
    """Where the function is called: like the trainer, but for what would disturb that."""

    python: str
    workdir: Path
    path: tuple[str, ...]
    environment: Mapping[str, str]
    params: Mapping[str, Any]

    @classmethod
    def of(cls, job: Job, run_id: str = "") -> Workplace:
        own = {"RUNNER_RUN_ID": run_id, "RUNNER_PARAMS": json.dumps(job.params)}
        environment = build_environment(os.environ, own, job.env)
        environment |= dict.fromkeys(_ONE_THREAD, "1") | dict.fromkeys(_NO_GPU, "")
        environment[MARK_VARIABLE] = _mark()
        folders = tuple(import_folders(job))
        # What a container's command begins with is not on this machine.
        python = interpreter(job) if job.launcher == "process" else sys.executable
        return cls(python, job.workdir, folders, environment, job.params)


class Trial:
    """One call. Its files are `result.json` and `output` in `folder`, which is made."""

    def __init__(self, place: Workplace, folder: Path, request: Mapping[str, Any]) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._result, self._output = folder / "result.json", folder / "output"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [place.python, "-m", "runner.training.validate"],
                cwd=place.workdir,
                env=dict(place.environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
            )
        self._begun = time.monotonic()
        whole = {**request, "path": place.path, "params": place.params}
        self._request = json.dumps(whole | {"result": str(self._result)}).encode()

    @property
    def pid(self) -> int:
        """Of a child that will have a session of its own, as soon as it was told what to do."""
        return self._process.pid

    def begin(self) -> None:
        """Tell it what to do."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(self._request)

    def wait(self, limit_seconds: float, over: threading.Event) -> Answer | None:
        """Wait for the answer; None if it is `over` before that. Nothing of it runs afterwards.

        Time in which the process was ready to run, and others did, is not counted.
        """
        try:
            while not self._has_ended():
                passed = time.monotonic() - self._begun
                if passed - waited_seconds(self.pid) > limit_seconds:
                    return Answer(problem=f"it took longer than {format_duration(limit_seconds)}")
                if passed > _PATIENCE * limit_seconds:
                    return Answer(unusable="there was no processor for it")
                if over.wait(_LOOK_SECONDS):
                    return None
        finally:
            code = self._end()
        return self._answer(code)

    def _has_ended(self) -> bool:
        """Its code is not taken: until then its number, and that of its session, stays its own."""
        with contextlib.suppress(ChildProcessError):
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.pid, flags) is not None
        return True

    def _end(self) -> int:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no session of its own yet
            self._process.kill()
        return self._process.wait()

    def _answer(self, code: int) -> Answer:
        try:
            result = json.loads(self._result.read_bytes())
        except (OSError, ValueError):
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            if -code in _FROM_OUTSIDE:
                return Answer(unusable=f"it was ended with {how}, for want of memory maybe")
            return Answer(problem=f"it ended with {how}{self._last_words()}")
        if "unusable" in result:
            return Answer(unusable=result["unusable"])
        if "problem" in result:
            return Answer(problem=result["problem"])
        if result["metrics"] is None:
            return Answer(unusable="the entry point has returned nothing")
        return Answer({name: float(value) for name, value in result["metrics"].items()})

    def _last_words(self) -> str:
        with contextlib.suppress(OSError), self._output.open("rb") as output:
            output.seek(max(0, self._output.stat().st_size - _TAIL_BYTES))
            lines = output.read().decode(errors="replace").strip().splitlines()
            return f": {lines[-1]}" if lines else ""
        return ""


def check_entrypoint(job: Job) -> None:
    """UsageError if the function that is to validate is not there, or cannot be called.

    It is imported in a process of its own, and not called. Does nothing where none is named, nor
    for a pod, whose own supervisor looks: this machine need not have what is in the image.
    """
    validation = job.checkpoint.validation
    if validation is None or job.launcher == "kubernetes":
        return
    with tempfile.TemporaryDirectory() as folder:
        request = {"entrypoint": validation.entrypoint}
        trial = Trial(Workplace.of(job), Path(folder), request)
        trial.begin()
        answer = trial.wait(_CHECK_SECONDS, threading.Event())
    problem = answer and (answer.problem or answer.unusable)
    if problem:
        raise UsageError(f"checkpoint.validate.entrypoint: {problem}")


def _mark() -> str:
    """What tells its processes from those of a trainer, all of which are killed with it."""
    own = read_entry(os.getpid())
    return "" if own is None else f"{mark_prefix(own)}.trial"


def waited_seconds(pid: int) -> float:
    """For how long a process was ready to run and did not; 0 where the kernel does not tell.

    Source: the kernel's documentation, scheduler/sched-stats.rst, /proc/<pid>/schedstat.
    """
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
