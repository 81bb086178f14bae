"""Logged values, thinned: bounded memory, and no spike, no gap and no end is lost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from runner.points import Point
from runner.views.curves import Curves, Reading, kept_until


def point(step: int, value: float, attempt: int = 1, name: str = "loss") -> Point:
    return Point(attempt, step, 0, 1_790_000_000.0 + step, {name: value})


def traces(points: Iterable[Point]) -> dict[str, dict[int, list[Reading]]]:
    curves = Curves()
    curves.take(points)
    return {name: dict(found) for name, found in curves.traces()}


def test_few_values_stay_as_they_are() -> None:
    made = traces([point(1, 3.0), point(2, 2.0), point(2, 2.5), point(4, 1.0, attempt=2)])
    assert made == {"loss": {1: [(1, 3.0), (2, 2.5)], 2: [(4, 1.0)]}}


def test_of_a_million_values_a_few_hundred_are_kept_with_every_spike() -> None:
    curves = Curves()
    for begin in range(0, 1_000_000, 50_000):
        curves.take(
            point(step, 100.0 if step == 654_321 else 1.0 + step / 1e6)
            for step in range(begin, begin + 50_000)
        )
    ((_, found),) = curves.traces()
    kept = found[1]
    assert 100 < len(kept) < 3000
    assert (654_321, 100.0) in kept
    assert kept[0] == (0, 1.0)
    assert kept[-1].step == 999_999
    assert kept == sorted(kept)
    assert max(b.step - a.step for a, b in pairwise(kept)) < 10_000


def test_many_attempts_together_stay_within_bounds() -> None:
    points = (point(step, float(step), attempt) for attempt in range(200) for step in range(500))
    ((_, found),) = traces(points).items()
    assert sum(map(len, found.values())) < 4000
    assert len(found) == 200


def test_what_is_not_finite_is_not_forgotten() -> None:
    made = traces([point(1, 3.0), point(2, math.nan), point(3, math.inf)])["loss"][1]
    assert [reading.step for reading in made] == [1, 2, 3]
    assert math.isnan(made[1].value)


def test_losses_come_first_and_the_newest_values_are_known() -> None:
    curves = Curves()
    curves.take([point(1, 1.0, name="accuracy"), point(1, 2.0, name="val_loss"),
                 point(2, 0.5, name="val_loss"), point(2, 0.1, name="lr")])  # fmt: skip
    assert [name for name, _ in curves.traces()] == ["val_loss", "accuracy", "lr"]
    assert curves.newest == {"accuracy": 1.0, "val_loss": 0.5, "lr": 0.1}
    assert curves.last[1].step == 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5000), st.floats(-1e6, 1e6)), min_size=1, max_size=1500))
def test_the_extremes_survive_whatever_the_order(rows: list[tuple[int, float]]) -> None:
    latest = dict(rows)
    made = traces(point(step, value) for step, value in latest.items())["loss"][1]
    values = [reading.value for reading in made]
    assert (min(values), max(values)) == (min(latest.values()), max(latest.values()))
    assert set(made) <= set(latest.items())


def test_a_way_is_kept_up_to_where_a_later_attempt_began() -> None:
    """Attempt 3 has trained nothing, so it has overtaken nothing."""
    assert kept_until({1: 0, 2: 40, 4: 30}, [1, 2, 3, 4]) == {1: 30, 2: 30, 3: 30, 4: math.inf}
