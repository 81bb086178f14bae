"""How long a trainer may show no progress before it counts as hung. Pure.

A limit for each thing that it does, learned from the pauses between two signs of progress while it
did that. Until there are enough of them, it is the job's `hang_timeout`: a first compilation or a
long first validation is no hang. A new attempt begins without any, for it compiles anew. A limit
that was learned and has ended an attempt is not believed a second time: if it was too short, that
costs one restart and no more.

Before a script has begun its loop, there is nothing to learn from. There, use of the CPU counts as
a sign of life for a while, since preparing data may take long; later it does not, for a rank that
waits for another one is busy as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

SAMPLES_NEEDED = 50
STARTING_UP = ("", "attached")
IDLE = ("after training",)  # a test after the loop gives no signs of life
START_UP_FACTOR = 6  # times `hang_timeout`: the longest that a busy start may take
_FACTOR = 10
_LEAST_SECONDS = 60.0
_WINDOW = 500
_MOST_ACTIVITIES = 64  # a script may call each of its phases something else


@dataclass(frozen=True)
class Rhythm:
    """Pauses in seconds by activity, newest last, and the activities whose limit was wrong."""

    pauses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    distrusted: frozenset[str] = frozenset()

    def heard(self, activity: str, pause_seconds: float) -> Rhythm:
        """There was progress; it was doing this in the pause before."""
        known = self.pauses.get(activity, ())
        if not known and len(self.pauses) >= _MOST_ACTIVITIES:
            return self
        window = (*known, pause_seconds)[-_WINDOW:]
        return replace(self, pauses={**self.pauses, activity: window})

    def anew(self) -> Rhythm:
        """For the next attempt."""
        return Rhythm(distrusted=self.distrusted)

    def ended(self, activity: str) -> Rhythm:
        """A limit has ended an attempt: it will not be a learned one again for this activity."""
        return replace(self, distrusted=self.distrusted | {activity})

    def limit_seconds(self, activity: str, hang_timeout_seconds: float) -> float | None:
        """The longest pause that is no hang, None where there is no limit."""
        if activity in IDLE:
            return None
        known = self.pauses.get(activity, ())
        if len(known) < SAMPLES_NEEDED or activity in self.distrusted:
            return max(hang_timeout_seconds, _FACTOR * _percentile_99(known))
        least = min(_LEAST_SECONDS, hang_timeout_seconds)
        return max(least, _FACTOR * _percentile_99(known))


def _percentile_99(values: tuple[float, ...]) -> float:
    """By the nearest rank; 0.0 of too few to tell."""
    if len(values) < SAMPLES_NEEDED:
        return 0.0
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]
