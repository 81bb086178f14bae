"""Keeps a line for each checkpoint that became durable: on this node, and with the run.

    $RUNNER_HOME/metrics/<run>-<hash>/000012-000000000000.saves      see `logs.files`
    <run>/metrics/000012-000000000000-000000004096.saves             in the store

Retention deletes checkpoints; when they were made, and how long that took, is not forgotten.
"""

from __future__ import annotations

from pathlib import Path

from runner.checkpoint.logs import StoredLogs
from runner.logs.files import LocalLogs, LogLimits, LogWriter
from runner.logs.sink import Patience, Sink
from runner.saves import SaveRecord
from runner.store import Store
from runner.supervisor.shipping import Shipment

_SUFFIX = ".saves"
_LIMITS = LogLimits(max_bytes=16 << 20, files=16)  # some 60,000 of them
_BUFFER_BYTES = 1 << 20
_PATIENCE = Patience(seconds=0.0, share=0.0)
_FLUSH_SECONDS = 1.0


def stored_saves(store: Store, run_id: str) -> StoredLogs:
    """What a store has of them."""
    return StoredLogs(store, run_id, "metrics", _SUFFIX)


def local_saves(folder: Path) -> LocalLogs:
    """What this node has of them."""
    return LocalLogs(folder, _SUFFIX)


class SaveLog:
    """One for a supervisor's life: `begin` for each attempt, `note`, and `finish` once."""

    def __init__(self, folder: Path, stored: StoredLogs) -> None:
        self._attempt = 0
        self._writer = LogWriter(folder, _LIMITS, _SUFFIX, "what is known of the saves")
        self._sink = Sink(
            "saves",
            self._writer.write,
            lambda nbytes: b"",
            capacity_bytes=_BUFFER_BYTES,
            patience=_PATIENCE,
        )
        self.shipment = Shipment(local_saves(folder), stored, _LIMITS.max_bytes)

    def begin(self, attempt: int) -> None:
        """What comes from here on goes into this attempt's files."""
        self._attempt = attempt

    def note(self, record: SaveRecord) -> None:
        self._sink.offer(self._attempt, record.to_line())

    def finish(self) -> None:
        """Write what is left."""
        if self._sink.close(_FLUSH_SECONDS):
            self._writer.close()
