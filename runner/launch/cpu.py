"""What processes have used of the CPU, as the process table tells. Source: proc_pid_stat(5)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def session_seconds(session: int) -> float:
    """What the living processes of a session have used, their dead children included."""
    ticks = 0
    for name in os.listdir("/proc"):  # noqa: PTH208 - a Path for each process is too slow
        fields = _fields(name) if name.isdigit() else []
        if fields and int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))
    return ticks / _TICKS_PER_SECOND


def seconds_of(pids: Iterable[int]) -> float:
    """What these processes have used, their dead children included; 0 for those that have ended."""
    ticks = 0
    for pid in pids:
        ticks += sum(map(int, _fields(str(pid))[11:15]))
    return ticks / _TICKS_PER_SECOND


def _fields(pid: str) -> list[bytes]:
    """The fields behind the name; none of a process that has ended meanwhile."""
    try:
        text = Path("/proc", pid, "stat").read_bytes()
    except OSError:
        return []
    return text[text.rindex(b")") + 2 :].split()
