"""Writes an export's network as ONNX, and compares the two: `python -m runner.training.onnx`.

    python -m runner.training.onnx FOLDER module:function

The job's function is given the folder of an export, and returns the module and its inputs: a dict
of example tensors by name, the first dimension of which is the batch. Onnxruntime must give what
torch gives on a random batch of another size, or nothing is written. The last line that is printed
is JSON: `{"difference": 1e-6}` or `{"problem": TEXT}`.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FILE = "model.onnx"
_BATCH = 3
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4


def write(folder: Path, entrypoint: str) -> float:
    """Write `model.onnx`; the largest difference between the two. ValueError if it is too large."""
    module_name, _, function = entrypoint.partition(":")
    module, inputs = getattr(importlib.import_module(module_name), function)(folder)
    module.eval()
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            folder / FILE,
            input_names=list(inputs),
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return compare(folder / FILE, module, inputs)


def compare(path: Path, module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> float:
    """The largest difference on a random batch, of another size than the example's."""
    import onnxruntime

    size = next(iter(inputs.values())).shape[0] + _BATCH
    given = {name: _random(tensor, size) for name, tensor in inputs.items()}
    with torch.no_grad():
        expected = module(*given.values())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    outputs = expected if isinstance(expected, tuple | list) else (expected,)
    worst = 0.0
    for number, (one, other) in enumerate(zip(outputs, found, strict=True)):
        difference = (one - torch.from_numpy(other)).abs()
        if (difference > _ABSOLUTE + _RELATIVE * one.abs()).any() or not one.isfinite().all():
            raise ValueError(
                f"output {number} of ONNX differs from torch's by up to {difference.max():.3g}"
            )
        worst = max(worst, float(difference.max()))
    return worst


def _random(example: torch.Tensor, size: int) -> torch.Tensor:
    shape = (size, *example.shape[1:])
    if example.is_floating_point():
        return torch.randn(shape, dtype=example.dtype)
    return example[torch.randint(len(example), (size,))]


def main(folder: str, entrypoint: str) -> None:
    reply: dict[str, Any]
    try:
        reply = {"difference": write(Path(folder), entrypoint)}
    except Exception as error:  # noqa: BLE001 - the job's function and the exporter raise anything
        reply = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]}
        (Path(folder) / FILE).unlink(missing_ok=True)
    sys.stdout.write("\n" + json.dumps(reply) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
