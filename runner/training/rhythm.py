"""How often to save, and how often to copy the state into a slot.

`checkpoint.snapshot_every: auto` keeps the measured stall under one percent of the step time, so
that the loop hardly notices.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from statistics import median

from runner.plan import Interval

log = logging.getLogger(__name__)

_TOLERATED_STALL = 0.01
_SAMPLES = 20
_MIN_SAMPLES = 3
_HYSTERESIS = 1.5


def steps_between(stall_seconds: float, step_seconds: float) -> int:
    """The smallest number of steps between two snapshots that keeps the stall under 1 %."""
    if step_seconds <= 0:
        return 1
    return max(1, math.ceil(stall_seconds / (_TOLERATED_STALL * step_seconds)))


class SaveRhythm:
    """When the next save is due. What is due stays so until it is `saved`."""

    def __init__(self, interval: Interval) -> None:
        self._interval = interval
        self._last = time.monotonic()
        self._is_due = False

    def is_due(
        self, step: int, epoch: int, *, step_end: bool, epoch_end: bool, milliseconds: int = 0
    ) -> bool:
        """Whether it is time, at the end of this step or epoch.

        `milliseconds` is another interval, 0 for none: the one that the supervisor gives.
        """
        since, interval = time.monotonic() - self._last, self._interval
        self._is_due = self._is_due or (
            (interval.minutes is not None and since >= 60 * interval.minutes)
            or (milliseconds > 0 and since >= milliseconds / 1e3)
            or (step_end and _divides(interval.steps, step))
            or (epoch_end and _divides(interval.epochs, epoch))
        )
        return self._is_due

    def saved(self) -> None:
        self._last = time.monotonic()
        self._is_due = False


def _divides(interval: int | None, count: int) -> bool:
    return interval is not None and count % interval == 0


class SnapshotRhythm:
    """When the next snapshot is due. `fixed` steps between two, or None to find out."""

    def __init__(self, fixed: int | None) -> None:
        self._fixed = fixed
        self.steps = fixed or 1
        self._stalls: deque[float] = deque(maxlen=_SAMPLES)
        self._step_times: deque[float] = deque(maxlen=_SAMPLES)
        self._since = 0

    def stepped(self, seconds: float) -> None:
        """A step has ended; how long it took, without the stall of a snapshot."""
        self._since += 1
        self._step_times.append(seconds)

    def is_due(self, *, epoch_end: bool) -> bool:
        """Whether it is time; the end of an epoch is worth one where every step is."""
        return self._since >= self.steps or (epoch_end and self.steps == 1)

    @property
    def is_behind(self) -> bool:
        """Whether steps have been made since the last snapshot."""
        return self._since > 0

    def copied(self, stall_seconds: float) -> None:
        """A snapshot has been taken, and the loop has waited for it for so long."""
        self._since = 0
        if self._fixed is not None:
            return
        self._stalls.append(stall_seconds)
        if len(self._stalls) < _MIN_SAMPLES or len(self._step_times) < _MIN_SAMPLES:
            return
        stall, step = median(self._stalls), median(self._step_times)
        wanted = steps_between(stall, step)
        # Measurements swing: only what is clearly another rhythm is worth a change and a line.
        if not 1 / _HYSTERESIS <= wanted / self.steps <= _HYSTERESIS:
            log.info(
                "a snapshot every %d steps: it stalls the loop for %.1f ms, a step takes %.1f ms",
                wanted,
                1e3 * stall,
                1e3 * step,
            )
            self.steps = wanted
