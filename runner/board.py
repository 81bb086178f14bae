"""The board: one mapped page of the spool, progress one way and requests the other.

Plain memory accesses of aligned 8-byte words: looking at it at every boundary costs nothing.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum
from pathlib import Path

from runner.errors import SpoolError
from runner.histogram import BUCKETS, bucket_of
from runner.regular import open_regular

_BOARD_BYTES = 4096
_MAGIC = 0x52554E4E4552_0001  # "RUNNER", version 1
_PHASE_AT, _PHASE_BYTES = 2048, 64


class Request(IntEnum):
    """What the supervisor asks of the trainer at its next boundary."""

    NONE = 0
    SAVE = 1
    SAVE_AND_STOP = 2


class Why(IntEnum):
    """The trigger of a requested save."""

    INTERVAL = 0
    PREEMPTION = 1
    INTERRUPT = 2
    MANUAL = 3

    @property
    def trigger(self) -> str:
        return self.name.lower()


class Account(IntEnum):
    """What the trainer's time goes into, from `attach` on; each has its word on the board."""

    STARTUP = 0
    RESTORE = 1
    PRODUCTIVE = 2
    STALL = 3
    VALIDATION = 4

    @property
    def word(self) -> str:
        return f"{self.name.lower()}_us"


class _Word:
    """One aligned 8-byte field of the board: a plain memory access, so it is never seen torn."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, board: Board, owner: type) -> int:
        return board.words[self._index]

    def __set__(self, board: Board, value: int) -> None:
        board.words[self._index] = value


class _Durations:
    """A histogram of durations: a word for each bucket of `runner.histogram`, then microseconds."""

    WORDS = BUCKETS + 1

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, board: Board, owner: type) -> Durations:
        return Durations(board.words, self._index)


class Durations:
    """One histogram of a board."""

    def __init__(self, words: memoryview, index: int) -> None:
        self._words, self._index = words, index

    def observe(self, seconds: float) -> None:
        """Count a duration; for the writer alone."""
        self._words[self._index + bucket_of(seconds)] += 1
        self._words[self._index + BUCKETS] += int(1e6 * seconds)

    def read(self) -> tuple[list[int], float]:
        """The counts, and the sum in seconds."""
        words = self._words[self._index : self._index + BUCKETS + 1].tolist()
        return words[:BUCKETS], words[BUCKETS] / 1e6


class Board:
    """The mapped page. Times are `CLOCK_MONOTONIC` in nanoseconds, 0 is never.

    The first block is written by the trainer alone, the second by the supervisor alone.
    """

    pid = _Word(2)
    step = _Word(3)
    epoch = _Word(4)
    batch = _Word(5)
    heartbeat_ns = _Word(6)
    progress = _Word(7)  # counts boundaries and signs of life: hang detection looks at this
    restored = _Word(8)  # 1 when the state is in place and the slot it came from may be used again
    answered = _Word(9)  # the number of the last request that was obeyed
    first_step_ns = _Word(10)  # when this attempt finished its first step
    productive_us = _Word(11)  # microseconds of steps since the attempt began, see `Account`
    held = _Word(12)  # 1 while the trainer waits at the boundary named by `hold_at_step`
    epochs = _Word(13)  # of the whole run, 0 where the script has no epochs
    finished = _Word(14)  # 1 after the run's last boundary
    step_us = _Word(15)  # microseconds that the last step took
    sick_since = _Word(16)  # first step whose metrics are not finite, plus one; 0: they are
    sick_steps = _Word(17)  # for how many steps they have not been
    stall_us = _Word(18)
    validation_us = _Word(19)
    restore_us = _Word(20)
    startup_us = _Word(21)  # since `attach`; nothing before that is on the board
    account = _Word(22)  # what the time goes into now
    account_ns = _Word(23)  # since when; 0 before `attach`, and while the words change
    expected_steps = _Word(60)  # of the whole run, as it seems now; 0: it cannot be known

    request_number = _Word(64)
    request_kind = _Word(65)
    request_why = _Word(66)
    deadline_ns = _Word(67)
    supervisor_pid = _Word(68)
    supervisor_ns = _Word(69)
    persisted_step = _Word(70)  # newest durable step, plus one; 0 is none
    interval_ms = _Word(71)  # between two saves, where the job leaves it to the supervisor
    prepared = _Word(72)  # 1 when what the attempt begins from lies in the spool

    stalls = _Durations(128)  # what the loop waited at boundaries with a snapshot; the trainer's
    steps = _Durations(160)  # what the steps took; the trainer's

    def __init__(self, path: Path) -> None:
        descriptor = open_regular(path, os.O_RDWR)
        try:
            if os.fstat(descriptor).st_size != _BOARD_BYTES:
                raise SpoolError(f"{path} is no board")
            self._map = mmap.mmap(descriptor, _BOARD_BYTES)
        finally:
            os.close(descriptor)
        self.words = memoryview(self._map).cast("Q")
        if self.words[0] != _MAGIC:
            raise SpoolError(f"{path} is no board of this version")

    def ask(self, kind: Request, why: Why, deadline_ns: int = 0) -> int:
        """Ask the trainer for something; the number of the request. Its number is written last."""
        self.request_kind, self.request_why, self.deadline_ns = int(kind), int(why), deadline_ns
        self.request_number += 1
        return self.request_number

    @property
    def phase(self) -> str:
        """What the loop is doing, in a word."""
        raw = bytes(self._map[_PHASE_AT : _PHASE_AT + _PHASE_BYTES])
        return raw.split(b"\0", 1)[0].decode("utf-8", "replace")

    @phase.setter
    def phase(self, name: str) -> None:
        raw = name.encode()[: _PHASE_BYTES - 1]
        self._map[_PHASE_AT : _PHASE_AT + _PHASE_BYTES] = raw.ljust(_PHASE_BYTES, b"\0")


def blank_board() -> bytes:
    """The content of a new board, on which nothing is written yet."""
    return _MAGIC.to_bytes(8, "little") + bytes(_BOARD_BYTES - 8)
