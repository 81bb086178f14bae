"""Files of a run on this machine that only grow: each attempt begins one, and size limits them all.

    000012-000000000000.log    the log of attempt 12 from its byte 0 on
    000012-000008388608.log    from there on

A name says which bytes of which attempt's log a file holds, so that a reader, and whoever copies
them to a store, finds the place again when files have come and gone. The oldest go first. A disk
that is full or broken costs lines, never the run: how much was lost is said where it was.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.logs import lines

log = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{6,})-(\d{12,})")
_RETRY_SECONDS = 1.0
_MOST_FILES = 1000  # an attempt that fails at once leaves one of a few hundred bytes


@dataclass(frozen=True)
class LogLimits:
    """How much is kept of a run: bytes in all, and in how many files if each is full."""

    max_bytes: int
    files: int

    @property
    def file_bytes(self) -> int:
        return max(1, self.max_bytes // self.files)


@dataclass(frozen=True, order=True)
class Span:
    """A stretch of an attempt's log, from one byte up to another."""

    attempt: int
    begin: int
    end: int


class LocalLogs:
    """The log files in a folder, for reading. They may grow and go while they are read."""

    def __init__(self, folder: Path, suffix: str = ".log") -> None:
        self.folder, self._suffix = folder, suffix

    def spans(self) -> list[Span]:
        """What there is, in order."""
        return sorted(span for span, _ in _files(self.folder, self._suffix))

    def read(self, span: Span, begin: int, limit: int) -> bytes:
        """From `begin` on, `limit` bytes at most; nothing if the file is gone."""
        try:
            with (self.folder / _name(span.attempt, span.begin, self._suffix)).open("rb") as file:
                file.seek(begin - span.begin)
                return file.read(min(limit, span.end - begin))
        except FileNotFoundError:
            return b""


class LogWriter:
    """Appends records to the files of a run. Used by one thread; never raises.

    `what` is in them, for a warning that it is not kept.
    """

    def __init__(
        self,
        folder: Path,
        limits: LogLimits,
        suffix: str = ".log",
        what: str = "what the trainer prints",
    ) -> None:
        self._folder, self._limits, self._suffix, self._what = folder, limits, suffix, what
        self._attempt = self._offset = self._size = 0
        self._file: int | None = None
        self._lost, self._problem, self._retry_at = 0, "", 0.0
        self._is_cut = False  # whether the last record is there in part only

    def write(self, attempt: int, data: bytes) -> None:
        """Append whole records of an attempt."""
        if self._lost and time.monotonic() < self._retry_at:
            self._lost += len(data)
            return
        try:
            if attempt != self._attempt:
                self._begin(attempt)
            if self._lost:
                self._append(self._mark_of_loss())
                self._lost = 0
            for piece in _pieces(data, self._limits.file_bytes):
                self._append(piece)
        except OSError as error:
            self._refused(error, len(data))

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None

    def _begin(self, attempt: int) -> None:
        """Another attempt, another file. Later ones are of a run of that name that was removed."""
        self.close()
        self._attempt, self._offset, self._is_cut = attempt, 0, False
        for span, path in _files(self._folder, self._suffix):
            if span.attempt >= attempt:
                path.unlink(missing_ok=True)

    def _append(self, data: bytes) -> None:
        if self._is_cut:
            data = b"\n" + data
        is_full = self._size and self._size + len(data) > self._limits.file_bytes
        if self._file is None or is_full:
            self._open()
        assert self._file is not None
        view = memoryview(data)
        while view:
            written = os.write(self._file, view)
            view = view[written:]
            self._offset += written
            self._size += written
            self._is_cut = bool(view)

    def _open(self) -> None:
        self.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._make_room()
        path = self._folder / _name(self._attempt, self._offset, self._suffix)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file, self._size = os.open(path, flags, 0o640), 0

    def _make_room(self) -> None:
        """Remove the oldest, so that a file more stays within the limit."""
        found = sorted(_files(self._folder, self._suffix))
        total = sum(span.end - span.begin for span, _ in found)
        most = self._limits.max_bytes - self._limits.file_bytes
        for number, (span, path) in enumerate(found):
            if total <= most and len(found) - number < _MOST_FILES:
                return
            path.unlink(missing_ok=True)
            total -= span.end - span.begin

    def _refused(self, error: OSError, nbytes: int) -> None:
        self.close()
        if not self._lost:
            log.warning("%s is not kept for now: %s", self._what, error)
        self._lost += nbytes
        self._problem = error.strerror or str(error)
        self._retry_at = time.monotonic() + _RETRY_SECONDS

    def _mark_of_loss(self) -> bytes:
        text = f"… about {self._lost} bytes of the log are missing here: {self._problem}"
        return lines.records(lines.stamp(time.time()), self._attempt, lines.RUN, text.encode())


def _pieces(data: bytes, limit: int) -> Iterator[bytes]:
    """Whole records, together at most as long as the limit wherever a single one is not longer."""
    begin = 0
    while len(data) - begin > limit:
        end = data.rfind(b"\n", begin, begin + limit) + 1 or data.find(b"\n", begin) + 1
        yield data[begin : end or len(data)]
        begin = end or len(data)
    if begin < len(data):
        yield data[begin:]


def _name(attempt: int, begin: int, suffix: str) -> str:
    return f"{attempt:06d}-{begin:012d}{suffix}"


def _files(folder: Path, suffix: str) -> list[tuple[Span, Path]]:
    found = []
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    for path in paths:
        name = _NAME.fullmatch(path.stem) if path.suffix == suffix else None
        with contextlib.suppress(OSError):  # removed by the next rotation
            if name is not None:
                attempt, begin = int(name[1]), int(name[2])
                found.append((Span(attempt, begin, begin + path.stat().st_size), path))
    return found
