"""The order of one pass over a `DataLoader`.

A pass does not hand the user's sampler to the loader's machinery. `Order` stands in its place and
promises:

* The sampler draws from streams of its own, which depend only on the state in which the pass
  began. However far workers prefetch, its draws never mix with those of the loop's body.
* A running checksum over the indices proves, when a pass is resumed, that the sampler has repeated
  its order. If it has not, that is a `PositionError`, never another order in silence.
"""

from __future__ import annotations

import re
import threading
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from runner.errors import PositionError
from runner.training.rng import (
    Streams,
    capture_streams,
    derive_seed,
    draw_seed,
    restore_streams,
    same_state,
    seed_process,
)
from runner.training.samplers import Generators, draws_first, index_sampler
from runner.training.seeding import Task, loads_by_rule, seed_batch

_END: Final = object()


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
        self.number = skip
        """Of the batch whose index is pulled next."""
        self._generators = Generators(loader, self._sampler)
        self._draws_late = not self._iterable and not draws_first(self._sampler)
        self.draws_here = not self._in_workers and (self._draws_late or not loads_by_rule(loader))
        """Whether batches may draw in this process: then the order seeds it for each of them, and
        the reader keeps the loop's streams."""
        self._marks: deque[Mark] = deque()
        self._thread = threading.get_ident()

        self.begun = self.ended = self.trespassed = False
        self.nothing_left = False
        """Whether an earlier process has finished all batches: then the loader need not start."""
        self.failure: Exception | None = None
        self.pulled = 0
        self.seed = 0
        self.live: Streams | None = None
        """The process's streams after the draws of `begin`: those of the loop's body."""
        self.mark = Mark(0, [])
        """Of the batch that was handed out last."""

    def begin(self) -> None:
        """Start the sampler, then pass over the batches that an earlier process has finished.

        An error is kept in `failure`, and the order is empty then: a subclass of `DataLoader` may
        call this from inside torch's constructor, whose half-built object does not survive one.
        """
        self.begun = True
        try:
            self._inner = iter(self._sampler)
            self.seed = draw_seed(self._loader_generator)
            self._current = next(self._inner, _END)
            self._fresh = True
            self.live = capture_streams()
            self._live_generators = self._own_generators = self._generators.states()
            seed_process(derive_seed("sampler", self.seed))
            self._own = capture_streams()
            self._checksum = 0
            self.mark = Mark(self._checksum, self._own_generators)
            if self._skip:
                self._in_own_streams(self._pass_over)
                self.mark = Mark(self._checksum, self._own_generators)
                self._in_own_streams(self._advance)
                self.ended = self.nothing_left = self._current is _END
            self.seed_main(self._skip)  # an IterableDataset's __iter__ may draw at once
        except Exception as error:  # noqa: BLE001 - raised by the reader
            self.failure, self.ended = error, True

    def seed_main(self, number: int) -> None:
        """Seed this process for what it does itself for a batch whose data workers load."""
        seed_process(derive_seed("main", self.seed, number))

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
            if self.draws_here:
                self.seed_main(self.number)
            raise StopIteration
        self._note()
        self._marks.append(Mark(self._checksum, self._own_generators))
        self.pulled += 1
        number = self.number
        self.number += 1
        if self._in_workers:
            return Task(self._current, self.seed, None if self._iterable else number)
        if self.draws_here:
            seed_batch(self._dataset, self.seed, number, worker=0 if self._iterable else -1)
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
        if self.live is not None and same_state(self._generators.states(), self._live_generators):
            self._live_generators = self._own_generators if self.ended else self.mark.generators
            self._generators.set(self._live_generators)

    def _in_own_streams(self, action: Callable[[], None]) -> None:
        """Run the sampler where its draws do not touch those of the loop's body."""
        if not (self._draws_late or self._generators):
            return action()
        # Without workers, whoever reads the order keeps the loop's streams anyway.
        outer = capture_streams() if self._draws_late and self._in_workers else None
        outer_generators = self._generators.states()
        if self._draws_late:
            restore_streams(self._own)
        self._generators.set(self._own_generators)
        try:
            return action()
        finally:
            self._own_generators = self._generators.states()
            self._generators.set(outer_generators)
            if self._draws_late:
                self._own = capture_streams()
            if outer:
                restore_streams(outer)

    def _pass_over(self) -> None:
        for number in range(self._skip):
            if number:
                self._advance()
            if self._current is _END:
                raise PositionError(
                    f"{self._skip} batches of this pass were finished, and the sampler gives only "
                    f"{number} now; restore the data and the sampler as they were"
                )
            self._note()
        if self._checksum != self._expected:
            raise PositionError(
                f"the sampler did not repeat the order of the {self._skip} batches that were "
                "finished, so the pass cannot go on exactly; a sampler with hidden state needs "
                "state_dict and load_state_dict, and data and sampler must be as they were"
            )

    def _advance(self) -> None:
        self._current = next(self._inner, _END)

    def _note(self) -> None:
        self._checksum = index_checksum(self._current, self._checksum)


class Indices:
    """What a loader has in the place of its (batch) sampler: gives the order of the current pass.

    The machinery asks for an iterator up to twice per pass; both times it is the same one.
    """

    def __init__(self, length_of: Any) -> None:
        self._length_of = length_of
        self.order: Order | None = None
        self.worker_generator = torch.Generator()
        """The machinery draws the base seed of its workers from it."""
        self.worker_seed: int | None = None
        """A seed that stays, for workers that stay. None: that of the pass."""

    def __iter__(self) -> Iterator[Any]:
        return self.begin()

    def begin(self) -> Order:
        """The order of the current pass, begun if it was not."""
        if self.order is None:
            raise RuntimeError("no pass over this loader has been opened")
        if not self.order.begun:
            self.order.begin()
            seed = self.order.seed if self.worker_seed is None else self.worker_seed
            self.worker_generator.manual_seed(seed)
        return self.order

    def __len__(self) -> int:
        return len(self._length_of)


def index_checksum(index: Any, start: int = 0) -> int:
    """A checksum of one index, or of a batch of them, on top of `start`.

    By value: a list of Python's integers and one of numpy's give the same. What only `repr` can
    tell apart is compared by that, without addresses.
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
