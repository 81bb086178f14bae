"""The log of a run in its store, so that it outlives the node.

    <run>/logs/000012-000000000000-000000065536.log    bytes 0 to 65536 of the log of attempt 12
    <run>/metrics/000012-….jsonl                       the same of what its script has logged

Each stretch is written once and never changed. What is there already is known from the names alone.
The oldest are deleted when all of them together have more than may be kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from runner.errors import NotFound
from runner.logs.files import LocalLogs, Span
from runner.store import Store

_NAME = re.compile(r"(\d{6,})-(\d{12,})-(\d{12,})(\.\w+)")
_SEGMENT_BYTES = 2 << 20
_MOST_READ_BYTES = 64 << 20
_MOST_SEGMENTS = 4000  # four pages of a listing


class StoredLogs:
    """The log's stretches in a store: a source to read from, and where `ship` brings more.

    They lie in a folder of the run, `logs` unless another is named.
    """

    def __init__(
        self, store: Store, run_id: str, folder: str = "logs", suffix: str = ".log"
    ) -> None:
        self._store, self._folder, self._suffix = store, f"{run_id}/{folder}", suffix
        self._block: tuple[Span, bytes] | None = None

    def spans(self) -> list[Span]:
        """What there is, in order. Raises StoreError."""
        names = [_NAME.fullmatch(name) for name in self._store.children(self._folder)]
        ours = [name.groups() for name in names if name is not None and name[4] == self._suffix]
        found = (Span(int(attempt), int(begin), int(end)) for attempt, begin, end, _ in ours)
        return sorted(span for span in found if span.begin < span.end)

    def read(self, span: Span, begin: int, limit: int) -> bytes:
        """A part of one; nothing if it is gone by now. Raises StoreError."""
        if self._block is None or self._block[0] != span:
            try:
                self._block = span, self._store.read(self._key(span), _MOST_READ_BYTES)
            except NotFound:
                return b""
        return self._block[1][begin - span.begin :][:limit]

    def ship(
        self, local: LocalLogs, max_bytes: int, newest: int, may_go_on: Callable[[], bool]
    ) -> int:
        """Store what the files here have and the store has not; the bytes that were moved.

        Only of attempts up to the `newest`, and only whole lines. Asks before each stretch whether
        to go on. Raises StoreError; what has been moved until then stays.
        """
        stored = self.spans()
        ends: dict[int, int] = {}
        for span in stored:
            ends[span.attempt] = max(span.end, ends.get(span.attempt, 0))
        moved = 0
        for span in local.spans():
            begin = max(span.begin, ends.get(span.attempt, 0))
            while begin < span.end and span.attempt <= newest:
                block = local.read(span, begin, _SEGMENT_BYTES)
                block = block[: block.rfind(b"\n") + 1]
                if not block or not may_go_on():
                    break
                made = Span(span.attempt, begin, begin + len(block))
                self._store.replace(self._key(made), block)
                stored.append(made)
                begin, moved = made.end, moved + len(block)
        self._forget_oldest(sorted(stored), max_bytes, newest)
        return moved

    def _forget_oldest(self, stored: list[Span], max_bytes: int, newest: int) -> None:
        total, doomed = sum(span.end - span.begin for span in stored), []
        for number, span in enumerate(stored):
            within = total <= max_bytes and len(stored) - number <= _MOST_SEGMENTS
            if within or span.attempt > newest:
                break
            doomed.append(span)
            total -= span.end - span.begin
        if doomed:
            self._store.delete([self._key(span) for span in doomed])

    def _key(self, span: Span) -> str:
        name = f"{span.attempt:06d}-{span.begin:012d}-{span.end:012d}"
        return f"{self._folder}/{name}{self._suffix}"
