"""Bodies of requests and answers: views of the caller's memory, never copied as a whole."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

_SEND_BYTES = 256 * 1024
RECEIVE_BYTES = 1024 * 1024


class ViewBody:
    """A file to read from, over a stretch of memory; botocore rewinds it when it sends it again.

    `read` hands out views of at most 256 KiB, so that each `send` of a slow socket ends before its
    time-out. After `close` it fails, and the request with it: nothing is sent of memory that the
    caller has taken back.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory: memoryview | None = memory.cast("B")
        self._length = len(self._memory)
        self._at = 0

    def read(self, size: int = -1) -> memoryview:
        memory = self._memory
        if memory is None:
            raise OSError("the request was given up")
        end = self._length if size is None or size < 0 else self._at + _SEND_BYTES
        piece = memory[self._at : end]
        self._at += len(piece)
        return piece

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, min(self._length, start + offset))
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._memory = None


class Filling:
    """Memory being filled from its beginning, maybe by two answers at once with the same bytes.

    After `close` nothing is written any more, however late an answer comes.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory.cast("B")
        self._lock = threading.Lock()
        self._open = True
        self.length = len(self._memory)
        self.done = 0

    def put(self, at: int, piece: bytes) -> bool:
        """Lay a piece down where it belongs; False if nothing more is wanted."""
        with self._lock:
            if self._open:
                self._memory[at : at + len(piece)] = piece
                self.done = max(self.done, at + len(piece))
            return self._open and self.done < self.length

    def close(self) -> None:
        with self._lock:
            self._open = False


def read_into(body: Any, filling: Filling, at: int) -> None:
    """Read an answer's body to its place, from `at` on, until it ends or nothing is missing."""
    while at < filling.length:
        piece = body.read(min(RECEIVE_BYTES, filling.length - at))
        if not piece:
            return
        if not filling.put(at, piece):
            return
        at += len(piece)


def base64_of(digest: bytes) -> str:
    return base64.b64encode(digest).decode("ascii")


def composite_of(digests: Sequence[bytes]) -> str:
    """What S3 calls the checksum of an object that came in parts."""
    return f"{base64_of(sha256(b''.join(digests)).digest())}-{len(digests)}"


def digest_from(checksum: str | None) -> str | None:
    """A checksum of S3 as a manifest writes it: hex, over the parts' digests if there are several.

    None if there is none. An object of one part that came as a multipart upload has a digest of a
    digest, which no manifest has.
    """
    if not checksum:
        return None
    value, dash, parts = checksum.partition("-")
    if dash and parts == "1":
        return None
    return base64.b64decode(value).hex()
