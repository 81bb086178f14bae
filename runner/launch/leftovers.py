"""What a supervisor that was killed has left running: its trainer, and what that started."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from runner.launch.process_tree import ProcessEntry, read_entry, read_table, send_to

_POLL_SECONDS = 0.01


def end_leftovers(spool: Path, *, timeout_seconds: float = 10.0) -> list[int]:
    """Kill every process that was started with this spool; the process ids of those that were.

    The caller holds the spool's lock, so whoever still works in it belongs to a dead supervisor.
    Returns when none of them is alive, or after the timeout.
    """
    spared = {entry.pid for entry in _ancestors()}
    found: set[int] = set()
    deadline = time.monotonic() + timeout_seconds
    while True:
        alive = [
            entry
            for entry in read_table().values()
            if entry.alive and entry.pid not in spared and _belongs_to(entry.pid, spool)
        ]
        if not alive or time.monotonic() >= deadline:
            return sorted(found)
        for entry in alive:
            if entry.pid not in found:
                found.add(entry.pid)
                send_to(entry, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _ancestors() -> list[ProcessEntry]:
    """This process and those above it: a run that is started by another run's script is not it."""
    chain, pid = [], os.getpid()
    while pid > 0 and (entry := read_entry(pid)) is not None:
        chain.append(entry)
        pid = entry.parent
    return chain


def _belongs_to(pid: int, spool: Path) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone, or another user's
        return False
    return f"RUNNER_SPOOL={spool}".encode() in environment.split(b"\0")
