"""The kinds of things that a loop can take its batches from, and how each finds its place again.

| kind | what | at a resume |
|---|---|---|
| `map` | a `DataLoader` (see `twin`) | finished batches are skipped by index |
| `iterable` | a `DataLoader` over an `IterableDataset` | they are read again and dropped |
| `sequence` | list, tuple, range, `collections.abc.Sequence` | they are skipped by index |
| `stateful` | what has `state_dict` and `load_state_dict` | it loads its own state |
| `replayed` | any other iterable | they are read again and dropped |

A `Source` belongs to the run; a `Reading` is one pass over it. What loading draws never touches the
streams of the loop's body. Here, each item is read inside a guard, with a seed of its own.
"""

from __future__ import annotations

import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from runner.errors import PositionError, RestoreError, UsageError
from runner.training.rng import KeepStreams, derive_seed, draw_seed, seed_process
from runner.training.samplers import Generators
from runner.training.seeding import reseed

log = logging.getLogger(__name__)

_BY_INDEX: Final = (list.__iter__, tuple.__iter__, range.__iter__, Sequence.__iter__)
_PLAIN: Final = (list, tuple, range)


def length_of(value: Any) -> int | None:
    """`len(value)`, or None for what has no length."""
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None


def is_indexed(value: Any) -> bool:
    """Whether iterating is the same as going through the indices."""
    return isinstance(value, Sequence) and type(value).__iter__ in _BY_INDEX


class Reading(ABC):
    """One pass that has been opened."""

    closed = False
    lost_one = False
    """Whether the exception that came out of `read` has used up a batch."""

    @abstractmethod
    def read(self) -> Any:
        """The next batch, or StopIteration. The streams of the loop's body stay as they are."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain values from which `Source.open` goes on after the last finished batch."""

    def finish(self) -> None:  # noqa: B027 - most kinds have nothing to note
        """All batches that were read are finished."""

    def close(self) -> None:
        """Let go of the iterator."""
        self.closed = True


class Source(ABC):
    """What batches come from, over the whole run."""

    kind: str

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._reading: weakref.ref[Reading] | None = None

    def open(self, saved: Mapping[str, Any] | None, done: int) -> Reading:
        """Begin a pass, or go on with a saved one after `done` finished batches."""
        reading = self.start(saved, done)
        self._reading = weakref.ref(reading)
        return reading

    @abstractmethod
    def start(self, saved: Mapping[str, Any] | None, done: int) -> Reading:
        """What `open` does for this kind."""

    @property
    def being_read(self) -> bool:
        """Whether a pass is under way: then its state counts, not that of the source."""
        reading = None if self._reading is None else self._reading()
        return reading is not None and not reading.closed

    def fingerprint(self) -> dict[str, Any]:
        """By what the same source is known in the next process."""
        return {
            "kind": self.kind,
            "batch_size": None,
            "dataset_length": None,
            "length": length_of(self.loader),
            "sampler": None,
        }

    def state(self) -> dict[str, Any]:
        """What the next pass depends on."""
        return {}

    def load_state(self, saved: Mapping[str, Any]) -> None:  # noqa: B027 - nothing to load
        """Take over what `state` returned in an earlier process."""

    def __str__(self) -> str:
        dataset = getattr(self.loader, "dataset", None)
        over = "" if dataset is None else f" over {type(dataset).__name__}"
        return type(self.loader).__name__ + over


class ItemReading(Reading):
    """Reads an iterator item by item, each with its own seed (none without `seed`)."""

    def __init__(
        self,
        source: Source,
        make_iterator: Callable[[], Iterator[Any]],
        seed: int | None,
        number: int,
        extra: Callable[[], dict[str, Any]] = dict,
        *,
        begin_as: str = "main",
    ) -> None:
        self._dataset = getattr(source.loader, "dataset", source.loader)
        self._seed, self._number, self._extra = seed, number, extra
        with KeepStreams():
            if seed is not None:
                seed_process(derive_seed(begin_as, seed, 0))
            self._iterator: Iterator[Any] = make_iterator()

    def read(self) -> Any:
        if self._seed is None:
            return next(self._iterator)
        number, self._number = self._number, self._number + 1
        with KeepStreams():
            reseed(self._dataset, seed_process(derive_seed("item", self._seed, number)))
            try:
                return next(self._iterator)
            except StopIteration:
                self.closed = True
                raise
            except BaseException:
                self.lost_one = True
                raise

    def state(self) -> dict[str, Any]:
        return {"seed": self._seed, **self._extra()}

    def close(self) -> None:
        super().close()
        self._iterator = iter(())


