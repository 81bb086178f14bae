"""The kinds of things that a loop can take its batches from, and how each finds its place again.

| kind | what | at a resume |
|---|---|---|
| `map` | `DataLoader` over indices | finished batches are skipped by index, nothing is loaded |
| `iterable` | `DataLoader` over an `IterableDataset` | finished batches are read again and dropped |
| `sequence` | list, tuple, range, `collections.abc.Sequence` | skipped by index |
| `stateful` | has `state_dict` and `load_state_dict` | loads its own state |
| `replayed` | any other iterable | finished items are read again and dropped |

A `Source` belongs to the run; a `Reading` is one pass over it. Randomness in loading never touches
the streams of the loop's body: see `order` for `DataLoader`s; the other kinds are read inside a
guard, each item with a seed of its own.
"""

from __future__ import annotations

import logging
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.utils.data
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler
from torch.utils.data import WeightedRandomSampler as WeightedSampler

from runner.errors import PositionError, RestoreError, UsageError
from runner.training.order import (
    Indices,
    Order,
    generators_of,
    has_state_dict,
    index_sampler,
    reseed,
    stateful_samplers_of,
    wrapped_datasets,
)
from runner.training.rng import (
    Generator,
    KeepStreams,
    capture_rng,
    derive_seed,
    draw_seed,
    generator_state,
    restore_rng,
    restore_streams,
    same_state,
    seed_process,
    set_generator_state,
)

log = logging.getLogger(__name__)

_SEQUENCE_ITERS = (list.__iter__, tuple.__iter__, range.__iter__, Sequence.__iter__)
_BUILTIN_SEQUENCES = (list, tuple, range)


def source_of(loader: Iterable[Any]) -> Source:
    """The source that fits what the script iterates over. Changes and draws nothing."""
    if has_state_dict(loader):
        return StatefulSource(loader)
    if isinstance(loader, DataLoader):
        return LoaderSource(loader)
    if isinstance(loader, Sequence) and type(loader).__iter__ in _SEQUENCE_ITERS:
        return SequenceSource(loader)
    return ReplayedSource(loader)


class Reading(ABC):
    """One opened pass."""

    lost_one = False
    """Whether an exception out of `read` has used up a batch, as it does in a plain loader."""
    closed = False

    @abstractmethod
    def read(self) -> Any:
        """The next batch. StopIteration at the end; the loop's streams stay as they are."""

    def finish(self) -> None:  # noqa: B027 - most kinds have nothing to note
        """All batches that were read are done."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain values with which `Source.open` can go on after the last finished batch."""

    def close(self) -> None:
        """Let go of the iterator."""
        self.closed = True


class Source(ABC):
    """What batches come from, over the whole run."""

    kind: ClassVar[str]

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._reading: weakref.ref[Reading] | None = None

    @abstractmethod
    def start(self, saved: Mapping[str, Any] | None, done: int) -> Reading:
        """Begin a pass, or go on with the saved one after `done` finished batches."""

    def open(self, saved: Mapping[str, Any] | None, done: int) -> Reading:
        """`start`, remembering that a pass is under way."""
        reading = self.start(saved, done)
        self._reading = weakref.ref(reading)
        return reading

    @property
    def reading(self) -> bool:
        """Whether a pass is under way. Its own state counts then, not that of the source."""
        reading = None if self._reading is None else self._reading()
        return reading is not None and not reading.closed

    def fingerprint(self) -> dict[str, Any]:
        """By what the same source is known in the next process."""
        return {
            "kind": self.kind,
            "batch_size": None,
            "length": length_of(self.loader),
            "dataset_length": None,
            "sampler": None,
        }

    def state(self) -> dict[str, Any]:
        """What the next pass depends on."""
        return {}

    def load_state(self, saved: Mapping[str, Any]) -> None:  # noqa: B027 - nothing by default
        """Take over what `state` returned in an earlier process."""

    def __str__(self) -> str:
        dataset = getattr(self.loader, "dataset", None)
        over = "" if dataset is None else f" over {type(dataset).__name__}"
        return type(self.loader).__name__ + over


def length_of(value: Any) -> int | None:
    """`len(value)`, or None for what has no length."""
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None


# ---------------------------------------------------------------- torch's DataLoader


