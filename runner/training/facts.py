"""What only the trainer knows of where a checkpoint comes from; into the spool once, not each time.

    rank-00000/facts.json     for the supervisor, which puts it into each manifest

Plain JSON. Of the environment only what is listed here is told, and what looks like a key is
masked, there and in the parameters.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runner.checkpoint.provenance import installed_packages, mask_secrets
from runner.errors import SpoolError
from runner.spool import FACTS_FILE, RankSpool
from runner.training.params import all_params

log = logging.getLogger(__name__)

ENVIRONMENT = (
    *("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_*"),
    *("NVIDIA_TF32_OVERRIDE", "NCCL_*", "TORCH_*", "TORCHINDUCTOR_*", "PYTORCH_*"),
    *("OMP_*", "KMP_*", "MKL_*", "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED", "TZ", "LANG", "LC_ALL"),
    *("SLURM_JOB_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"),
)
"""The variables that may change what is computed; a final `*` stands for any ending."""

_MAX_LINES = 300
_MAX_REPR = 120


class Facts:
    """The facts of one attempt. Each change is told at once; where memory is full, it is not."""

    def __init__(self, rank: RankSpool) -> None:
        self._rank = rank
        self._facts = trainer_facts()

    def tell(self, **facts: Any) -> None:
        """Add facts, plain JSON, and leave all of them for the supervisor."""
        self._facts |= facts
        try:
            self._rank.send(FACTS_FILE, self._facts)
        except SpoolError as error:
            log.warning("where checkpoints come from is not told: %s", error)

    def add(self, kind: str, name: str, fact: Any) -> None:
        """Add one of several facts of a kind."""
        self.tell(**{kind: {**self._facts.get(kind, {}), name: fact}})


def trainer_facts() -> dict[str, Any]:
    """Versions, devices, settings and parameters, as they are when the script attaches."""
    cuda = torch.cuda.is_available()
    count = torch.cuda.device_count() if cuda else 0
    return {
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
        },
        "packages": installed_packages(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _cudnn() if cuda else None,
        "driver": _driver(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
        "settings": {
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        "seeds": {"torch": torch.initial_seed()},
        "params": plain(mask_secrets(all_params())),
        "environment": environment(os.environ),
    }


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of the allow-list, what looks like a secret in them masked."""
    known = {
        name: value
        for name, value in sorted(variables.items())
        if any(fnmatchcase(name, pattern) for pattern in ENVIRONMENT)
    }
    return mask_secrets(known)


def plain(value: Any) -> Any:
    """A value as plain JSON; what JSON does not have is told as text."""
    return json.loads(json.dumps(value, default=repr, allow_nan=True), parse_constant=str)


def _cudnn() -> int | None:
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


def _driver() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


# ---------------------------------------------------------------------------- architecture


def architecture(module: nn.Module) -> dict[str, Any]:
    """The class of a model, its parameters, and a tree of its parts that people can read.

    Neighbours that look the same stand in one line. A long tree is cut.
    """
    lines = _lines("", module)
    if len(lines) > _MAX_LINES:
        lines = [*lines[:_MAX_LINES], f"… and {len(lines) - _MAX_LINES} more lines"]
    parameters = [p for p in module.parameters() if not nn.parameter.is_lazy(p)]
    kind = type(module)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "tree": lines,
    }


def _lines(name: str, module: nn.Module) -> list[str]:
    head = type(module).__name__ + (f"({text})" if (text := _details(module)) else "")
    count = sum(p.numel() for p in module.parameters() if not nn.parameter.is_lazy(p))
    children = [(key, _lines("", child)) for key, child in module.named_children()]
    lines = [f"{name}{head}" + (f"  {count:,}" if count else "")]
    at = 0
    while at < len(children):
        end = at
        while end + 1 < len(children) and children[end + 1][1] == children[at][1]:
            end += 1
        (first, inner), (last, _) = children[at], children[end]
        label = first if end == at else f"{first} to {last}, each"
        lines += [f"  {label}: {inner[0]}", *(f"  {line}" for line in inner[1:])]
        at = end + 1
    return lines


def _details(module: nn.Module) -> str:
    """What a module says of itself, which is code of its own."""
    try:
        text = " ".join(module.extra_repr().split())
    except Exception:  # noqa: BLE001 - a model that cannot describe itself is trained all the same
        return ""
    return text if len(text) <= _MAX_REPR else f"{text[: _MAX_REPR - 1]}…"
