"""What a training script may import. Nothing here imports torch until `attach` is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.training.params import params
    from runner.training.preempted import Preempted
    from runner.training.run import Run, attach

__version__ = "0.1.0"

__all__ = ["Preempted", "Run", "__version__", "attach", "params"]

_HOMES = {
    "Preempted": "runner.training.preempted",
    "Run": "runner.training.run",
    "attach": "runner.training.run",
    "params": "runner.training.params",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the supervisor loads this package too, and must not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
