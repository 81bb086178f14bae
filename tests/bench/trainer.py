"""The training script of the measurements, and the same training without `runner`.

    python -m tests.bench.trainer                            supervised: what a job file starts
    python -m tests.bench.trainer plain MB STEPS             digest of an undisturbed run
    python -m tests.bench.trainer save MB STEPS EVERY FILE   the same, with torch.save now and then
    python -m tests.bench.trainer first-step MB              the moment when one step has ended

It notes what it does, with moments on CLOCK_MONOTONIC, as lines of JSON in the file `diary`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_PACE_SECONDS = 0.005  # between the steps of a small model, which would count thousands otherwise


class Diary:
    """A file that whoever measures reads along. It lies in memory."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, kind: str, **facts: Any) -> None:
        line = json.dumps({"kind": kind, "pid": os.getpid(), **facts}) + "\n"
        os.write(self._descriptor, line.encode())


def supervised(began: float) -> None:
    """Train until there is a file `finish`, or for so many steps."""
    import runner

    params = runner.params(megabytes=1.0, steps=0, diary="", finish="")
    diary = Diary(params["diary"])
    diary.note("began", at=began)

    from tests.bench.workload import build, digest, train_step

    model, optimizer = build(params["megabytes"])
    diary.note("built", at=time.monotonic())
    run = runner.attach(model=model, optimizer=optimizer)
    diary.note("attached", at=time.monotonic(), attempt=run.attempt, step=run.step)
    finish = Path(params["finish"])
    for step in run.steps(params["steps"] or sys.maxsize):
        begun = time.monotonic()
        train_step(model, optimizer, step)
        run.log(step_seconds=time.monotonic() - begun)
        if params["megabytes"] < 10:
            time.sleep(_PACE_SECONDS)
        if not params["steps"] and finish.exists():
            run.stop("enough was measured")
        diary.note("step", attempt=run.attempt, step=step + 1, begun=begun, ended=time.monotonic())
    diary.note("digest", digest=digest(model, optimizer), step=run.step)


def plain(megabytes: float, steps: int) -> None:
    """Print the digest after so many steps that nothing disturbs."""
    from tests.bench.workload import build, digest, train_step

    model, optimizer = build(megabytes)
    for step in range(steps):
        train_step(model, optimizer, step)
    print(digest(model, optimizer))


def save(megabytes: float, steps: int, every: int, path: Path) -> None:
    """Print the seconds that each `torch.save` of model and optimizer took."""
    import torch

    from tests.bench.workload import build, train_step

    model, optimizer = build(megabytes)
    seconds = []
    for step in range(steps):
        train_step(model, optimizer, step)
        if megabytes < 10:
            time.sleep(_PACE_SECONDS)
        if (step + 1) % every == 0:
            begun = time.monotonic()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
            seconds.append(time.monotonic() - begun)
    print(json.dumps(seconds))


def first_step(megabytes: float) -> None:
    """Print the moment when the first step has ended."""
    from tests.bench.workload import build, train_step

    train_step(*build(megabytes), 0)
    print(time.monotonic())


def main(words: list[str]) -> None:
    began = time.monotonic()
    match words:
        case []:
            supervised(began)
        case ["plain", megabytes, steps]:
            plain(float(megabytes), int(steps))
        case ["save", megabytes, steps, every, path]:
            save(float(megabytes), int(steps), int(every), Path(path))
        case ["first-step", megabytes]:
            first_step(float(megabytes))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
