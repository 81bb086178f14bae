"""The order of one pass over a `DataLoader`, and the randomness of each of its batches.

A pass does not hand the user's sampler to the loader's machinery. `Order` stands in its place and
promises:

* The sampler draws from streams of its own, which depend only on the state in which the pass
  began. However far workers prefetch, its draws never mix with those of the loop's body.
* Each batch is seeded from (seed of the pass, number of the batch), wherever it is loaded. Without
  workers that happens when the index is handed out; with workers the index travels as a `Task`,
  which seeds the worker at the moment when the worker takes it off its queue.
* A running checksum over the indices proves, when a pass is resumed, that the sampler has repeated
  its order. If it has not, that is a `PositionError`, never another order in silence.
"""

from __future__ import annotations

import random
import re
import threading
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from runner.errors import PositionError
from runner.training.rng import (
    GENERATOR_TYPES,
    Generator,
    Streams,
    capture_streams,
    derive_seed,
    draw_seed,
    generator_state,
    restore_streams,
    same_state,
    seed_process,
    set_generator_state,
)

_END: Final = object()
_WALK_LIMIT: Final = 64  # containers with more entries hold data, not generators

# Samplers that draw from the process's streams before their first index, if at all. Exact types: a
# subclass may do anything.
_DRAW_FIRST = (
    SequentialSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    DistributedSampler,
)


class Mark(NamedTuple):
    """Where the order stood after an index: checksum so far, states of the sampler's generators."""

    checksum: int
    generators: list[Any]


