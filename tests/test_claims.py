"""Slots that several readers share: taken once, given back once, after the last of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from slots import Snapshot, fill, memory_folder, read_slot, snapshot
from waiting import wait_until

from runner.checkpoint.claims import Claims
from runner.spool import Marker, RankSpool


@pytest.fixture
def rank() -> Iterator[RankSpool]:
    with memory_folder() as folder:
        yield RankSpool(folder)


@pytest.fixture
def claims(rank: RankSpool) -> Claims:
    """Two slots are complete: 0 is older and must be persisted, 1 is newer and may be."""
    fill(rank, 0, snapshot(save=1), must=True)
    fill(rank, 1, snapshot(save=2))
    return Claims(rank)


def shown(markers: list[Marker]) -> list[tuple[int, int, bool]]:
    return [(marker.slot, marker.order[1], marker.must) for marker in markers]


BOTH = [(0, 1, True), (1, 2, False)]


# ---------------------------------------------------------------- taking


def test_a_slot_that_is_taken_cannot_be_overwritten(rank: RankSpool, claims: Claims) -> None:
    marker = claims.take(1)

    assert marker is not None
    assert marker.order == (1, 2)
    assert rank.is_claimed(1)
    assert not rank.withdraw(1)
    assert shown(rank.complete()) == BOTH[:1]


@pytest.mark.parametrize("slot", [1, 2])
def test_a_slot_that_the_trainer_has_withdrawn_cannot_be_taken(
    rank: RankSpool, claims: Claims, slot: int
) -> None:
    rank.withdraw(slot)

    assert claims.take(slot) is None
    assert not rank.is_claimed(slot)
    fill(rank, slot, snapshot(save=3))  # and nothing is remembered of the attempt to
    assert claims.take(slot) is not None
    claims.release(slot)
    assert (slot, 3, False) in shown(rank.complete())


def test_a_marker_that_is_no_marker_cannot_be_taken(rank: RankSpool, claims: Claims) -> None:
    (rank.folder / "slot-1.json").write_text("{")

    assert claims.take(1) is None
    assert not rank.is_claimed(1)
    assert shown(claims.complete()) == BOTH[:1]


def test_all_readers_of_a_slot_are_given_the_same_marker(claims: Claims) -> None:
    assert claims.take(1) == claims.take(1) == claims.take(1)


def test_what_is_taken_is_still_complete_for_its_supervisor(claims: Claims) -> None:
    assert shown(claims.complete()) == BOTH

    for slot in (1, 0, 0):
        claims.take(slot)

        assert shown(claims.complete()) == BOTH


# ---------------------------------------------------------------- giving back


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_the_last_reader_gives_a_slot_back(rank: RankSpool, claims: Claims, readers: int) -> None:
    for _ in range(readers):
        claims.take(1)

    for _ in range(readers - 1):
        claims.release(1)
        assert rank.is_claimed(1)
    claims.release(1)

    assert not rank.is_claimed(1)
    assert shown(rank.complete()) == BOTH


def test_a_slot_can_be_taken_again_after_its_last_reader(rank: RankSpool, claims: Claims) -> None:
    for _ in range(2):
        assert claims.take(1) is not None
        assert rank.is_claimed(1)
        claims.release(1)

    rank.withdraw(1)
    fill(rank, 1, snapshot(save=3))
    again = claims.take(1)
    assert again is not None
    assert again.order == (1, 3)  # what is there now, and not what was


@pytest.mark.parametrize("slot", [0, 1])
def test_one_that_only_reads_leaves_open_whether_it_must_be_persisted(
    rank: RankSpool, claims: Claims, slot: int
) -> None:
    claims.take(slot)

    claims.release(slot)

    assert shown(rank.complete()) == BOTH


Ends = list[Callable[[Claims], None]]


def reads(claims: Claims) -> None:
    claims.release(0)


def saves(claims: Claims) -> None:
    claims.release(0, must=False)


def fails(claims: Claims) -> None:
    claims.release(0, must=True)


# how its readers end, one after another, and whether the slot must be persisted after that
ENDS: dict[str, tuple[bool, Ends, bool]] = {
    "it is saved, then it has been read": (True, [saves, reads], False),
    "it has been read, then it is saved": (True, [reads, saves], False),
    "its saving fails, then it has been read": (False, [fails, reads], True),
    "it has been read, then its saving fails": (False, [reads, fails], True),
    "its saving fails twice around a reader": (False, [fails, reads, fails], True),
    "its saving fails, then it is saved": (False, [fails, saves, reads], False),
    "two only read what must be persisted": (True, [reads, reads], True),
    "two only read what may be persisted": (False, [reads, reads], False),
}


@pytest.mark.parametrize(("must", "ends", "after"), ENDS.values(), ids=list(ENDS))
def test_the_one_that_persists_it_says_whether_it_must_still_be(
    rank: RankSpool, must: bool, ends: Ends, after: bool
) -> None:
    fill(rank, 0, snapshot(save=1), must=must)
    claims = Claims(rank)
    for _ in ends:
        claims.take(0)

    for end in ends:
        assert rank.is_claimed(0)
        end(claims)

    assert shown(rank.complete()) == [(0, 1, after)]
    assert shown(claims.complete()) == [(0, 1, after)]


def test_what_is_known_of_a_slot_shows_before_its_last_reader_ends(claims: Claims) -> None:
    claims.take(0)
    claims.take(0)

    claims.release(0, must=False)
    assert shown(claims.complete()) == [(0, 1, False), (1, 2, False)]

    claims.take(0)
    claims.release(0, must=True)
    assert shown(claims.complete()) == [(0, 1, True), (1, 2, False)]


# ---------------------------------------------------------------- dropping


def test_a_slot_that_is_of_no_use_is_free_after_its_reader(rank: RankSpool, claims: Claims) -> None:
    claims.take(1)

    claims.drop(1)

    assert not rank.is_claimed(1)
    assert shown(rank.complete()) == shown(claims.complete()) == BOTH[:1]


def test_a_slot_that_one_reader_drops_is_not_taken_from_another(
    rank: RankSpool, claims: Claims
) -> None:
    claims.take(0)
    claims.take(0)

    claims.drop(0)
    assert rank.is_claimed(0)
    claims.release(0)

    assert shown(rank.complete()) == BOTH  # whoever still reads it has use for it


def test_the_last_reader_drops_a_slot_that_others_gave_back(
    rank: RankSpool, claims: Claims
) -> None:
    claims.take(0)
    claims.take(0)

    claims.release(0, must=True)
    claims.drop(0)

    assert not rank.is_claimed(0)
    assert shown(rank.complete()) == BOTH[1:]


# ---------------------------------------------------------------- filled by the supervisor


def test_a_slot_that_the_supervisor_has_filled_is_held_from_the_start(
    rank: RankSpool, claims: Claims
) -> None:
    rank.withdraw(0)
    marker = fill(rank, 2, snapshot(save=3))
    rank.withdraw(2)

    claims.hold(marker)

    assert rank.is_claimed(2)
    assert claims.take(2) == marker
    claims.release(2)
    assert rank.is_claimed(2)
    claims.release(2)
    assert shown(rank.complete()) == [(1, 2, False), (2, 3, False)]


# ---------------------------------------------------------------- after a death


def test_what_a_dead_supervisor_had_taken_is_given_back_as_it_was(
    rank: RankSpool, claims: Claims
) -> None:
    claims.take(0)
    claims.take(1)
    heir = Claims(rank)
    assert heir.complete() == []

    heir.recover()

    assert shown(rank.complete()) == shown(heir.complete()) == BOTH


def test_what_is_held_here_is_not_given_back_with_the_rest(rank: RankSpool, claims: Claims) -> None:
    Claims(rank).take(0)  # of one that is dead
    claims.take(1)

    claims.recover()

    assert not rank.is_claimed(0)
    assert rank.is_claimed(1)
    assert shown(claims.complete()) == BOTH
    claims.release(1)
    assert shown(rank.complete()) == BOTH


# ---------------------------------------------------------------- threads

ROUNDS = 60


def test_threads_that_take_and_release_at_once_lose_no_slot(
    rank: RankSpool, claims: Claims
) -> None:
    """Nobody reads a slot that is not claimed, and in the end all is as it was."""
    begin = threading.Barrier(4)

    def read() -> int:
        begin.wait(10)
        unclaimed = 0
        for i in range(ROUNDS):
            slot = i % 2
            if claims.take(slot) is None:
                return -1
            unclaimed += not rank.is_claimed(slot)
            unclaimed += shown(claims.complete()) != BOTH
            claims.release(slot)
        return unclaimed

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(4)]

    assert [reader.result() for reader in readers] == [0, 0, 0, 0]
    assert shown(rank.complete()) == BOTH


def test_a_trainer_never_overwrites_what_threads_are_reading(
    rank: RankSpool, claims: Claims
) -> None:
    """It withdraws, refills and hands over a slot again and again while two threads read it."""
    begin = threading.Barrier(3)
    over = threading.Event()
    seen: set[int] = set()
    fill(rank, 1, numbered(2))

    def train() -> None:
        begin.wait(10)
        for save in range(3, 3 + ROUNDS):
            wait_until(lambda: rank.withdraw(1), what="the readers to be done")
            fill(rank, 1, numbered(save))
            if save % 10 == 0:
                wait_until(lambda save=save: save in seen, what="a reader to come")

    def read() -> int:
        begin.wait(10)
        torn = 0
        while not over.wait(0.0005):  # the trainer gets its turn
            marker = claims.take(1)
            if marker is None:
                continue
            for _ in range(2):
                torn += read_slot(rank, marker) != numbered(marker.order[1]).files
            seen.add(marker.order[1])
            claims.release(1)
        return torn

    with ThreadPoolExecutor(3) as pool:
        trainer, *readers = [pool.submit(train), pool.submit(read), pool.submit(read)]
        try:
            trainer.result(30)
        finally:
            over.set()

    assert [reader.result() for reader in readers] == [0, 0]
    assert shown(rank.complete()) == [BOTH[0], (1, 2 + ROUNDS, False)]


def numbered(save: int) -> Snapshot:
    """A snapshot of a few pages, which differs from the next one in every byte."""
    return Snapshot(snapshot(save=save).moment, {"state.json": bytes([save]) * 20_000})
