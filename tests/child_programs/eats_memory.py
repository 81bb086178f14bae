"""Trains steps that do little, and takes memory.

Params: `steps`; `eats`: by attempt, from which step on and how many bytes in each, `at_once` so
often, and `at_first` so many more; `cache`: bytes of a file that is read in each step;
`state_floats`: the size of the state; `step_seconds`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

import runner

PARAMS = runner.params(steps=20, eats={}, at_once=1, at_first=0, cache=0, step_seconds=0.02)


class Counter:
    """A state of one number, and as many bytes as there shall be in a slot."""

    def __init__(self) -> None:
        self.value = torch.zeros(PARAMS.get("state_floats", 16))

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value.copy_(state["value"])


def fill_page_cache(folder: Path, nbytes: int) -> None:
    """Write and read a file in pieces. Pages used twice are active, and can be dropped too."""
    path, piece = folder / "read-twice", 1 << 20
    with path.open("wb") as file:
        for _ in range(nbytes // piece):
            file.write(bytes(piece))
        os.fsync(file.fileno())
    for _ in range(2):
        with path.open("rb", buffering=0) as file:
            while file.read(piece):
                pass


counter = Counter()
run = runner.attach(counter=counter)
first, nbytes = PARAMS["eats"].get(str(run.attempt), [1 << 60, 0])
hoard = [bytearray(b"x") * PARAMS["at_first"]] if nbytes else []
print(f"ready at {run.step} in attempt {run.attempt} process {os.getpid()}", flush=True)
for step in run.steps(PARAMS["steps"]):
    if PARAMS["cache"]:
        fill_page_cache(run.output_dir, PARAMS["cache"])
    for _ in range(PARAMS["at_once"] if step >= first else 0):
        hoard.append(bytearray(b"x") * nbytes)
        time.sleep(PARAMS["step_seconds"])
    counter.value += 1
    time.sleep(PARAMS["step_seconds"])
print(f"finished at {run.step}", flush=True)
