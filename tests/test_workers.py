"""Loader workers and SIGTERM, without a supervisor in between: who obeys it, and when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from nodes import is_running
from waiting import wait_until

READS = """
import os, signal, sys, threading
import torch
from torch.utils.data import DataLoader, Dataset
from runner.training.loader import Pass, Stream

class Data(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        if "stuck" in sys.argv and index == 20:  # it is loaded ahead
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            print("stuck", file=sys.stderr, flush=True)
            threading.Event().wait()
        return torch.tensor([index, os.getpid()])

if __name__ == "__main__":
    way = sys.argv[1]
    loader = DataLoader(Data(), 4, num_workers=2, persistent_workers="persistent" in sys.argv)
    reading = Pass(Stream(loader))
    reading.open()
    pids = set()
    for batch in range(3):
        pids |= set(next(reading)[:, 1].tolist())
        reading.finish()
    print(*pids, flush=True)
    sys.stdin.readline()
    if way == "raise":
        raise RuntimeError("raised on purpose")
    for batch in reading:
        reading.finish()
    print("read", reading.done, flush=True)
"""


def begin(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A process that reads from workers and waits for a line; and its workers."""
    script = folder / "reads.py"
    script.write_text(READS)
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, [int(word) for word in process.stdout.readline().split()]


def test_a_signal_from_somebody_else_is_not_obeyed(tmp_path: Path) -> None:
    process, workers = begin(tmp_path, "read")
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGTERM)

    out, err = process.communicate("\n", timeout=60)

    assert (process.returncode, out) == (0, "read 16\n"), err


@pytest.mark.parametrize("persistent", ["persistent", ""])
def test_they_end_when_the_trainer_leaves(tmp_path: Path, persistent: str) -> None:
    process, workers = begin(tmp_path, "raise", persistent)

    _, err = process.communicate("\n", timeout=60)

    assert process.returncode == 1
    assert "raised on purpose" in err
    wait_until(lambda: not any(map(is_running, workers)), what="the workers to end")


def test_one_that_hears_nothing_does_not_hold_the_trainer_up(tmp_path: Path) -> None:
    process, workers = begin(tmp_path, "raise", "stuck")
    assert process.stderr is not None
    assert process.stderr.readline() == "stuck\n"

    _, err = process.communicate("\n", timeout=60)

    assert process.returncode == 1
    assert "raised on purpose" in err
    wait_until(lambda: not any(map(is_running, workers)), what="the workers to end")
