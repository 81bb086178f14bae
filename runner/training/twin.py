"""Read a `DataLoader` through a twin of it, which takes its indices from an `Order`.

The script's loader is never changed. The twin is a shallow copy, so that subclasses and every
option keep working; it owns the persistent workers. Undisturbed, a pass gives the samples that the
plain loader would, and leaves the loop's body the random numbers that it would have without
workers. What cannot be held exactly is said in the log, once, or refused.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils.data
from torch.utils.data import DataLoader, IterableDataset

from runner.errors import PositionError, UsageError
from runner.training.order import Indices, Order
from runner.training.rng import KeepStreams, capture_rng, draw_seed, restore_rng, restore_streams
from runner.training.samplers import (
    Generators,
    index_sampler,
    load_samplers,
    stateful_samplers_of,
)
from runner.training.seeding import unreachable_generators
from runner.training.sources import Reading, Source, length_of, read_again
from runner.training.workers import share_the_end

log = logging.getLogger(__name__)


class LoaderSource(Source):
    """A `DataLoader`, over the whole run."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self._iterable = isinstance(loader.dataset, IterableDataset)
        self.kind = "iterable" if self._iterable else "map"
        self._indices = Indices(index_sampler(loader))
        self._twin = object.__new__(type(loader))
        self._seen: dict[str, Any] = {}
        self._passes = 0
        self._reseeded: list[bool] | None = None
        self._announced = False
        """Which generators the script seeds anew for each pass; unknown before the second."""

    def fingerprint(self) -> dict[str, Any]:
        loader, sampler = self.loader, index_sampler(self.loader)
        inner = getattr(sampler, "sampler", None)
        size = loader.batch_size
        return {
            "kind": self.kind,
            "batch_size": getattr(sampler, "batch_size", None) if size is None else size,
            "dataset_length": length_of(loader.dataset),
            # An iterable loader that was asked for its length complains later if that was wrong.
            "length": None if self._iterable else length_of(sampler),
            "sampler": type(sampler).__name__ + (f"({type(inner).__name__})" if inner else ""),
        }

    def state(self) -> dict[str, Any]:
        return self._lasting() | ({} if self.being_read else self._held())

    def load_state(self, saved: Mapping[str, Any]) -> None:
        self._load_lasting(saved)
        if "generators" in saved:
            generators = self._generators()
            keep = self._reseeded
            if keep is None:
                keep = generators.seeded_unlike(saved["generators"])
            generators.set(saved["generators"], keep)
            load_samplers(stateful_samplers_of(self.loader), saved["samplers"])

    def start(self, saved: Mapping[str, Any] | None, done: int) -> Reading:
        if saved is None:
            if self._passes and not self.being_read:
                self._reseeded = self._generators().freshly_seeded()
            begin = {"rng": capture_rng(), **self._held()}
        else:
            self._require_same_workers(saved["workers"])
            begin = saved["begin"]
            self._load_lasting(saved)
            self._generators().set(begin["generators"])
            load_samplers(stateful_samplers_of(self.loader), begin["samplers"])
            restore_rng(begin["rng"])
        self._refresh_twin()
        self._passes += 1
        if not self._announced:
            self._announced = True
            self._announce()

        if saved is None or self._iterable:
            order = Order(self.loader)
        else:
            order = Order(self.loader, skip=done, checksum=saved["checksum"])
        reading = LoaderReading(self, self._twin, self._indices, order, begin)
        if self._twin.persistent_workers and self._indices.worker_seed is None:
            self._indices.worker_seed = order.seed
        if saved is not None:
            self._arrive(reading, order, saved, done)
        elif order.live is not None:
            restore_streams(order.live)
        return reading

    def pass_state(self) -> dict[str, Any]:
        """What the state of a pass holds of this source."""
        return {
            **self._lasting(),
            "workers": self.loader.num_workers,
            "generators": self._generators().states(),
        }

    def _arrive(
        self, reading: LoaderReading, order: Order, saved: Mapping[str, Any], done: int
    ) -> None:
        if order.seed != saved["seed"]:
            raise PositionError(
                f"{self} drew another seed than when this pass began; "
                "give it the generator and the sampler that it had"
            )
        if self._iterable:
            log.warning(
                "%s cannot be skipped by index: its first %d batches are read again and dropped",
                self,
                done,
            )
            read_again(reading, done)
        self._generators().set(saved["generators"])

    def _lasting(self) -> dict[str, Any]:
        return {
            "worker_seed": self._indices.worker_seed,
            "reseeded": self._reseeded,
            "begun": self._passes > 0,
        }

    def _load_lasting(self, saved: Mapping[str, Any]) -> None:
        self._indices.worker_seed, self._reseeded = saved["worker_seed"], saved["reseeded"]
        # Whether there was a pass before this one decides what the next one looks at.
        self._passes = max(self._passes, int(saved["begun"]))

    def _generators(self) -> Generators:
        return Generators(self.loader, index_sampler(self.loader))

    def _held(self) -> dict[str, Any]:
        samplers = stateful_samplers_of(self.loader)
        return {
            "generators": self._generators().states(),
            "samplers": [sampler.state_dict() for sampler in samplers],
        }

    def _refresh_twin(self) -> None:
        """Bring over what the script has changed in its loader since the last pass."""
        loader, twin = self.loader, vars(self._twin)
        for name, value in vars(loader).items():
            changed = name not in self._seen or self._seen[name] is not value
            if changed and name != "_iterator":
                twin[name] = value
        self._seen = dict(vars(loader))
        # Into __dict__, because DataLoader.__setattr__ refuses these names.
        twin["sampler" if loader.batch_sampler is None else "batch_sampler"] = self._indices
        twin.setdefault("_iterator", None)  # of the persistent workers
        twin["in_order"] = True
        if self._iterable:
            twin["persistent_workers"] = False
        # On the device where the machinery makes its tensors: there is set_default_device.
        generator = torch.Generator(torch.empty(0).device)
        if isinstance(loader.dataset, getattr(torch.utils.data, "IterDataPipe", ())):
            generator.manual_seed(draw_seed(loader.generator))  # drawn before all else
        twin["generator"] = self._indices.worker_generator = generator

    def _require_same_workers(self, then: int) -> None:
        now = self.loader.num_workers
        if self._iterable and then != now:
            raise PositionError(
                f"{self} had {then} workers when this pass began and has {now} now, and which "
                f"worker reads what depends on that; set num_workers={then} until it has ended"
            )

    def _announce(self) -> None:
        """Say what is done otherwise than the script asked for, and what is not exact."""
        loader = self.loader
        if loader.num_workers and not getattr(loader, "in_order", True):
            log.warning(
                "%s: batches come in order in spite of in_order=False, "
                "because which worker is faster could not be repeated",
                self,
            )
        if loader.persistent_workers and self._iterable:
            log.warning(
                "%s: workers are started anew for each pass in spite of persistent_workers=True, "
                "because what an iterable data set keeps in them could not be restored",
                self,
            )
        for path in unreachable_generators(loader.dataset, "dataset"):
            log.warning(
                "%s: %s is a random number generator that is not saved, so what it draws differs "
                "after a resume; give the data set a method reseed(seed: int), or draw from torch, "
                "numpy.random or random",
                self,
                path,
            )


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
        self._source, self._indices, self._order, self._begin = source, indices, order, begin
        self._number = order.number
        # A subclass with an __iter__ of its own may draw in this process even with workers, and
        # may hand out something else than one batch for each of its sampler's.
        self._own_iter = type(twin).__iter__ is not DataLoader.__iter__
        self._one_each = self._own_iter and not isinstance(twin.dataset, IterableDataset)
        self._ahead: deque[Any] = deque()
        self._iterator: Iterator[Any] | None = None
        indices.order = order
        if twin.num_workers:
            share_the_end()
        if self._own_iter:
            self._start_own_iter(twin)
        else:
            indices.begin()
        if order.failure is not None:
            failure, order.failure = order.failure, None
            self.close()
            raise failure
        if not (order.nothing_left or self._own_iter):
            self._iterator = iter(twin)
        self._checksum = self._checksum_read = order.mark.checksum

    def read(self) -> Any:
        if self._ahead:
            self._count()
            return self._ahead.popleft()
        order, pulled = self._order, self._order.pulled
        try:
            batch = self._next()
        except StopIteration:
            self._require_own_thread()
            self.close()
            raise
        except BaseException:
            self.lost_one = order.ended or order.pulled > pulled
            if self.lost_one:
                self._count()
            raise
        self._require_own_thread()
        if self._one_each and pulled and not order.ended:
            self._require_one_each(order.pulled - pulled)
        self._count()
        return batch

    def finish(self) -> None:
        self._checksum = self._checksum_read

    def state(self) -> dict[str, Any]:
        return {
            "begin": self._begin,
            "seed": self._order.seed,
            "checksum": self._checksum,
            **self._source.pass_state(),
        }

    def close(self) -> None:
        """Stop the workers, unless they are persistent, and hand back the sampler's generators."""
        if not self.closed:
            super().close()
            self._order.hand_back()
            self._iterator = None
            self._ahead.clear()
            if self._indices.order is self._order:
                self._indices.order = None

    def _next(self) -> Any:
        if self._iterator is None:
            raise StopIteration
        if not (self._order.draws_here or self._own_iter):
            return next(self._iterator)
        with KeepStreams():
            if not self._order.draws_here:
                self._order.seed_main(self._number)
            return next(self._iterator)

    def _start_own_iter(self, twin: DataLoader[Any]) -> None:
        """The subclass's code comes first: it may set the sampler's epoch. Then torch begins.

        If __iter__ is a generator function it runs at the first `next`, which has to be on the live
        streams, because the order begins there.
        """
        try:
            self._iterator = iter(twin)
            if not self._order.begun:
                self._ahead.extend(itertools.islice(self._iterator, 1))
        except Exception:
            # Some cannot stand a sampler without indices, which they have never seen.
            if not self._order.nothing_left:
                raise
            self._iterator = None
        if not self._order.begun:
            self.close()
            raise UsageError(
                f"{self._source} does not take its order from its sampler when it is iterated, so "
                "its place in the data cannot be found again; make its iterator in __iter__, or "
                "give it state_dict and load_state_dict"
            )

    def _count(self) -> None:
        self._number += 1
        self._checksum_read = self._order.hand_out().checksum

    def _require_own_thread(self) -> None:
        if self._order.trespassed:
            self.close()
            raise RuntimeError(
                f"{self._source} is read by another thread than the one that opened the pass, so "
                "what was loaded when cannot be repeated; use num_workers to load ahead"
            )

    def _require_one_each(self, pulled: int) -> None:
        if pulled != 1:
            self.close()
            raise UsageError(
                f"{self._source} used {pulled} batches of its sampler for one of its own, so its "
                "place in the data cannot be told from the count of batches; give it state_dict "
                "and load_state_dict"
            )
