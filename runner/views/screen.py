"""A terminal that shows what a run prints, and below it, always last, a view of the run.

    … lines that were printed, for good
    10 %|█▏      | 3/30          a line that is not finished yet
    rul-fd001   running          the view: taken away before anything is printed, and put back after

Pure: what was printed and what is to be shown go in, the bytes for the terminal come out. What a
trainer prints is passed on line by line; colours stay, all else that would move the cursor is left
out, because it would tear the view. A line that is written over and over, as progress bars do, is
shown above the view until it ends.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from rich.cells import cell_len

from runner.views.words import plain

_ESCAPES = re.compile(
    rb"\x1b\[[0-?]*[ -/]*[@-~]"  # what moves, erases or colours: ECMA-48, 5.4
    rb"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles, links and other strings
    rb"|\x1b[ -/]*[0-~]?"
)
_COLOUR = re.compile(rb"\x1b\[[0-9;:]*m")
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]")
_RESET = b"\x1b[0m"
# https://gist.github.com/christianparpart/d8a62cc1ab659194337d73e399004036: drawn at once
_BEGIN, _END = b"\x1b[?2026h", b"\x1b[?2026l"
_NO_WRAP, _WRAP = b"\x1b[?7l", b"\x1b[?7h"  # so that a view never takes more rows than it has lines
_LONGEST_LINE = 1 << 14


class Screen:
    """One terminal, for one thread. `size` gives its columns and rows."""

    def __init__(self, size: Callable[[], os.terminal_size]) -> None:
        self._size = size
        self._view: list[str] = []
        self._open: dict[int, bytes] = {}
        self._drawn: list[int] = []  # how wide each row is that can be taken away again

    def printed(self, source: int, data: bytes) -> bytes:
        """Something was printed: what to send to the terminal."""
        *whole, rest = (self._open.get(source, b"") + data).split(b"\n")
        rest = _newest(rest)
        if len(rest) > _LONGEST_LINE:
            whole, rest = [*whole, rest], b""
        self._open[source] = rest
        return self._redrawn(b"".join(map(_harmless, whole)))

    def shown(self, view: Sequence[str]) -> bytes:
        """The view has changed: what to send to the terminal."""
        self._view = list(view)
        return self._redrawn(b"")

    def left(self) -> bytes:
        """The end: the view stays as it was last, below all that was printed."""
        rest = b"".join(_harmless(line) for line in self._open.values() if line.strip())
        self._open = {}
        made = self._redrawn(rest)
        stays = b"\r\n" if self._drawn else b""
        self._view, self._drawn = [], []
        return made + stays

    def _redrawn(self, lines: bytes) -> bytes:
        columns, rows = self._size()
        shown = (
            [line for line in map(_last_state, self._open.values()) if line] if self._view else []
        )
        below = [*(line[: max(1, columns - 1)] for line in shown), *self._view][: max(0, rows - 1)]
        if not lines and not below and not self._drawn:
            return b""
        drawing = _NO_WRAP + "\r\n".join(below).encode() + _RESET + _WRAP if below else b""
        made = _BEGIN + self._taken_away(columns) + lines + drawing + _END
        self._drawn = [cell_len(_ESCAPES.sub(b"", line.encode()).decode()) for line in below]
        return made

    def _taken_away(self, columns: int) -> bytes:
        """Back to where the view began, and nothing below. A terminal that has become narrower has
        broken its lines."""
        rows = sum(max(1, -(-width // max(1, columns))) for width in self._drawn)
        if not rows:
            return b""
        up = f"\x1b[{rows - 1}A".encode() if rows > 1 else b""
        return b"\r" + up + b"\x1b[J"


def _harmless(line: bytes) -> bytes:
    """A whole line for good: its last state, its colours, and nothing that moves the cursor."""
    text = _newest(line).rstrip(b"\r")
    text = _ESCAPES.sub(lambda found: found[0] if _COLOUR.fullmatch(found[0]) else b"", text)
    reset = _RESET if b"\x1b" in text else b""
    return _CONTROL.sub(b"", text) + reset + b"\r\n"


def _last_state(line: bytes) -> str:
    """A line that is not finished, as it is now, without colours."""
    return plain(_ESCAPES.sub(b"", _newest(line)).decode("utf-8", "replace"))


def _newest(line: bytes) -> bytes:
    """What a line that was written over shows now; a carriage return at its end waits for more."""
    body = line.rstrip(b"\r")
    return body.rpartition(b"\r")[2] + line[len(body) :][:1]
