"""A supervisor that outlives the shell that started it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.spool import Spool
from runner.supervisor import index

DETACHED_VARIABLE = "RUNNER_DETACHED"
"""Set where nobody reads along: what the trainer prints would fill the file without a limit."""

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Detached:
    """A supervisor in a session of its own. `exit_code` is None if it runs on."""

    pid: int
    log: Path
    exit_code: int | None


def start_detached(arguments: Sequence[str]) -> Detached:
    """Start `runner` with these arguments, its messages in a file; return when it supervises.

    Or when it has ended: what was to be started may be live already, or finished.
    """
    folder = index.home() / "detached"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix="supervisor-", suffix=".log", dir=folder)
    with os.fdopen(descriptor, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "runner", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, DETACHED_VARIABLE: "1"},
            start_new_session=True,
        )
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while process.poll() is None and not _supervises(process.pid) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return Detached(process.pid, Path(name), process.poll())


def _supervises(pid: int) -> bool:
    statuses = (Spool(Path(entry.spool)).status() for entry in index.entries())
    return any(status is not None and status.get("pid") == pid for status in statuses)
