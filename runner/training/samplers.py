"""What the samplers of a `DataLoader` hold: generator objects, and state of their own.

A sampler's next order depends on it, so it is saved between passes and at the start of each. It is
found by looking through the attributes of the loader and its samplers, and known again in the next
process by its position.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from runner.errors import RestoreError
from runner.training.rng import (
    GENERATOR_TYPES,
    Generator,
    generator_state,
    same_state,
    set_generator_state,
)

_LOOK_ENTRIES: Final = 64  # a container with more entries holds data, not generators

# Exact types: a subclass may draw whenever it likes.
_DRAW_FIRST: Final = (
    SequentialSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    DistributedSampler,
    list,
    tuple,
    range,
)


def index_sampler(loader: DataLoader[Any]) -> Iterable[Any]:
    """What gives this loader's indices: batches of them, or single ones without batching."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def draws_first(sampler: Iterable[Any]) -> bool:
    """Whether a sampler draws from the process's streams before its first index, if at all."""
    return type(sampler.sampler if type(sampler) is BatchSampler else sampler) in _DRAW_FIRST


def has_state_dict(value: Any) -> bool:
    """Whether an object can save and load its own state."""
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def generators_of(*roots: Any) -> list[Generator]:
    """The generator objects held by loaders and samplers, and by those inside them, in order."""
    return [
        value
        for value in _walk(*roots)
        if isinstance(value, GENERATOR_TYPES) and not isinstance(value, random.SystemRandom)
    ]


def stateful_samplers_of(loader: DataLoader[Any]) -> list[Any]:
    """The loader's samplers with state that they can save and load.

    One with `set_epoch` is left alone: its order is made by the epoch, which the script sets, and
    what such samplers save is a position, which is known anyway.
    """
    return [
        value
        for value in _walk(index_sampler(loader))
        if has_state_dict(value) and not hasattr(value, "set_epoch")
    ]


def _walk(*roots: Any) -> Iterator[Any]:
    """The roots, their attributes, and all that is inside samplers and loaders among these."""
    seen: set[int] = set()
    todo = deque((root, True) for root in roots)
    while todo:
        value, inside = todo.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if inside or isinstance(value, Sampler | DataLoader):
            todo.extend((inner, False) for inner in getattr(value, "__dict__", {}).values())
        elif isinstance(value, list | tuple) and len(value) <= _LOOK_ENTRIES:
            todo.extend((inner, False) for inner in value)
        elif isinstance(value, dict) and len(value) <= _LOOK_ENTRIES:
            todo.extend((inner, False) for inner in value.values())


class Generators:
    """The generators of one loader, as far as their states are concerned."""

    def __init__(self, *roots: Any) -> None:
        self._generators = generators_of(*roots)

    def __len__(self) -> int:
        return len(self._generators)

    def states(self) -> list[Any]:
        """Their states now, as plain values."""
        return [generator_state(generator) for generator in self._generators]

    def set(self, states: Sequence[Any], keep: Sequence[bool] = ()) -> None:
        """Set them, but for those marked in `keep`.

        Raises `RestoreError`, with nothing set, if there are more or fewer states than generators.
        """
        require_as_many("random number generators", states, self._generators)
        for i, (generator, state) in enumerate(zip(self._generators, states, strict=True)):
            if not any(keep[i : i + 1]):
                set_generator_state(generator, state)

    def freshly_seeded(self) -> list[bool]:
        """For each, whether nothing was drawn since `manual_seed`. False if that cannot be told."""
        return [_is_fresh(generator) for generator in self._generators]

    def seeded_unlike(self, states: Sequence[Any]) -> list[bool]:
        """For each, whether it is freshly seeded, and with another seed than its saved state."""
        require_as_many("random number generators", states, self._generators)
        return [
            isinstance(generator, torch.Generator)
            and _is_fresh(generator)
            and generator.initial_seed() != _seed_of(state, generator.device)
            for generator, state in zip(self._generators, states, strict=True)
        ]


def _is_fresh(generator: Generator) -> bool:
    if not isinstance(generator, torch.Generator):
        return False
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    return same_state(generator_state(fresh), generator_state(generator))


def _seed_of(state: Any, device: torch.device) -> int:
    saved = torch.Generator(device)
    set_generator_state(saved, state)
    return saved.initial_seed()


def load_samplers(samplers: Sequence[Any], states: Sequence[Any]) -> None:
    """Hand saved states to stateful samplers. Raises `RestoreError` if they are not as many."""
    require_as_many("samplers with a state_dict", states, samplers)
    for sampler, state in zip(samplers, states, strict=True):
        sampler.load_state_dict(state)


def require_as_many(what: str, saved: Sequence[Any], present: Sequence[Any]) -> None:
    """Raises `RestoreError` if a loader has more or fewer of something than it had."""
    if len(saved) != len(present):
        raise RestoreError(
            f"the loader and its samplers had {len(saved)} {what} when this was saved, and have "
            f"{len(present)} now; build the loader as the interrupted run did"
        )
