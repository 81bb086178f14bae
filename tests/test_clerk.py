"""The supervisor's second thread, on a real spool and store: what it asks of a store, and when."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from slots import RUN, RefusingStore, commit, memory_folder, snapshot
from waiting import wait_until

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import AttemptRecord, Ledger
from runner.checkpoint.keeper import Keeper
from runner.checkpoint.persist import Persister
from runner.checkpoint.retention import Keep
from runner.errors import StoreError
from runner.spool import Spool
from runner.store import DirectoryStore
from runner.supervisor import events
from runner.supervisor.clerk import Clerk
from runner.supervisor.forecast import Forecaster
from runner.supervisor.happenings import Happening

SECONDS = 30.0


class Store(RefusingStore):
    """Notes which attempts' records are read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(DirectoryStore(folder / "store"))
        self.read_records: list[str] = []
        self.asked = 0  # to replace something

    def read(self, key: str, limit: int) -> bytes:
        if key.startswith(f"{RUN}/attempts/"):
            self.read_records.append(key.rpartition("/")[2])
        return self.store.read(key, limit)

    def replace(self, key: str, data: bytes) -> None:
        self.asked += 1
        if "replace" in self.refused:
            raise StoreError("replace is refused")
        self.store.replace(key, data)


class Supervised:
    """A clerk, what it posts, and what it tells."""

    def __init__(self, folder: Path, store: Store, owner: str) -> None:
        self.store = store
        self.spool = Spool(folder / f"spool-{owner[0]}")
        self.spool.open()
        self.ledger = Ledger(store, RUN, owner)
        persister = Persister(store, self.ledger, Keep(), dict)
        self.posted: queue.Queue[events.Event] = queue.Queue()
        self.known: list[Sequence[AttemptRecord]] = []
        self.clerk = Clerk(
            self.spool.rank,
            Keeper(self.spool.rank, persister, Archive(store, RUN)),
            persister,
            "node-1",
            self.posted.put,
            Forecaster(30.0, chooses_interval=False),
            None,
            self,
        )
        self.clerk.start()

    def tell(self, happening: Happening) -> None:
        pass

    def knows(self, records: Sequence[AttemptRecord]) -> None:
        self.known.append(records)

    def attempt(self, **ends: str) -> Sequence[AttemptRecord]:
        """Let one begin; what is known of all of them then. It ends as it is told."""
        self.clerk.claim()
        self.clerk.restore(0, None, None)
        while not isinstance(self.posted.get(timeout=SECONDS), events.RestoreReady):
            pass
        self.clerk.record(metrics={"runner_saves_total": 1.0}, **ends)
        return self.known[-1]

    def outcome(self) -> str | None:
        """How the newest attempt has ended, as the store has it."""
        newest = Ledger(self.store, RUN, "").latest()
        assert newest is not None
        return newest.outcome

    def close(self) -> None:
        self.clerk.finish(SECONDS, fenced=True)
        self.spool.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture
def first(folder: Path) -> Iterator[Supervised]:
    supervised = Supervised(folder, Store(folder), "a" * 16)
    supervised.ledger.begin({"run_id": RUN})
    commit(supervised.store.store, snapshot())
    yield supervised
    supervised.close()


def test_what_is_over_is_read_once_however_often_a_run_is_started_again(
    first: Supervised,
) -> None:
    for _ in range(20):
        first.attempt(outcome="failed")
    del first.store.read_records[:]

    records = first.attempt(outcome="failed")

    assert [record.attempt for record in records] == list(range(1, 22))
    assert [record.outcome for record in records] == ["failed"] * 20 + [None]
    assert set(first.store.read_records) == {"000020.json", "000021.json"}


def test_of_what_is_over_only_the_newest_keeps_what_it_counted(first: Supervised) -> None:
    """A page of metrics for each attempt would add up in a supervisor that lives for months."""
    for _ in range(3):
        first.attempt(outcome="failed")

    records = first.attempt()

    assert [bool(record.metrics) for record in records] == [False, False, True, False]


def test_an_attempt_whose_end_is_not_written_is_read_again(first: Supervised, folder: Path) -> None:
    """Its supervisor may be alive, and may come to write it."""
    first.attempt()
    first.attempt()
    other = Ledger(DirectoryStore(folder / "store"), RUN, "a" * 16)
    other.record = other.records()[0]
    other.update(outcome="fenced")

    assert [record.outcome for record in first.attempt()] == ["fenced", None, None]


# ---------------------------------------------------------------- the end


def test_how_an_attempt_ended_is_written_when_the_store_takes_it_again(first: Supervised) -> None:
    first.attempt()
    first.store.refused.add("replace")
    first.clerk.record(outcome="succeeded")
    ending = threading.Thread(target=lambda: first.clerk.finish(SECONDS, fenced=False))
    ending.start()
    asked = first.store.asked
    wait_until(lambda: first.store.asked >= asked + 3, what="it to ask again")
    assert first.outcome() is None

    first.store.refused.clear()
    ending.join(SECONDS)

    assert first.outcome() == "succeeded"


def test_a_store_that_never_takes_it_does_not_keep_the_supervisor_for_ever(
    first: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first.clerk, "_catch_up_seconds", 0.5)
    first.attempt()
    first.store.refused.add("replace")
    first.clerk.record(outcome="succeeded")

    assert first.clerk.finish(SECONDS, fenced=False)
    assert first.outcome() is None


def test_one_that_was_fenced_off_writes_nothing_more(first: Supervised) -> None:
    first.attempt()
    first.store.refused.add("replace")
    first.clerk.record(outcome="failed")
    wait_until(lambda: first.clerk._tasks.empty(), what="the clerk")
    first.store.refused.clear()

    assert first.clerk.finish(SECONDS, fenced=True)
    assert first.outcome() is None
