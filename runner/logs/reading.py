"""A run's log, read back from wherever parts of it are: this machine's files, and the store.

What two of them have is read once. A reader keeps its place, so it can be asked again for what has
come since, across files, attempts, and machines.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

from runner.logs.files import Span

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 20


class Source(Protocol):
    """Something that has stretches of a log."""

    def spans(self) -> list[Span]: ...

    def read(self, span: Span, begin: int, limit: int) -> bytes:
        """A part of a span, at most `limit` bytes of it; nothing if it is gone by now."""


class LogReader:
    """Gives the log of all attempts, or of one, in order. Not for several threads."""

    def __init__(self, attempt: int | None = None) -> None:
        self._only = attempt
        self._attempt = 0
        self._offset = 0
        self.newest_attempt = 0

    def advance(self, sources: Sequence[Source]) -> Iterator[bytes]:
        """Blocks of whole lines: all that has come since the last time.

        Of what several sources have, the first one's is read. What is not kept any more is passed
        over, with a warning.
        """
        listed = [(span, source) for source in sources for span in source.spans()]
        self.newest_attempt = max([self.newest_attempt, *(span.attempt for span, _ in listed)])
        for attempt in sorted({span.attempt for span, _ in listed}):
            if attempt < self._attempt or self._only not in (None, attempt):
                continue
            if attempt > self._attempt:
                self._attempt, self._offset = attempt, 0
            yield from self._read_attempt([pair for pair in listed if pair[0].attempt == attempt])

    def _read_attempt(self, listed: list[tuple[Span, Source]]) -> Iterator[bytes]:
        while True:
            ahead = [(span, source) for span, source in listed if span.end > self._offset]
            if not ahead:
                return
            # Those that have the place at hand are equal here, and `min` takes the first of them.
            span, source = min(ahead, key=lambda pair: max(pair[0].begin, self._offset))
            begin = max(span.begin, self._offset)
            before = self._offset
            yield from self._read_span(span, source, begin)
            if self._offset == before:  # gone by now, or a line that is being written
                listed = [pair for pair in listed if pair != (span, source)]

    def _read_span(self, span: Span, source: Source, begin: int) -> Iterator[bytes]:
        while begin < span.end:
            block = source.read(span, begin, _READ_BYTES)
            end = block.rfind(b"\n") + 1
            if not end:
                return
            if begin > self._offset:
                log.warning(
                    "%d bytes of the log of attempt %d are not kept any more",
                    begin - self._offset,
                    span.attempt,
                )
            begin += end
            self._offset = begin
            yield block[:end]
