"""Ends the trainer before the kernel ends everything.

In a container that has used up its memory, kubelet has the kernel kill all processes together
(`memory.oom.group`): the trainer, this supervisor, and with the last of them the slots. So what is
used is watched, and short of the limit the trainer is asked to save and to leave. If it goes on
growing until the next look might come too late, it is killed, and its newest slot is what is saved.

Page cache does not count, since the kernel drops it first. The slots do not count on either side,
used or limit: they do not grow, and ending the trainer does not make them smaller.
"""

from __future__ import annotations

import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from runner.memory import Memory, OomWatch, limited_memory
from runner.supervisor.events import MemoryShort

_LOOK_SECONDS = 0.1
_CLOSE_LOOK_SECONDS = 0.02  # once the bound is passed
_PATIENCE = 0.75  # of what is left above the bound, to a trainer that was asked to leave
_SHELLS_ADD = 128  # to a signal's number, in the exit code of a shell
_KILLED = (-signal.SIGKILL, _SHELLS_ADD + signal.SIGKILL)


class MemoryGuard:
    """Looks at the memory of one rank's attempts. `share` of the limit is the bound, 0 is off.

    `rank` is the rank's folder in the spool.
    """

    def __init__(
        self,
        rank: Path,
        share: float,
        read: Callable[[], Memory | None] = limited_memory,
        watch: Callable[[], OomWatch] = OomWatch,
    ) -> None:
        self._rank, self._share, self._read, self._watch = rank, share, read, watch
        self._oom = watch()
        self._told = 0
        self._look_at = 0.0
        self._most: int | None = None

    def begin(self) -> None:
        """A new attempt: what happened before is no longer of interest."""
        self._oom = self._watch()
        self._told = 0
        self._most = None

    def look(self, now: float) -> MemoryShort | None:
        """What is to be told: once at the bound, and once more, urgently, close to the limit."""
        if not self._share or self._told == 2 or now < self._look_at:
            return None
        self._look_at = now + _LOOK_SECONDS
        memory = self._read()
        if memory is None:
            return None
        slots = min(slot_bytes(self._rank), memory.shared)
        most = memory.used if self._most is None else self._most
        self._most = max(most, memory.used)
        level = level_of(memory, slots, self._share, self._most - most)
        if level:
            self._look_at = now + _CLOSE_LOOK_SECONDS
        if level <= self._told:
            return None
        self._told = level
        return MemoryShort(now, memory.used, memory.limit, urgent=level == 2)

    def verdict(self, code: int, killed: bool | None = None) -> tuple[str, str] | None:
        """Cause and explanation, if the trainer has ended with this code for want of memory.

        A loader worker may have been the victim: then the trainer ends by an exception. `killed` is
        what a container's engine says; None is to ask the kernel's counts.
        """
        if code and killed is None:
            killed = self._oom.has_killed(by_sigkill=code in _KILLED)
        if not code or not killed:
            return None
        return "out of memory", explain(self._read())


def level_of(memory: Memory, slots: int, share: float, growth: int) -> int:
    """0: there is room. 1: the bound is passed. 2: it may be too late at the next look. Pure.

    `growth` is by how many bytes more is used than ever before the last look: what a step takes
    and gives back again is none.
    """
    room, own = memory.limit - slots, memory.used - slots
    bound = share * room
    if own <= bound:
        return 0
    return 2 if own > min(bound + _PATIENCE * (room - bound), room - growth) else 1


def slot_bytes(rank: Path) -> int:
    """What the rank's slots hold in memory; those on disk, and links to them, hold nothing."""
    return sum(_allocated(rank))


def _allocated(rank: Path) -> Iterator[int]:
    for path in (*rank.glob("slot-?"), rank / "fetched"):
        try:
            status = path.lstat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            yield 512 * status.st_blocks


def explain(memory: Memory | None) -> str:
    """What happened, in a sentence, and what may be done."""
    what = "the kernel killed a process of the trainer for want of memory"
    if memory is None:
        return f"{what} on this machine; make the batches smaller, or use fewer slots or workers"
    peak = "" if memory.peak is None else f"the peak was {megabytes(memory.peak)} of "
    return (
        f"{what}: {peak or 'the limit is '}{megabytes(memory.limit)}; raise the limit, make the "
        "batches smaller, or use fewer slots or workers"
    )


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f} MB"
