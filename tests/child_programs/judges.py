"""Entry points of a validation, for what `trains.py` saves: good, wrong, deadly, endless."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

if os.environ.get("JUDGE_DIES"):  # before torch is imported, which takes its time
    os.kill(os.getpid(), signal.SIGSEGV)
if os.environ.get("JUDGE_HAS_A_CHILD"):
    child = subprocess.Popen(["sleep", "600"])
    Path(os.environ["JUDGE_HAS_A_CHILD"]).write_text(str(child.pid))
if os.environ.get("JUDGE_HANGS"):
    threading.Event().wait()


def val_loss(components: dict[str, Any], *, params: Any, state: Any) -> dict[str, float]:
    """The loss that `trains.py` logs at the end of an epoch, of the saved model."""
    import torch

    torch.manual_seed(7)
    features = torch.randn(48, 6)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)
    )
    model.load_state_dict(components["model"])
    model.eval()
    with torch.no_grad():
        loss = torch.nn.functional.mse_loss(model(features), features.sum(1, keepdim=True))
    return {"val_loss": float(loss)}


def says_nothing(components: dict[str, Any], *, params: Any, state: Any) -> None:
    """The data cannot be had just now, for example."""


def never_ends(components: dict[str, Any], *, params: Any, state: Any) -> None:
    threading.Event().wait()


def takes_too_little(components: dict[str, Any], params: Any) -> None: ...


def takes_too_much(components: dict[str, Any], params: Any, state: Any, more: Any) -> None: ...


a_value = 3
