"""A buffer with a limit before something slow: whoever fills it never waits for long.

A thread of its own empties it. When it is full, whoever offers more waits for room, but has only so
much time for that: a few seconds at once, and a small share of the time in the long run. After that
what is offered is dropped until half of the buffer is free again, and a mark says how much it was.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_BATCH_BYTES = 1 << 18
_RESERVE_BYTES = 1 << 18


@dataclass(frozen=True)
class Patience:
    """How long a full buffer may hold up whoever fills it: seconds at once, and what share."""

    seconds: float
    share: float


class Sink:
    """`write(key, data)` is called in the sink's thread, and must not raise.

    `mark(nbytes)` makes the bytes that stand for what was dropped. Data with the same key are put
    together; the order is that of the offers.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[int, bytes], None],
        mark: Callable[[int], bytes],
        *,
        capacity_bytes: int,
        patience: Patience,
    ) -> None:
        self._write, self._mark = write, mark
        self._capacity, self._patience = capacity_bytes, patience
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._changed = threading.Condition()
        self._buffered = self._dropped = self._dropped_key = 0
        self._seconds_left, self._counted_at = patience.seconds, time.monotonic()
        self._over = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def offer(self, key: int, data: bytes, *, urgent: bool = False) -> None:
        """Put data into the buffer; dropped if there is no room, and no time to wait for it.

        What is urgent never waits, and has some room of its own.
        """
        if not data:
            return
        with self._changed:
            reserve = _RESERVE_BYTES if urgent else 0
            if not urgent and not self._dropped:
                self._wait_for_room(len(data))
            refused = self._over or (self._dropped and not urgent)
            if refused or not self._has_room(len(data) - reserve):
                self._dropped += len(data)
                self._dropped_key = key
                return
            self._append(key, data)
            self._changed.notify_all()

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until all of it is written; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._buffered, timeout_seconds)

    def close(self, timeout_seconds: float) -> bool:
        """Write what is left, and end; whether that succeeded in time."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _has_room(self, nbytes: int) -> bool:
        return not self._buffered or self._buffered + nbytes <= self._capacity

    def _wait_for_room(self, nbytes: int) -> None:
        now = time.monotonic()
        earned = self._patience.share * (now - self._counted_at)
        self._seconds_left = min(self._patience.seconds, self._seconds_left + earned)
        self._counted_at = now
        if self._has_room(nbytes):
            return
        self._changed.wait_for(lambda: self._has_room(nbytes), self._seconds_left)
        waited = time.monotonic() - now
        self._seconds_left = max(0.0, self._seconds_left - waited)
        self._counted_at = now + waited

    def _append(self, key: int, data: bytes) -> None:
        self._waiting.append((key, data))
        self._buffered += len(data)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._over)
                if not self._waiting:
                    return
                key, batch = self._next_batch()
            self._write(key, batch)
            with self._changed:
                self._buffered -= len(batch)
                if self._dropped and self._buffered <= self._capacity // 2:
                    self._append(self._dropped_key, self._mark(self._dropped))
                    self._dropped = 0
                self._changed.notify_all()

    def _next_batch(self) -> tuple[int, bytes]:
        """What stands at the front, with as much of the same key as makes a good write."""
        key, first = self._waiting.popleft()
        batch, size = [first], len(first)
        while self._waiting and self._waiting[0][0] == key and size < _BATCH_BYTES:
            batch.append(self._waiting.popleft()[1])
            size += len(batch[-1])
        return key, b"".join(batch)
