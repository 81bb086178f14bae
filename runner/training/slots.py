"""The memory of the slots: asked for, reserved and touched before the first save needs it.

A page that is touched for the first time costs far more than copying into it (measured: 600 MB into
touched memory 45 ms, into untouched 1,030 ms), so a thread does it while training goes on. Memory
that is not there is not taken: the plan is stepped down to fewer slots, and at last to one on disk.
"""

from __future__ import annotations

import logging
import mmap
import threading
from pathlib import Path

import torch

from runner.errors import SpoolError
from runner.memory import available_bytes, slots_that_fit
from runner.spool import RankSpool, open_slot

log = logging.getLogger(__name__)

# Linux 5.14, see madvise(2); Python's mmap has no names for them.
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_CHUNK_BYTES = 8 << 20  # madvise holds the GIL: the training thread must not wait for long
_PAGE_BYTES = 4096


class SlotMemory:
    """The slots of one rank as the trainer has them mapped.

    `wanted` slots in memory, as many of them as fit; 0 is one slot on the rank's disk.
    """

    def __init__(self, rank: RankSpool, wanted: int) -> None:
        self._rank, self._wanted = rank, wanted
        self.count = max(1, wanted)
        self.on_disk = False
        self._maps: dict[int, mmap.mmap] = {}
        self._preparing: threading.Thread | None = None
        self._failure: Exception | None = None

    def expect(self, nbytes: int) -> None:
        """Prepare for states of this size, in the background."""
        self._settle(nbytes)
        self._preparing = threading.Thread(
            target=self._prepare, args=(nbytes,), name="slots", daemon=True
        )
        self._preparing.start()

    def is_ready(self) -> bool:
        return self._preparing is None or not self._preparing.is_alive()

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
        if known is None or len(known) < nbytes:
            self._settle(nbytes)  # which may put it on disk
        self._maps[slot] = _open_and_touch(self._rank.slot_path(slot), nbytes)
        return self._maps[slot]

    def retreat_to_disk(self, reason: Exception) -> bool:
        """Go on with one slot on disk; False if that is how it is already, or cannot be now."""
        if self.on_disk:
            return False
        log.warning("%s: from now on there is one slot, on disk", reason)
        self.count = 1
        self.on_disk = self._rank.put_on_disk(0)
        self._maps.clear()
        return self.on_disk

    def _finish_preparing(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            log.warning("the slots could not be prepared ahead: %s", failure)

    def _prepare(self, nbytes: int) -> None:
        try:
            for slot in range(self.count):
                self._maps[slot] = _open_and_touch(self._rank.slot_path(slot), nbytes)
        except (SpoolError, OSError) as error:
            self._failure = error

    def _settle(self, nbytes: int) -> None:
        """Decide how many slots of this size there will be."""
        if self.on_disk:
            return
        sizes = [_size(self._rank.slot_path(slot)) for slot in range(self.count)]
        held = sum(min(size, nbytes) for size in sizes)
        available = available_bytes(self._rank.folder)
        fits = min(self.count, slots_that_fit(self._wanted, nbytes, available, held))
        if fits >= self.count and self._wanted:
            return
        where = "on disk" if fits == 0 else "in memory"
        if self._wanted:
            log.warning(
                "memory is short: %d slots of %.0f MB were planned and %.0f MB can be had, so "
                "there is %s",
                self.count,
                nbytes / 1e6,
                (available + held) / 1e6,
                f"{fits} {where}" if fits else "one on disk, and snapshots only to save them",
            )
        self.count = max(1, fits)
        if fits == 0:
            self.on_disk = self._rank.put_on_disk(0)


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
