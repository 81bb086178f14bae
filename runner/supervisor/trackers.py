"""The supervisor's side of tracking: a process for each tracker, which is told that there is news.

Nothing here waits but the end, and that not for long. What a tracker has not got by then is sent by
the next supervisor of the run, or by `runner track`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from runner.errors import UsageError
from runner.job import Tracking, is_s3, missing_tracker
from runner.store import S3Options
from runner.supervisor import index
from runner.supervisor.lookup import KnownRun
from runner.tracking.sender import Errand

log = logging.getLogger(__name__)

_LEAST_SECONDS = 0.2
_CATCHING_UP_SECONDS = 30.0


def errands(
    tracking: Tracking | None, workdir: Path, run_id: str, store: str, options: S3Options
) -> list[Errand]:
    """What is to be done for each tracker of a job."""
    outputs = index.files_of(run_id, store) / "outputs"
    return [
        Errand(
            tracker=name,
            store=store,
            run_id=run_id,
            points=str(index.metrics_of(run_id, store)),
            folder=str(outputs / name if _writes_files(tracking, name) else _folder(run_id, store)),
            workdir=str(workdir),
            settings=getattr(tracking, name).model_dump(mode="json", exclude_none=True),
            options=asdict(options) if is_s3(store) else None,
        )
        for name in (() if tracking is None else tracking.chosen)
    ]


def catch_up(run: KnownRun, options: S3Options) -> bool:
    """Send what the trackers of a run have not got; whether they have it all now.

    UsageError if the run is live here, or has no trackers.
    """
    job = (run.ledger.run() or {}).get("job") or {}
    if run.is_live():
        raise UsageError(f"run {run.run_id} is live on this machine, and sends by itself")
    if not job.get("tracking"):
        raise UsageError(f"run {run.run_id} has no section `tracking` in its job")
    tracking = Tracking.model_validate(job["tracking"])
    if problem := missing_tracker(tracking):
        raise UsageError(problem)
    if options == S3Options():  # how the store was found says how it is reached
        known = (entry for entry in index.entries() if entry.store == run.store.url)
        options = next((entry.options for entry in known), options)
    workdir = Path(job["workdir"])
    trackers = Trackers(errands(tracking, workdir, run.run_id, run.store.url, options))
    trackers.start()
    trackers.leave(_CATCHING_UP_SECONDS, 100 * _CATCHING_UP_SECONDS)
    return trackers.close()


def _folder(run_id: str, store: str) -> Path:
    metrics = index.metrics_of(run_id, store)
    return metrics.parent.with_name("tracking") / metrics.name


def _writes_files(tracking: Tracking | None, name: str) -> bool:
    """Whether it leaves files that belong to the run: they are stored with its own."""
    return getattr(getattr(tracking, name), "mode", None) == "offline"


class Trackers:
    """One for a supervisor's life: `start`, `news` often, `leave` and then `close` in the end."""

    def __init__(self, errands: Sequence[Errand]) -> None:
        self._errands = errands
        self._senders: list[_Sender] = []
        self._has_started = False

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Under which ids the trackers know the run, for a manifest: as far as that is known."""
        ids = {sender.name: sender.id for sender in self._senders if sender.id is not None}
        return {"tracker": ids} if ids else {}

    def start(self) -> None:
        """Start their processes, unless that was done."""
        errands = () if self._has_started else self._errands
        self._has_started = True
        for errand in errands:
            try:
                self._senders.append(_Sender(errand))
            except OSError as error:
                log.warning("%s is told nothing: %s", errand.tracker, error)

    def news(self) -> None:
        """An attempt has begun, or a checkpoint was saved."""
        for sender in self._senders:
            sender.tell(b"\n")

    def leave(self, seconds: float, at_most: float) -> None:
        """Have them send what is left: for so many seconds to a tracker that fails.

        One that is only slow has until `at_most`.
        """
        for sender in self._senders:
            sender.leave(seconds, at_most)

    def close(self) -> bool:
        """Wait for them until then, and no longer; whether everything has been sent."""
        has_all = [sender.close() for sender in self._senders]
        self._senders = []
        return all(has_all)


class _Sender:
    """A process that sends to one tracker."""

    def __init__(self, errand: Errand) -> None:
        self.name = errand.tracker
        self.id: str | None = None
        self._has_all = False
        self._until = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runner.tracking.sender"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=errand.workdir,
            process_group=0,  # a Ctrl-C is for the supervisor alone; its session says whose it is
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin: IO[bytes] = self._process.stdin
        with contextlib.suppress(OSError):
            self._stdin.write(errand.to_line())
        os.set_blocking(self._stdin.fileno(), False)
        self._listener = threading.Thread(
            target=self._listen, args=(self._process.stdout,), name=self.name, daemon=True
        )
        self._listener.start()

    def tell(self, line: bytes) -> None:
        with contextlib.suppress(OSError):  # it is busy with what it was told, or has ended
            self._stdin.write(line)

    def leave(self, seconds: float, at_most: float) -> None:
        self._until = time.monotonic() + at_most
        self.tell(f"{seconds:.1f}\n".encode())
        with contextlib.suppress(OSError):
            self._stdin.close()

    def close(self) -> bool:
        try:
            left = max(_LEAST_SECONDS, self._until - time.monotonic())
            self._process.wait(left)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(_LEAST_SECONDS)
        if not self._has_all:
            log.warning("%s has not got everything; `runner track` sends the rest", self.name)
        return self._has_all

    def _listen(self, lines: IO[bytes]) -> None:
        with lines:
            for line in lines:
                with contextlib.suppress(ValueError, KeyError):
                    self._hear(json.loads(line))

    def _hear(self, message: Mapping[str, Any]) -> None:
        if "id" in message:
            self.id = message["id"]
        if "warn" in message:
            log.warning("%s %s", self.name, message["warn"])
        if "info" in message:
            log.info("%s %s", self.name, message["info"])
        if "done" in message:
            self._has_all = True
