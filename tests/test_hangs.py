"""What counts as a hang: limits learned from pauses, as tables."""

from __future__ import annotations

import pytest

from runner.supervisor.hangs import SAMPLES_NEEDED, Rhythm

TIMEOUT = 600.0


def heard(*pauses: float, activity: str = "training") -> Rhythm:
    rhythm = Rhythm()
    for pause in pauses:
        rhythm = rhythm.heard(activity, pause)
    return rhythm


LIMITS: dict[str, tuple[list[float], float, float]] = {
    "nothing known": ([], TIMEOUT, 600.0),
    "one too few": ([0.01] * 49, TIMEOUT, 600.0),
    "short steps": ([0.01] * 50, TIMEOUT, 60.0),
    "short steps, and a limit shorter than a minute": ([0.01] * 50, 9.0, 9.0),
    "steps of ten seconds": ([10.0] * 50, TIMEOUT, 100.0),
    "steps as long as the limit": ([600.0] * 50, TIMEOUT, 6000.0),
    "steps longer than the limit, before enough are known": ([700.0] * 49, TIMEOUT, 600.0),
    "one long one in fifty": ([0.01] * 49 + [30.0], TIMEOUT, 300.0),
    "one long one in a hundred": ([0.01] * 99 + [30.0], TIMEOUT, 60.0),
    "two long ones in a hundred": ([0.01] * 98 + [30.0] * 2, TIMEOUT, 300.0),
    "they were long a while ago": ([30.0] * 100 + [0.01] * 500, TIMEOUT, 60.0),
}


@pytest.mark.parametrize(("pauses", "timeout", "limit"), LIMITS.values(), ids=list(LIMITS))
def test_a_limit_follows_from_the_pauses_before(
    pauses: list[float], timeout: float, limit: float
) -> None:
    assert heard(*pauses).limit_seconds("training", timeout) == pytest.approx(limit)


def test_what_comes_after_training_has_no_limit() -> None:
    assert heard(*[0.01] * 99).limit_seconds("after training", TIMEOUT) is None


def test_each_activity_has_a_limit_of_its_own() -> None:
    rhythm = heard(*[0.01] * 99, activity="validation")

    assert rhythm.limit_seconds("validation", TIMEOUT) == 60.0
    assert rhythm.limit_seconds("training", TIMEOUT) == TIMEOUT


def test_a_limit_that_was_wrong_is_the_jobs_from_then_on_in_later_attempts_too() -> None:
    known = [0.01] * 99
    rhythm = heard(*known).ended("training").anew()
    for pause in known:
        rhythm = rhythm.heard("training", pause).heard("validation", pause)

    assert rhythm.limit_seconds("training", TIMEOUT) == TIMEOUT
    assert rhythm.limit_seconds("validation", TIMEOUT) == 60.0


def test_a_new_attempt_has_learned_nothing() -> None:
    assert heard(*[0.01] * 99).anew().limit_seconds("training", TIMEOUT) == TIMEOUT


def test_a_limit_that_was_wrong_may_be_longer_if_the_steps_are() -> None:
    rhythm = heard(*[100.0] * SAMPLES_NEEDED).ended("training")

    assert rhythm.limit_seconds("training", TIMEOUT) == 1000.0


def test_what_is_remembered_does_not_grow_with_the_run() -> None:
    rhythm = Rhythm()
    for number in range(5000):
        rhythm = rhythm.heard("training", 0.01).heard(f"epoch {number}", 0.01)

    assert len(rhythm.pauses) <= 64
    assert sum(map(len, rhythm.pauses.values())) < 1000
    assert rhythm.limit_seconds("training", TIMEOUT) == 60.0
