"""What a process and its descendants have of memory, as the kernel tells.

Only these processes are looked at: on a node with thousands of others that costs no more.
Sources: proc_pid_status(5), proc_tid_children(5).
"""

from __future__ import annotations

import contextlib
from pathlib import Path


def memory_bytes(pid: int) -> int:
    """Bytes that are theirs alone; 0 once they have ended.

    Neither files nor shared memory, such as the slots, count. Pages that a forked process still
    shares with its parent count for both.
    """
    found, left = 0, [pid]
    while left:
        process = Path("/proc", str(left.pop()))
        with contextlib.suppress(OSError):  # it has ended meanwhile
            line = (process / "status").read_bytes().partition(b"\nRssAnon:")[2].split(maxsplit=1)
            found += 1024 * int(line[0]) if line else 0
            for thread in (process / "task").iterdir():
                left += map(int, (thread / "children").read_bytes().split())
    return found
