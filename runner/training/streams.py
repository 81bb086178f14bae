"""Which loader of this process is which loader of the saved run.

Loaders have no names, and many scripts make a new one for each epoch. They are recognised by what
they look like (their fingerprint), in the order in which a run first uses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.training.loader import Stream


@dataclass
class _Entry:
    """One loader of the run. `initial` is its state when the run first used it."""

    fingerprint: dict[str, Any]
    initial: dict[str, Any]
    saved: dict[str, Any] | None = None
    renewed: bool = False  # the script makes a new loader of this kind from time to time
    stream: Stream | None = None
    used: bool = False  # in this epoch


class Streams:
    """All loaders that a run has used, as a list that is the same in each of its attempts."""

    def __init__(self) -> None:
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
                "initial": entry.initial,
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
        fingerprint, state = stream.fingerprint(), stream.state()
        if wanted is not None:
            entry = self._entries[wanted]
            stream.load_state(entry.saved or {})
            entry.stream = stream
            return wanted, entry
        for index, entry in enumerate(self._entries):
            if entry.fingerprint != fingerprint:
                continue
            if entry.stream is None:
                # Generators that the script has seeded itself, for this epoch say, are left alone.
                if not entry.renewed and _same(entry.initial, state):
                    stream.load_state(entry.saved or {})
                entry.stream = stream
                return index, entry
            if not entry.used:
                entry.stream, entry.renewed = stream, True
                return index, entry
        self._entries.append(_Entry(fingerprint, state, stream=stream))
        return len(self._entries) - 1, self._entries[-1]


def _same(one: Any, other: Any) -> bool:
    """Equality of states, which may hold numpy arrays."""
    if hasattr(one, "tobytes") and hasattr(other, "tobytes"):
        return bool(one.dtype == other.dtype and one.tobytes() == other.tobytes())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
