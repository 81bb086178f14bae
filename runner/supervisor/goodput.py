"""Where the time of a run went, all of it from the first submit on: steps that count, and the rest.

    since ─▶ attempt 1 ──────────────▶ gap ─▶ attempt 2 ──────────▶ … ─▶ until
             startup restore │ steps,         backoff, or
             stalls, validation, …            waiting_for_node

Each attempt's record says what its own time was `spent` on; it adds up to the attempt. What became
of its steps is known from where the attempt after it began: what lies behind was trained for
nothing. Pure: the same function serves `status`, reports, metrics and simulations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from runner.checkpoint.attempts import AttemptRecord
from runner.spending import PRODUCTIVE
from runner.wallclock import parse_time

__all__ = ["BADPUT", "PRODUCTIVE", "Goodput", "goodput_of"]

BADPUT = {
    "stall": "the loop waited for a snapshot",
    "lost_steps": "steps that had to be made again, or were cut off",
    "startup": "until the loop began: processes, libraries, data, models",
    "restore": "waiting for the saved state, and putting it into place",
    "draining": "from a notice, or the script's end, until the attempt was over",
    "backoff": "between a failure and the next start on the same node",
    "waiting_for_node": "no node had the run",
    "hang": "no progress, until that was noticed and the trainer was gone",
    "validation": "between the loops, and in phases that the script has named",
}
LOST_SECONDS = 180.0  # without a word from its supervisor: its node is taken to be gone
_OVER = ("succeeded", "failed", "stopped", "interrupted", "interrupt", "ended", "fenced")


@dataclass(frozen=True)
class Goodput:
    """The split. Times are seconds since the epoch; the parts add up to `wall_seconds`.

    `productive_seconds` went into steps whose outcome is in the newest state, or still may be.
    `resumed_seconds` is what would have been trained again if every start had been one from step
    0. `per_hour` is what an hour of the node costs, if that is known.
    """

    since: float
    until: float
    productive_seconds: float
    badput_seconds: Mapping[str, float]
    lost_steps: int = 0
    resumed_seconds: float = 0.0
    per_hour: float | None = None

    @property
    def wall_seconds(self) -> float:
        return self.until - self.since

    @property
    def ratio(self) -> float:
        """Productive time by all time; 0.0 where no time has passed."""
        return self.productive_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0

    @property
    def node_seconds(self) -> float:
        """For how long there was a node to pay for."""
        return self.wall_seconds - self.badput_seconds["waiting_for_node"]

    def cost(self) -> dict[str, float] | None:
        """The money: spent in all, lost of that, and saved by every start that was none from 0."""
        if self.per_hour is None:
            return None
        rate = self.per_hour / 3600
        return {
            "per_hour": self.per_hour,
            "spent": round(rate * self.node_seconds, 4),
            "lost": round(rate * (self.node_seconds - self.productive_seconds), 4),
            "saved": round(rate * self.resumed_seconds, 4),
        }

    def to_json(self) -> dict[str, Any]:
        """The document that every view shows."""
        return {
            "since": _iso(self.since),
            "until": _iso(self.until),
            "wall_seconds": round(self.wall_seconds, 3),
            "productive_seconds": round(self.productive_seconds, 3),
            "goodput_ratio": round(self.ratio, 4),
            "badput_seconds": {kind: round(self.badput_seconds[kind], 3) for kind in BADPUT},
            "lost_steps": self.lost_steps,
            "resumed_seconds": round(self.resumed_seconds, 3),
            "cost": self.cost(),
        }


@dataclass
class _Sums:
    """What has been added up so far."""

    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys((PRODUCTIVE, *BADPUT), 0))
    lost_steps: int = 0
    resumed_seconds: float = 0.0

    def add(self, kind: str, seconds: float) -> None:
        self.spent[kind] = self.spent.get(kind, 0.0) + max(0.0, seconds)

    def lose(self, productive_seconds: float) -> None:
        """What counted as productive turns out to have been for nothing."""
        lost = min(max(0.0, productive_seconds), self.spent[PRODUCTIVE])
        self.spent[PRODUCTIVE] -= lost
        self.spent["lost_steps"] += lost


def goodput_of(
    records: Sequence[AttemptRecord],
    now: float,
    *,
    submitted_at: float | None = None,
    live: bool = False,
    per_hour: float | None = None,
) -> Goodput:
    """Split the time of a run, as its attempts' records tell it; times in seconds since the epoch.

    `records` are all of the run, oldest first. `submitted_at` is when the run was first submitted,
    by default when its first attempt began. With `live`, `now` is a moment of a supervisor that has
    the run, and the last record says how it is now. Otherwise the run is looked at from outside: it
    lasts until its end, or until it was last heard of, or until `now` if it waits for a node.
    """
    sums = _Sums()
    begun = _begin(records[0]) if records else now
    since = begun if submitted_at is None else min(begun, submitted_at)
    sums.add("startup", begun - since)
    for record, following in pairwise(records):
        end = _add_attempt(sums, record, following)
        gap = "backoff" if record.owner == following.owner else "waiting_for_node"
        sums.add(gap, _begin(following) - end)
        sums.lose(_reached(record, following) - following.resumed_productive_seconds)
        sums.lost_steps += max(0, _end_step(record) - following.start_step)
        first = records[0].resumed_productive_seconds
        sums.resumed_seconds += max(0.0, following.resumed_productive_seconds - first)
    until = _add_last(sums, records[-1], now, live=live) if records else begun
    productive = sums.spent.pop(PRODUCTIVE)
    return Goodput(
        since, until, productive, sums.spent, sums.lost_steps, sums.resumed_seconds, per_hour
    )


def _add_attempt(sums: _Sums, record: AttemptRecord, following: AttemptRecord | None) -> float:
    """Add what an attempt's time went into; when it ended, as far as that is known."""
    begin, spent = _begin(record), _own(record, following)
    for kind, seconds in spent.items():
        sums.add(kind if kind in sums.spent else "startup", seconds)
    counted = sum(spent.values())
    end = parse_time(record.ended_at)
    if end is None:  # its supervisor was killed: it was there at least until then
        return begin + counted
    rest = "lost_steps" if spent[PRODUCTIVE] else "startup"
    sums.add(rest, end - begin - counted)
    return max(end, begin + counted)


