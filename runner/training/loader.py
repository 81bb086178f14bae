"""The place in the data: what a training loop iterates over, and how far it has come.

A `Stream` is what belongs to one loader over the whole run, a `Pass` is one time through it. A pass
that is opened with the saved state of another goes on after that one's last finished batch, with
the same samples in the same order and the same randomness in loading them, whatever the number of
workers was and is. What a loop can take its batches from is in `sources`. What is not exact:

* An iterable data set with another number of workers, a sampler with hidden state, changed data:
  `PositionError`. A loader that hides its sampler, or loads in a thread: an error at once.
* A data set with a generator of its own and no method `reseed(seed: int)`, a loader with a state of
  its own that does not hold all randomness, and what has to be read again: a warning.
* A `worker_init_fn` that makes state of its own, `worker_info.seed` and `.id`, and what a subclass
  of `DataLoader` draws in this process: exact with the same number of workers only. Not visible.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from torch.utils.data import DataLoader

from runner.errors import PositionError
from runner.training.samplers import has_state_dict
from runner.training.sources import (
    Reading,
    ReplayedSource,
    SequenceSource,
    Source,
    StatefulSource,
    is_indexed,
)
from runner.training.twin import LoaderSource

# In the order in which a difference is reported: the cause before what follows from it.
_FEATURES: Final = {
    "kind": "kind",
    "batch_size": "batch size",
    "dataset_length": "number of samples",
    "length": "number of batches",
    "sampler": "sampler",
}


class Stream:
    """What belongs to one loader over the whole run. Making one draws and starts nothing."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.source = _source_of(loader)
        self._fingerprint: dict[str, Any] | None = None

    def fingerprint(self) -> dict[str, Any]:
        """By what the same loader is known in the next process.

        `kind` ("map", "iterable", "sequence", "replayed", "stateful"), `batch_size`,
        `dataset_length` (samples), `length` (batches) and `sampler` (types); None where unknown.
        Taken at the first call, and anew whenever a pass is opened.
        """
        if self._fingerprint is None:
            self._fingerprint = self.source.fingerprint()
        return self._fingerprint

    def state(self) -> dict[str, Any]:
        """What the next pass depends on, as plain values. Cheap enough for every boundary.

        While a pass is under way it holds the fingerprint and little more: the state of the pass
        has the rest.
        """
        return {"fingerprint": self.fingerprint(), **self.source.state()}

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state` returned in an earlier process, before the first pass.

        A generator that the script seeds anew before each pass keeps what the script gave it.
        Raises `PositionError` for a loader of another kind or with another sampler (between passes,
        batch size and lengths may change), `RestoreError` if a generator or a sampler does not
        take its state.
        """
        self._require_like(saved["fingerprint"], ("kind", "sampler"), "when it was saved")
        self.source.load_state(saved)

    def open(self, resume: Mapping[str, Any] | None, done: int) -> Reading:
        """Begin a pass, or go on with a saved one (see `Pass.open`)."""
        self._fingerprint = None
        if resume is not None:
            self._require_like(resume["fingerprint"], tuple(_FEATURES), "when this pass began")
        return self.source.open(resume, done)

    def _require_like(self, then: Mapping[str, Any], features: tuple[str, ...], when: str) -> None:
        now = self.fingerprint()
        for feature in features:
            if then[feature] != now[feature]:
                raise PositionError(
                    f"the {_FEATURES[feature]} of {self.source} was {then[feature]} {when} and is "
                    f"{now[feature]} now, so the place in the data cannot be found again; "
                    "set it back until the pass has ended, or start a new run"
                )


class Pass:
    """One pass over one loader, as an iterator over its batches.

    `open`, then for each batch: `next`, the body of the loop, `finish`. All from one thread.
    """

    def __init__(self, stream: Stream, resume: Mapping[str, Any] | None = None) -> None:
        self.stream = stream
        self.done: int = 0 if resume is None else resume["done"]
        """Batches whose body has ended, in this process or before."""
        self._handed_out = self.done
        self._resume = resume
        self._reading: Reading | None = None
        self._thread = 0

    def open(self) -> None:
        """Start the iterator.

        A fresh pass draws from the process's generators what the plain loader's would, and nothing
        more. A resumed one leaves them anywhere: restore those of the boundary afterwards. The
        loader's own generators and samplers are where they were at the boundary.

        Raises `PositionError` if the data or its order has changed, `RestoreError` if a state does
        not fit, `UsageError` for a loader whose place cannot be kept.
        """
        if self._reading is not None:
            raise RuntimeError("this pass has been opened already")
        self._thread = threading.get_ident()
        self._reading = self.stream.open(self._resume, self.done)
        self._resume = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next batch. The streams of the loop's body are the same before and after.

        An exception from loading a batch comes through and the batch counts as finished, as with
        the plain loader, which goes on after it. RuntimeError from another thread.
        """
        reading = self._opened()
        if threading.get_ident() != self._thread:
            raise RuntimeError("a pass must be iterated by the thread that opened it")
        all_done = self.done == self._handed_out
        reading.lost_one = False
        try:
            batch = reading.read()
        except StopIteration:
            raise
        except BaseException as error:
            if reading.lost_one:
                self._handed_out += 1
                if all_done and isinstance(error, Exception):
                    self.finish()
            raise
        self._handed_out += 1
        return batch

    def finish(self) -> None:
        """The body of the batch that was handed out last has ended; again is no harm."""
        self._opened().finish()
        self.done = self._handed_out

    def state(self) -> dict[str, Any]:
        """At a boundary: what `open` needs to go on here, in another process. Plain values."""
        return {
            "fingerprint": self.stream.fingerprint(),
            "done": self.done,
            **self._opened().state(),
        }

    def close(self) -> None:
        """Let go of the iterator, after a `break` too: workers stop at once, persistent ones stay.

        The loader's generators are left where the plain loader would have left them. `state` keeps
        answering for the place that was reached.
        """
        if self._reading is not None:
            self._reading.close()

    def __len__(self) -> int:
        """Batches in the whole pass. TypeError if the loader has no length."""
        return len(self.stream.loader)  # type: ignore[arg-type]

    def _opened(self) -> Reading:
        if self._reading is None:
            raise RuntimeError("open() the pass first")
        return self._reading


def _source_of(loader: Any) -> Source:
    if has_state_dict(loader):
        return StatefulSource(loader)
    if isinstance(loader, DataLoader):
        return LoaderSource(loader)
    return SequenceSource(loader) if is_indexed(loader) else ReplayedSource(loader)
