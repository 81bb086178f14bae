"""A line of a log file: when, which attempt, which stream, what was printed. Pure.

    2026-11-21T10:00:00.123Z 000012 out epoch 3, loss 0.0123
    2026-11-21T10:00:00.130Z 000012 err+ Downloading …
    2026-11-21T10:00:05.000Z 000012 err~  42%|████      | 420/1000

`out` and `err` are the trainer's, `run` is the supervisor itself. A line of output is a line of the
file, byte for byte. Where a piece of text did not end with its line, a mark says how it ended: `+`
means that the line goes on in the next piece of the stream, or ended with the attempt; `~` that it
was written over from its beginning, as progress bars do. Of such rewriting the last text is kept,
and on the way there one every few seconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

OUT, ERR, RUN = "out", "err", "run"
STREAMS = (OUT, ERR, RUN)

GOES_ON, WRITTEN_OVER = b"+", b"~"
_ENDS = {b"": b"\n", GOES_ON: b"", WRITTEN_OVER: b"\r"}
_RECORD = re.compile(
    rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (\d{6,}) (out|err|run)([+~]?) (.*)", re.DOTALL
)

_PIECE_BYTES = 1 << 16  # longer lines are kept in pieces
_IDLE_SECONDS = 1.0  # after which the beginning of a line is not held back any more
_BAR_SECONDS = 5.0  # between two states of a line that is written over and over
_LONGEST_CHARACTER = 4


@dataclass(frozen=True)
class Record:
    """A line of a log file, read. `end` is what followed the text: a line's end, nothing, or CR."""

    time: str
    attempt: int
    stream: str
    text: bytes
    end: bytes


def parse(line: bytes) -> Record | None:
    """Read a line, without its newline; None if it is no record, or only a part of one."""
    found = _RECORD.fullmatch(line)
    if found is None:
        return None
    time, attempt, stream, mark, text = found.groups()
    return Record(time.decode(), int(attempt), stream.decode(), text, _ENDS[mark])


def stamp(seconds: float) -> bytes:
    """The time of day, in seconds since the epoch, as it stands in a record."""
    moment = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return moment.removesuffix("+00:00").encode() + b"Z"


def records(time: bytes, attempt: int, stream: str, text: bytes, mark: bytes = b"") -> bytes:
    """One record for each line of a text; the mark is for the last of them."""
    head = _head(time, attempt, stream)
    lines, newline, last = text.rpartition(b"\n")
    made = b""
    if newline:
        made = head + b" " + lines.replace(b"\n", b"\n" + head + b" ") + b"\n"
    return made + b"%s%s %s\n" % (head, mark, last)


def _head(time: bytes, attempt: int, stream: str) -> bytes:
    return b"%s %06d %s" % (time, attempt, stream.encode())


class Stream:
    """Makes records of what comes out of one pipe. `now` is monotonic, in seconds.

    It never holds more than a piece of a line, however long that line is.
    """

    def __init__(self, attempt: int, name: str) -> None:
        self._attempt, self._name = attempt, name
        self._pending = b""  # of the line at hand; carriage returns only at its end
        self._begun = False  # whether a piece of it is in the file
        self._rewritten = False
        self._fed_at = self._bar_at = float("-inf")
        self._bar = b""

    @property
    def holds_back(self) -> bool:
        """Whether there is something that `idle` may give out later on."""
        return bool(self._pending)

    def feed(self, data: bytes, time: bytes, now: float) -> bytes:
        """The records that this completes."""
        self._fed_at = now
        whole, newline, rest = data.rpartition(b"\n")
        made = self._lines(self._pending + whole, time) if newline else b""
        self._pending = rest if newline else self._pending + data
        if b"\r" in self._pending:
            made += self._write_over(time)
        if self._rewritten:
            made += self._show_bar(time, now)
        if len(self._pending) > _PIECE_BYTES:
            made += self._give_out(time)
        return made

    def idle(self, time: bytes, now: float) -> bytes:
        """What need not be held back any longer, if nothing has come for a while."""
        if self._rewritten:
            return self._show_bar(time, now)
        held = self._pending and not self._pending.endswith(b"\r")
        return self._give_out(time) if held and now - self._fed_at >= _IDLE_SECONDS else b""

    def end(self, time: bytes) -> bytes:
        """The last line, if it has no end."""
        left, self._pending = self._pending.rstrip(b"\r"), b""
        return self._record(time, left, GOES_ON) if left else b""

    def _lines(self, text: bytes, time: bytes) -> bytes:
        """Whole lines: all at once, unless something in them was written over."""
        if b"\r" not in text:
            made = records(time, self._attempt, self._name, text)
        else:
            made = b"".join(self._line(line, time) for line in text.split(b"\n"))
        self._begun = self._rewritten = False
        return made

    def _line(self, line: bytes, time: bytes) -> bytes:
        before, overwritten, shown = line.rstrip(b"\r").rpartition(b"\r")
        made = b""
        if self._begun and overwritten:
            made = self._record(time, before.partition(b"\r")[0], WRITTEN_OVER)
        self._begun = False
        return made + self._record(time, shown)

    def _write_over(self, time: bytes) -> bytes:
        """Forget what a carriage return has sent the cursor back over."""
        text = self._pending.rstrip(b"\r")
        returned = b"\r" if len(text) < len(self._pending) else b""
        before, overwritten, shown = text.rpartition(b"\r")
        self._pending = shown + returned
        if not overwritten:
            return b""
        self._rewritten = True
        if not self._begun:
            return b""
        self._begun = False
        return self._record(time, before.partition(b"\r")[0], WRITTEN_OVER)

    def _show_bar(self, time: bytes, now: float) -> bytes:
        """The state of a line that is being written over, from time to time."""
        shown, _ = _whole_characters(self._pending.rstrip(b"\r"))
        if not shown or shown == self._bar or now - self._bar_at < _BAR_SECONDS or self._begun:
            return b""
        self._bar, self._bar_at = shown, now
        return self._record(time, shown, WRITTEN_OVER)

    def _give_out(self, time: bytes) -> bytes:
        text = self._pending.rstrip(b"\r")
        returned = self._pending[len(text) :]
        given, left = _whole_characters(text)
        self._pending = left + returned
        if not given:
            return b""
        self._begun = True
        return self._record(time, given, GOES_ON)

    def _record(self, time: bytes, text: bytes, mark: bytes = b"") -> bytes:
        return b"%s%s %s\n" % (_head(time, self._attempt, self._name), mark, text)


def _whole_characters(text: bytes) -> tuple[bytes, bytes]:
    """A text without the beginning of a UTF-8 character at its end, and that beginning."""
    for length in range(1, min(_LONGEST_CHARACTER, len(text) + 1)):
        byte = text[-length]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return (text[:-length], text[-length:]) if needed > length else (text, b"")
    return text, b""