class Order:
    """The indices of one pass, as an iterator for the loader's machinery.

    `begin` draws from the live streams of the process exactly what the plain loader would; from
    then on the order has its own. It holds no reference to the loader's iterator, so that dropping
    that one stops its workers at once.
    """

    def __init__(self, loader: DataLoader[Any], skip: int = 0, checksum: int = 0) -> None:
        self._sampler = index_sampler(loader)
        self._loader_generator = loader.generator
        self._dataset = loader.dataset
        self._iterable = isinstance(loader.dataset, IterableDataset)
        self._in_workers = loader.num_workers > 0
        self._skip, self._expected = skip, checksum
        self._number = skip
        self._generators = generators_of(loader)
        self._draws_late = not self._iterable and not _draws_first(self._sampler)
        self._marks: deque[Mark] = deque()
        self._thread = threading.get_ident()

        self.begun = self.ended = self.trespassed = False
        self.failure: Exception | None = None
        self.pulled = 0
        self.seed = 0
        self.live: Streams | None = None
        """The process's streams after the draws of `begin`: those of the loop's body."""
        self.mark = Mark(0, [])
        """Of the batch that was handed out last."""

    def begin(self) -> None:
        """Start the sampler, then pass over the batches that an earlier process has finished.

        An error is kept in `failure`, and the order is empty then: torch calls this from inside a
        constructor whose half-built object does not survive an exception.
        """
        self.begun = True
        try:
            self._inner = iter(self._sampler)
            self.seed = draw_seed(self._loader_generator)
            self._current = next(self._inner, _END)
            self._fresh = True
            self.live = capture_streams()
            self._live_generators = self._own_generators = self._states()
            seed_process(derive_seed("sampler", self.seed))
            self._own = capture_streams()
            self._checksum = 0
            if self._skip:
                self._pass_over(self._skip)
            self.mark = Mark(self._checksum, self._own_generators)
            seed_process(derive_seed("build", self.seed))  # for an eager IterableDataset.__iter__
        except Exception as error:  # noqa: BLE001 - raised by the one who reads the order
            self.failure, self.ended = error, True

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if threading.get_ident() != self._thread:
            # An exception in a prefetching thread can leave its reader waiting for ever. The order
            # ends instead, and the reader, in the right thread, sees `trespassed` and raises.
            self.trespassed = True
        if self.trespassed or self.ended:
            raise StopIteration
        if not self._fresh:
            self._in_own_streams(self._advance)
        self._fresh = False
        if self._current is _END:
            self.ended = True
            raise StopIteration
        self._note()
        self._marks.append(Mark(self._checksum, self._own_generators))
        self.pulled += 1
        number = self._number
        self._number += 1
        if self._in_workers:
            return Task(self._current, self.seed, None if self._iterable else number)
        _seed_batch(self._dataset, self.seed, 0 if self._iterable else None, number)
        return self._current

    def hand_out(self) -> Mark:
        """The oldest batch that was pulled goes to the loop's body; returns its mark."""
        if self._marks:
            self.mark = self._marks.popleft()
        return self.mark

    def hand_back(self) -> None:
        """Leave the sampler's generators where the plain loader would have left them.

        Not if the script has drawn from them during the pass: then they are the script's.
        """
        if self.live is not None and same_state(self._states(), self._live_generators):
            states = self._own_generators if self.ended else self.mark.generators
            self._set_states(states)
            self._live_generators = states

    def _pass_over(self, count: int) -> None:
        def skip() -> None:
            for number in range(count):
                if number:
                    self._advance()
                if self._current is _END:
                    raise PositionError(
                        f"{count} batches of this pass were finished, and the sampler gives only "
                        f"{number} now; restore the data and the sampler as they were"
                    )
                self._note()

        self._in_own_streams(skip)
        self._fresh = False
        if self._checksum != self._expected:
            raise PositionError(
                f"the sampler did not repeat the order of the {count} batches that were finished, "
                "so the pass cannot go on exactly; a sampler with hidden state needs state_dict "
                "and load_state_dict, and data and sampler must be those of the interrupted run"
            )

    def _in_own_streams(self, action: Callable[[], None]) -> None:
        """Run the sampler where its draws do not touch the loop's body, nor the other way round."""
        if not (self._draws_late or self._generators):
            return action()
        # Without workers the reader of the order keeps the loop's streams, for the data set as well.
        outer = capture_streams() if self._draws_late and self._in_workers else None
        outer_generators = self._states()
        if self._draws_late:
            restore_streams(self._own)
        self._set_states(self._own_generators)
        try:
            return action()
        finally:
            self._own_generators = self._states()
            self._set_states(outer_generators)
            if self._draws_late:
                self._own = capture_streams()
            if outer:
                restore_streams(outer)

    def _advance(self) -> None:
        self._current = next(self._inner, _END)

    def _note(self) -> None:
        self._checksum = index_checksum(self._current, self._checksum)

    def _states(self) -> list[Any]:
        return [generator_state(generator) for generator in self._generators]

    def _set_states(self, states: list[Any]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            set_generator_state(generator, state)


class Indices:
    """What a loader has in the place of its (batch) sampler: gives the order of the current pass.

    The machinery asks for an iterator up to twice per pass; both times it is the same one.
    """

    def __init__(self, length_of: Any) -> None:
        self._length_of = length_of
        self.order: Order | None = None
        self.worker_generator = torch.Generator()
        """The loader's machinery draws the base seed of its workers from it."""
        self.worker_seed: int | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.order is None:
            raise RuntimeError("no pass over this loader has been opened")
        if not self.order.begun:
            self.order.begin()
            seed = self.order.seed if self.worker_seed is None else self.worker_seed
            self.worker_generator.manual_seed(seed)
        return self.order

    def __len__(self) -> int:
        return len(self._length_of)


class Task:
    """An index on its way to a worker, where it arrives as the bare index."""

    __slots__ = ("_index", "_number", "_seed")

    def __init__(self, index: Any, seed: int, number: int | None) -> None:
        self._index, self._seed, self._number = index, seed, number

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _receive, (self._index, self._seed, self._number)


_tasks_received = 0  # in a worker of an iterable data set; such a worker serves one pass


def _receive(index: Any, seed: int, number: int | None) -> Any:
    """Runs in the worker: seed it for this batch.

    By the number of the batch, so that the number of workers does not matter. For an iterable data
    set (no number) by worker and how many tasks it has had.
    """
    global _tasks_received
    info = get_worker_info()
    if info is not None and number is not None:
        _seed_batch(info.dataset, seed, None, number)
    elif info is not None:
        _seed_batch(info.dataset, seed, info.id, _tasks_received)
        _tasks_received += 1
    return index


def _seed_batch(dataset: Any, seed: int, worker: int | None, number: int) -> None:
    if worker is None:
        key = derive_seed("batch", seed, number)
    else:
        key = derive_seed("task", seed, worker, number)
    reseed(dataset, seed_process(key))


def reseed(dataset: Any, seed: int) -> None:
    """Call the hook `reseed(seed)` of a data set, or of those that it wraps.

    It is for data sets with random number generators of their own, which nothing else can reach.
    """
    hook = getattr(dataset, "reseed", None)
    if callable(hook):
        hook(seed)
        return
    for inner in wrapped_datasets(dataset):
        reseed(inner, seed)


def wrapped_datasets(dataset: Any) -> list[Any]:
    """The data sets inside a `Subset` (`.dataset`) or a `ConcatDataset` (`.datasets`)."""
    inner = getattr(dataset, "dataset", None)
    several = getattr(dataset, "datasets", None)
    return ([] if inner is None else [inner]) + (
        list(several) if isinstance(several, list | tuple) else []
    )


def index_sampler(loader: DataLoader[Any]) -> Iterable[Any]:
    """What gives this loader's indices: batches of them, or single ones without batching."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


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
    what such samplers save is a position, which the order itself keeps.
    """
    return [
        value
        for value in _walk(index_sampler(loader))
        if has_state_dict(value) and not hasattr(value, "set_epoch")
    ]


def has_state_dict(value: Any) -> bool:
    """Whether an object can save and load its own state."""
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def _walk(*roots: Any) -> Iterator[Any]:
    """The roots, their attributes, and all that is inside samplers and loaders among these."""
    seen: set[int] = set()
    todo = deque((root, True) for root in roots)
    while todo:
        value, look_inside = todo.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if look_inside or isinstance(value, Sampler | DataLoader):
            todo.extend((inner, False) for inner in getattr(value, "__dict__", {}).values())
        elif isinstance(value, list | tuple) and len(value) <= _WALK_LIMIT:
            todo.extend((inner, False) for inner in value)
        elif isinstance(value, dict) and len(value) <= _WALK_LIMIT:
            todo.extend((inner, False) for inner in value.values())


def _draws_first(sampler: Any) -> bool:
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    return type(sampler) in _DRAW_FIRST or isinstance(sampler, list | tuple | range)


def index_checksum(index: Any, start: int = 0) -> int:
    """A checksum of one index, or of a batch of them, on top of `start`.

    By value: a list of Python integers and one of numpy's give the same. What only `repr` can tell
    apart is compared by that, without addresses.
    """
    if isinstance(index, list | tuple):
        start = zlib.crc32(b"%d" % len(index), start)
        try:
            return zlib.crc32(array("q", index), start)
        except (TypeError, OverflowError, ValueError, RuntimeError):  # not all are integers
            for item in index:
                start = index_checksum(item, start)
            return start
    if isinstance(index, torch.Tensor):
        index = index.detach().cpu().numpy()
    if isinstance(index, np.ndarray) and index.dtype != object:
        header = f"{index.dtype.str}{index.shape}".encode()
        return zlib.crc32(np.ascontiguousarray(index).tobytes(), zlib.crc32(header, start))
    if isinstance(index, dict):
        return index_checksum([part for item in index.items() for part in item], start)
    if isinstance(index, int | np.integer):
        return zlib.crc32(b"%d" % int(index), start)
    return zlib.crc32(re.sub(r" at 0x[0-9a-f]+", "", repr(index)).encode(), start)
