from __future__ import annotations

import os
import signal
from collections.abc import Callable
from unittest import mock

import pytest
from nodes import Node

from runner.checkpoint.attempts import AttemptRecord
from runner.points import Point
from runner.supervisor.history import History, series
from runner.supervisor.lookup import Where, find_run


def record(attempt: int, start: int, *, trained: bool = True) -> AttemptRecord:
    first = "2026-01-01T00:00:00+00:00" if trained else None
    return AttemptRecord(attempt, "o", "n", "t", start_step=start, first_step_at=first)


def points(attempt: int, *steps: int) -> list[Point]:
    return [Point(attempt, step, 0, 0.0, {"loss": step + attempt / 10}) for step in steps]


CASES = {
    "one attempt": ([record(1, 0)], points(1, 1, 2, 3), [(1, 1), (2, 1), (3, 1)]),
    "killed two steps after what was saved": (
        [record(1, 0), record(2, 2)],
        [*points(1, 1, 2, 3, 4), *points(2, 3, 4, 5)],
        [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)],
    ),
    "gone back past an attempt": (
        [record(1, 0), record(2, 2), record(3, 1)],
        [*points(1, 1, 2), *points(2, 3), *points(3, 2)],
        [(1, 1), (2, 3)],
    ),
    "an attempt that never trained": (
        [record(1, 0), record(2, 0, trained=False), record(3, 2)],
        [*points(1, 1, 2), *points(3, 3)],
        [(1, 1), (2, 1), (3, 3)],
    ),
    "validation of one step, logged twice": (
        [record(1, 0), record(2, 2)],
        [*points(1, 1, 2), *points(2, 2, 3)],
        [(1, 1), (2, 2), (3, 2)],
    ),
}


@pytest.mark.parametrize(("records", "logged", "kept"), CASES.values(), ids=CASES)
def test_the_way_that_was_kept_is_told_from_what_was_overtaken(
    records: list[AttemptRecord], logged: list[Point], kept: list[tuple[int, int]]
) -> None:
    readings = series(logged, records)["loss"]
    assert [(r.step, r.attempt) for r in readings if r.kept] == kept
    assert len(readings) == len({(p.step, p.attempt) for p in logged}), "and nothing is left out"


def test_all_that_a_run_logs_is_there_after_a_preemption_on_another_node(
    new_node: Callable[[str], Node],
) -> None:
    one, other = new_node("one"), new_node("other")
    params = {"gate": str(one.gate), "befalls": {"1": {"5": "wait"}}}
    supervisor = one.start("run", one.training(params=params))
    supervisor.wait_for("step 5")
    supervisor.send_signal(signal.SIGTERM)
    one.wait_until_asked()
    one.gate.touch()
    assert supervisor.wait() == 75
    done = other.run("run", other.training(params=params))
    assert done.code == 0, done.err

    with mock.patch.dict(os.environ, other.environment):
        history = History(find_run("job", Where(str(other.store_folder))))
        logged = list(history.advance())
        assert list(history.advance()) == [], "and each only once"

    found = series(logged, other.records())
    last = other.records()[-1].end_step
    assert last is not None
    assert [r.step for r in found["train_loss"]] == list(range(1, last + 1))
    assert {r.attempt for r in found["train_loss"]} == {1, 2}
    assert [(r.step, r.epoch) for r in found["val_loss"]] == [(last // 2, 0), (last, 1)]
    assert all(r.kept for readings in found.values() for r in readings)