class LoaderSource(Source):
    """A `DataLoader`, read through a twin of it that takes its indices from an `Order`.

    The script's loader is never changed. The twin is a shallow copy, so that subclasses and every
    option keep working; it owns the persistent workers.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self._iterable = isinstance(loader.dataset, IterableDataset)
        self.kind = "iterable" if self._iterable else "map"  # type: ignore[misc]
        self._indices = Indices(index_sampler(loader))
        self._twin = object.__new__(type(loader))
        self._seen: dict[str, Any] = {}
        self._passes = 0
        self._reseeded: list[bool] | None = None
        """Which generators the script seeds anew for each pass; None before the second pass."""

    def fingerprint(self) -> dict[str, Any]:
        loader, sampler = self.loader, index_sampler(self.loader)
        inner = getattr(sampler, "sampler", None)
        size = loader.batch_size
        return {
            "kind": self.kind,
            "batch_size": getattr(sampler, "batch_size", None) if size is None else size,
            # Asking an iterable loader for its length makes it warn about that length later.
            "length": None if self._iterable else length_of(sampler),
            "dataset_length": length_of(loader.dataset),
            "sampler": type(sampler).__name__ + (f"({type(inner).__name__})" if inner else ""),
        }

    def state(self) -> dict[str, Any]:
        lasting = {"worker_seed": self._indices.worker_seed, "reseeded": self._reseeded}
        if self.reading:
            return lasting
        return {
            **lasting,
            "generators": [generator_state(g) for g in self._generators()],
            "samplers": [sampler.state_dict() for sampler in stateful_samplers_of(self.loader)],
        }

    def load_state(self, saved: Mapping[str, Any]) -> None:
        self._indices.worker_seed = saved["worker_seed"]
        self._reseeded = saved["reseeded"]
        if "generators" in saved:
            generators = self._generators()
            _require_as_many("random generators", saved["generators"], generators)
            for i, (generator, state) in enumerate(
                zip(generators, saved["generators"], strict=True)
            ):
                if not self._script_seeds(i, generator, state):
                    set_generator_state(generator, state)
            self._load_samplers(saved["samplers"])

    def start(self, saved: Mapping[str, Any] | None, done: int) -> Reading:
        loader = self.loader
        if saved is not None and self._iterable and saved["workers"] != loader.num_workers:
            raise PositionError(
                f"{self} was read by {saved['workers']} workers when this pass began, and has "
                f"{loader.num_workers} now: which worker reads what depends on it; set "
                f"num_workers={saved['workers']} until the pass has ended"
            )
        generators = self._generators()
        if saved is None:
            begin = {
                "rng": capture_rng(),
                "generators": [generator_state(g) for g in generators],
                "samplers": [sampler.state_dict() for sampler in stateful_samplers_of(loader)],
            }
            self._watch(generators)
        else:
            begin = saved["begin"]
            _require_as_many("random generators", begin["generators"], generators)
            restore_rng(begin["rng"])
            _set_generators(generators, begin["generators"])
            self._load_samplers(begin["samplers"])
            self._indices.worker_seed = saved["worker_seed"]
            self._reseeded = saved["reseeded"]
        self._passes += 1
        self._refresh_twin()
        if saved is None and self._passes == 1:
            self._announce()

        skip, checksum = (0, 0) if saved is None or self._iterable else (done, saved["checksum"])
        order = Order(loader, skip, checksum)
        reading = LoaderReading(self, self._twin, self._indices, order, begin)
        if self._twin.persistent_workers and self._indices.worker_seed is None:
            self._indices.worker_seed = order.seed
        if saved is not None:
            if order.seed != saved["seed"]:
                raise PositionError(
                    f"{self} draws another seed than when this pass began; "
                    "give it the same generator and sampler as then"
                )
            if self._iterable:
                reading.read_again(done)
            _set_generators(generators, saved["generators"])
        elif order.live is not None:
            restore_streams(order.live)
        return reading

    def pass_state(self, order: Order) -> dict[str, Any]:
        """The part of a reading's state that this source knows."""
        return {
            "seed": order.seed,
            "workers": self.loader.num_workers,
            "worker_seed": self._indices.worker_seed,
            "reseeded": self._reseeded,
            "generators": [generator_state(g) for g in self._generators()],
        }

    def _generators(self) -> list[Generator]:
        return generators_of(self.loader, index_sampler(self.loader))

    def _load_samplers(self, states: Sequence[Any]) -> None:
        samplers = stateful_samplers_of(self.loader)
        _require_as_many("samplers with a state_dict", states, samplers)
        for sampler, state in zip(samplers, states, strict=True):
            sampler.load_state_dict(state)

    def _refresh_twin(self) -> None:
        """Bring over what the script has changed in its loader since the last pass."""
        loader, twin = self.loader, self._twin.__dict__
        for name, value in vars(loader).items():
            if name not in self._seen or self._seen[name] is not value:
                if name != "_iterator":
                    twin[name] = value
        self._seen = dict(vars(loader))
        twin.setdefault("_iterator", None)
        # Into __dict__, because DataLoader.__setattr__ refuses these names.
        twin["sampler" if loader.batch_sampler is None else "batch_sampler"] = self._indices
        # Where the loader's machinery makes its tensors, for set_default_device.
        generator = torch.Generator(device=torch.empty(0).device)
        if isinstance(loader.dataset, getattr(torch.utils.data, "IterDataPipe", ())):
            generator.manual_seed(draw_seed(loader.generator))  # its shared seed comes first
        twin["generator"] = self._indices.worker_generator = generator
        twin["in_order"] = True
        if self._iterable:
            twin["persistent_workers"] = False

    def _announce(self) -> None:
        """Say at the first pass what is done otherwise than asked for, and what is not exact."""
        loader = self.loader
        if loader.num_workers and not getattr(loader, "in_order", True):
            log.warning(
                "%s: in_order=False would make the order depend on which worker is faster; "
                "batches come in order instead",
                self,
            )
        if loader.persistent_workers and self._iterable:
            log.warning(
                "%s: the workers of an iterable data set are started anew for each pass, because "
                "what they keep from one pass to the next could not be restored",
                self,
            )
        held = {id(generator) for generator in self._generators()}
        for path, generator in _own_generators(loader.dataset, "dataset"):
            if id(generator) not in held:
                log.warning(
                    "%s: %s is a random number generator of its own, so what it draws is not "
                    "the same after a resume; give the data set a method reseed(seed: int), or "
                    "draw from torch, numpy.random or random",
                    self,
                    path,
                )

    def _watch(self, generators: list[Generator]) -> None:
        """Notice whether the script seeds a generator before each pass."""
        if self._passes and not self.reading:
            self._reseeded = [_freshly_seeded(generator) for generator in generators]

    def _script_seeds(self, index: int, generator: Generator, state: Any) -> bool:
        """Whether what a generator holds now is what the script wants for the next pass."""
        if self._reseeded is not None and index < len(self._reseeded):
            return self._reseeded[index]
        if not isinstance(generator, torch.Generator) or not _freshly_seeded(generator):
            return False
        saved = torch.Generator(device=generator.device)
        set_generator_state(saved, state)
        return saved.initial_seed() != generator.initial_seed()


