"""What a trainer's signs of life say since the last look: as events, for the loop."""

from __future__ import annotations

from collections.abc import Callable

from runner.board import Board
from runner.supervisor.events import Event, Overslept, Progressed, Unhealthy, Worked
from runner.supervisor.hangs import STARTING_UP

_OVERSLEPT_SECONDS = 5.0  # between two looks: this process was frozen, or had to wait for long
_CPU_ROUND_SECONDS = 5.0  # between two looks at the CPU, or less if the job's limit is short
_BUSY_SHARE = 0.1  # of one CPU


class Vitals:
    """Looks at the board, and while a script has not begun its loop at the use of the CPU."""

    def __init__(self, patience_steps: int, hang_timeout_seconds: float) -> None:
        self._patience_steps = patience_steps
        self._cpu_round_seconds = min(_CPU_ROUND_SECONDS, hang_timeout_seconds / 4)
        self.attempt_begins()

    def attempt_begins(self) -> None:
        """Nothing that was seen before counts."""
        self._seen: tuple[int, str] | None = None
        self._told_sick_since = 0
        self._looked_at: float | None = None
        self._cpu_looked_at: float | None = None
        self._cpu_seconds = 0.0

    def look(
        self, now: float, board: Board | None, cpu_seconds: Callable[[], float]
    ) -> list[Event]:
        """What has changed. `cpu_seconds` tells what the trainer has used of the CPU so far."""
        found: list[Event] = []
        before, self._looked_at = self._looked_at, now
        if before is not None and now - before > _OVERSLEPT_SECONDS:
            found.append(Overslept(now, now - before))
        if board is None:
            return found
        seen = board.progress, board.phase
        if seen != self._seen:
            self._seen = seen
            found.append(Progressed(now, seen[1], board.step))
        since, steps = board.sick_since, board.sick_steps
        if since == 0:
            self._told_sick_since = 0
        elif steps >= self._patience_steps and since != self._told_sick_since:
            self._told_sick_since = since
            found.append(Unhealthy(now, since - 1, steps))
        if seen[1] in STARTING_UP and self._has_worked(now, cpu_seconds):
            found.append(Worked(now))
        return found

    def _has_worked(self, now: float, cpu_seconds: Callable[[], float]) -> bool:
        begun = self._cpu_looked_at
        if begun is not None and now - begun < self._cpu_round_seconds:
            return False
        self._cpu_looked_at = now
        before, self._cpu_seconds = self._cpu_seconds, cpu_seconds()
        return begun is not None and self._cpu_seconds - before >= _BUSY_SHARE * (now - begun)
