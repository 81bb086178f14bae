"""What the time of one attempt went into, while it runs and when it is over. Pure.

    claim ──── attach ─────────────────────────────── notice ───────────── end
    startup    what the trainer says on the board     the same, and the rest is draining

The trainer's accounts cover all of its time from `attach` on, up to the stretch that is open. What
they cannot tell is added here: what was before, what became of an open stretch when the trainer
died in it, and how long it hung. The parts always add up to the attempt. Times are seconds of the
monotonic clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from runner.board import Account, Board

PRODUCTIVE = "productive"
_TRIES = 100

_KIND = {
    Account.STARTUP: "startup",
    Account.RESTORE: "restore",
    Account.PRODUCTIVE: PRODUCTIVE,
    Account.STALL: "stall",
    Account.VALIDATION: "validation",
}


@dataclass(frozen=True)
class Reading:
    """The trainer's accounts at one moment: closed sums by kind, and the stretch that is open.

    `open_since` is None before `attach`.
    """

    closed: Mapping[str, float]
    open_kind: str = "startup"
    open_since: float | None = None


NOTHING = Reading({})


def read(board: Board | None) -> Reading:
    """Read the accounts of a board; none before there is one."""
    if board is None:
        return NOTHING
    for _ in range(_TRIES):
        since = board.account_ns
        reading = Reading(
            {kind: getattr(board, account.word) / 1e6 for account, kind in _KIND.items()},
            _KIND[Account(board.account)],
            since / 1e9,
        )
        if since and board.account_ns == since:
            return reading
    return replace(reading, open_since=None)  # not attached, or killed between two words


@dataclass(frozen=True)
class Attempt:
    """When an attempt began, and what has befallen it: when it was asked to end, and since when it
    has not moved, if it was ended for that. `at_notice` are its accounts when it was asked."""

    begun: float
    noticed: float | None = None
    at_notice: Mapping[str, float] | None = None
    stuck_since: float | None = None

    def asked_to_end(self, at: float, reading: Reading) -> Attempt:
        """A notice, an interrupt, or its own end. Only the first counts."""
        if self.noticed is not None:
            return self
        return replace(self, noticed=at, at_notice=so_far(self, reading, at))

    def hangs(self, since: float) -> Attempt:
        """It is ended because it has not moved since then."""
        return replace(self, stuck_since=max(self.begun, since))


def so_far(attempt: Attempt, reading: Reading, now: float) -> dict[str, float]:
    """What the time from the attempt's begin until now went into, the open stretch included."""
    spent = dict(reading.closed)
    if reading.open_since is not None:
        _add(spent, reading.open_kind, now - reading.open_since)
    return _with_rest(spent, "startup", now - attempt.begun)


def in_all(attempt: Attempt, reading: Reading, end: float) -> dict[str, float]:
    """The same for an attempt whose trainer is gone, or is still being ended."""
    if attempt.stuck_since is not None:
        return _until(attempt, reading, end, attempt.stuck_since, "hang")
    if attempt.noticed is not None:
        assert attempt.at_notice is not None
        return _drained(attempt, reading, end)
    return _until(attempt, reading, end, end, "hang")


def _until(
    attempt: Attempt, reading: Reading, end: float, moved: float, after: str
) -> dict[str, float]:
    """A trainer that died, after it had not moved for a while: the step at hand is lost."""
    spent = dict(reading.closed)
    if reading.open_since is not None:
        kind = "lost_steps" if reading.open_kind == PRODUCTIVE else reading.open_kind
        _add(spent, kind, moved - reading.open_since)
    spent = _with_rest(spent, "startup", moved - attempt.begun)
    _add(spent, after, end - moved)
    return spent


def _drained(attempt: Attempt, reading: Reading, end: float) -> dict[str, float]:
    """What the trainer still did after the notice counts as what it was; the rest is draining."""
    assert attempt.noticed is not None
    assert attempt.at_notice is not None
    spent = dict(attempt.at_notice)
    for kind, seconds in reading.closed.items():
        more = seconds - spent.get(kind, 0.0)
        if more < 0 and kind == PRODUCTIVE:  # a step was open at the notice, and never ended
            _add(spent, "lost_steps", -more)
            spent[kind] = seconds
        elif more > 0 and kind != "startup":
            spent[kind] = seconds
    return _with_rest(spent, "draining", end - attempt.begun)


def _with_rest(spent: dict[str, float], kind: str, seconds: float) -> dict[str, float]:
    """Fill up to so many seconds; what is too much by a clock's grain is taken off the largest."""
    rest = seconds - sum(spent.values())
    if rest >= 0:
        _add(spent, kind, rest)
    elif spent:
        largest = max(spent, key=lambda each: spent[each])
        spent[largest] = max(0.0, spent[largest] + rest)
    return spent


def _add(spent: dict[str, float], kind: str, seconds: float) -> None:
    spent[kind] = spent.get(kind, 0.0) + max(0.0, seconds)


class Meter:
    """Keeps an attempt's spending in step with the supervisor's loop; asked from any thread."""

    def __init__(self, board: Callable[[], Board | None]) -> None:
        self._board = board
        self._attempt: Attempt | None = None
        self._ended: dict[str, float] | None = None

    def begin(self, at: float) -> None:
        """An attempt begins, with a new board."""
        self._attempt, self._ended = Attempt(at), None

    def asked_to_end(self, at: float) -> None:
        if self._attempt is not None:
            self._attempt = self._attempt.asked_to_end(at, read(self._board()))

    def hangs(self, since: float) -> None:
        if self._attempt is not None:
            self._attempt = self._attempt.hangs(since)

    def end(self, at: float) -> dict[str, float]:
        """The attempt is over: what it was spent on."""
        if self._attempt is None:
            return {}
        self._ended = in_all(self._attempt, read(self._board()), at)
        return self._ended

    def now(self) -> dict[str, float]:
        """What it was spent on until now, or until its end; nothing if none has begun."""
        attempt, ended = self._attempt, self._ended
        if attempt is None or ended is not None:
            return ended or {}
        split = so_far if attempt.noticed is None else _drained
        return split(attempt, read(self._board()), time.monotonic())
