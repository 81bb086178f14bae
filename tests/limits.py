"""Trainers that take more memory than there is, and cgroups that have little of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from nodes import PROGRAMS, Node, Started
from waiting import wait_until


@contextlib.contextmanager
def limited_group(limit: int) -> Iterator[Path]:
    """A cgroup with a limit on memory, v2 where that has it, else v1."""
    name = f"runner-test-{os.getpid()}"
    for root, key in (
        (Path("/sys/fs/cgroup"), "memory.max"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    ):
        with contextlib.suppress(OSError):
            (root / name).mkdir()
            if not (root / name / key).exists():
                (root / name).rmdir()
                continue
            (root / name / key).write_text(str(limit))
            for swap in ("memory.swap.max", "memory.memsw.limit_in_bytes"):
                with contextlib.suppress(OSError):
                    (root / name / swap).write_text("0" if "max" in swap else str(limit))
            break
    else:
        pytest.skip("no cgroup with a limit on memory can be made here: that takes root")
    try:
        yield root / name
    finally:
        with contextlib.suppress(OSError):
            wait_until(
                lambda: not (root / name / "cgroup.procs").read_text(), what="an empty group"
            )
            (root / name).rmdir()


def run_in(group: Path, node: Node, job: str) -> Started:
    supervisor = node.start("run", job)
    (group / "cgroup.procs").write_text(str(supervisor.pid))
    return supervisor


MB = 10**6
LIMIT = 900 * MB


def eater(
    node: Node, guard: str, resources: Mapping[str, str] | None = None, **params: object
) -> str:
    """A job whose trainer takes more and more memory."""
    return node.job(
        "python",
        str(PROGRAMS / "eats_memory.py"),
        params=params,
        resources={"memory_guard": guard, **(resources or {})},
        env={"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
