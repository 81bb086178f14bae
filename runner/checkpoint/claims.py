"""The slots that this supervisor has taken from the trainer, and who of its own still reads them.

A slot may be restored from while it is being persisted: both only read. It goes back to the
trainer when the last of them is done with it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from runner.spool import Marker, RankSpool


@dataclass
class _Held:
    marker: Marker
    must: bool
    readers: int = 1


class Claims:
    """Takes and returns the slots of one rank; from any thread."""

    def __init__(self, rank: RankSpool) -> None:
        self._rank = rank
        self._held: dict[int, _Held] = {}
        self._lock = threading.Lock()

    def recover(self) -> None:
        """Give back what a supervisor that is dead by now had taken."""
        with self._lock:
            self._rank.recover_claims(self._held)

    def complete(self) -> list[Marker]:
        """Markers of all complete slots, also of those that are held here, oldest first."""
        with self._lock:
            markers = self._rank.complete()
            markers += [replace(held.marker, must=held.must) for held in self._held.values()]
        return sorted(markers, key=lambda marker: marker.order)

    def take(self, slot: int) -> Marker | None:
        """Keep a slot from being overwritten; None if the trainer has just withdrawn it."""
        with self._lock:
            held = self._held.get(slot)
            if held is not None:
                held.readers += 1
                return held.marker
            marker = self._rank.claim(slot)
            if marker is not None:
                self._held[slot] = _Held(marker, marker.must)
            return marker

    def hold(self, marker: Marker) -> None:
        """Take a slot that the supervisor itself has filled."""
        with self._lock:
            self._rank.hold(marker)
            self._held[marker.slot] = _Held(marker, marker.must)

    def release(self, slot: int, *, must: bool | None = None) -> None:
        """One reader is done; `must` says whether the slot is still to be persisted, if it knows.

        After the last one the slot is complete again, and the trainer's.
        """
        with self._lock:
            held = self._held[slot]
            held.must = held.must if must is None else must
            if self._is_last(held):
                self._rank.give_back(slot, must=held.must)

    def drop(self, slot: int) -> None:
        """One reader is done with a slot that is of no use: after the last one it is free."""
        with self._lock:
            if self._is_last(self._held[slot]):
                self._rank.drop(slot)

    def _is_last(self, held: _Held) -> bool:
        held.readers -= 1
        if held.readers == 0:
            del self._held[held.marker.slot]
        return held.readers == 0
