"""The memory of the slots: reserved and touched ahead, stepped down where it is short."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from slots import read_slot
from waiting import wait_until

from runner.checkpoint.claims import Claims
from runner.checkpoint.manifest import Moment
from runner.errors import SpoolFull
from runner.spool import RankSpool
from runner.training import slots
from runner.training.overlap import Overlap, Pair
from runner.training.slots import SlotMemory
from runner.training.snapshot import SnapshotWriter
from runner.training.tensors import TensorSink

MIB = 1 << 20


@pytest.fixture
def rank(tmp_path: Path) -> RankSpool:
    folder = tmp_path / "spool" / "rank-00000"
    folder.mkdir(parents=True)
    return RankSpool(folder, disk=tmp_path / "disk")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[RankSpool]:
    """A rank on a file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root")
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", mount]).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        (mount / "rank-00000").mkdir()
        yield RankSpool(mount / "rank-00000", disk=tmp_path / "disk")
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


@pytest.fixture
def cramped(rank: RankSpool, monkeypatch: pytest.MonkeyPatch) -> RankSpool:
    """A rank whose slots may take 24 MiB in memory, and the kernel kills for more."""
    monkeypatch.setattr(slots, "available_bytes", lambda folder: 24 * MIB - held_bytes(rank))
    return rank


def held_bytes(rank: RankSpool) -> int:
    files = [path for path in rank.folder.glob("slot-?") if not path.is_symlink()]
    return 512 * sum(path.stat().st_blocks for path in files)


def resident_pages(path: Path) -> int:
    return path.stat().st_blocks * 512 // 4096


def test_slots_are_there_before_the_first_save(rank: RankSpool, tmp_path: Path) -> None:
    memory = SlotMemory(rank, 2)
    memory.expect(3 * MIB)
    first = memory.get(0, 2 * MIB)

    assert len(first) == 3 * MIB  # nothing was made anew
    assert [resident_pages(rank.slot_path(i)) for i in (0, 1)] == [768, 768]
    assert memory.is_ready()


def test_a_state_that_outgrows_what_was_expected_gets_more(rank: RankSpool, tmp_path: Path) -> None:
    memory = SlotMemory(rank, 2)
    memory.expect(MIB)
    memory.get(0, MIB)[:5] = b"old 0"

    assert len(memory.get(0, 2 * MIB)) == 2 * MIB
    assert memory.get(0, 2 * MIB)[:5] == b"old 0"  # growing moves nothing


def test_a_slot_that_was_cut_short_is_made_whole(rank: RankSpool, tmp_path: Path) -> None:
    memory = SlotMemory(rank, 1)
    memory.get(0, MIB)
    os.truncate(rank.slot_path(0), 10)

    whole = memory.get(0, MIB)
    whole[MIB - 1] = 7  # a SIGBUS, if it were not

    assert rank.slot_path(0).stat().st_size == MIB


@pytest.mark.parametrize(
    ("available", "count", "on_disk", "words"),
    [
        (100 * MIB, 2, False, ""),
        (15 * MIB, 1, False, "1 in memory"),
        (5 * MIB, 1, True, "one on disk"),
    ],
)
def test_the_plan_is_stepped_down_with_one_warning_that_gives_the_numbers(
    rank: RankSpool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    available: int,
    count: int,
    on_disk: bool,
    words: str,
) -> None:
    monkeypatch.setattr(slots, "available_bytes", lambda folder: available)
    memory = SlotMemory(rank, 2)
    memory.expect(10 * MIB)
    memory.get(0, 10 * MIB)
    memory.get(0, 10 * MIB)

    assert (memory.count, memory.on_disk) == (count, on_disk)
    assert len(caplog.records) == (1 if words else 0)
    assert words in caplog.text
    assert ("2 slots of 10 MB" in caplog.text) == bool(words)
    assert (tmp_path / "disk").exists() == on_disk


