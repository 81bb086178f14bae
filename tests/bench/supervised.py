"""One run under `runner run`, as it is seen from outside: started, watched, preempted, killed.

The trainer's diary says when it did what, on the same clock as ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from runner.store import Store, open_store
from tests.bench.bucket import Bucket
from tests.bench.place import REPOSITORY, Place
from tests.waiting import wait_until

_PATIENCE_SECONDS = 120.0
RUNNER = str(Path(sys.executable).with_name("runner"))

Note = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a run does. `steps` 0 is: until it is told to finish; None: as `runner` decides."""

    megabytes: float
    steps: int = 0
    save_every_steps: int | None = None
    snapshot_every_steps: int | None = None
    validate: dict[str, Any] | None = None
    contained: bool = False
    tracking: dict[str, Any] | None = None
    threads: int | None = None
    """That torch computes with; None: as many as there are cores."""


def spare_one() -> int:
    """Threads for a trainer that leaves one processor free, as one does that waits for a GPU."""
    return max(1, (os.cpu_count() or 2) - 1)


class SupervisedRun:
    """A run of `trainer` with a store of its own in a place."""

    def __init__(
        self, place: Place, run_id: str, settings: Settings, bucket: Bucket | None = None
    ) -> None:
        self._place, self.run_id, self._bucket = place, run_id, bucket
        self._settings, self.megabytes = settings, settings.megabytes
        self._diary = place.memory / f"{run_id}.diary"
        self._finish = place.memory / f"{run_id}.finish"
        self._log = place.disk / f"{run_id}.log"
        self._job = place.disk / f"{run_id}.json"
        document = self._document()
        if settings.contained:
            from tests.bench.containing import in_container

            document = in_container(document, place)
        self._job.write_text(json.dumps(document))
        self._process: subprocess.Popen[bytes] | None = None
        self._notes: list[Note] = []
        self._read_bytes = 0

    def _document(self) -> dict[str, Any]:
        """The job file: JSON is YAML too."""
        every, snapshot_every = self._settings.save_every_steps, self._settings.snapshot_every_steps
        validate = self._settings.validate
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
            **self._where,
            "checkpoint": {
                "every": {"minutes": 600} if every is None else {"steps": every},
                "snapshot_every": "auto" if snapshot_every is None else {"steps": snapshot_every},
                **({} if validate is None else {"validate": validate}),
            },
            **({} if self._settings.tracking is None else {"tracking": self._settings.tracking}),
            "env": self._threads,
            "preemption": {"grace": "120s"},
            "restart": {"backoff": {"initial": "1ms", "max": "1ms"}},
            "metrics": {"port": 0},
        }

    @property
    def _threads(self) -> dict[str, str]:
        threads = self._settings.threads
        return {} if threads is None else {"OMP_NUM_THREADS": str(threads)}

    @property
    def _where(self) -> dict[str, Any]:
        if self._bucket is None:
            return {"store": str(self._place.store)}
        return {"store": self._bucket.url, "s3": self._bucket.section}

    @property
    def _store(self) -> Store:
        if self._bucket is None:
            return open_store(str(self._place.store))
        return self._bucket.store()

    # ------------------------------------------------------------------ from outside

    def start(self) -> float:
        """Start a supervisor; the moment just before."""
        command = [RUNNER, "run", str(self._job), "--run-id", self.run_id]
        with self._log.open("ab") as log:
            started = time.monotonic()
            self._process = subprocess.Popen(
                command,
                env=self._place.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # as a service has one
            )
        return started

    @property
    def pid(self) -> int:
        """The supervisor's."""
        return self._running.pid

    @property
    def address(self) -> str:
        """Where the supervisor can be asked, as it said last."""
        found = re.findall(r"http://(\S+)/metrics", self._log.read_text(errors="replace"))
        self._expect(bool(found), "it says of no endpoint")
        return str(found[-1])

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "no supervisor has been started"
        return self._process

    def preempt(self) -> tuple[float, float]:
        """SIGTERM; seconds until the checkpoint's rename, and until the exit with 75.

        The time of the rename is asked for afterwards: nothing looks while it is measured.
        """
        wall, exited = time.time(), self.end()
        return self.checkpoint_path(self.newest()).stat().st_ctime - wall, exited

    def end(self) -> float:
        """SIGTERM; seconds until the exit with 75."""
        sent = time.monotonic()
        self._running.send_signal(signal.SIGTERM)
        code = self._running.wait(_PATIENCE_SECONDS)
        exited = time.monotonic() - sent
        self._expect(code == 75, f"exit code {code} instead of 75")
        return exited

    def kill_trainer(self, phase: float = 0.0) -> float:
        """SIGKILL to the trainer alone; the moment just before.

        That is so far into a step, from 0, right after the one before, to 1; its snapshot counts.
        """
        before, newest = self.steps()[-2:]
        time.sleep(phase * (newest["begun"] - before["begun"]))
        killed = time.monotonic()
        os.kill(self.steps()[-1]["pid"], signal.SIGKILL)
        return killed

    def kill_tree(self, phase: float = 0.0) -> float:
        """The same for supervisor and trainer, which are both gone afterwards."""
        before, newest = self.steps()[-2:]
        time.sleep(phase * (newest["begun"] - before["begun"]))
        trainer = newest["pid"]
        killed = time.monotonic()
        self._running.kill()
        os.kill(trainer, signal.SIGKILL)
        self._running.wait(_PATIENCE_SECONDS)
        os.waitpid(trainer, 0)  # ours by now: we are a child subreaper
        return killed

    def finish(self) -> tuple[str, int]:
        """Let it come to its end; the digest that the trainer ended with, and its last step."""
        self._finish.touch()
        self.wait()
        note = self.notes("digest")[-1]
        return note["digest"], note["step"]

    def wait(self) -> None:
        """Wait until the run has ended well."""
        code = self._running.wait(_PATIENCE_SECONDS)
        self._expect(code == 0, f"exit code {code} instead of 0")

    def close(self) -> None:
        """End it in any case; what it stored goes with the place."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, IndexError):
                self.kill_tree()
            self._process.kill()
            self._process.wait()

    # ------------------------------------------------------------------ what it did

    def notes(self, kind: str) -> list[Note]:
        """What the trainers noted, in order. Only what is new is read: this is asked often."""
        with contextlib.suppress(FileNotFoundError), self._diary.open("rb") as diary:
            diary.seek(self._read_bytes)
            whole, _, _ = diary.read().rpartition(b"\n")
            if whole:
                self._read_bytes += len(whole) + 1
                self._notes += [json.loads(line) for line in whole.split(b"\n")]
        return [note for note in self._notes if note["kind"] == kind]

    def steps(self) -> list[Note]:
        return self.notes("step")

    def wait_for_steps(self, count: int, *, attempt: int, beyond: int = 0) -> list[Note]:
        """Wait until an attempt has finished so many steps beyond a step; give those."""

        def enough() -> list[Note]:
            self._expect(self._running.poll() is None, "the supervisor has ended")
            done = [n for n in self.steps() if n["attempt"] == attempt and n["step"] > beyond]
            return done if len(done) >= count else []

        return wait_until(enough, _PATIENCE_SECONDS, f"{count} steps of attempt {attempt}")

    def record(self, attempt: int) -> AttemptRecord:
        """What the supervisor wrote down about an attempt."""
        records = Ledger(self._store, self.run_id, "").records()
        return next(record for record in records if record.attempt == attempt)

    @property
    def archive(self) -> Archive:
        return Archive(self._store, self.run_id)

    def newest(self) -> Manifest:
        return next(iter(self.archive.manifests()))

    def checkpoint_path(self, manifest: Manifest) -> Path:
        return self._place.store / self.run_id / "checkpoints" / manifest.name

    def _expect(self, holds: bool, problem: str) -> None:
        if not holds:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise AssertionError(f"run {self.run_id}: {problem}; it printed:\n{tail}")


def warm_up(place: Place) -> None:
    """Have everything compiled and read from the disk once, before anything is measured."""
    run = SupervisedRun(place, "warm-up", Settings(1, steps=2, save_every_steps=1))
    try:
        run.start()
        run.wait()
    finally:
        run.close()
    place.clear()
