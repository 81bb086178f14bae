"""Trains steps until a signal comes, and prints its name: `params.count` of them, then it ends.

With `params.fork`, what was started forks and ends, and its child does the training.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import runner

PARAMS = runner.params(count=2, fork=False)
if PARAMS["fork"] and os.fork():
    os._exit(0)

import torch  # noqa: E402

heard = []


class Counter:
    def __init__(self) -> None:
        self.value = torch.zeros(1)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value.copy_(state["value"])


def hear(number: int, _frame: object) -> None:
    heard.append(number)
    os.write(1, f"heard {signal.Signals(number).name}\n".encode())


for number in (signal.SIGHUP, signal.SIGUSR2):
    signal.signal(number, hear)
run = runner.attach(counter=Counter())
print("ready", flush=True)
for _ in run.steps(1 << 40):
    signal.sigtimedwait([], 0.01)
    if len(heard) >= PARAMS["count"]:
        run.stop("heard enough")
print("finished", flush=True)
