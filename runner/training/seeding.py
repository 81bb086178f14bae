"""The randomness of one batch, wherever it is loaded.

Each batch has a seed of its own: from the seed of its pass and its number. Without workers the
process is seeded when the index of the batch is handed out. With workers the index travels as a
`Task`, which seeds the worker at the moment when the worker takes it off its queue; the data set
gets the bare index and is not wrapped. So it matters neither how many workers there are, nor how
far they prefetch, nor where a run was resumed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
    get_worker_info,
)

from runner.training.rng import GENERATOR_TYPES, derive_seed, seed_process
from runner.training.workers import outlive_the_save

_PROCESS_WIDE: Final = (torch.default_generator, np.random.mtrand._rand)
_LOOK_DEPTH: Final = 4  # data set → transform → list of transforms → transform → generator
_LOOK_ENTRIES: Final = 64  # a list with more entries holds data, not transforms


class Task:
    """An index on its way to a worker, where it arrives as the bare index."""

    __slots__ = ("_index", "_number", "_seed")

    def __init__(self, index: Any, seed: int, number: int | None) -> None:
        self._index, self._seed, self._number = index, seed, number

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _receive, (self._index, self._seed, self._number)


_tasks_received = 0  # by a worker of an iterable data set: such a worker serves one pass


def _receive(index: Any, seed: int, number: int | None) -> Any:
    """Runs in the worker that takes a task off its queue; returns the index.

    Seeds it by the number of the batch; for an iterable data set, which has no numbers (None), by
    the worker and how many tasks it has had.
    """
    global _tasks_received
    info = get_worker_info()
    if info is not None:
        outlive_the_save()
    if info is not None and number is not None:
        seed_batch(info.dataset, seed, number)
    elif info is not None:
        seed_batch(info.dataset, seed, _tasks_received, worker=info.id)
        _tasks_received += 1
    return index


def seed_batch(dataset: Any, seed: int, number: int, *, worker: int = -1) -> None:
    """Seed this process, and the data set's own generators, for one batch of a pass.

    `worker` is given for iterable data sets only; without workers it is 0.
    """
    reseed(dataset, seed_process(derive_seed("batch", seed, number, worker)))


def loads_by_rule(loader: DataLoader[Any]) -> bool:
    """Whether nothing is drawn at random while this loader makes a batch: torch's own parts only.

    Exact types: a subclass may do anything.
    """
    dataset = loader.dataset
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return type(dataset) in (TensorDataset, list, tuple, range) and loader.collate_fn in (
        default_collate,
        default_convert,
    )


def reseed(dataset: Any, seed: int) -> None:
    """Call the hook `reseed(seed)` of a data set, or else of those that it wraps.

    It is for data sets with random number generators of their own, which nothing else can reach.
    """
    hook = getattr(dataset, "reseed", None)
    if callable(hook):
        hook(seed)
        return
    inner = getattr(dataset, "dataset", None)  # Subset
    if inner is not None:
        reseed(inner, seed)
    several = getattr(dataset, "datasets", None)  # ConcatDataset, StackDataset
    for one in several if isinstance(several, list | tuple) else ():
        reseed(one, seed)


def unreachable_generators(value: Any, path: str, depth: int = _LOOK_DEPTH) -> Iterator[str]:
    """Where a data set, or its transforms, hold generators that no hook `reseed` covers.

    Yields paths such as `dataset.transform.rng`. Looks at attributes and short lists only.
    """
    if isinstance(value, GENERATOR_TYPES):
        if not any(value is one for one in (*_PROCESS_WIDE, random._inst)):
            yield path
        return
    if depth == 0 or callable(getattr(value, "reseed", None)):
        return
    if isinstance(value, list | tuple) and len(value) <= _LOOK_ENTRIES:
        for i, inner in enumerate(value):
            yield from unreachable_generators(inner, f"{path}[{i}]", depth - 1)
    elif not isinstance(value, type | ModuleType | FunctionType | torch.Tensor | np.ndarray):
        for name, inner in getattr(value, "__dict__", {}).items():
            yield from unreachable_generators(inner, f"{path}.{name}", depth - 1)
