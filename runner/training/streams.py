"""Which loader of this process is which loader of the saved run.

Loaders have no names, and many scripts make a new one for each epoch. They are recognised by what
they look like (their fingerprint), in the order in which a run first uses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.training.loader import Stream
from runner.training.rng import Generator, generator_state, set_generator_state
from runner.training.samplers import generators_of


@dataclass
class _Entry:
    """One loader of the run."""

    fingerprint: dict[str, Any]
    saved: dict[str, Any] | None = None
    renewed: bool = False  # the script makes a new loader of this kind from time to time
    stream: Stream | None = None
    used: bool = False  # in this epoch


class Streams:
    """All loaders that a run has used, as a list that is the same in each of its attempts.

    `generators` are the random generators that are saved by themselves.
    """

    def __init__(self, generators: Sequence[Generator] = ()) -> None:
        self._generators = generators
        self._entries: list[_Entry] = []

    def begin_epoch(self) -> None:
        for entry in self._entries:
            entry.used = False

    def find(self, loader: Any, wanted: int | None = None) -> tuple[int, Stream]:
        """The number and the stream of a loader.

        `wanted` is the number that it must have, because a pass over it is to be resumed:
        PositionError if it is another one now.
        """
        index, entry = self._entry_for(loader, wanted)
        entry.used = True
        assert entry.stream is not None
        return index, entry.stream

    def state(self) -> list[dict[str, Any]]:
        return [
            {
                "fingerprint": entry.fingerprint,
                "renewed": entry.renewed,
                "saved": entry.saved if entry.stream is None else entry.stream.state(),
            }
            for entry in self._entries
        ]

    def load_state(self, saved: Sequence[Mapping[str, Any]]) -> None:
        self._entries = [_Entry(**entry) for entry in saved]

    def _entry_for(self, loader: Any, wanted: int | None) -> tuple[int, _Entry]:
        for index, entry in enumerate(self._entries):
            if entry.stream is not None and entry.stream.loader is loader:
                return index, entry
        stream = Stream(loader)
        fingerprint = stream.fingerprint()
        if wanted is not None:
            entry = self._entries[wanted]
            if entry.saved is not None:
                self._load(stream, entry.saved)
            entry.stream = stream
            return wanted, entry
        for index, entry in enumerate(self._entries):
            if entry.fingerprint != fingerprint:
                continue
            if entry.stream is None:
                if not entry.renewed and entry.saved is not None:
                    self._load(stream, entry.saved)
                entry.stream = stream
                return index, entry
            if not entry.used:
                entry.stream, entry.renewed = stream, True
                return index, entry
        self._entries.append(_Entry(fingerprint, stream=stream))
        return len(self._entries) - 1, self._entries[-1]

    def _load(self, stream: Stream, saved: Mapping[str, Any]) -> None:
        """Give a loader its saved state, when the run comes to it for the first time.

        A generator that others have as well has gone on since, and stays where it is.
        """
        live = [entry.stream.loader for entry in self._entries if entry.stream is not None]
        shared = [*self._generators, *generators_of(*live)]
        states = [generator_state(generator) for generator in shared]
        stream.load_state(saved)
        for generator, state in zip(shared, states, strict=True):
            set_generator_state(generator, state)
