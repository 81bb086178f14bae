"""A restore copies each tensor once, to where it lives: there is no second copy of the state."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "child_programs" / "restores_much.py"


def own_bytes(pid: int) -> int:
    """Memory that is the process's alone: without files and shared memory, so without slots."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert match is not None
    return int(match.group(1)) * 1024


class Highest(threading.Thread):
    """The most memory that a process has had since this began to look."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._over = pid, threading.Event()
        self.bytes = self.looks = 0

    def run(self) -> None:
        while not self._over.is_set():
            self.bytes = max(self.bytes, own_bytes(self._pid))
            self.looks += 1

    def end(self) -> int:
        self._over.set()
        self.join()
        return self.bytes


def life(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        cwd=folder,
        env=os.environ | {"RUNNER_STORE": "store", "PYTHONPATH": str(SCRIPT.parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def say(process: subprocess.Popen[str], expected: str) -> list[str]:
    assert process.stdout is not None
    words = process.stdout.readline().split()
    assert words[:1] == [expected]
    return words


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_restoring_needs_no_second_copy_of_the_state(tmp_path: Path) -> None:
    with life(tmp_path) as first:
        say(first, "ready")
        go_on(first)
        say(first, "began")
        first.communicate("\n")
    assert first.returncode == 0

    with life(tmp_path) as second:
        _, state_bytes = say(second, "ready")
        before = own_bytes(second.pid)
        highest = Highest(second.pid)
        highest.start()
        go_on(second)
        say(second, "restored")
        peak, after = highest.end(), own_bytes(second.pid)
        second.communicate("\n")

    assert second.returncode == 0
    # The moments of the optimizer are there only now: that is where they live.
    assert after - before > int(state_bytes) / 2
    assert peak - after < 0.15 * int(state_bytes)
    assert highest.looks > 100
