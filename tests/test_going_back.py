"""What was gone back on stays gone back on: in later attempts, and for other supervisors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from slots import RUN, fill, memory_folder, snapshot

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import AttemptRecord, Ledger
from runner.checkpoint.keeper import Keeper
from runner.checkpoint.persist import Persister
from runner.checkpoint.retention import Keep
from runner.spool import Spool
from runner.store import DirectoryStore


@dataclass
class Supervisor:
    """One supervisor's share of a run: attempts that restore, train to some steps, and crash."""

    store: DirectoryStore
    spool: Spool
    owner: str
    keep: Keep

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.store, RUN, self.owner * 16)
        self.persister = Persister(self.store, self.ledger, self.keep)
        self.archive = Archive(self.store, RUN)
        self.keeper = Keeper(self.spool.rank, self.persister, self.archive)

    def attempt(self, go_back: int, *steps: int, must: bool = True) -> int:
        """The step at which it began. It saves these steps, the last as a crashed trainer's."""
        number = self.ledger.claim("node").attempt
        resumption = self.keeper.restore(go_back)
        if resumption is not None:
            self.ledger.update(resumed_from=str(resumption.moment.name))
        self.keeper.restored()
        for save, step in enumerate(steps, 1):
            fill(self.spool.rank, save % 2, snapshot(number, save, step=step), must=must)
            self.keeper.persist_newest(())
        return -1 if resumption is None else resumption.moment.step

    def saved(self) -> list[int]:
        return sorted({manifest.moment.step for manifest in self.archive.manifests()})


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


def supervisor(folder: Path, owner: str = "a", last: int = 100) -> Supervisor:
    spool = Spool(folder / f"spool-{owner}")
    spool.open()
    return Supervisor(DirectoryStore(folder / "store"), spool, owner, Keep(last=last))


def test_each_start_goes_back_by_one_whatever_was_saved_on_the_way(folder: Path) -> None:
    """It always crashes at step 45, and saves every ten steps on its way there."""
    run = supervisor(folder)
    begun = [run.attempt(0, 10, 20, 30, 40, 45)]
    for go_back in (0, 1, 2, 3, 4, 5):
        start = run.attempt(go_back)
        begun.append(start)
        for save, step in enumerate(range(start + 10 - start % 10, 46, 10), 1):
            number = run.ledger.claim("node").attempt
            fill(run.spool.rank, 1, snapshot(number, save, step=step), must=True)
            run.keeper.persist_newest(())

    assert begun == [-1, 45, 40, 30, 20, 10, 10]


def test_it_does_not_circle_between_two_checkpoints(folder: Path) -> None:
    run = supervisor(folder)

    begun = [
        run.attempt(0, 10, 20, 30),
        run.attempt(0),
        run.attempt(1, 31),
        run.attempt(2, 21, 31),
        run.attempt(3),
    ]

    assert begun == [-1, 30, 20, 10, 10]


def test_another_supervisor_does_not_begin_from_what_was_gone_back_on(folder: Path) -> None:
    first = supervisor(folder, "a")
    first.attempt(0, 10, 20, 30)
    first.attempt(0)
    assert first.attempt(1) == 20  # and nothing was saved since

    second = supervisor(folder, "b")

    assert second.attempt(0) == 20
    assert second.attempt(0, 25) == 20
    assert supervisor(folder, "c").attempt(0) == 25


def test_a_slot_of_what_was_gone_back_on_is_not_used_either(folder: Path) -> None:
    first = supervisor(folder, "a")
    first.attempt(0, 10, 20, 30)
    first.attempt(0)
    first.attempt(1)
    second = supervisor(folder, "b")
    fill(second.spool.rank, 0, snapshot(1, 3, step=30))

    assert second.attempt(0) == 20


def test_the_slot_of_what_it_went_back_to_is_used_without_asking_the_store(folder: Path) -> None:
    first = supervisor(folder, "a")
    first.attempt(0, 10, 20, 30)
    first.attempt(0)
    assert first.attempt(1) == 20
    second = supervisor(folder, "b")
    second.ledger.claim("node")
    fill(second.spool.rank, 0, snapshot(1, 2, step=20))

    resumption = second.keeper.restore()

    assert resumption is not None
    assert (resumption.moment.step, resumption.source) == (20, "slot")


def test_the_attempts_record_names_what_was_gone_back_from(folder: Path) -> None:
    run = supervisor(folder)
    run.attempt(0, 10, 20, 30)
    run.attempt(0)
    run.attempt(1)

    records = run.ledger.records()

    assert [r.went_back_from for r in records] == [(), (), (str(snapshot(1, 3, step=30).name),)]
    assert AttemptRecord.from_json(records[2].to_json()) == records[2]


def test_if_nothing_else_is_left_it_begins_there_all_the_same(folder: Path) -> None:
    first = supervisor(folder, "a")
    first.attempt(0, 10, 20)
    first.attempt(0)
    assert first.attempt(1) == 10
    (older,) = [m for m in first.archive.manifests() if m.moment.step == 10]
    first.archive.quarantine(older.name, "damaged by hand")

    assert supervisor(folder, "b").attempt(0) == 20


def test_a_checkpoint_that_a_user_names_is_taken_whatever_was_gone_back_on(folder: Path) -> None:
    first = supervisor(folder, "a")
    first.attempt(0, 10, 20)
    first.attempt(0)
    first.attempt(1)
    second = supervisor(folder, "b")
    second.ledger.claim("node")

    resumption = second.keeper.restore(which="20")

    assert resumption is not None
    assert resumption.moment.step == 20


def test_those_behind_are_not_crowded_out_by_what_was_gone_back_on(folder: Path) -> None:
    """With the last three kept, going back three times still finds the third."""
    run = supervisor(folder, last=3)
    begun = [run.attempt(0, 10, 20, 30), run.attempt(0)]
    for go_back in (1, 2, 3):
        begun.append(run.attempt(go_back, 100 + go_back))

    assert begun == [-1, 30, 20, 10, 10]
    assert 10 in run.saved()
