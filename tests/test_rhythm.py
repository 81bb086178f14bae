"""How often the state is copied into a slot."""

from __future__ import annotations

import pytest

from runner.plan import Interval
from runner.training.rhythm import SaveRhythm, SnapshotRhythm, steps_between


@pytest.mark.parametrize(
    ("stall", "step", "steps"),
    [(0.001, 0.1, 1), (0.0011, 0.1, 2), (0.05, 0.5, 10), (0.003, 0.001, 300), (0.1, 0.0, 1)],
)
def test_the_stall_stays_under_one_percent(stall: float, step: float, steps: int) -> None:
    assert steps_between(stall, step) == steps


def drive(rhythm: SnapshotRhythm, steps: int, step_seconds: float, stall_seconds: float) -> int:
    taken = 0
    for _ in range(steps):
        rhythm.stepped(step_seconds)
        if rhythm.is_due(epoch_end=False):
            rhythm.copied(stall_seconds)
            taken += 1
    return taken


def test_a_fixed_rhythm_is_kept_whatever_it_costs() -> None:
    assert drive(SnapshotRhythm(1), 50, 0.001, 1.0) == 50
    assert drive(SnapshotRhythm(10), 50, 0.001, 1.0) == 5


def test_a_free_rhythm_finds_the_steps_that_cost_one_percent() -> None:
    rhythm = SnapshotRhythm(None)
    drive(rhythm, 2000, step_seconds=0.01, stall_seconds=0.005)

    assert rhythm.steps == 50


def test_a_free_rhythm_follows_when_saving_becomes_cheap() -> None:
    rhythm = SnapshotRhythm(None)
    drive(rhythm, 1000, step_seconds=0.01, stall_seconds=0.005)
    drive(rhythm, 3000, step_seconds=1.0, stall_seconds=0.005)

    assert rhythm.steps == 1


def test_small_swings_do_not_change_it() -> None:
    rhythm = SnapshotRhythm(None)
    drive(rhythm, 1000, step_seconds=0.01, stall_seconds=0.005)
    drive(rhythm, 5000, step_seconds=0.0105, stall_seconds=0.0055)

    assert rhythm.steps == 50


def test_the_end_of_an_epoch_counts_where_every_step_does() -> None:
    every_step, seldom = SnapshotRhythm(1), SnapshotRhythm(100)
    for rhythm in (every_step, seldom):
        rhythm.stepped(0.1)
        rhythm.copied(0.01)

    assert every_step.is_due(epoch_end=True)
    assert not every_step.is_due(epoch_end=False)
    assert not seldom.is_due(epoch_end=True)


@pytest.mark.parametrize("interval", [Interval(steps=3), Interval(epochs=1), Interval(minutes=0)])
def test_what_is_due_stays_so_until_it_is_saved(interval: Interval) -> None:
    rhythm = SaveRhythm(interval)
    assert rhythm.is_due(3, 1, step_end=True, epoch_end=True)

    assert rhythm.is_due(4, 1, step_end=True, epoch_end=False), "there was no room for it"
    rhythm.saved()

    is_due = rhythm.is_due(5, 1, step_end=True, epoch_end=False)
    assert is_due == (interval.minutes is not None)
