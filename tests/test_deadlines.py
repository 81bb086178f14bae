"""How the time between a notice and the end of a node is used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.supervisor.deadlines import (
    is_worth_staying,
    last_moment,
    patience_for_boundary,
    train_until,
)

TIMES: dict[str, tuple[float, float | None, float]] = {
    # seconds that the notice gives, seconds of a save, seconds of training after the notice
    "two minutes, a quick save": (120.0, 0.5, 90.0),
    "two minutes, a save of ten seconds": (120.0, 10.0, 90.0),
    "two minutes, a save of twenty": (120.0, 20.0, 60.0),
    "two minutes, a save of a minute": (120.0, 60.0, -60.0),
    "half a minute, a quick save": (30.0, 0.5, 22.5),
    "half a minute, a save of three seconds": (30.0, 3.0, 21.0),
    "a quarter of a minute, a quick save": (15.0, 0.5, 9.5),
    "two minutes, nothing was measured yet": (120.0, None, 60.0),
    "half a minute, nothing was measured yet": (30.0, None, 15.0),
}


@pytest.mark.parametrize(("given_seconds", "save", "trained"), TIMES.values(), ids=list(TIMES))
def test_the_last_save_is_begun_in_time(
    given_seconds: float, save: float | None, trained: float
) -> None:
    assert train_until(1000.0, 1000.0 + given_seconds, save) == pytest.approx(1000.0 + trained)


@given(st.floats(0.1, 900), st.floats(0.001, 900))
def test_a_save_that_takes_three_times_as_long_as_the_last_one_is_still_in_time(
    given_seconds: float, save: float
) -> None:
    leave = train_until(0.0, given_seconds, save)

    assert leave + 3 * save <= given_seconds + 1e-6
    assert leave + save + 5 <= given_seconds + 1e-6
    assert leave <= 0.75 * given_seconds + 1e-6


@pytest.mark.parametrize(
    ("leave_at", "save", "stays"),
    [
        (110.0, 1.0, True),
        (105.0, 1.0, True),
        (104.9, 1.0, False),
        (110.0, 11.0, False),
        (100.0, None, False),
        (90.0, 0.1, False),
    ],
)
def test_nobody_stays_for_a_few_seconds(leave_at: float, save: float | None, stays: bool) -> None:
    assert is_worth_staying(100.0, leave_at, save) is stays


def test_a_trainer_has_a_quarter_of_the_time_for_its_boundary() -> None:
    assert patience_for_boundary(10.0, 50.0) == 20.0


@pytest.mark.parametrize(("deadline", "moment"), [(130.0, 129.0), (105.0, 104.5), (100.0, 100.0)])
def test_the_tree_is_killed_before_the_node_is(deadline: float, moment: float) -> None:
    assert last_moment(100.0, deadline) == moment