def test_no_slots_means_one_on_disk_without_a_warning(
    rank: RankSpool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = SlotMemory(rank, 0)
    memory.expect(MIB)
    memory.get(0, MIB)

    assert memory.on_disk
    assert not caplog.records
    (file,) = (tmp_path / "disk").iterdir()
    assert file.stat().st_size == MIB
    rank.remove_disk_slots()
    assert not file.exists()


def test_a_full_file_system_is_found_out_and_not_run_into(small: RankSpool, tmp_path: Path) -> None:
    memory = SlotMemory(small, 2)
    memory.expect(3 * MIB)

    assert len(memory.get(1, 3 * MIB)) == 3 * MIB
    with pytest.raises(SpoolFull):  # and no SIGBUS: slot 1 has what slot 0 would need
        memory.get(0, 6 * MIB)
    assert resident_pages(small.slot_path(1)) == 768


def test_room_that_somebody_else_took_meanwhile_sends_the_slot_to_disk(
    small: RankSpool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "available_bytes", lambda folder: 100 * MIB)  # as it was
    (small.folder / "somebody-else").write_bytes(bytes(6 * MIB))
    memory = SlotMemory(small, 2)

    with pytest.raises(SpoolFull) as full:
        memory.get(0, 4 * MIB)
    assert memory.retreat_to_disk(full.value)
    assert len(memory.get(0, 4 * MIB)) == 4 * MIB
    assert not memory.retreat_to_disk(full.value)


def test_a_claimed_slot_is_not_moved_to_disk_under_its_reader(
    rank: RankSpool, tmp_path: Path
) -> None:
    memory = SlotMemory(rank, 1)
    memory.get(0, MIB)
    (rank.folder / "slot-0.claimed.json").write_text("{}")

    assert not rank.put_on_disk(0)
    assert rank.slot_path(0).stat().st_size == MIB


# ---------------------------------------------------------------- a state that grows


GROWTH = {
    "one slot is enough for it": ([10, 10, 10, 16, 16], "there is 1 in memory"),
    "one slot is, after all that the others hold is had": ([5, 5, 5, 21, 21], "1 in memory"),
    "memory has no slot for it": ([10, 10, 10, 30, 30], "one on disk"),
    "first there is one slot, then none": ([10, 10, 15, 15, 15], "1 in memory"),
}


@pytest.mark.parametrize(("sizes", "words"), GROWTH.values(), ids=GROWTH)
def test_a_state_that_grows_where_memory_is_short_costs_neither_a_kill_nor_the_newest_one(
    cramped: RankSpool, caplog: pytest.LogCaptureFixture, sizes: list[int], words: str
) -> None:
    trainer, taken = Trainer(cramped, 2), 0

    for step, mebibytes in enumerate(sizes, start=1):
        if trainer.save(step, mebibytes=mebibytes):
            taken = step
        assert [m.moment["step"] for m in cramped.complete()][-1] == taken
        assert held_bytes(cramped) <= 24 * MIB

    assert len(caplog.records) == 1
    assert words in caplog.text
    if trainer.memory.on_disk:
        assert taken == 4, "from then on there are snapshots to save them, and no others"
        assert held_bytes(cramped) == 0, "what was the newest is not, and is given back"
    else:
        assert taken == len(sizes)


def test_a_slot_that_is_too_many_is_given_back_when_it_is_persisted(cramped: RankSpool) -> None:
    trainer, claims = Trainer(cramped, 2), Claims(cramped)
    assert trainer.save(1, "best", mebibytes=10)
    assert trainer.save(2, mebibytes=10)

    assert not trainer.save(3, mebibytes=16), "step 1 must still be persisted"
    assert [m.moment["step"] for m in cramped.complete()] == [1, 2]
    assert claims.take(0) is not None
    assert not trainer.save(4, mebibytes=16)
    claims.release(0, must=False)
    assert trainer.save(5, mebibytes=16)

    assert [m.moment["step"] for m in cramped.complete()] == [5]
    assert held_bytes(cramped) < 17 * MIB


def test_a_save_that_must_be_takes_over_what_the_interval_asked_for_before_it(
    cramped: RankSpool,
) -> None:
    """Else a store that is out of reach would keep the memory that the newest state needs."""
    trainer = Trainer(cramped, 2)
    assert trainer.save(1, "interval", mebibytes=10)
    assert trainer.save(2, mebibytes=10)

    assert trainer.save(3, "preemption", mebibytes=16)

    (marker,) = cramped.complete()
    assert marker.moment["triggers"] == ["interval", "preemption"]


@pytest.mark.parametrize(("mebibytes", "left"), [(5, 2), (9, 7)])
def test_memory_that_is_given_back_is_mapped_by_nobody(
    small: RankSpool, mebibytes: int, left: int
) -> None:
    trainer = Trainer(small, 2)
    for step in (1, 2, 3):
        assert trainer.save(step, mebibytes=3)
    assert trainer.save(4, mebibytes=mebibytes), "at once, and with what the others had"

    assert [m.moment["step"] for m in small.complete()] == [4]
    free = os.statvfs(small.folder)
    assert free.f_bavail * free.f_frsize > left * MIB


def test_a_later_attempt_has_its_slots_in_memory_again(cramped: RankSpool) -> None:
    trainer = Trainer(cramped, 2)
    for step in (1, 2, 3):
        trainer.save(step, mebibytes=10)
    trainer.save(4, mebibytes=30)
    assert cramped.slots() == list(trainer.memory.planned)

    later = Trainer(cramped, 2)
    later.memory.expect(6 * MIB)
    wait_until(later.memory.is_ready, what="the slots")
    assert later.save(5, mebibytes=5)

    assert not later.memory.on_disk
    assert [m.moment["step"] for m in cramped.complete()] == [5]
    assert cramped.slots() == sorted(later.memory.planned)


# what the slots hold in MiB, newest first; the size that is wanted, what is available; what is kept
KEPT = {
    "all fit": ([10, 10], 10, 0, 2),
    "all fit, grown": ([10, 10], 12, 5, 2),
    "the older one makes room": ([10, 10], 12, 4, 1),
    "a third one that is not planned makes room, too": ([10, 10, 5], 12, 0, 2),
    "the tenth that is left to the training": ([10, 10], 20, 0, 0),
    "just so": ([10, 10], 19, 0, 1),
    "none": ([10, 10], 30, 4, 0),
    "there are none yet": ([0, 0], 10, 23, 2),
    "there are none yet, and there is room for one": ([0, 0], 10, 15, 1),
    "larger ones than are wanted": ([30, 30], 10, 0, 2),
}


@pytest.mark.parametrize(("held", "size", "available", "kept"), KEPT.values(), ids=KEPT)
def test_so_many_slots_are_kept(held: list[int], size: int, available: int, kept: int) -> None:
    sizes = {slot: mebibytes * MIB for slot, mebibytes in enumerate(held)}
    assert slots.slots_to_keep([0, 1], sizes, size * MIB, available * MIB) == kept


# ---------------------------------------------------------------- a kill inside a copy


class Killed(BaseException):
    """The trainer is gone: nothing of it runs any more."""


class MortalDevice:
    """Every tensor lives on it. When `is_dying`, a copy ends after the first of its tensors."""

    is_dying = False

    def handles(self, tensor: torch.Tensor) -> bool:
        return True

    def register(self, memory: mmap.mmap) -> None: ...

    def unregister(self, memory: mmap.mmap) -> None: ...

    def copy_now(self, pairs: Sequence[Pair]) -> None:
        for place, tensor in pairs:
            place.copy_(tensor)
            if self.is_dying:
                raise Killed

    def copy_beside(self, pairs: Sequence[Pair]) -> Any:
        raise AssertionError("overlap is off")

    def hold_compute(self, ticket: Any) -> None: ...

    def wait(self, ticket: Any) -> None: ...


class Trainer:
    """Its state are two tensors that are full of the number of the step."""

    def __init__(self, rank: RankSpool, count: int) -> None:
        self.device = MortalDevice()
        overlap = Overlap(self.device, [], enabled=False)
        self.memory = SlotMemory(rank, count)
        self._writer = SnapshotWriter(rank, self.memory, overlap, alive=lambda: None)

    def save(self, step: int, *triggers: str, mebibytes: int = 0) -> bool:
        """With `mebibytes` more than the state has by itself."""
        sink = TensorSink()
        for name, tensor in state_at(step).items():
            sink.add(tensor, f"model.{name}")
        if mebibytes:
            sink.add(torch.full((mebibytes * MIB,), step, dtype=torch.uint8), "model.more")
        created_at = "2025-11-21T05:46:00+00:00"
        moment = Moment(1, step, step, 0, step, created_at=created_at, triggers=triggers)
        return self._writer.take(moment, {"step": step}, sink, {}, beside=False)


def state_at(step: int) -> dict[str, torch.Tensor]:
    return {name: torch.full((1000,), float(step)) for name in ("bias", "weight")}


@pytest.mark.parametrize(("count", "continues_at"), [(1, 10), (2, 10), (3, 12)])
def test_a_kill_inside_a_copy_costs_what_only_a_third_slot_saves(
    rank: RankSpool, tmp_path: Path, count: int, continues_at: int
) -> None:
    """Step 10 is being persisted, and step 12 is in the second slot, if there is one.

    The copy of step 13 goes over step 12 where there are two slots, for step 10 is claimed. A kill
    in its middle costs the steps since 10. A third slot leaves step 12 as it is.
    """
    trainer = Trainer(rank, count)
    claims = Claims(rank)  # the supervisor's
    assert trainer.save(10, "interval")
    persisting = claims.take(0)
    assert persisting is not None
    assert trainer.save(12) == (count > 1)

    trainer.device.is_dying = True
    if count > 1:
        with pytest.raises(Killed):
            trainer.save(13)
    else:
        assert not trainer.save(13)  # passed over: there is nothing to copy it into

    newest = claims.complete()[-1]
    assert newest.moment["step"] == continues_at
    for marker in claims.complete():  # and all that is said to be complete is whole
        saved = safetensors.torch.load(read_slot(rank, marker)["model.safetensors"])
        expected = state_at(marker.moment["step"])
        assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_the_window_of_two_slots_is_shut_again_when_the_save_has_ended(
    rank: RankSpool, tmp_path: Path
) -> None:
    """With no slot claimed, a copy goes over the older one, and a kill in it costs one snapshot."""
    trainer = Trainer(rank, 2)
    claims = Claims(rank)
    trainer.save(10, "interval")
    claims.take(0)
    trainer.save(12)
    claims.release(0, must=False)

    trainer.device.is_dying = True
    with pytest.raises(Killed):
        trainer.save(13)

    assert [marker.moment["step"] for marker in claims.complete()] == [12]
