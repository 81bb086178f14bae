"""When the memory guard speaks, by numbers as a cgroup gives them; and what it says of kills."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.memory import Memory, OomWatch
from runner.supervisor.events import MemoryShort
from runner.supervisor.memory_guard import MemoryGuard, explain, level_of, slot_bytes

MB = 10**6


@pytest.mark.parametrize(
    ("used", "slots", "level"),
    [
        (0, 0, 0),
        (950, 0, 0),
        (951, 0, 1),
        (987, 0, 1),
        (988, 0, 2),
        (1100, 0, 2),  # what is used and the limit are not read in the same instant
        # Beside slots of 600, 95 % of the other 400 are the bound.
        (979, 600, 0),
        (981, 600, 1),
        (996, 600, 2),
        # Of slots alone there may be as many as there is memory.
        (960, 960, 0),
        (990, 980, 0),
    ],
)
def test_the_bound_is_a_share_of_what_is_left_beside_the_slots(
    used: int, slots: int, level: int
) -> None:
    memory = Memory(limit=1000 * MB, used=used * MB, shared=slots * MB)

    assert level_of(memory, slots * MB, 0.95, growth=0) == level


@pytest.mark.parametrize(
    ("used", "growth", "level"), [(951, 48, 1), (951, 50, 2), (949, 500, 0), (970, 31, 2)]
)
def test_it_is_urgent_when_the_same_growth_once_more_would_be_too_much(
    used: int, growth: int, level: int
) -> None:
    memory = Memory(limit=1000 * MB, used=used * MB, shared=0)

    assert level_of(memory, 0, 0.95, growth * MB) == level


class Readings:
    """A cgroup of 1000 MB in which so much is used, and how often it was asked for."""

    def __init__(self, used: int = 0, shared: int = 0) -> None:
        self.used, self.shared, self.asked = used, shared, 0

    def __call__(self) -> Memory | None:
        self.asked += 1
        return Memory(1000 * MB, self.used * MB, self.shared * MB)


def looks(guard: MemoryGuard, *seconds: float) -> list[MemoryShort]:
    """What it says at these times."""
    found = [guard.look(at) for at in seconds]
    return [short for short in found if short is not None]


def test_it_speaks_once_at_the_bound_and_once_more_if_that_does_not_help(tmp_path: Path) -> None:
    readings = Readings(used=949)
    guard = MemoryGuard(tmp_path, 0.95, readings)
    assert looks(guard, 1, 2) == []

    readings.used = 960
    assert looks(guard, 3, 4) == [MemoryShort(3.0, 960 * MB, 1000 * MB)]
    readings.used = 990
    assert looks(guard, 5, 6) == [MemoryShort(5.0, 990 * MB, 1000 * MB, urgent=True)]
    assert readings.asked == 5, "after that there is nothing more to say"

    guard.begin()
    assert looks(guard, 7, 8) == [MemoryShort(7.0, 990 * MB, 1000 * MB, urgent=True)]


def test_growth_is_what_was_never_used_before(tmp_path: Path) -> None:
    """A step that takes a third of the memory, and gives it back, is none."""
    readings = Readings()
    guard = MemoryGuard(tmp_path, 0.95, readings)
    for second, readings.used in enumerate([600, 940, 600, 940, 600], 1):
        assert looks(guard, second) == []

    readings.used = 955
    assert looks(guard, 6) == [MemoryShort(6.0, 955 * MB, 1000 * MB)]
    readings.used = 978
    assert looks(guard, 7) == [MemoryShort(7.0, 978 * MB, 1000 * MB, urgent=True)]


def test_it_does_not_look_at_every_tick(tmp_path: Path) -> None:
    readings = Readings()
    guard = MemoryGuard(tmp_path, 0.95, readings)

    for tick in range(100):
        guard.look(1 + tick / 100)

    assert 5 <= readings.asked <= 15


def test_it_looks_more_closely_once_the_bound_is_passed(tmp_path: Path) -> None:
    readings = Readings(used=960)
    guard = MemoryGuard(tmp_path, 0.95, readings)

    for tick in range(100):
        guard.look(1 + tick / 100)

    assert 40 <= readings.asked <= 60


@pytest.mark.parametrize("share", [0.0, 0.95])
def test_it_is_silent_where_it_is_off_or_there_is_no_limit(tmp_path: Path, share: float) -> None:
    full = Readings(used=1000)
    guard = MemoryGuard(tmp_path, share, (lambda: None) if share else full)

    assert looks(guard, 1, 2) == []
    assert full.asked == 0


def test_slots_are_what_the_rank_holds_in_memory(tmp_path: Path) -> None:
    (tmp_path / "slot-0").write_bytes(bytes(1 << 20))
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    (tmp_path / "slot-1").symlink_to(tmp_path / "disk")
    (tmp_path / "slot-0.json").write_bytes(bytes(1 << 20))
    with (tmp_path / "slot-2").open("wb") as sparse:
        os.truncate(sparse.fileno(), 1 << 30)

    assert 1 << 20 <= slot_bytes(tmp_path) < (1 << 20) + (1 << 16)


def test_slots_that_lie_on_a_disk_are_no_memory(tmp_path: Path) -> None:
    """They are page cache, which is not counted as used: so nothing is to be taken off it."""
    with (tmp_path / "slot-0").open("wb") as slot:
        os.posix_fallocate(slot.fileno(), 0, 300 * MB)

    short = [MemoryShort(1.0, 960 * MB, 1000 * MB)]
    in_cache = MemoryGuard(tmp_path, 0.95, Readings(used=960, shared=0))
    in_memory = MemoryGuard(tmp_path, 0.95, Readings(used=960, shared=800))

    assert looks(in_cache, 1.0) == short
    assert looks(in_memory, 1.0) == [], "of 700 MB beside the slot, 660 are used, and 665 may be"


# ---------------------------------------------------------------- kills


class Oom(OomWatch):
    """Kills by the kernel, as a test has them."""

    def __init__(self, kills: Iterator[bool]) -> None:
        self._kills = kills

    def has_killed(self, *, by_sigkill: bool) -> bool:
        return next(self._kills)


@pytest.mark.parametrize(
    ("code", "killed", "named"),
    [
        (-9, True, True),
        (137, True, True),
        (1, True, True),  # the victim was a loader worker
        (0, True, False),  # it has finished all the same
        (-9, False, False),  # somebody's kill -9
    ],
)
def test_an_end_for_want_of_memory_is_named(
    tmp_path: Path, code: int, killed: bool, named: bool
) -> None:
    watch = Oom(iter([killed] * 2))
    guard = MemoryGuard(tmp_path, 0.95, Readings(), lambda: watch)

    verdict = guard.verdict(code)

    assert (verdict is not None) == named
    if verdict is not None:
        assert verdict[0] == "out of memory"


def test_the_explanation_has_the_peak_and_the_limit() -> None:
    text = explain(Memory(limit=200 * MB, used=20 * MB, shared=0, peak=199_600_000))
    assert "the peak was 200 MB of 200 MB; raise the limit" in text
    assert "the limit is 200 MB" in explain(Memory(200 * MB, 20 * MB, 0))
    assert "on this machine" in explain(None)
