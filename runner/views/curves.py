"""The values that a run has logged, thinned to what an eye can tell apart, in bounded memory.

A run of a year logs millions of values. For each metric and attempt a few hundred stretches of
steps are kept, each with its smallest, its largest and its last value, so that no spike and no gap
is smoothed away. A stretch is one step until there are too many.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from runner.points import Point

_MOST_STRETCHES = 400  # of one metric in one attempt
_MOST_METRICS = 64
_MOST_READINGS = 3000  # of one metric over all attempts


class Reading(NamedTuple):
    """One value of one metric."""

    step: int
    value: float


@dataclass
class _Stretch:
    """What is remembered of the readings between two steps."""

    last: Reading
    smallest: Reading
    largest: Reading

    def take(self, other: _Stretch) -> None:
        self.last = max(self.last, other.last, key=lambda reading: reading.step)
        self.smallest = min(self.smallest, other.smallest, key=lambda reading: reading.value)
        self.largest = max(self.largest, other.largest, key=lambda reading: reading.value)

    def readings(self) -> list[Reading]:
        return sorted({self.smallest, self.largest, self.last})


@dataclass
class _Trace:
    """The readings of one metric in one attempt."""

    width: int = 1
    stretches: dict[int, _Stretch] = field(default_factory=dict)
    odd: dict[int, Reading] = field(default_factory=dict)

    def take(self, reading: Reading) -> None:
        place = reading.step // self.width
        if not math.isfinite(reading.value):
            self.odd[place] = reading
        elif place not in self.stretches or self.width == 1:
            self.stretches[place] = _Stretch(reading, reading, reading)
        else:
            self.stretches[place].take(_Stretch(reading, reading, reading))
        if len(self.stretches) > _MOST_STRETCHES:
            self.coarsen()

    def coarsen(self) -> None:
        """Make each stretch twice as long."""
        self.width *= 2
        before, self.stretches = self.stretches, {}
        for place, stretch in before.items():
            if place // 2 in self.stretches:
                self.stretches[place // 2].take(stretch)
            else:
                self.stretches[place // 2] = stretch
        self.odd = {place // 2: reading for place, reading in self.odd.items()}

    def readings(self) -> list[Reading]:
        found = [r for stretch in self.stretches.values() for r in stretch.readings()]
        return sorted([*found, *self.odd.values()], key=lambda reading: reading.step)


class Curves:
    """Takes points in as they come; `attempt_of_last` and `newest` are of the last ones."""

    def __init__(self) -> None:
        self._traces: dict[str, dict[int, _Trace]] = {}
        self.newest: dict[str, float] = {}
        self.last: dict[int, Point] = {}
        """The last point of each attempt: how far it came, and when."""

    def take(self, points: Iterable[Point]) -> None:
        for point in points:
            before = self.last.get(point.attempt)
            if before is None or point.time >= before.time:
                self.last[point.attempt] = point
            for name, value in point.values.items():
                if name not in self._traces and len(self._traces) >= _MOST_METRICS:
                    continue
                self.newest[name] = value
                traces = self._traces.setdefault(name, {})
                trace = traces.setdefault(point.attempt, _Trace())
                trace.take(Reading(point.step, value))

    def traces(self) -> Iterator[tuple[str, Mapping[int, list[Reading]]]]:
        """The readings of each metric by attempt, those of losses first."""
        for name in sorted(self._traces, key=lambda name: ("loss" not in name.lower(), name)):
            traces = self._traces[name]
            while sum(len(trace.stretches) for trace in traces.values()) * 3 > _MOST_READINGS:
                if all(len(trace.stretches) < 2 for trace in traces.values()):
                    break
                for trace in traces.values():
                    trace.coarsen()
            yield name, {attempt: traces[attempt].readings() for attempt in sorted(traces)}


def kept_until(begun: Mapping[int, int], attempts: Iterable[int]) -> dict[int, float]:
    """Up to which step each attempt's way was kept: where the first later one has begun.

    `begun` has the first step of those attempts that have trained; others have overtaken nothing.
    """
    bounds: dict[int, float] = {}
    bound = math.inf
    for attempt in sorted({*attempts, *begun}, reverse=True):
        bounds[attempt] = bound
        bound = min(bound, begun.get(attempt, math.inf))
    return bounds
