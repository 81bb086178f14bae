"""How much memory is left, from files as the kernel writes them, and how many slots fit into it."""

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
