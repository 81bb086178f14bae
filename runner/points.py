"""What a script logs, on its way from the trainer to the supervisor: one line for each step.

    rank-00000/points-000012-000000.jsonl     of attempt 12, the first file of it
    {"attempt": 12, "step": 40, "epoch": 2, "time": 1790000000.5, "values": {"train_loss": 0.25}}

The trainer appends and begins another file when one is large; the supervisor reads them in order
and removes each that it has read to its end. A line is written at once, so a trainer that is
killed leaves whole ones. Where nobody reads, the oldest are dropped: this is memory. Numbers that
JSON does not have are written as text: "nan", "inf", "-inf".
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.regular import open_regular

log = logging.getLogger(__name__)

_NAME = re.compile(r"points-(\d{6,})-(\d{6,})\.jsonl")
_FILE_BYTES = 1 << 20
_MOST_FILES = 16
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Point:
    """The values that were logged for one step, or some of them. `time` is of the wall clock."""

    attempt: int
    step: int
    epoch: int
    time: float
    values: Mapping[str, float]

    def to_line(self) -> bytes:
        values = {name: _plain(value) for name, value in self.values.items()}
        document = {
            "attempt": self.attempt,
            "step": self.step,
            "epoch": self.epoch,
            "time": round(self.time, 3),
            "values": values,
        }
        return json.dumps(document, allow_nan=False, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Point | None:
        """The inverse; None if the line is none of ours."""
        try:
            document = json.loads(line)
            return cls(
                attempt=int(document["attempt"]),
                step=int(document["step"]),
                epoch=int(document["epoch"]),
                time=float(document["time"]),
                values={str(name): float(v) for name, v in document["values"].items()},
            )
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return None


def _plain(value: float) -> Any:
    return value if math.isfinite(value) else str(value)


def points_of(block: bytes) -> Iterator[Point]:
    """The points of whole lines, those that cannot be read passed over."""
    for line in block.splitlines():
        point = Point.from_line(line)
        if point is not None:
            yield point


class PointWriter:
    """The trainer's end. Never raises: what cannot be written is lost, and said once."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self._folder, self.attempt = folder, attempt
        self._file: int | None = None
        self._number = self._size = 0
        self._complained = False

    def write(self, lines: bytes) -> None:
        """Append whole lines."""
        try:
            if self._file is None or self._size >= _FILE_BYTES:
                self._begin()
            assert self._file is not None
            self._size += os.write(self._file, lines)
        except OSError as error:
            if not self._complained:
                self._complained = True
                log.warning("logged values cannot be handed over: %s", error)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _begin(self) -> None:
        self.close()
        for _, path in _files(self._folder)[:-_MOST_FILES]:
            path.unlink(missing_ok=True)
        path = self._folder / f"points-{self.attempt:06d}-{self._number:06d}.jsonl"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file, self._size = os.open(path, flags, 0o600), 0
        self._number += 1


class PointReader:
    """The supervisor's end: gives what has come since, and removes what was read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None
        self._offset = 0

    def take(self) -> bytes:
        """Whole lines, oldest first; empty if there is nothing new for now."""
        taken = []
        found = [path for _, path in _files(self._folder)]
        for path in found:
            if path != self._path:
                self._path, self._offset = path, 0
            while block := self._read(path):
                taken.append(block)
            if path != found[-1]:  # nobody writes into it any more
                with contextlib.suppress(OSError):
                    path.unlink()
        return b"".join(taken)

    def _read(self, path: Path) -> bytes:
        try:
            with os.fdopen(open_regular(path), "rb") as file:
                file.seek(self._offset)
                block = file.read(_READ_BYTES)
        except OSError:  # dropped by its writer, or no descriptor is free for now
            return b""
        whole = block[: block.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole


def _files(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """In the order in which they were written."""
    try:
        names = [(_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir()]
    except OSError:
        return []
    return sorted(((int(n[1]), int(n[2])), path) for n, path in names if n is not None)
