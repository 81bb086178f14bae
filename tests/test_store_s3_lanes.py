from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
from waiting import wait_until

from runner.errors import StoreError
from runner.store import s3_lanes
from runner.store.s3_lanes import Job, Lanes, Pace

# Throughput of each window, and the number of lanes after it.
PACES = {
    "grows while it pays": ([100, 150, 200, 260], [6, 8, 10, 12]),
    "goes back when it does not": ([100, 105, 100], [6, 4, 4]),
    "keeps the best": ([100, 150, 155, 140], [6, 8, 6, 6]),
    "ends at sixteen": ([100 * 2**n for n in range(9)], [6, 8, 10, 12, 14, 16, 16, 16, 16]),
    "looks again when it falls by much": ([100, 105, 50, 80, 82], [6, 4, 6, 8, 6]),
}


@pytest.mark.parametrize(("rates", "widths"), PACES.values(), ids=PACES)
def test_the_number_of_lanes_follows_the_throughput(rates: list[float], widths: list[int]) -> None:
    pace = Pace()
    assert pace.width == 4

    seen = []
    for rate in rates:
        pace.window(rate)
        seen.append(pace.width)

    assert seen == widths


def nothing() -> None:
    """There is nothing to call off."""


def test_all_jobs_are_done_side_by_side() -> None:
    together = threading.Barrier(4, timeout=10)
    done: list[int] = []

    def job(number: int) -> int:
        together.wait()
        done.append(number)
        return 0

    Lanes().run(iter([partial(job, number) for number in range(20)]), nothing)

    assert sorted(done) == list(range(20))


def test_no_job_is_taken_before_there_is_a_lane_for_it() -> None:
    taken, finish, lanes = 0, threading.Event(), Lanes()

    def job() -> int:
        assert finish.wait(10)
        return 0

    def jobs() -> Iterator[Job]:
        nonlocal taken
        for _ in range(50):
            taken += 1
            yield job

    thread = threading.Thread(target=lanes.run, args=(jobs(), nothing))
    thread.start()
    wait_until(lambda: taken >= 4, what="the lanes to be full")
    thread.join(0.1)

    assert taken == lanes.width == 4
    finish.set()
    thread.join(10)
    assert taken == 50


def test_the_first_failure_calls_off_the_others_and_is_raised() -> None:
    called_off, begun = threading.Event(), []

    def fails() -> int:
        wait_until(lambda: len(begun) == 3, what="the others to begin")
        raise StoreError("the first")

    def waits() -> int:
        begun.append(1)
        assert called_off.wait(10)
        raise StoreError("called off")

    def jobs() -> Iterator[Job]:
        yield fails
        while True:
            yield waits

    with pytest.raises(StoreError, match="the first"):
        Lanes().run(jobs(), called_off.set)
    assert len(begun) == 3


def test_when_lanes_are_closed_enough_of_them_stay_for_all_jobs() -> None:
    pace, go_on = Pace(fewest=6), threading.Event()
    begun: list[int] = []
    done: list[int] = []

    def job() -> int:
        begun.append(1)
        assert go_on.wait(10)
        done.append(1)
        return 0

    run = s3_lanes._Run(pace, threading.Lock(), iter([job] * 20), nothing)
    thread = threading.Thread(target=run.drive)
    thread.start()
    wait_until(lambda: len(begun) == 6, what="six lanes")
    pace.width = 4
    with run._changed:  # so that all six ask whether they are too many before one has left
        go_on.set()
        wait_until(lambda: len(done) == 6, what="the first jobs")
        thread.join(0.1)
    thread.join(10)

    assert not thread.is_alive()
    assert len(done) == 20


def test_jobs_that_were_not_taken_in_hand_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_lanes._Run, "_next", lambda run: None)

    with pytest.raises(StoreError, match="not all"):
        Lanes().run(iter([lambda: 0]), nothing)


def test_a_failure_in_making_jobs_is_raised() -> None:
    def jobs() -> Iterator[Job]:
        yield lambda: 0
        raise KeyError("no more")

    with pytest.raises(KeyError):
        Lanes().run(jobs(), nothing)


def test_no_jobs_are_no_work() -> None:
    Lanes().run(iter(()), nothing)
