"""How much memory there is, how much may still be taken, and whether the kernel killed for it.

Pages of a tmpfs are charged to the cgroup of the process that touches them, and a reservation over
its limit is no error but an out-of-memory kill. So one asks first, and watches what is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_VMSTAT = Path("/proc/vmstat")
_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" with a number near 2^63


@dataclass(frozen=True)
class _Names:
    """How one version of cgroups calls what is read here."""

    limit: str
    used: str
    peak: str
    kills: str
    cache: tuple[str, ...]
    shared: str
    hits: str | None = None


# Source: the kernel's documentation, admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/memory.rst
_V2 = _Names(
    limit="memory.max",
    used="memory.current",
    peak="memory.peak",
    kills="memory.events",
    cache=("inactive_file", "active_file"),
    shared="shmem",
)
_V1 = _Names(
    limit="memory.limit_in_bytes",
    used="memory.usage_in_bytes",
    peak="memory.max_usage_in_bytes",
    kills="memory.oom_control",
    cache=("total_inactive_file", "total_active_file"),
    shared="total_shmem",
    hits="memory.failcnt",
)


@dataclass(frozen=True)
class Memory:
    """The memory of a cgroup with a limit, in bytes. Page cache that can be dropped is not used.

    `shared` of what is used lies in a tmpfs. `peak` is the most ever, cache included; None where
    the kernel does not tell.
    """

    limit: int
    used: int
    shared: int
    peak: int | None = None


def available_bytes(folder: Path) -> int:
    """What can still be written into `folder`, and be held in memory, without an end in a kill.

    The least of: free space of the file system, available memory of the machine, and what every
    memory cgroup above this process leaves, page cache that can be dropped not counted as used.
    """
    statistics = os.statvfs(folder)
    free = statistics.f_bavail * statistics.f_frsize
    return max(0, min([free, _machine_room(), *_cgroup_rooms()]))


def slots_that_fit(wanted: int, slot_bytes: int, available: int, held: int = 0) -> int:
    """How many of `wanted` slots there is memory for; `held` bytes of them are taken already.

    A tenth of what is available is left to the training itself.
    """
    room = held + int(0.9 * available)
    return min(wanted, room // max(1, slot_bytes))


def physical_memory() -> int:
    """What this machine has, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def limited_memory(root: Path = _CGROUP_ROOT, membership: Path = _MEMBERSHIP) -> Memory | None:
    """The memory of the innermost cgroup of this process that has a limit; None without one.

    Those further out are shared with strangers, for whom nobody here can make room.
    """
    for folder, names in _memory_groups(root, membership):
        try:
            limit = int((folder / names.limit).read_text())
            used = int((folder / names.used).read_text())
            statistics = (folder / "memory.stat").read_text()
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if limit < _UNLIMITED:
            cache = sum(field_of(statistics, key) or 0 for key in names.cache)
            shared = field_of(statistics, names.shared) or 0
            return Memory(limit, max(0, used - cache), shared, _number(folder / names.peak))
    return None


class OomWatch:
    """Whether the kernel has killed a process of ours for want of memory, since this was made."""

    def __init__(
        self, root: Path = _CGROUP_ROOT, membership: Path = _MEMBERSHIP, vmstat: Path = _VMSTAT
    ) -> None:
        self._places = root, membership, vmstat
        self._before = self._counts()

    def has_killed(self, *, by_sigkill: bool) -> bool:
        """`by_sigkill`: a process of ours has ended by SIGKILL, and nobody here sent it.

        Where the kernel counts no kills by cgroup (v1 before 4.13, and outside of all cgroups),
        that the limit was hit, or somebody killed on this machine, proves something only then.
        """
        certain, likely = self._counts()
        certain_before, likely_before = self._before
        if certain is not None and certain_before is not None:
            return certain > certain_before
        return by_sigkill and likely > likely_before

    def _counts(self) -> tuple[int | None, int]:
        """Kills in the cgroups of this process, None if they are not counted; and weaker signs."""
        root, membership, vmstat = self._places
        kills: list[int] = []
        hits: list[int] = []
        for folder, names in _memory_groups(root, membership):
            if (count := _counted(folder / names.kills, "oom_kill")) is not None:
                kills.append(count)
            if names.hits and (count := _number(folder / names.hits)) is not None:
                hits.append(count)
        machine = _counted(vmstat, "oom_kill") or 0
        # With v2 a group counts those below it too, with v1 it does not: the innermost has ours.
        return (kills[0] if kills else None), sum(hits) + machine


def field_of(text: str, key: str) -> int | None:
    """The number behind a word at the beginning of a line; None where there is none."""
    for line in text.splitlines():
        name, *values = line.split() or [""]
        if name == key and values and values[0].isdigit():
            return int(values[0])
    return None


def _machine_room() -> int:
    """What the kernel says can be had without swapping. Source: proc_meminfo(5).

    Read here and not with psutil: a trainer's image needs nothing but torch and this package.
    """
    return 1024 * (field_of(Path("/proc/meminfo").read_text(), "MemAvailable:") or 0)


def _cgroup_rooms(root: Path = _CGROUP_ROOT, membership: Path = _MEMBERSHIP) -> Iterator[int]:
    """Bytes left in each memory cgroup that this process is in, for cgroup v1 and v2."""
    for folder, names in _memory_groups(root, membership):
        try:
            limit = int((folder / names.limit).read_text())
            used = int((folder / names.used).read_text())
            statistics = (folder / "memory.stat").read_text()
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if limit < _UNLIMITED:
            yield limit - used + (field_of(statistics, names.cache[0]) or 0)


def _memory_groups(root: Path, membership: Path) -> Iterator[tuple[Path, _Names]]:
    """Every memory cgroup from ours up to the root. Source: cgroups(7)."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, _V2
        elif "memory" in controllers.split(","):
            base, names = root / "memory", _V1
        else:
            continue
        folder = base / path.lstrip("/")
        while True:
            yield folder, names
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _counted(path: Path, key: str) -> int | None:
    try:
        return field_of(path.read_text(), key)
    except OSError:
        return None
