"""Trains a little, and in some attempts stops to move. Params: `befalls`, by attempt.

"start" sleeps before it attaches, "busy start" computes for `busy` seconds first; then,
in the attempt's own step (`at`): "freeze" stops the process, "c" waits in a C function with the
interpreter's lock held, "loader" waits in the loader's worker, "heartbeat" waits with a heart that
beats, "gate" waits for the gate. After the loop, it rests for `rest` seconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import runner

PARAMS = runner.params(befalls={}, at={}, busy=0.0, rest=0.0, gate="")
ATTEMPT = os.environ.get("RUNNER_ATTEMPT", "1")
HOW: str = PARAMS["befalls"].get(ATTEMPT, "")
AT: int = PARAMS["at"].get(ATTEMPT, -1)
STEPS = 24


def sleep_before_attach() -> None:
    threading.Event().wait()


def compute_before_attach() -> None:
    begun = time.monotonic()
    while time.monotonic() < begun + PARAMS["busy"]:
        pass


def wait_in_c() -> None:
    while True:  # a signal wakes it up, also the one that asks for its stacks
        ctypes.PyDLL(None).pause()


def wait_in_the_loader() -> None:
    threading.Event().wait()


def wait_with_a_heartbeat(run: Any) -> None:
    board = run._course.session.board
    while True:
        board.heartbeat_ns = time.monotonic_ns()
        time.sleep(0.01)


def befall(run: Any) -> None:
    if HOW == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif HOW == "c":
        wait_in_c()
    elif HOW == "heartbeat":
        wait_with_a_heartbeat(run)
    elif HOW == "gate":
        while not Path(PARAMS["gate"]).exists():
            time.sleep(0.001)


if HOW == "start":
    print("sleeping", flush=True)
    sleep_before_attach()
if HOW == "busy start":
    compute_before_attach()
    print("busy no more", flush=True)

import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> torch.Tensor:
        if HOW == "loader" and index == AT:
            wait_in_the_loader()
        return torch.full((4,), float(index)) / STEPS


def main() -> None:
    torch.manual_seed(7)
    torch.set_num_threads(1)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = runner.attach(model=model, optimizer=optimizer)
    print(f"ready at {run.step} in attempt {run.attempt}", flush=True)
    for _ in run.epochs(1):
        for batch in run.batches(DataLoader(Numbers(), 1, num_workers=int(HOW == "loader"))):
            print(f"step {run.step + 1}", flush=True)
            if run.step + 1 == AT:
                befall(run)
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            run.log(train_loss=loss)
    print("resting", flush=True)
    time.sleep(PARAMS["rest"])
    print(f"finished at {run.step}", flush=True)


if __name__ == "__main__":
    main()
