"""This session's share of the processor, beside that of the trainer's session.

Where autogroups are on, as they are by default, Linux divides the processor between sessions first,
and only then, by their niceness, between the threads in one (sched(7)). A trainer has a session of
its own, so the threads that make its states durable would take half of the processor from it,
however nice they are: measured on two cores, steps beside a save took twice as long. So the whole
session becomes nice, if it is ours: if nobody is in it but us, what we have started, and who has
started us and waits. In a cgroup with a share of its own, such as a container's, the kernel does
without autogroups, and a thread's own niceness counts.

A supervisor that is killed leaves the session as it is, at the cost of whoever uses it then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

from runner.launch.process_tree import ProcessEntry, read_table

log = logging.getLogger(__name__)

NICENESS = 10
"""That of the threads that give way to the trainer: about a tenth of a full share."""

_ATTEMPTS = 3
_PAUSE_SECONDS = 0.11  # those without rights may make one change in 0.1 s, all of them together


class SessionShare:
    """Gives way, and takes back what was given. `file` is this process's `autogroup`.

    Where that is not there, or nothing may be written to it, everything stays as it is.
    """

    def __init__(self, file: Path = Path("/proc/self/autogroup")) -> None:
        self._file = file
        self._before: int | None = None

    def give_way(self) -> None:
        """Let the trainer go first from now on, if that is at the cost of nobody else."""
        with contextlib.suppress(OSError, ValueError):
            before = int(self._file.read_bytes().rsplit(b"nice", 1)[-1])
            if before < NICENESS and has_session_for_itself(read_table(), os.getpid()):
                self._file.write_text(str(NICENESS))
                self._before = before

    def take_back(self, attempts: int = 1) -> None:
        """Have a full share again, for an emergency or for whoever uses the session afterwards."""
        if self._before is None:
            return
        for attempt in range(attempts):
            try:
                self._file.write_text(str(self._before))
            except OSError as error:
                log.debug("the session's share of the processor stays low: %s", error)
                if attempt + 1 < attempts:
                    time.sleep(_PAUSE_SECONDS)
            else:
                self._before = None
                return

    def leave(self) -> None:
        """Take it back for good, which may take some tenths of a second."""
        self.take_back(_ATTEMPTS)


def has_session_for_itself(table: dict[int, ProcessEntry], pid: int) -> bool:
    """Whether a process shares its session with its ancestors and descendants only. Pure."""
    lineage = {pid}
    ancestor = table.get(pid)
    while ancestor is not None and ancestor.parent not in lineage:
        lineage.add(ancestor.parent)
        ancestor = table.get(ancestor.parent)

    def descends(entry: ProcessEntry | None) -> bool:
        seen: set[int] = set()
        while entry is not None and entry.pid not in seen:
            if entry.pid == pid:
                return True
            seen.add(entry.pid)
            entry = table.get(entry.parent)
        return False

    session = table[pid].session
    return all(
        entry.pid in lineage or descends(entry)
        for entry in table.values()
        if entry.session == session and entry.alive
    )
