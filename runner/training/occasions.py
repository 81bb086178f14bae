"""Why a state is to be saved at a boundary: it is time, it is the best so far, it was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from runner.plan import Plan
from runner.training.rhythm import SaveRhythm


@dataclass(frozen=True)
class Boundary:
    """A moment between two steps, by what has ended there. `last` is that of the whole loop."""

    step: int
    epoch: int
    last: bool = False
    step_end: bool = False
    epoch_end: bool = False


class Occasions:
    """Which of them there are at a boundary. `best` has the best values so far, best first."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._saves = SaveRhythm(plan.every)
        self._weights = SaveRhythm(plan.weights_every)
        self._is_asked = False
        self.best: list[float] = []
        self._best_before: list[float] = []

    def ask(self) -> None:
        """Save at the next boundary."""
        self._is_asked = True

    def triggers(
        self, boundary: Boundary, fresh: Callable[[str], float], interval_ms: int
    ) -> set[str]:
        """Why to save all. `fresh` gives a metric that was logged for just this state, or NaN;
        `interval_ms` is the time between two saves that the supervisor has chosen, for a job that
        leaves it that."""
        triggers = set()
        if self._is_due(self._saves, boundary, interval_ms if self._plan.every_auto else 0):
            triggers.add("interval")
        if self._is_best(fresh):
            triggers.add("best")
        if self._is_asked:
            triggers.add("manual")
        if boundary.last:
            triggers.add("final")
        return triggers

    def weights_are_due(self, boundary: Boundary) -> bool:
        """Whether it is time to store weights alone."""
        return self._is_due(self._weights, boundary)

    def saved(self, triggers: Collection[str], *, weights: bool) -> None:
        """All was handed over for these reasons, if there are any; or `weights` alone were."""
        if triggers:
            self._is_asked = False
            self._saves.saved()
        if triggers or weights:
            self._weights.saved()

    def passed_over(self, triggers: Collection[str]) -> None:
        """Nothing was handed over for these reasons, which stay: a later state has to do."""
        if "best" in triggers:
            self.best = self._best_before

    def _is_due(self, rhythm: SaveRhythm, boundary: Boundary, milliseconds: int = 0) -> bool:
        return rhythm.is_due(
            boundary.step,
            boundary.epoch,
            step_end=boundary.step_end,
            epoch_end=boundary.epoch_end,
            milliseconds=milliseconds,
        )

    def _is_best(self, fresh: Callable[[str], float]) -> bool:
        best = self._plan.best
        if best is None:
            return False
        value = fresh(best.metric)  # which may wait for a device
        if not math.isfinite(value):
            return False
        if len(self.best) >= best.count and not best.better(value, self.best[-1]):
            return False
        self._best_before = self.best
        self.best = sorted([*self.best, value], reverse=best.mode == "max")[: best.count]
        return True
