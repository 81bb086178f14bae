"""What a run has logged, read back from this machine and the store, across all attempts.

An attempt that is killed has trained steps that the next one trains again. Nothing is deleted: a
reader is told which points are on the way that the run has kept, and which were overtaken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runner.checkpoint.attempts import AttemptRecord
from runner.errors import StoreError
from runner.logs.reading import LogReader, Source
from runner.points import Point, points_of
from runner.supervisor.lookup import KnownRun
from runner.supervisor.pointlog import local_points, stored_points


class History:
    """Reads a run's points; keeps its place, so it can be asked again for what has come since."""

    def __init__(self, run: KnownRun) -> None:
        self._run, self._reader = run, LogReader()
        self._has_asked_store = False

    def advance(self) -> Iterator[Point]:
        """All that has come since the last time. A store that cannot be asked adds nothing.

        Of a run that is live on this machine, the store has only what other nodes have left there.
        """
        here = local_points(self._run.metrics)
        sources: list[Source] = [here]
        if not self._has_asked_store or not self._run.is_live():
            sources.append(stored_points(self._run.store, self._run.run_id))
            self._has_asked_store = True
        try:
            for block in self._reader.advance(sources):
                yield from points_of(block)
        except StoreError:
            for block in self._reader.advance([here]):
                yield from points_of(block)


@dataclass(frozen=True)
class Reading:
    """One value of one metric. `kept` says that it lies on the way that the run has kept."""

    step: int
    epoch: int
    attempt: int
    time: float
    value: float
    kept: bool


def series(points: Sequence[Point], records: Sequence[AttemptRecord]) -> dict[str, list[Reading]]:
    """The readings of each metric, by step, and of a step by attempt. Pure.

    Overtaken is what a later attempt has begun before, and of the same step all but the newest.
    """
    bounds = _bounds(points, records)
    by_name: dict[str, dict[tuple[int, int], tuple[Point, float]]] = {}
    for point in points:
        for name, value in point.values.items():
            by_name.setdefault(name, {})[point.step, point.attempt] = point, value
    return {name: list(_readings(found, bounds)) for name, found in sorted(by_name.items())}


def _readings(
    found: dict[tuple[int, int], tuple[Point, float]], bounds: dict[int, float]
) -> Iterator[Reading]:
    newest = dict(sorted(found))
    for (step, attempt), (point, value) in sorted(found.items()):
        kept = step <= bounds[attempt] and newest[step] == attempt
        yield Reading(step, point.epoch, attempt, point.time, value, kept)


def _bounds(points: Sequence[Point], records: Sequence[AttemptRecord]) -> dict[int, float]:
    """Up to which step each attempt's way was kept: the first step that a later one began at.

    Of those that have trained at all; others have overtaken nothing.
    """
    trained = {point.attempt for point in points}
    begun = {
        record.attempt: record.start_step
        for record in records
        if record.first_step_at is not None or record.attempt in trained
    }
    bounds, bound = {}, math.inf
    for attempt in sorted({*trained, *begun}, reverse=True):
        bounds[attempt] = bound
        bound = min(bound, begun.get(attempt, math.inf))
    return bounds