class LoaderReading(Reading):
    """One pass over the twin of a loader."""

    def __init__(
        self,
        source: LoaderSource,
        twin: DataLoader[Any],
        indices: Indices,
        order: Order,
        begin: dict[str, Any],
    ) -> None:
        self._source, self._order, self._begin = source, order, begin
        self._ahead: deque[Any] = deque()
        self._number = 0
        self._checksum_read = 0
        # A subclass with an __iter__ of its own may draw in this process, and may hand out
        # something else than one batch per batch of its sampler.
        self._own_iter = type(twin).__iter__ is not DataLoader.__iter__
        self._in_workers = twin.num_workers > 0
        indices.order = order
        self._iterator: Iterator[Any] | None = iter(twin)
        if not order.begun:  # __iter__ is a generator function: it runs at the first `next`
            self._ahead.extend(self._first())
        if order.failure is not None:
            self.close()
            raise order.failure
        self._checksum_read = self._checksum = order.mark.checksum

    def read(self) -> Any:
        if self._ahead:
            self._order.hand_out()
            return self._ahead.popleft()
        if self._iterator is None:
            raise StopIteration
        pulled = self._order.pulled
        try:
            batch = self._next()
        except StopIteration:
            self._refuse_other_threads()
            self._order.hand_back()
            self.close()
            raise
        except Exception:
            self.lost_one = self._order.ended or self._order.pulled > pulled
            if self.lost_one:
                self._checksum_read = self._order.hand_out().checksum
            raise
        self._refuse_other_threads()
        if self._own_iter and self._number > 1 and not self._order.ended:
            self._require_one(self._order.pulled - pulled)
        self._checksum_read = self._order.hand_out().checksum
        return batch
