"""The training that is measured: linear layers and AdamW in fp32, their state of a wanted size.

Weights and two moments make three numbers per weight, so a state of M megabytes (10^6 bytes) has
M / 12 million weights. What a step does depends on its number and the state alone, so that a run
that was interrupted can be compared bit for bit with one that was not.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from tests.bench.exactness import digest_of

LAYERS = 10
_BYTES_PER_WEIGHT = 3 * 4
_ROWS = 8


def build(megabytes: float) -> tuple[nn.Sequential, torch.optim.AdamW]:
    """A model and its optimizer whose state has about so many megabytes, the same at each call."""
    torch.manual_seed(0)
    width = round(math.sqrt(megabytes * 1e6 / (_BYTES_PER_WEIGHT * LAYERS)))
    model = nn.Sequential(
        *(layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.ReLU()))
    )
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def train_step(
    model: nn.Sequential, optimizer: torch.optim.AdamW, step: int, batch: int = _ROWS
) -> None:
    """One optimizer step on data that follows from its number."""
    width = model[0].in_features
    rows = torch.randn(batch, width, generator=torch.Generator().manual_seed(step))
    loss = (model(rows) - rows).square().mean()
    optimizer.zero_grad(set_to_none=False)  # to write over gradients is shorter than to fault in
    loss.backward()
    optimizer.step()


def digest(model: nn.Sequential, optimizer: torch.optim.AdamW) -> str:
    """A digest of weights and moments, in hex digits, for which nothing of `runner` is used.

    It does not depend on names or order, so that the tensors in a checkpoint's files, of whatever
    name, can be compared with those in a process: see `digest_of`.
    """
    tensors = [
        tensor.detach().contiguous().numpy().data
        for parameter in model.parameters()
        for tensor in (parameter, *optimizer.state[parameter].values())
    ]
    return digest_of(tensors)
