"""The network of an export, for `runner checkpoints export --onnx`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from jobs.rul.data import SENSORS
from jobs.rul.model import RulNet, load_bundle


def network(folder: Path) -> tuple[RulNet, dict[str, Tensor]]:
    """The network in eval mode, and two windows of normalized sensors as an example."""
    net, config, _ = load_bundle(folder)
    return net, {"sensors": torch.randn(2, config.window, SENSORS)}
