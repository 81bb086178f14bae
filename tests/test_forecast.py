"""What a save will cost, and how often to make one: pure estimates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runner.checkpoint.attempts import AttemptRecord
from runner.supervisor.forecast import (
    FIRST_INTERVAL_SECONDS,
    FIRST_MEAN_SECONDS,
    EmergencySave,
    Forecaster,
    mean_time_between_failures,
    save_interval,
)


def life(begun: int, ended: int | None, outcome: str | None) -> AttemptRecord:
    def clock(second: int) -> str:
        return f"2026-01-01T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}+00:00"

    record = AttemptRecord(1, "me", "here", clock(begun))
    return replace(record, ended_at=None if ended is None else clock(ended), outcome=outcome)


def test_an_emergency_save_is_the_step_at_hand_the_copy_and_the_store() -> None:
    save = EmergencySave(step_seconds=2.0, snapshot_seconds=0.5, persist_seconds=10.0)

    assert save.total_seconds == 12.5
    fits, sentence = save.verdict(grace_seconds=30)
    assert fits
    assert "12.50 s of 30 s grace" in sentence
    fits, sentence = save.verdict(grace_seconds=12)
    assert not fits
    assert "does NOT fit" in sentence


def test_the_verdict_is_said_at_first_and_whenever_it_changes_sides() -> None:
    forecaster = Forecaster(grace_seconds=15.0, chooses_interval=False)
    said = [forecaster.saved(EmergencySave(1.0, 0.1, seconds)) for seconds in (1, 2, 60, 70, 1, 1)]

    assert [sentence is not None for sentence in said] == [True, False, True, False, True, False]
    assert forecaster.fits


def test_the_interval_is_youngs_and_dalys() -> None:
    assert save_interval(2.0, 3600.0) == pytest.approx(120.0)
    assert save_interval(0.0001, 3600.0) == 5.0  # not more often than makes sense
    assert save_interval(500.0, 60.0) == 1000.0  # a save has to come to its end


def test_an_hour_is_assumed_until_this_run_has_failed() -> None:
    assert mean_time_between_failures([]) == FIRST_MEAN_SECONDS
    assert mean_time_between_failures([life(0, 600, "interrupted")]) == FIRST_MEAN_SECONDS
    assert mean_time_between_failures([life(0, 7200, "succeeded")]) == 7200


def test_lives_are_shared_among_the_deaths() -> None:
    lives = [life(0, 600, "preempted"), life(700, 1000, "failed"), life(1000, 1300, "stopped")]

    assert mean_time_between_failures(lives) == 600


def test_a_record_without_an_end_or_from_a_clock_that_ran_backwards_is_passed_over() -> None:
    lives = [life(0, None, None), life(100, 50, "failed"), life(0, 100, "preempted")]

    assert mean_time_between_failures(lives) == 100


def test_the_interval_is_measured_before_it_is_chosen_and_said_only_when_it_is_another() -> None:
    forecaster = Forecaster(grace_seconds=15.0, chooses_interval=True)
    assert forecaster.interval() == (FIRST_INTERVAL_SECONDS, None)

    forecaster.saved(EmergencySave(1.0, 0.5, 1.5))
    seconds, sentence = forecaster.interval()
    assert seconds == pytest.approx(120.0)
    assert sentence is not None
    assert "every 120 s" in sentence
    forecaster.saved(EmergencySave(1.0, 0.5, 1.6))
    assert forecaster.interval()[1] is None
    forecaster.attempt_begins([life(0, 36, "preempted")])
    assert forecaster.interval()[0] == pytest.approx(12.3, abs=0.1)


def test_a_job_that_says_when_to_save_is_left_alone() -> None:
    forecaster = Forecaster(grace_seconds=15.0, chooses_interval=False)
    forecaster.saved(EmergencySave(1.0, 0.5, 1.5))

    assert forecaster.interval() == (0.0, None)
