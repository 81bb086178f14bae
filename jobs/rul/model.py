"""The network with its two tasks, its losses and average, and the bundle in which it is deployed.

    sensors (batch, window, 21) ─▶ 1-D convolutions ─▶ bidirectional LSTM ─▶ attention over time
        ─▶ remaining useful life (batch,), in cycles
        ─▶ health state (batch, 3), logits: healthy, degrading, critical

The bundle is what a server needs: `model.safetensors`, `config.json`, `statistics.json` and
`metrics.json`, the last of which is written when the others are complete.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from jobs.rul.data import SENSORS, Statistics
from jobs.rul.nasa import write_atomically

STATES = ("healthy", "degrading", "critical")
RUL_WEIGHT, STATE_WEIGHT = 0.5, 0.5


@dataclass(frozen=True)
class Config:
    """What determines the network's shape, and how its input and output are to be read."""

    window: int = 30
    cap: float = 125.0
    hidden: int = 256
    dropout: float = 0.1


class RulNet(nn.Module):
    """Remaining useful life and health state of an engine, from a window of normalized sensors."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, dropout = config.hidden, config.dropout
        self.cap = config.cap
        self.convolutions = nn.Sequential(
            nn.Conv1d(SENSORS, hidden, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.Conv1d(hidden, hidden, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True, bidirectional=True)
        self.attention = nn.Sequential(
            nn.Linear(2 * hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
        )
        self.dropout = nn.Dropout(dropout)
        self.rul_head = _head(2 * hidden, hidden, 1)
        self.state_head = _head(2 * hidden, hidden, len(STATES))

    def forward(self, sensors: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, window, 21) to cycles (batch,) and logits (batch, 3)."""
        features = self.convolutions(sensors.transpose(1, 2)).transpose(1, 2)
        features, _ = self.lstm(features)
        weights = self.attention(features).softmax(dim=1)
        context = self.dropout((weights * features).sum(dim=1))
        # The head answers in units of the cap: a layer's usual scale, for whatever cap.
        return self.cap * self.rul_head(context).squeeze(1), self.state_head(context)


def _head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def rul_loss(predicted: Tensor, target: Tensor, cap: float) -> Tensor:
    """Squared error in cycles², weighted by 1 + clip(1 - y/cap, 0, 1): twice at failure."""
    weight = 1.0 + (1.0 - target / cap).clamp(0.0, 1.0)
    return (weight * (predicted - target) ** 2).mean()


def two_task_loss(rul: Tensor, logits: Tensor, target: Tensor, state: Tensor, cap: float) -> Tensor:
    """Half the loss of the remaining life, half the cross-entropy of the health state."""
    return RUL_WEIGHT * rul_loss(rul, target, cap) + STATE_WEIGHT * F.cross_entropy(logits, state)


def averaged(net: RulNet, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, with its own copy of them.

    The decay grows as (1 + n) / (10 + n) with the number n of averaged steps until it is `decay`:
    otherwise 0.999 would still hold mostly the initial weights after a short run.
    """

    @torch.no_grad()
    def update(averages: Any, weights: Any, count: Any) -> None:
        # `count` stays a tensor, so that nothing waits for a GPU.
        count = torch.as_tensor(count, dtype=torch.float32)
        keep = ((1.0 + count) / (10.0 + count)).clamp(max=decay)
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, 1.0 - keep.to(weight.device))

    return AveragedModel(net, multi_avg_fn=update)


@torch.no_grad()
def predict(net: nn.Module, windows: Tensor, batch_size: int = 1024) -> tuple[Tensor, Tensor]:
    """Cycles (n,) and logits (n, 3), on the CPU, for windows (n, window, 21). Sets eval mode."""
    net.eval()
    device = next(net.parameters()).device
    parts = [net(part.to(device)) for part in torch.split(windows, batch_size)]
    return torch.cat([rul.cpu() for rul, _ in parts]), torch.cat([s.cpu() for _, s in parts])


def save_bundle(
    folder: Path,
    net: nn.Module,
    config: Config,
    statistics: Statistics,
    facts: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Write the four files of the bundle, each whole or not at all; `facts` go into the config."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
    described = {**asdict(config), "sensors": SENSORS, "states": STATES, **facts}
    lists = {name: array.tolist() for name, array in statistics.as_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "model.safetensors", safetensors.torch.save(weights))
    write_atomically(folder / "config.json", _json(described))
    write_atomically(folder / "statistics.json", _json(lists))
    write_atomically(folder / "metrics.json", _json(metrics))


def load_bundle(folder: Path) -> tuple[RulNet, Config, Statistics]:
    """The network (in eval mode), its config and its statistics, as `save_bundle` got them."""
    described = json.loads((folder / "config.json").read_bytes())
    config = Config(**{name: described[name] for name in Config.__dataclass_fields__})
    net = RulNet(config)
    net.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    lists = json.loads((folder / "statistics.json").read_bytes())
    return net.eval(), config, Statistics.from_lists(lists)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
