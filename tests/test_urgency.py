"""Which snapshot is saved when time is short."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from slots import RUN, fill, snapshot
from waiting import wait_until

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.keeper import Keeper
from runner.checkpoint.persist import Persister
from runner.checkpoint.retention import Keep
from runner.checkpoint.urgency import Upload, worth_abandoning
from runner.spool import RankSpool, Spool
from runner.store import Content, DirectoryStore, Part

MB = 10**6
HALF_DONE = Upload(1000 * MB, 500 * MB, 5.0)  # at 100 MB/s
JUST_BEGUN = Upload(1000 * MB, 0, 0.0)
A_MOMENT_AGO = Upload(1000 * MB, 20 * MB, 0.2)
STALLED = Upload(1000 * MB, 500 * MB, 30.0)

CASES: dict[str, tuple[Upload, int, float | None, float | None, bool]] = {
    "nothing presses": (HALF_DONE, 1000 * MB, None, None, True),
    "plenty of time": (HALF_DONE, 1000 * MB, 60.0, None, True),
    "just enough time, with a margin": (HALF_DONE, 1000 * MB, 12.6, None, True),
    "too little time for the newer one": (HALF_DONE, 1000 * MB, 12.4, None, False),
    "too little time for either": (HALF_DONE, 1000 * MB, 2.0, None, False),
    "the time is over": (HALF_DONE, 1000 * MB, -1.0, None, False),
    "the newer one is small": (HALF_DONE, 10 * MB, 2.0, None, True),
    "nothing was given to the store yet": (JUST_BEGUN, 1000 * MB, 2.0, 100e6, True),
    "nothing is known of the store's speed": (A_MOMENT_AGO, 1000 * MB, 2.0, None, True),
    "earlier saves were fast enough": (A_MOMENT_AGO, 1000 * MB, 20.0, 100e6, True),
    "earlier saves were too slow": (A_MOMENT_AGO, 1000 * MB, 20.0, 10e6, False),
    "the store has become slow": (STALLED, 1000 * MB, 30.0, 100e6, False),
    "the store has become slow, and there is time": (STALLED, 1000 * MB, 90.0, 100e6, True),
}


@pytest.mark.parametrize(
    ("older", "newer_bytes", "seconds_left", "rate", "gives_way"), CASES.values(), ids=list(CASES)
)
def test_an_older_save_gives_way_if_the_newer_one_will_be_finished(
    older: Upload,
    newer_bytes: int,
    seconds_left: float | None,
    rate: float | None,
    gives_way: bool,
) -> None:
    assert worth_abandoning(older, newer_bytes, seconds_left, rate) is gives_way


# ---------------------------------------------------------------- with a real keeper


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[RankSpool]:
    spool = Spool(tmp_path / "spool")
    spool.open()
    yield spool.rank
    spool.close()


@pytest.mark.parametrize(
    ("seconds_left", "order"),
    [(None, ["newest"]), (600.0, ["newest"]), (-1.0, ["older", "newest"])],
    ids=["nothing presses", "there is time", "there is none"],
)
def test_the_save_on_its_way_is_finished_first_if_the_newest_is_too_late(
    tmp_path: Path, rank: RankSpool, seconds_left: float | None, order: list[str]
) -> None:
    store = DirectoryStore(tmp_path / "store")
    ledger = Ledger(store, RUN, "a" * 16)
    ledger.claim("node")
    keeper = Keeper(rank, Persister(store, ledger, Keep(last=9)), Archive(store, RUN))
    taken = {"older": snapshot(save=2), "newest": snapshot(save=3)}
    fill(rank, 0, snapshot(save=1), must=True)
    keeper.persist_due()  # now it is known how fast the store is
    fill(rank, 0, taken["older"], must=True)
    if seconds_left is not None:
        keeper.hurry(time.monotonic() + seconds_left)
    halfway, asked = threading.Event(), threading.Event()
    stage = store.stage

    def slow_stage(prefix: str, owner: str) -> Any:
        staging = stage(prefix, owner)
        if prefix.endswith(taken["older"].name) and not asked.is_set():
            write = staging.write

            def slow_write(contents: Sequence[Content]) -> Any:
                first, *rest = contents
                held = Content(first.name, first.part_bytes, wait_after(first.parts))
                return write([held, *rest])

            staging.write = slow_write  # type: ignore[method-assign]
        return staging

    def wait_after(parts: Iterable[Part]) -> Iterator[Part]:
        yield from parts
        halfway.set()
        assert asked.wait(10)

    with mock.patch.object(store, "stage", slow_stage), ThreadPoolExecutor(2) as pool:
        older = pool.submit(keeper.persist_due)
        assert halfway.wait(10)
        fill(rank, 1, taken["newest"])
        newest = pool.submit(keeper.persist_newest, ("preemption",))
        wait_until(lambda: keeper._awaited is not None, what="the newest to be waited for")
        asked.set()
        saved = [one.manifest.name for one in older.result(10)]
        last = newest.result(10)

    assert last is not None
    assert [*saved, last.manifest.name] == [taken[which].name for which in order]
