"""What is looked up when somebody asks: the board, the spool, the trainer's memory and values."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.board import Board
from runner.checkpoint.attempts import Ledger
from runner.histogram import BUCKETS
from runner.job import Job
from runner.spending import read
from runner.supervisor.footprint import memory_bytes
from runner.supervisor.state import Phase, State
from runner.supervisor.tally import Tally
from runner.wallclock import parse_time

_LONGEST_NAME = 100
_HISTOGRAMS = {"stalls": "runner_checkpoint_stall_seconds", "steps": "runner_step_seconds"}


@dataclass(frozen=True)
class Sight:
    """What can be seen of a supervisor: its board, if there is one, its ledger and spool.

    `pid_here` is what this machine calls a process of the trainer, and belongs into the loop's
    thread; `newest` is the last value of each name that the script has logged.
    """

    board: Callable[[], Board | None]
    ledger: Ledger
    spool: Path
    pid_here: Callable[[int], int | None] = lambda pid: None
    newest: Callable[[], Mapping[str, float]] = dict


@dataclass
class _Taken:
    """What of a board's histograms has been counted already, and what else was noted of it."""

    board: Board | None = None
    counts: dict[str, list[int]] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    is_restored: bool = False


class Gauges:
    """Writes into a tally what it sees."""

    def __init__(self, tally: Tally, job: Job, sight: Sight) -> None:
        self._tally, self._job, self._sight = tally, job, sight
        self._taken = _Taken()
        self._lock = threading.Lock()
        self._begun_at = time.monotonic()
        self._attached = 0
        self._pid: int | None = None  # what this machine calls the process that has attached

    def attempt_begins(self, at: float) -> None:
        """With a new board; what the one before has counted is taken over for the last time."""
        self.look()
        self._begun_at = at
        self._attached, self._pid = 0, None

    def moved(self, at: float) -> None:
        """The trainer has moved: the first time that its state is in place, that is counted."""
        board, taken = self._sight.board(), self._taken
        if board is not None and board.pid != self._attached:
            self._attached = board.pid
            self._pid = self._sight.pid_here(board.pid)
        if board is None or board is not taken.board or taken.is_restored or not board.restored:
            return
        taken.is_restored = True
        if board.restore_us and board.step:
            self._tally.observe("runner_restore_seconds", board.restore_us / 1e6, ("load",))
            self._tally.observe("runner_restore_seconds", at - self._begun_at, ("total",))

    def look(self) -> None:
        """Count what the trainer has counted since the last look."""
        with self._lock:
            board = self._sight.board()
            if self._taken.board is not None:
                self._take(self._taken.board)
            if board is not self._taken.board:
                self._taken = _Taken(board)
                if board is not None:
                    self._take(board)

    def _take(self, board: Board) -> None:
        taken = self._taken
        for kind, name in _HISTOGRAMS.items():
            counts, total = getattr(board, kind).read()
            before = taken.counts.get(kind, [0] * BUCKETS)
            new = [max(0, now - then) for now, then in zip(counts, before, strict=True)]
            self._tally.observe_many(name, new, max(0.0, total - taken.sums.get(kind, 0.0)))
            taken.counts[kind], taken.sums[kind] = counts, total

    def show(self, state: State) -> None:
        """Say what is so now."""
        tally, board, record = self._tally, self._sight.board(), self._sight.ledger.record
        tally.set_all("runner_phase", {(each.value,): each is state.phase for each in Phase})
        tally.set("runner_grace_seconds", state.policy.grace_seconds)
        tally.set("runner_failures_without_progress", state.failures)
        tally.set("runner_failures_limit", state.policy.failures)
        if record is not None:
            tally.set("runner_attempt", record.attempt)
            begun = parse_time(record.started_at)
            tally.set("runner_attempt_start_timestamp_seconds", begun)
        if board is not None:
            tally.set("runner_step", board.step)
            tally.set("runner_epoch", board.epoch)
            tally.set("runner_epochs", board.epochs or None)
            tally.set("runner_checkpoint_interval_seconds", self._interval_seconds(board))
        newest = dict(self._sight.newest())
        tally.set_all(
            "runner_train_metric",
            {(name[:_LONGEST_NAME],): value for name, value in newest.items()},
        )
        used = 0 if self._pid is None else memory_bytes(self._pid)
        tally.set("runner_trainer_memory_bytes", used or None)
        self._show_spool()

    def _show_spool(self) -> None:
        try:
            found = os.statvfs(self._sight.spool)
        except OSError:  # it is gone: the run is over
            return
        self._tally.set("runner_spool_size_bytes", found.f_blocks * found.f_frsize)
        self._tally.set("runner_spool_free_bytes", found.f_bavail * found.f_frsize)

    def _interval_seconds(self, board: Board) -> float | None:
        """Between two saves, as far as it can be told: the shortest of what the job file names."""
        every = self._job.checkpoint.every
        if every is None:
            return board.interval_ms / 1e3 or None
        intervals = []
        if every.minutes is not None:
            intervals.append(60 * every.minutes)
        counts, total = board.steps.read()
        if every.steps is not None and any(counts):
            spent = read(board).closed
            trained = total + spent["stall"]
            intervals.append(every.steps * trained / sum(counts))
        if every.epochs is not None and board.epoch and board.step and any(counts):
            seconds_a_step = sum(read(board).closed.values()) / sum(counts)
            intervals.append(every.epochs * seconds_a_step * board.step / board.epoch)
        return min(intervals, default=None)

    def status(self) -> dict[str, Any]:
        """What the board says, as plain JSON."""
        board = self._sight.board()
        newest = {
            name: value if math.isfinite(value) else str(value)
            for name, value in dict(self._sight.newest()).items()
        }
        return {
            "step": 0 if board is None else board.step,
            "epoch": None if board is None else board.epoch,
            "epochs": None if board is None else board.epochs or None,
            "batch": None if board is None else board.batch,
            "activity": None if board is None else board.phase,
            "values": newest,
        }
