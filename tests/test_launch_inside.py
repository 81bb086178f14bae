"""What runs first in a trainer's container, here without one: its pipes, and their other ends."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from runner.launch import inside

PATIENCE_SECONDS = 30.0


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    for name in ("stdout", "stderr"):
        os.mkfifo(tmp_path / name)
    return tmp_path


def start(spool: Path, *command: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-I", "-S", str(inside.__file__), str(spool), *command]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_without_a_supervisor_it_ends_at_once(spool: Path) -> None:
    """It waited for somebody to read, for ever, and kept the container's memory and GPUs."""
    process = start(spool, "true")
    try:
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()

    assert process.returncode == 75
    assert b"the supervisor is gone" in said


def test_a_slow_reader_is_waited_for(spool: Path) -> None:
    """More than a pipe holds comes through whole, and nothing of it past the pipes."""
    readers = [os.open(spool / name, os.O_RDONLY | os.O_NONBLOCK) for name in ("stdout", "stderr")]
    program = "import sys; print('x' * 300_000, flush=True); sys.exit(3)"
    process = start(spool, sys.executable, "-c", program)
    try:
        assert select.select(readers[:1], [], [], PATIENCE_SECONDS)[0]
        took = [read_whole(reader) for reader in readers]
        assert process.communicate(timeout=PATIENCE_SECONDS) == (b"", b"")
    finally:
        process.kill()
    assert took == [b"x" * 300_000 + b"\n", b""]
    assert process.returncode == 3


def read_whole(reader: int) -> bytes:
    """All that comes until nobody has the pipe's other end any more."""
    os.set_blocking(reader, True)
    with os.fdopen(reader, "rb") as file:
        return file.read()