class SequenceSource(Source):
    """Something with an index: the position is the index."""

    kind = "sequence"

    def start(self, saved: Mapping[str, Any] | None, done: int) -> Reading:
        # What is in a plain list is there already; a Sequence may make its items as they are asked.
        if type(self.loader) in _PLAIN:
            seed = None
        else:
            seed = draw_seed() if saved is None else saved["seed"]
        return ItemReading(self, lambda: _items(self.loader, done), seed, done)


def _items(sequence: Sequence[Any], start: int) -> Iterator[Any]:
    index = start
    while True:
        try:
            item = sequence[index]
        except IndexError:  # what ends a plain iteration as well
            return
        yield item
        index += 1


class ReplayedSource(Source):
    """An iterable that nothing is known about: its position is found by reading it again."""

    kind = "replayed"

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._used = False

    def start(self, saved: Mapping[str, Any] | None, done: int) -> Reading:
        self._require_unused()
        generators = Generators(self.loader)  # of a loader inside, if there is one
        if saved is None:
            begin, seed = generators.states(), draw_seed()
        else:
            begin, seed = saved["generators"], saved["seed"]
            generators.set(begin)
            log.warning(
                "%s cannot be skipped by index: its first %d items are read again and dropped; "
                "exact only if it gives the same items again",
                self,
                done,
            )
        reading = ItemReading(
            self, lambda: iter(self.loader), seed, 0, lambda: {"generators": begin}
        )
        read_again(reading, done)
        return reading

    def state(self) -> dict[str, Any]:
        return {"generators": None if self.being_read else Generators(self.loader).states()}

    def load_state(self, saved: Mapping[str, Any]) -> None:
        if saved["generators"] is not None:
            generators = Generators(self.loader)
            generators.set(saved["generators"], generators.seeded_unlike(saved["generators"]))

    def _require_unused(self) -> None:
        one_shot = isinstance(self.loader, Iterator) and not hasattr(self.loader, "reset")
        if one_shot and self._used:
            raise UsageError(
                f"a {self} is its own iterator and can be gone through once only: make a new one "
                "for each pass, or give an object whose iter() starts again"
            )
        self._used = True


class StatefulSource(Source):
    """A loader that saves and loads its own position, such as torchdata's StatefulDataLoader."""

    kind = "stateful"

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._loaded: Any = None
        self._passes = 0

    def state(self) -> dict[str, Any]:
        # Before the first pass, asking could make it start its workers.
        if self.being_read or not self._passes:
            return {"loader": self._loaded}
        return {"loader": self._own_state()}

    def load_state(self, saved: Mapping[str, Any]) -> None:
        self._loaded = saved["loader"]
        if self._loaded is not None:
            self._load(self._loaded)

    def start(self, saved: Mapping[str, Any] | None, done: int) -> Reading:
        if saved is None:
            self._require_own_randomness()
            seed = draw_seed()
        else:
            seed = saved["seed"]
            self._load(saved["loader"])
        self._loaded = None
        self._passes += 1
        # When it goes on, torchdata's loader goes through its sampler or data set again inside
        # iter(), and these must draw what they drew when they were asked for the first item.
        return ItemReading(
            self,
            lambda: iter(self.loader),
            seed,
            done,
            lambda: {"loader": self._own_state()},
            begin_as="item",
        )

    def _own_state(self) -> Any:
        with KeepStreams():
            return self.loader.state_dict()

    def _load(self, state: Any) -> None:
        try:
            self.loader.load_state_dict(state)
        except Exception as error:
            raise RestoreError(f"{self} did not load its saved state: {error!r}") from error
        iterable = isinstance(getattr(self.loader, "dataset", None), IterableDataset)
        workers = getattr(self.loader, "num_workers", 0)
        if iterable or workers:
            log.warning(
                "%s continues from its own state, which does not hold all that its data set and "
                "its workers draw at random: that may differ from a run without the interruption",
                self,
            )

    def _require_own_randomness(self) -> None:
        """torchdata saves the generator of its own samplers, but not what torch's draw from."""
        sampler = getattr(self.loader, "sampler", None)
        if isinstance(self.loader, DataLoader) and type(sampler) in (
            RandomSampler,
            SubsetRandomSampler,
            WeightedRandomSampler,
        ):
            raise UsageError(
                f"{self} does not save the randomness of its {type(sampler).__name__}, so it would "
                "continue in another order; use torch's DataLoader, which resumes exactly, or "
                "shuffle=True in the place of the sampler"
            )


def read_again(reading: Reading, count: int) -> None:
    """Read and drop what an earlier process has finished."""
    for number in range(count):
        try:
            reading.read()
        except StopIteration:
            raise PositionError(
                f"{count} batches of this pass were finished, and the data ends after {number} now"
            ) from None
        except Exception as error:  # noqa: BLE001 - it counted as a batch then, and does now
            log.warning("batch %d failed while it was read again: %r", number, error)
