"""A supervisor that outlives the shell that started it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.supervisor import index


@dataclass(frozen=True)
class Detached:
    pid: int
    log: Path


def start_detached(arguments: Sequence[str]) -> Detached:
    """Start `runner` with these arguments in a session of its own, its output in a file."""
    folder = index.home() / "detached"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix="supervisor-", suffix=".log", dir=folder)
    with os.fdopen(descriptor, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "runner", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Detached(process.pid, Path(name))
