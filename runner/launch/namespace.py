"""Who lives in a container, as this machine's process table shows it.

All processes of a process namespace descend from its first one, orphans too, and each has a number
of its own in there beside the one that it has here. Source: pid_namespaces(7), proc_pid_status(5).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runner.launch.process_tree import ProcessEntry, read_table


def first_process(state: Mapping[str, Any]) -> int:
    """The number of a container's first process, 0 where our process table does not have it."""
    pid = int(state.get("Pid") or 0)
    return pid if pid and number_of(1, inhabitants(pid)[:1]) is not None else 0


def inhabitants(first: int) -> list[ProcessEntry]:
    """The first process and all that descend from it, parents first."""
    table = read_table()
    children: dict[int, list[ProcessEntry]] = defaultdict(list)
    for entry in table.values():
        children[entry.parent].append(entry)
    found = [table[first]] if first in table else []
    for entry in found:  # which grows
        found.extend(children[entry.pid])
    return found


def number_of(inner: int, entries: Iterable[ProcessEntry]) -> int | None:
    """Which of these has this number in its own namespace; None if there is no such one."""
    for entry in entries:
        if inner_number(entry.pid) == inner:
            return entry.pid
    return None


def inner_number(pid: int) -> int | None:
    """What a process is called in the innermost namespace that it is in."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:  # it has ended
        return None
    numbers = [line.split() for line in status.splitlines() if line.startswith("NSpid:")]
    return int(numbers[0][-1]) if numbers else None
