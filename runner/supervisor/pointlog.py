"""Keeps what the scripts of a run log: out of the spool into files, from there into the store.

    $RUNNER_HOME/metrics/<run>-<hash>/000012-000000000000.jsonl      on this node, see `logs.files`
    <run>/metrics/000012-000000000000-000000065536.jsonl             in the store

The files are named after the attempt at hand; whose a line is, it says itself: what a supervisor
that was killed has left in the spool is kept by the next one. A disk that is slow or full costs
points, never time of the run.
"""

from __future__ import annotations

from pathlib import Path

from runner.checkpoint.logs import StoredLogs
from runner.logs.files import LocalLogs, LogLimits, LogWriter
from runner.logs.sink import Patience, Sink
from runner.points import PointReader, points_of
from runner.store import Store
from runner.supervisor.shipping import Shipment

SUFFIX = ".jsonl"
_LIMITS = LogLimits(max_bytes=256 << 20, files=16)
_BUFFER_BYTES = 16 << 20
_PATIENCE = Patience(seconds=0.0, share=0.0)
_FLUSH_SECONDS = 1.0
_MOST_NAMES = 100


def stored_points(store: Store, run_id: str) -> StoredLogs:
    """What a store has of a run's points."""
    return StoredLogs(store, run_id, "metrics", SUFFIX)


def local_points(folder: Path) -> LocalLogs:
    """What this node has of them."""
    return LocalLogs(folder, SUFFIX)


class PointLog:
    """One for a supervisor's life: `begin` for each attempt, `look` often, `finish` once.

    `spool` is the rank's folder. `newest` has the last value of each name that was logged.
    """

    def __init__(self, spool: Path, folder: Path, stored: StoredLogs) -> None:
        self._reader, self._attempt = PointReader(spool), 0
        self._writer = LogWriter(folder, _LIMITS, SUFFIX, "what the script logs")
        self._sink = Sink(
            "points",
            self._writer.write,
            lambda nbytes: b"",
            capacity_bytes=_BUFFER_BYTES,
            patience=_PATIENCE,
        )
        self.shipment = Shipment(local_points(folder), stored, _LIMITS.max_bytes)
        self.newest: dict[str, float] = {}

    def begin(self, attempt: int) -> None:
        """What comes from here on goes into this attempt's files."""
        self._attempt = attempt
        self.look()

    def look(self) -> None:
        """Take what is new."""
        if not self._attempt:
            return
        block = self._reader.take()
        if not block:
            return
        self._sink.offer(self._attempt, block)
        for point in points_of(block):
            for name, value in point.values.items():
                if name in self.newest or len(self.newest) < _MOST_NAMES:
                    self.newest[name] = value

    def finish(self) -> None:
        """Take what is left, and write it."""
        self.look()
        if self._sink.close(_FLUSH_SECONDS):
            self._writer.close()
