"""The job's own function in a process of its own, which it is tried with: started, awaited, killed.

What that process does is in `runner.training.validate`. It imports torch, so that the supervisor
does not; it has the trainer's interpreter, workdir and environment, without credentials and without
a GPU, and one thread. A function that hangs or dies harms nobody.

Whoever asks makes a folder for it and may put a `slot` there. The question goes in as
`request.json`, and the answer comes back as `result.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runner.job import Job
from runner.job_launch import import_folders, interpreter
from runner.launch.process import build_environment
from runner.launch.process_tree import MARK_VARIABLE, mark_prefix, read_entry
from runner.regular import open_regular
from runner.trial_files import REQUEST, RESULT
from runner.units import format_duration

PROGRAM = ("-m", "runner.training.validate")
ALONE: Mapping[str, str] = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    **dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"), ""),
}
"""One thread and no GPU, by the environment."""

_LOOK_SECONDS = 0.05
_PATIENCE = 6  # times the limit, for a process that is hardly ever given a processor
_TAIL_BYTES = 2000
_RESULT_BYTES = 1 << 20
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Answer:
    """What a function came to: metrics, or a `problem` of what it was tried with.

    `unusable` says why that is not known: it could not be called, had no time, or said nothing.
    """

    metrics: Mapping[str, float] | None = None
    problem: str = ""
    unusable: str = ""


class Trial(Protocol):
    """One call, made ready."""

    @property
    def pids(self) -> Collection[int]:
        """The children of this process whose exit codes are the trial's to take."""

    def begin(self) -> None:
        """Tell it what to do."""

    def wait(self, limit_seconds: float, over: threading.Event) -> Answer | None:
        """Wait for the answer; None if it is `over` before that. Nothing of it runs afterwards.

        Time in which the process was ready to run, and others did, is not counted. RunnerError if
        it cannot be followed.
        """


class ProcessTrial:
    """A call in a process of this machine, in the session that it makes for itself."""

    def __init__(self, job: Job, folder: Path, request: Mapping[str, Any], run_id: str) -> None:
        whole = {**request, "path": import_folders(job), "params": job.params}
        (folder / REQUEST).write_text(json.dumps(whole))
        self._folder, self._output = folder, folder / "output"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [interpreter(job), *PROGRAM, str(folder)],
                cwd=job.workdir,
                env=trial_environment(job, run_id),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
            )
        self._begun = time.monotonic()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def pids(self) -> Collection[int]:
        return (self.pid,)

    def begin(self) -> None:
        """Close its input, for which it waits: by now whoever reaps knows whose child it is."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def wait(self, limit_seconds: float, over: threading.Event) -> Answer | None:
        try:
            while not self._has_ended():
                passed = time.monotonic() - self._begun
                late = too_late(passed, waited_seconds(self.pid), limit_seconds)
                if late is not None:
                    return late
                if over.wait(_LOOK_SECONDS):
                    return None
        finally:
            code = self._end()
        return read_answer(self._folder, code, self._tail())

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

    def _tail(self) -> bytes:
        with contextlib.suppress(OSError), self._output.open("rb") as output:
            output.seek(max(0, self._output.stat().st_size - _TAIL_BYTES))
            return output.read()
        return b""


def trial_environment(job: Job, run_id: str) -> dict[str, str]:
    """Like the trainer's, but for what would disturb that."""
    environment = build_environment(os.environ, own_variables(job, run_id), job.env)
    return {**environment, **ALONE, MARK_VARIABLE: _mark()}


def own_variables(job: Job, run_id: str) -> dict[str, str]:
    return {"RUNNER_RUN_ID": run_id, "RUNNER_PARAMS": json.dumps(job.params)}


def too_late(passed: float, waited: float, limit_seconds: float) -> Answer | None:
    """What comes of a call after so many seconds, in so many of which others ran; None: wait on."""
    if passed - waited > limit_seconds:
        return Answer(problem=f"it took longer than {format_duration(limit_seconds)}")
    if passed > _PATIENCE * limit_seconds:
        return Answer(unusable="there was no processor for it")
    return None


def read_answer(folder: Path, code: int, printed: bytes) -> Answer:
    """What is in the folder after the end, which came with this exit code, negative for a signal.

    The job's code has written it, so nothing is followed, awaited or read without a bound.
    """
    try:
        result = json.loads(_read_plain(folder / RESULT))
        if "unusable" in result:
            return Answer(unusable=str(result["unusable"]))
        if "problem" in result:
            return Answer(problem=str(result["problem"]))
        if result["metrics"] is None:
            return Answer(unusable="the entry point has returned nothing")
        return Answer({str(name): float(value) for name, value in result["metrics"].items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if -code in _FROM_OUTSIDE:
            return Answer(unusable=f"it was ended with {how}, for want of memory maybe")
        lines = printed.decode(errors="replace").strip().splitlines()
        return Answer(problem=f"it ended with {how}{f': {lines[-1]}' if lines else ''}")


def _read_plain(path: Path) -> bytes:
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(_RESULT_BYTES)


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
