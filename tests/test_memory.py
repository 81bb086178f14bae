"""How much memory is left, what is used and who was killed for it, from files as the kernel writes
them; and how many slots fit.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from runner import memory

MIB = 1 << 20


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def rooms(tmp_path: Path, membership: str) -> list[int]:
    (tmp_path / "membership").write_text(membership)
    return list(memory._cgroup_rooms(tmp_path / "cgroup", tmp_path / "membership"))


def test_a_v2_group_leaves_its_limit_less_what_is_used_plus_the_cache(tmp_path: Path) -> None:
    group(
        tmp_path / "cgroup" / "a" / "b",
        memory__max=f"{100 * MIB}\n",
        memory__current=f"{70 * MIB}\n",
        memory__stat=f"anon 1\ninactive_file {20 * MIB}\n",
    )

    assert rooms(tmp_path, "0::/a/b\n") == [50 * MIB]


def test_the_groups_above_count_too(tmp_path: Path) -> None:
    group(
        tmp_path / "cgroup" / "a",
        memory__max=str(10 * MIB),
        memory__current=str(9 * MIB),
        memory__stat="inactive_file 0\n",
    )
    group(
        tmp_path / "cgroup" / "a" / "b",
        memory__max="max\n",
        memory__current="1",
        memory__stat="inactive_file 0\n",
    )

    assert rooms(tmp_path, "0::/a/b\n") == [1 * MIB]


def test_a_v1_group_is_read_and_its_word_for_no_limit_is_known(tmp_path: Path) -> None:
    stat = "total_inactive_file 0\n"
    group(
        tmp_path / "cgroup" / "memory" / "job",
        memory__limit_in_bytes=str(8 * MIB),
        memory__usage_in_bytes=str(3 * MIB),
        memory__stat=stat,
    )
    group(
        tmp_path / "cgroup" / "memory",
        memory__limit_in_bytes="9223372036854771712",
        memory__usage_in_bytes=str(3 * MIB),
        memory__stat=stat,
    )

    assert rooms(tmp_path, "7:cpu,cpuacct:/x\n5:memory:/job\n") == [5 * MIB]


def test_without_cgroups_nothing_is_said(tmp_path: Path) -> None:
    assert rooms(tmp_path, "0::/\n") == []


def test_what_is_available_never_exceeds_the_file_system(tmp_path: Path) -> None:
    import os

    statistics = os.statvfs(tmp_path)

    assert 0 < memory.available_bytes(tmp_path) <= statistics.f_blocks * statistics.f_frsize


@pytest.mark.parametrize(
    ("wanted", "slot", "available", "held", "fits"),
    [
        (2, 100, 1000, 0, 2),
        (2, 100, 200, 0, 1),  # a tenth is left to the training
        (2, 100, 100, 0, 0),
        (2, 100, 0, 200, 2),  # they are there already
        (3, 100, 112, 200, 3),
        (0, 100, 1000, 0, 0),
        (2, 0, 0, 0, 0),
    ],
)
def test_so_many_slots_fit(wanted: int, slot: int, available: int, held: int, fits: int) -> None:
    assert memory.slots_that_fit(wanted, slot, available, held) == fits


# ---------------------------------------------------------------- a limit, and what is used of it

V2_STAT = f"""anon {30 * MIB}
file {55 * MIB}
shmem {25 * MIB}
inactive_anon {40 * MIB}
active_anon {15 * MIB}
inactive_file {20 * MIB}
active_file {10 * MIB}
"""
V1_STAT = f"""cache {55 * MIB}
shmem 1
inactive_file 1
active_file 1
total_cache {55 * MIB}
total_shmem {25 * MIB}
total_inactive_file {20 * MIB}
total_active_file {10 * MIB}
"""


def limited(tmp_path: Path, membership: str) -> memory.Memory | None:
    (tmp_path / "membership").write_text(membership)
    return memory.limited_memory(tmp_path / "cgroup", tmp_path / "membership")


def test_what_is_used_counts_no_page_cache_but_what_lies_in_a_tmpfs(tmp_path: Path) -> None:
    expected = memory.Memory(100 * MIB, used=60 * MIB, shared=25 * MIB, peak=95 * MIB)
    group(
        tmp_path / "cgroup" / "a",
        memory__max=f"{100 * MIB}\n",
        memory__current=f"{90 * MIB}\n",
        memory__peak=f"{95 * MIB}\n",
        memory__stat=V2_STAT,
    )
    group(
        tmp_path / "cgroup" / "memory" / "b",
        memory__limit_in_bytes=f"{100 * MIB}\n",
        memory__usage_in_bytes=f"{90 * MIB}\n",
        memory__max_usage_in_bytes=f"{95 * MIB}\n",
        memory__stat=V1_STAT,
    )

    assert limited(tmp_path, "0::/a\n") == expected
    assert limited(tmp_path, "4:memory:/b\n0::/\n") == expected


def test_the_innermost_group_with_a_limit_counts(tmp_path: Path) -> None:
    for place, limit in (("", 50), ("a", 100), ("a/b", 0)):
        group(
            tmp_path / "cgroup" / place,
            memory__max=str(limit * MIB) if limit else "max\n",
            memory__current=str(MIB),
            memory__stat="",
        )

    found = limited(tmp_path, "0::/a/b\n")

    assert found == memory.Memory(100 * MIB, MIB, 0, peak=None)
    assert limited(tmp_path, "0::/somewhere/else\n") is not None, "a container sees its own as /"


def test_without_a_limit_there_is_nothing_to_guard(tmp_path: Path) -> None:
    group(
        tmp_path / "cgroup" / "memory",
        memory__limit_in_bytes="9223372036854771712",
        memory__usage_in_bytes="1",
        memory__stat=V1_STAT,
    )

    assert limited(tmp_path, "4:memory:/\n0::/\n") is None


# ---------------------------------------------------------------- kills by the kernel

EVENTS = "low 0\nhigh 0\nmax {max}\noom {oom}\noom_kill {oom_kill}\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {oom_kill}\n"
OLD_CONTROL = "oom_kill_disable 0\nunder_oom 0\n"

KILLS: dict[str, tuple[dict[str, str], dict[str, str], tuple[bool, bool]]] = {
    # what the files hold before, and after; whether it is a kill after SIGKILL, and after code 1
    "v2: a kill": (
        {"a/memory.events": EVENTS.format(max=3, oom=0, oom_kill=0)},
        {"a/memory.events": EVENTS.format(max=9, oom=1, oom_kill=1)},
        (True, True),
    ),
    "v2: one of an attempt before": (
        {"a/memory.events": EVENTS.format(max=9, oom=1, oom_kill=1)},
        {"a/memory.events": EVENTS.format(max=12, oom=1, oom_kill=1)},
        (False, False),
    ),
    "v2: a kill among the neighbours": (
        {"memory.events": EVENTS.format(max=0, oom=0, oom_kill=0)}
        | {"a/memory.events": EVENTS.format(max=0, oom=0, oom_kill=0)},
        {"memory.events": EVENTS.format(max=0, oom=1, oom_kill=1)},
        (False, False),
    ),
    "v1: a kill": (
        {"memory/b/memory.oom_control": CONTROL.format(oom_kill=2)},
        {"memory/b/memory.oom_control": CONTROL.format(oom_kill=3)},
        (True, True),
    ),
    "v1: the limit was hit, and cache was dropped": (
        {"memory/b/memory.oom_control": CONTROL.format(oom_kill=0), "memory/b/memory.failcnt": "1"},
        {"memory/b/memory.failcnt": "800"},
        (False, False),
    ),
    "v1 of an old kernel: the limit was hit": (
        {"memory/b/memory.oom_control": OLD_CONTROL, "memory/b/memory.failcnt": "1"},
        {"memory/b/memory.failcnt": "2"},
        (True, False),
    ),
    "no cgroup: a kill on this machine": (
        {"vmstat": "pgfault 12\noom_kill 4\n"},
        {"vmstat": "pgfault 15\noom_kill 5\n"},
        (True, False),
    ),
    "no cgroup, no kill": ({"vmstat": "oom_kill 4\n"}, {}, (False, False)),
    "nothing is counted": ({}, {}, (False, False)),
}


@pytest.mark.parametrize(("before", "after", "expected"), KILLS.values(), ids=KILLS)
def test_a_kill_for_want_of_memory_is_told_from_others(
    tmp_path: Path, before: dict[str, str], after: dict[str, str], expected: tuple[bool, bool]
) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("4:memory:/b\n0::/a\n")

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)

    write(before)
    watch = memory.OomWatch(root, membership, root / "vmstat")
    write(after)

    assert (watch.has_killed(by_sigkill=True), watch.has_killed(by_sigkill=False)) == expected


@pytest.mark.parametrize(
    ("text", "key", "number"),
    [
        ("oom 1\noom_kill 2\n", "oom_kill", 2),
        ("oom_kill_disable 0\nunder_oom 0\n", "oom_kill", None),
        ("MemFree: 1 kB\nMemAvailable:   20 kB\n", "MemAvailable:", 20),
        ("oom_kill\n\n", "oom_kill", None),
        ("oom_kill max\n", "oom_kill", None),
        ("", "oom_kill", None),
    ],
)
def test_a_number_is_found_behind_its_word(text: str, key: str, number: int | None) -> None:
    assert memory.field_of(text, key) == number
