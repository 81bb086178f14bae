"""What an attempt comes to, as its record in the store has it: how far, since when, by what end."""

from __future__ import annotations

import logging
import os
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from runner.board import Board
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.keeper import is_foreign
from runner.spool import RankSpool
from runner.supervisor import events
from runner.supervisor.clerk import Clerk
from runner.supervisor.monitor import Monitor
from runner.wallclock import utc_now

log = logging.getLogger(__name__)


class Recorder:
    """Has the clerk write it down. It looks at the board, and at what the monitor has counted."""

    def __init__(self, clerk: Clerk, rank: RankSpool, monitor: Monitor, ledger: Ledger) -> None:
        self._clerk, self._rank, self._monitor, self._ledger = clerk, rank, monitor, ledger
        self._first_step_seen = False
        self._last_saved_at: float | None = None
        self._closed_attempt = 0

    def begin(self) -> None:
        """Another trainer is about to start."""
        self._first_step_seen = False

    def look(self) -> None:
        """Leave a sign of life on the board; write down the first step, and from time to time."""
        board = self._clerk.board
        if board is None:
            return
        board.supervisor_pid, board.supervisor_ns = os.getpid(), time.monotonic_ns()
        if not self._first_step_seen and board.first_step_ns:
            self._first_step_seen = True
            self._clerk.record(
                first_step_at=_wall_clock(board.first_step_ns / 1e9),
                expected_steps=board.expected_steps or None,
                **self._monitor.facts(),
            )
        elif self._monitor.is_time_to_write(time.monotonic()):
            self._clerk.record(**self._monitor.facts())

    def saved(self, at: float) -> None:
        """The newest state is durable since this moment of the monotonic clock."""
        self._last_saved_at = max(at, self._last_saved_at or at)

    def exited(self, code: int, verdict: tuple[str, str] | None) -> events.Exited:
        """The trainer has ended with this code; `verdict` has the cause, where that is known."""
        board = self._clerk.board
        step = 0 if board is None else board.step
        facts = self._monitor.facts()
        self._clerk.record(
            exit_code=code, end_step=self._reached(board), ended_at=utc_now(), **facts
        )
        if code == 0 and board is not None and board.restored and not board.finished:
            log.warning(
                "the script ended before its loop over %s did: what is saved is the newest "
                "snapshot; end early with run.stop(reason) to save the last state",
                "epochs" if board.epochs else "batches",
            )
        left = [*self._rank.complete(), *self._rank.claimed()]
        steps = [int(marker.moment["step"]) for marker in left if not is_foreign(marker)]
        newest = max(steps, default=-1)
        cause, explanation = verdict or ("", "")
        if cause:
            log.error("%s", explanation)
        obeyed = board is not None and 0 < board.request_number == board.answered
        return events.Exited(time.monotonic(), code, obeyed, newest, step, cause)

    @property
    def is_open(self) -> bool:
        """False if the attempt is closed: it failed, and now the next one is being prepared."""
        return self._closed_attempt != self._ledger.attempt

    def close(self, outcome: str, cause: str, notice_at: float | None) -> None:
        """The attempt is over. A notice that came at this moment was answered by what was saved."""
        self._closed_attempt = self._ledger.attempt
        board = self._clerk.board
        changes: dict[str, Any] = {"outcome": outcome, "cause": cause, "ended_at": utc_now()}
        if board is not None:
            changes["end_step"] = self._reached(board)
            if board.first_step_ns:
                changes["first_step_at"] = _wall_clock(board.first_step_ns / 1e9)
        durable = self._last_saved_at
        if notice_at is not None and durable is not None and durable >= notice_at:
            changes["notice_to_durable_seconds"] = durable - notice_at
        self._clerk.record(**changes, **self._monitor.facts(ended=True))

    def _reached(self, board: Board | None) -> int:
        """The last finished step; where it began, for a trainer that has not restored its state."""
        began = 0 if self._ledger.record is None else self._ledger.record.start_step
        return began if board is None else max(board.step, began)


def _wall_clock(monotonic_seconds: float) -> str:
    """The time of day of a moment on the monotonic clock."""
    ago = time.monotonic() - monotonic_seconds
    return (datetime.now(UTC) - timedelta(seconds=ago)).isoformat()
