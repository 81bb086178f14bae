"""One run under `runner run`, as it is seen from outside: started, watched, preempted, killed.

The trainer's diary says when it did what, on the same clock as ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import AttemptRecord, Ledger
from runner.checkpoint.manifest import Manifest
from runner.store import open_store
from tests.bench.place import REPOSITORY, Place
from tests.waiting import wait_until

_PATIENCE_SECONDS = 120.0
RUNNER = str(Path(sys.executable).with_name("runner"))

Note = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a run does. `steps` 0 is: until it is told to finish."""

    megabytes: float
    steps: int = 0
    save_every_steps: int | None = None


class SupervisedRun:
    """A run of `trainer` with a store of its own in a place."""

    def __init__(self, place: Place, run_id: str, settings: Settings) -> None:
        self._place, self._run_id = place, run_id
        self._settings = settings
        self._diary = place.memory / f"{run_id}.diary"
        self._finish = place.memory / f"{run_id}.finish"
        self._log = place.disk / f"{run_id}.log"
        self._job = place.disk / f"{run_id}.json"
        self._job.write_text(json.dumps(self._document()))
        self._process: subprocess.Popen[bytes] | None = None

    def _document(self) -> dict[str, Any]:
        """The job file: JSON is YAML too."""
        every = self._settings.save_every_steps
        return {
            "name": "bench",
            "command": ["python", "-m", "tests.bench.trainer"],
            "workdir": str(REPOSITORY),
            "params": {
                "megabytes": self._settings.megabytes,
                "steps": self._settings.steps,
                "diary": str(self._diary),
                "finish": str(self._finish),
            },
            "store": str(self._place.store),
            "checkpoint": {"every": {"minutes": 600} if every is None else {"steps": every}},
            "preemption": {"grace": "120s"},
            "restart": {"backoff": {"initial": "1ms", "max": "1ms"}},
        }

    # ------------------------------------------------------------------ from outside

    def start(self) -> float:
        """Start a supervisor; the moment just before."""
        command = [RUNNER, "run", str(self._job), "--run-id", self._run_id]
        with self._log.open("ab") as log:
            started = time.monotonic()
            self._process = subprocess.Popen(
                command,
                env=self._place.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return started

    @property
    def pid(self) -> int:
        """The supervisor's."""
        return self._running.pid

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "no supervisor has been started"
        return self._process

    def preempt(self) -> tuple[float, float, float]:
        """SIGTERM; seconds until the checkpoint's rename and until the exit; the wall clock then.

        The rename is read from the directory afterwards: nothing looks while it is measured.
        """
        wall, sent = time.time(), time.monotonic()
        self._running.send_signal(signal.SIGTERM)
        code = self._running.wait(_PATIENCE_SECONDS)
        exited = time.monotonic() - sent
        self._expect(code == 75, f"exit code {code} instead of 75")
        saved = self._place.store / self._run_id / "checkpoints" / self.newest().name
        return saved.stat().st_ctime - wall, exited, wall

    def kill_trainer(self) -> float:
        """SIGKILL to the trainer alone; the moment just before."""
        killed = time.monotonic()
        os.kill(self.steps()[-1]["pid"], signal.SIGKILL)
        return killed

    def kill_tree(self) -> float:
        """SIGKILL to supervisor and trainer; the moment just before. Both are gone afterwards."""
        trainer = self.steps()[-1]["pid"]
        killed = time.monotonic()
        self._running.kill()
        os.kill(trainer, signal.SIGKILL)
        self._running.wait(_PATIENCE_SECONDS)
        os.waitpid(trainer, 0)  # ours by now: we are a child subreaper
        return killed

    def finish(self) -> str:
        """Let it come to its end; the digest of the state that the trainer ended with."""
        self._finish.touch()
        code = self._running.wait(_PATIENCE_SECONDS)
        self._expect(code == 0, f"exit code {code} instead of 0")
        return str(self.notes("digest")[-1]["digest"])

    def close(self) -> None:
        """End it in any case; what it stored goes with the place."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, IndexError):
                self.kill_tree()
            self._process.kill()
            self._process.wait()

    # ------------------------------------------------------------------ what it did

    def notes(self, kind: str) -> list[Note]:
        """What the trainers noted, in order; a line that is being written is left for later."""
        try:
            *lines, _ = self._diary.read_text().split("\n")
        except FileNotFoundError:
            return []
        notes = [json.loads(line) for line in lines]
        return [note for note in notes if note["kind"] == kind]

    def steps(self) -> list[Note]:
        return self.notes("step")

    def wait_for_steps(self, count: int, *, attempt: int) -> list[Note]:
        """Wait until an attempt has finished so many steps; those that it has finished."""

        def enough() -> list[Note]:
            self._expect(self._running.poll() is None, "the supervisor has ended")
            done = [note for note in self.steps() if note["attempt"] == attempt]
            return done if len(done) >= count else []

        return wait_until(enough, _PATIENCE_SECONDS, f"{count} steps of attempt {attempt}")

    def record(self, attempt: int) -> AttemptRecord:
        """What the supervisor wrote down about an attempt."""
        records = Ledger(open_store(str(self._place.store)), self._run_id, "").records()
        return next(record for record in records if record.attempt == attempt)

    @property
    def archive(self) -> Archive:
        return Archive(open_store(str(self._place.store)), self._run_id)

    def newest(self) -> Manifest:
        return next(iter(self.archive.manifests()))

    def _expect(self, holds: bool, problem: str) -> None:
        if not holds:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise AssertionError(f"run {self._run_id}: {problem}; it printed:\n{tail}")
