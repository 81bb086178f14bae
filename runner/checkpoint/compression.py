"""Tensor files on their way into a store and back, as independent zstd frames.

    model.safetensors       in the slot, cut into chunks: what the trainer reads and writes
    model.safetensors.zst   in the store, the frames of the chunks, cut into parts of legal size

Chunks are compressed on threads, a few ahead of the store, so that the memory it takes does not
depend on the size of the state. Parts come back in any order and are decoded straight into place.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from itertools import accumulate
from types import TracebackType

from runner.checkpoint import format as fmt
from runner.checkpoint.frames import Forms, Frames, chunk_bytes_for, decode, encode, zstd_library
from runner.checkpoint.manifest import FileEntry
from runner.store import Content, Part

_MOST_THREADS = 4
_AHEAD = 4  # chunks beside those that are being compressed: about a part
_TELLING_BYTES = 8 * fmt.MEBIBYTE  # what is smaller says more of latency than of throughput


class Rates:
    """What the saves until now say of the speed of compression, and of the store.

    They answer one question: would the next save end sooner if it were compressed? As both go on at
    once, it lasts as long as the slower one.
    """

    def __init__(self) -> None:
        self.compressed_per_second: float | None = None
        """Bytes of files that all threads together compress."""
        self.stored_per_second: float | None = None
        """Bytes that the store takes."""
        self.saved_fraction = 0.0

    def stored(self, nbytes: int, seconds: float) -> None:
        """The store has been busy so long with so many bytes."""
        if nbytes >= _TELLING_BYTES:
            self.stored_per_second = nbytes / max(seconds, 1e-6)

    def compressed(self, nbytes: int, stored_bytes: int, seconds: float) -> None:
        """Compressing so many bytes, to so many, would have lasted so long on its own."""
        if nbytes >= _TELLING_BYTES:
            self.compressed_per_second = nbytes / max(seconds, 1e-6)
            self.saved_fraction = 1 - stored_bytes / nbytes

    @property
    def compressing_ends_sooner(self) -> bool:
        """False as long as nothing has been measured."""
        if self.compressed_per_second is None or self.stored_per_second is None:
            return False
        return self.saved_fraction > 0 and self.compressed_per_second > self.stored_per_second


class Compressor:
    """The threads that compress the files of one save, and what they took. To be used with `with`.

    UsageError if the library is missing.
    """

    def __init__(self) -> None:
        zstd_library()
        self.threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(self.threads, "compress")
        self._counting = threading.Lock()
        self._busy_seconds = 0.0
        self.waited_seconds = 0.0
        """How long the store had to wait for it."""

    def __enter__(self) -> Compressor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def seconds(self) -> float:
        """How long the work that was done lasts on all threads, if nothing holds it up."""
        return self._busy_seconds / self.threads

    def submit(self, work: Callable[[], bytes]) -> Future[bytes]:
        """Do this on one of the threads."""

        def timed() -> bytes:
            begun = time.perf_counter()
            done = work()
            with self._counting:
                self._busy_seconds += time.perf_counter() - begun
            return done

        return self._pool.submit(timed)

    def result(self, future: Future[bytes]) -> bytes:
        """Wait for it, and note how long that was."""
        begun = time.perf_counter()
        done = future.result()
        self.waited_seconds += time.perf_counter() - begun
        return done


class CompressedFile:
    """A tensor file that is compressed while the store takes `content`.

    `go_on` is called before each part, and may raise. `digests` are those of its first chunks, as
    far as they are known.
    """

    def __init__(
        self,
        name: str,
        memory: memoryview,
        digests: Sequence[bytes],
        compressor: Compressor,
        go_on: Callable[[], None],
    ) -> None:
        self._name, self._memory, self._known = name, memory, digests
        self._compressor, self._go_on = compressor, go_on
        self._forms = Forms(memory, name)
        self._chunk_bytes = chunk_bytes_for(len(memory))
        self._lengths: list[int] = []
        self._digests: list[str] = []
        self._part_bytes = fmt.compressed_part_bytes_for(len(memory))
        self.content = Content(fmt.compressed_name(name), self._part_bytes, self._parts())

    def entry(self, parts: Sequence[bytes]) -> FileEntry:
        """What the manifest says of it, when the store has taken it in these parts."""
        frames = Frames(
            len(self._memory), self._chunk_bytes, tuple(self._lengths), tuple(self._digests)
        )
        return FileEntry(
            name=self.content.name,
            size=sum(self._lengths),
            part_bytes=self._part_bytes,
            parts=tuple(part.hex() for part in parts),
            digest=fmt.file_digest(parts),
            frames=frames,
        )

    def _parts(self) -> Iterator[Part]:
        """Each part is hashed while the next one is being filled."""
        before: tuple[memoryview, Future[bytes]] | None = None
        for part in _cut(self._frames(), self._part_bytes):
            hashing = self._compressor.submit(_hashing(part))
            if before is not None:
                self._go_on()
                yield Part(before[0], self._compressor.result(before[1]))
            before = part, hashing
        if before is not None:
            self._go_on()
            yield Part(before[0], self._compressor.result(before[1]))

    def _frames(self) -> Iterator[bytes]:
        ahead: deque[tuple[Future[bytes], Future[bytes] | bytes]] = deque()
        for index, begin in enumerate(range(0, len(self._memory), self._chunk_bytes)):
            if len(ahead) == self._compressor.threads + _AHEAD:
                yield self._next(ahead)
            ahead.append(self._begin(index, begin))
        while ahead:
            yield self._next(ahead)

    def _begin(self, index: int, begin: int) -> tuple[Future[bytes], Future[bytes] | bytes]:
        """The frame of a chunk and its digest, which may be known."""
        chunk = self._memory[begin : begin + self._chunk_bytes]
        form = self._forms.between(begin, begin + len(chunk))
        encoding = self._compressor.submit(lambda: encode(chunk, form))
        if index < len(self._known):
            return encoding, self._known[index]
        return encoding, self._compressor.submit(_hashing(chunk))

    def _next(self, ahead: deque[tuple[Future[bytes], Future[bytes] | bytes]]) -> bytes:
        encoding, hashing = ahead.popleft()
        frame = self._compressor.result(encoding)
        digest = hashing if isinstance(hashing, bytes) else self._compressor.result(hashing)
        self._digests.append(digest.hex())
        self._lengths.append(len(frame))
        return frame


class Decompression:
    """A stored file on its way into memory: `take` each of its parts once, in any order.

    Several threads may do so. A frame that crosses from one part into the next is decoded when both
    have come; only that stretch of the first one is kept until then.
    """

    def __init__(self, file: FileEntry, frames: Frames, into: memoryview) -> None:
        zstd_library()
        self._file, self._frames, self._into = file, frames, into
        self._ends = list(accumulate(frames.lengths))
        self._seams: dict[int, bytes] = {}
        self._sewing = threading.Lock()

    def take(self, index: int, part: memoryview) -> None:
        """Decode what lies in this part. ValueError if a frame does not hold what it should."""
        begin = index * self._file.part_bytes
        end = begin + len(part)
        for number in range(bisect_right(self._ends, begin), len(self._ends)):
            first = self._ends[number] - self._frames.lengths[number]
            last = self._ends[number]
            if first >= end:
                break
            stretch = part[max(first, begin) - begin : min(last, end) - begin]
            if len(stretch) == last - first:
                self._decode(number, stretch)
                continue
            with self._sewing:
                other = self._seams.pop(number, None)
                if other is None:
                    self._seams[number] = bytes(stretch)
            if other is not None:
                frame = other + bytes(stretch) if first < begin else bytes(stretch) + other
                self._decode(number, memoryview(frame))

    def _decode(self, number: int, frame: memoryview) -> None:
        begin, end = self._frames.chunk(number)
        try:
            decode(frame, self._into[begin:end], self._frames.digests[number])
        except ValueError as error:
            raise ValueError(f"frame {number} of {self._file.name} is unusable: {error}") from error


def _hashing(memory: memoryview) -> Callable[[], bytes]:
    return lambda: sha256(memory).digest()


def _cut(pieces: Iterator[bytes], part_bytes: int) -> Iterator[memoryview]:
    """The pieces one after another, in parts of which only the last may be shorter.

    A part lies on pages of its own, so that a disk can take it without a copy, and it is given back
    to the system with its last user.
    """
    part, filled = memoryview(mmap.mmap(-1, part_bytes)), 0
    for piece in pieces:
        done = 0
        while done < len(piece):
            if filled == part_bytes:
                yield part
                part, filled = memoryview(mmap.mmap(-1, part_bytes)), 0
            count = min(part_bytes - filled, len(piece) - done)
            part[filled : filled + count] = piece[done : done + count]
            done, filled = done + count, filled + count
    yield part[:filled]
