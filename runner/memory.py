"""How much memory may still be taken, before anything is taken.

Pages of a tmpfs are charged to the cgroup of the process that touches them, and a reservation over
its limit is no error but an out-of-memory kill. So one asks first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" with a number near 2^63


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


def _machine_room() -> int:
    """What the kernel says can be had without swapping. Source: proc_meminfo(5).

    Read here and not with psutil: a trainer's image needs nothing but torch and this package.
    """
    return 1024 * _stat(Path("/proc/meminfo"), "MemAvailable:")


def _cgroup_rooms(root: Path = _CGROUP_ROOT, membership: Path = _MEMBERSHIP) -> Iterator[int]:
    """Bytes left in each memory cgroup that this process is in, for cgroup v1 and v2."""
    for folder, limit_file, used_file, cache_key in _memory_groups(root, membership):
        try:
            limit = int((folder / limit_file).read_text())
            used = int((folder / used_file).read_text())
            cache = _stat(folder / "memory.stat", cache_key)
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if limit < _UNLIMITED:
            yield limit - used + cache


def _memory_groups(root: Path, membership: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Every memory cgroup from ours up to the root. Source: cgroups(7)."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        while True:
            yield folder, *names
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent


def _stat(path: Path, key: str) -> int:
    for line in path.read_text().splitlines():
        name, *values = line.split()
        if name == key:
            return int(values[0])
    return 0
