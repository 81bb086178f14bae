"""What saving costs, looked at before it matters: the emergency save, and how often to save.

Both are estimates from what this run has measured itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from runner.checkpoint.attempts import AttemptRecord
from runner.wallclock import parse_time

FIRST_MEAN_SECONDS = 3600.0  # between failures, before this run has seen one
FIRST_INTERVAL_SECONDS = 60.0  # until a first save has been measured
_LEAST_INTERVAL_SECONDS = 5.0
_WORTH_SAYING = 1.5


@dataclass(frozen=True)
class EmergencySave:
    """The parts of a save after a notice, in seconds."""

    step_seconds: float
    snapshot_seconds: float
    persist_seconds: float

    @property
    def total_seconds(self) -> float:
        """From the notice until the state is durable: the step at hand, the copy, the store."""
        return self.step_seconds + self.snapshot_seconds + self.persist_seconds

    def verdict(self, grace_seconds: float) -> tuple[bool, str]:
        """Whether it fits into the grace, and the sentence that says so with its numbers."""
        parts = (
            f"step {self.step_seconds:.2f} s + snapshot {self.snapshot_seconds:.2f} s + "
            f"store {self.persist_seconds:.2f} s = {self.total_seconds:.2f} s "
            f"of {grace_seconds:g} s grace"
        )
        if self.total_seconds <= grace_seconds:
            return True, f"an emergency save fits: {parts}"
        return False, (
            f"an emergency save does NOT fit: {parts}; a preemption will cost the steps since the "
            "last checkpoint. Save more often, use a faster store, or a longer grace"
        )


def save_interval(save_seconds: float, mean_seconds_between_failures: float) -> float:
    """Seconds between two saves that cost the least in all: sqrt(2 · cost · mean time).

    J. W. Young, "A first order approximation to the optimum checkpoint interval" (1974);
    J. T. Daly, "A higher order estimate of the optimum checkpoint interval" (2006). Never so short
    that saving would not come to an end between two.
    """
    best = math.sqrt(2 * save_seconds * mean_seconds_between_failures)
    return max(_LEAST_INTERVAL_SECONDS, 2 * save_seconds, best)


def mean_time_between_failures(records: Sequence[AttemptRecord]) -> float:
    """Seconds, from the attempts of this run that were ended from outside or failed.

    The time that passed without a failure counts too: all lives divided by the number of deaths.
    """
    lives, deaths = [], 0
    for record in records:
        begun, ended = parse_time(record.started_at), parse_time(record.ended_at)
        if begun is None or ended is None or ended < begun:
            continue
        lives.append(ended - begun)
        deaths += record.outcome in ("preempted", "failed", None)
    if not deaths:
        return max(FIRST_MEAN_SECONDS, sum(lives))
    return sum(lives) / deaths


class Forecaster:
    """Keeps both estimates up to date, and says when they change."""

    def __init__(self, grace_seconds: float, *, chooses_interval: bool) -> None:
        self._grace_seconds, self._chooses_interval = grace_seconds, chooses_interval
        self._mean_seconds = FIRST_MEAN_SECONDS
        self._fits: bool | None = None
        self._save_seconds: float | None = None
        self._said_interval = 0.0

    def attempt_begins(self, records: Sequence[AttemptRecord]) -> None:
        """Learn from the attempts until now how long they live."""
        self._mean_seconds = mean_time_between_failures(records)

    def saved(self, save: EmergencySave) -> str | None:
        """A save has been measured: the verdict, if it is the first or another than before."""
        self._save_seconds = save.snapshot_seconds + save.persist_seconds
        fits, sentence = save.verdict(self._grace_seconds)
        if fits == self._fits:
            return None
        self._fits = fits
        return sentence

    @property
    def fits(self) -> bool:
        """Whether an emergency save fits into the grace, as far as is known."""
        return self._fits is not False

    def interval(self) -> tuple[float, str | None]:
        """Seconds between two saves, and a sentence if it is clearly another than before; 0.0
        where the job file has said when to save."""
        if not self._chooses_interval:
            return 0.0, None
        if self._save_seconds is None:
            return FIRST_INTERVAL_SECONDS, None
        seconds = save_interval(self._save_seconds, self._mean_seconds)
        said = self._said_interval
        if said and 1 / _WORTH_SAYING < seconds / said < _WORTH_SAYING:
            return seconds, None
        self._said_interval = seconds
        return seconds, (
            f"saving every {seconds:.0f} s: a save takes {self._save_seconds:.2f} s, and a failure "
            f"comes every {self._mean_seconds:.0f} s"
        )