def _own(record: AttemptRecord, following: AttemptRecord | None) -> dict[str, float]:
    """What a record says it was spent on.

    A supervisor that was killed has not counted its last seconds. If the next attempt began with
    more than it had counted, so much was made.
    """
    spent = {PRODUCTIVE: 0.0, **record.spent}
    if following is not None and record.outcome is None:
        kept = following.resumed_productive_seconds - record.resumed_productive_seconds
        spent[PRODUCTIVE] = max(spent[PRODUCTIVE], kept)
    return spent


def _add_last(sums: _Sums, record: AttemptRecord, now: float, *, live: bool) -> float:
    """Add the newest attempt, and what comes after it; the moment up to which all is told."""
    end = _add_attempt(sums, record, None)
    if live:
        if record.ended_at is not None:
            sums.add("backoff", now - end)
        return max(now, end)
    if record.outcome in _OVER:
        if record.outcome != "succeeded":
            sums.lose(_reached(record, None) - _saved(record))
            sums.lost_steps += max(0, _end_step(record) - (record.saved_step or record.start_step))
        return end
    if record.ended_at is None and now - end < LOST_SECONDS:
        return end  # as it was when it was last heard of
    sums.add("waiting_for_node", now - end)
    return max(now, end)


def _reached(record: AttemptRecord, following: AttemptRecord | None) -> float:
    """What the state at its end had taken to train."""
    return record.resumed_productive_seconds + _own(record, following)[PRODUCTIVE]


def _saved(record: AttemptRecord) -> float:
    """What the newest state that it left in the store had taken to train."""
    saved = record.saved_productive_seconds
    return record.resumed_productive_seconds if saved is None else saved


def _begin(record: AttemptRecord) -> float:
    return parse_time(record.started_at) or 0.0


def _end_step(record: AttemptRecord) -> int:
    """The last step of an attempt, as far as it is known."""
    if record.end_step is not None:
        return record.end_step
    return max(record.start_step, record.saved_step or 0)


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()
