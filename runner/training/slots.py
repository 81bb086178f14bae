"""The memory of the slots: asked for, reserved and touched before the first save needs it.

A page that is touched for the first time costs far more than copying into it (measured: 600 MB into
touched memory 45 ms, into untouched 1,030 ms), so a thread does it while training goes on. Memory
that is not there is not taken: the plan is stepped down to fewer slots, and at last to one on disk.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from runner.errors import SpoolError, SpoolFull
from runner.memory import available_bytes, slots_that_fit
from runner.spool import ALL_SLOTS, RankSpool, open_slot

log = logging.getLogger(__name__)

# Linux 5.14, see madvise(2); Python's mmap has no names for them.
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_CHUNK_BYTES = 8 << 20  # madvise holds the GIL: the training thread must not wait for long
_PAGE_BYTES = 4096
_EMPTY = (-1, -1)  # older than all that can be in a slot


class SlotMemory:
    """The slots of one rank as the trainer has them mapped.

    `wanted` slots in memory, as many of them as fit; 0 is one slot on the rank's disk. `planned`
    are those that may be written. Others hold what was complete when the plan was made; they are
    given back (`shed`) as soon as nobody needs that any more.
    """

    def __init__(self, rank: RankSpool, wanted: int) -> None:
        self._rank, self._wanted = rank, wanted
        self.planned = tuple(self._newest_first()[: max(1, wanted)])
        self.on_disk = False
        self._maps: dict[int, mmap.mmap] = {}
        self._dropped: list[mmap.mmap] = []
        self._preparing: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def count(self) -> int:
        return len(self.planned)

    def expect(self, nbytes: int) -> None:
        """Prepare for states of this size, in the background."""
        try:
            self._settle(nbytes)
        except SpoolFull as error:
            self._failure = error
            return
        self.shed()
        self._preparing = threading.Thread(
            target=self._prepare, args=(nbytes, self.planned), name="slots", daemon=True
        )
        self._preparing.start()

    def is_ready(self) -> bool:
        return self._preparing is None or not self._preparing.is_alive()

    def plan_for(self, nbytes: int) -> None:
        """Have a plan that holds for states of this size: fewer slots, if memory is short for it.

        Waits until what was expected is prepared. Raises SpoolFull where not even a slot on disk
        can be had.
        """
        self._finish_preparing()
        if any(self._rank.memory_of(slot) < nbytes for slot in self.planned):
            self._settle(nbytes)

    def has_room(self, slot: int, nbytes: int) -> bool:
        """Whether a slot can be had in this size now. If not, others are to be given back first."""
        growth = nbytes - self._rank.memory_of(slot)
        return (
            self._rank.is_on_disk(slot)
            or growth <= 0
            or slots_that_fit(1, growth, available_bytes(self._rank.folder)) > 0
        )

    def get(self, slot: int, nbytes: int) -> mmap.mmap:
        """A slot's memory, at least so large. Waits until what was expected is prepared.

        A slot that another process has cut short is made whole again: a store into a mapping past
        the end of its file would be a SIGBUS. Raises SpoolFull where there is no room.
        """
        self._finish_preparing()
        known = self._maps.get(slot)
        whole = _size(self._rank.slot_path(slot))
        if known is not None and len(known) >= nbytes and whole >= len(known):
            return known
        memory = _open_and_touch(self._rank.slot_path(slot), nbytes)
        self._unmap(slot)
        self._maps[slot] = memory
        return memory

    def shed(self, outdated: Collection[int] = ()) -> list[int]:
        """Give back the slots that are not in the plan any more; which of them it could be done to.

        Not one that is claimed, nor the newest complete one, nor one that must be persisted, but
        for those that are `outdated`.
        """
        surplus = [s for s in self._rank.slots() if s not in self.planned]
        if not surplus:
            return []
        complete = self._rank.complete()
        needed = {m.slot for m in complete if m.must and m.slot not in outdated}
        needed.update(m.slot for m in complete[-1:])
        gone = [s for s in surplus if s not in needed and self._rank.remove_slot(s)]
        for slot in gone:
            self._unmap(slot)
        return gone

    def dropped(self) -> list[mmap.mmap]:
        """What was handed out by `get` and is of no use any more, since this was last asked."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def retreat_to_disk(self, reason: Exception) -> bool:
        """Go on with one slot on disk; False if that is how it is already, or cannot be."""
        if self.on_disk or not self._plan_disk():
            return False
        log.warning("%s: from now on there is one slot, on disk", reason)
        return True

    def _unmap(self, slot: int) -> None:
        memory = self._maps.pop(slot, None)
        if memory is not None:
            self._dropped.append(memory)

    def _finish_preparing(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            log.warning("the slots could not be prepared ahead: %s", failure)

    def _prepare(self, nbytes: int, slots: Sequence[int]) -> None:
        try:
            for slot in slots:
                if self.has_room(slot, nbytes):  # else when what is not in the plan is given back
                    self._maps[slot] = _open_and_touch(self._rank.slot_path(slot), nbytes)
        except (SpoolError, OSError) as error:
            self._failure = error

    def _settle(self, nbytes: int) -> None:
        """Decide how many slots of this size there will be, and which."""
        if self.on_disk:
            return
        sizes = {slot: self._rank.memory_of(slot) for slot in self._rank.slots()}
        available = available_bytes(self._rank.folder)
        newest_first = self._newest_first()
        fits = slots_to_keep(newest_first[: self.count], sizes, nbytes, available)
        if not self._wanted:
            fits = 0
        elif fits < self.count:
            where = "on disk" if fits == 0 else "in memory"
            log.warning(
                "memory is short: %d slots of %.0f MB were planned and %.0f MB can be had, so "
                "there is %s",
                self.count,
                nbytes / 1e6,
                (available + sum(min(size, nbytes) for size in sizes.values())) / 1e6,
                f"{fits} {where}" if fits else "one on disk, and snapshots only to save them",
            )
        if fits:
            self.planned = tuple(newest_first[:fits])
        elif not self._plan_disk():
            raise SpoolFull(f"there is neither memory nor a disk for {nbytes / 1e6:.1f} MB")

    def _plan_disk(self) -> bool:
        """From now on one slot, on disk: beside the newest complete one, until it is complete."""
        orders = self._orders()
        links = [slot for slot in ALL_SLOTS if self._rank.is_on_disk(slot)]
        links.sort(key=lambda slot: orders.get(slot, _EMPTY))
        slot = next(iter([*links, *(s for s in ALL_SLOTS if s not in orders)]))
        self._unmap(slot)
        if not self._rank.put_on_disk(slot):
            return False
        self.planned, self.on_disk = (slot,), True
        return True

    def _newest_first(self) -> list[int]:
        """All slots that are not on disk; first what holds the newest state, last what is not."""
        orders = self._orders()
        return sorted(
            (slot for slot in ALL_SLOTS if not self._rank.is_on_disk(slot)),
            key=lambda slot: (orders.get(slot, _EMPTY), self._rank.memory_of(slot), -slot),
            reverse=True,
        )

    def _orders(self) -> dict[int, tuple[int, int]]:
        """How new what a slot holds is, for all that hold something."""
        markers = (*self._rank.complete(), *self._rank.claimed())
        return {marker.slot: marker.order for marker in markers}


def slots_to_keep(
    newest_first: Sequence[int], sizes: Mapping[int, int], nbytes: int, available: int
) -> int:
    """How many of these slots, the newest, can all have `nbytes` when all others are given back."""
    for count in range(len(newest_first), 0, -1):
        kept = newest_first[:count]
        held = sum(min(sizes.get(slot, 0), nbytes) for slot in kept)
        given_back = sum(size for slot, size in sizes.items() if slot not in kept)
        if slots_that_fit(count, nbytes, available + given_back, held) == count:
            return count
    return 0


def _open_and_touch(path: Path, nbytes: int) -> mmap.mmap:
    """Map a slot so that no store into it has to wait for its page.

    Pages that an earlier attempt left are mapped sixteen at a time if they are asked for to be read
    (measured, 500 MB: 0.07 s, and 0.12 s one by one), and a tmpfs lets them be written then. Those
    that nobody had before are had one by one, and faster if they are asked for to be written.
    """
    is_there = _size(path) >= nbytes
    memory = open_slot(path, nbytes)
    for begin in range(0, len(memory), _CHUNK_BYTES):
        length = min(_CHUNK_BYTES, len(memory) - begin)
        try:
            if is_there:
                memory.madvise(_MADV_POPULATE_READ, begin, length)
            memory.madvise(_MADV_POPULATE_WRITE, begin, length)
        except OSError:  # an older kernel, or a file system that cannot
            chunk = torch.frombuffer(memory, dtype=torch.uint8, offset=begin, count=length)
            chunk[::_PAGE_BYTES].add_(0)
    return memory


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
