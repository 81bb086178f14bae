"""What a store must be able to do: a handful of methods, the same for a directory and for S3.

Keys are relative, `/`-separated, and made by this package only. A checkpoint is staged file by
file and exists from its commit on; everything else is one small object under one key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Part(NamedTuple):
    """A stretch of a file, and its SHA-256 where that is known already."""

    memory: memoryview
    digest: bytes | None = None


@dataclass(frozen=True)
class Content:
    """A file to be stored. All parts but the last are `part_bytes` long; there is at least one.

    `parts` is gone through once, so it may be made as it is read.
    """

    name: str
    part_bytes: int
    parts: Iterable[Part]


@dataclass(frozen=True)
class Stored:
    """What a store says of an object without reading it.

    `digest` is what a manifest calls a file's digest: hex SHA-256 of the object, or over the
    digests of its parts if it has several. None where the store keeps no checksums.
    """

    size: int
    digest: str | None = None


class Staging(Protocol):
    """A checkpoint in the making. Exactly one of `commit` and `abort` ends it."""

    def write(self, contents: Sequence[Content]) -> list[tuple[bytes, ...]]:
        """Store files; the SHA-256 of each part of each. Every byte is hashed once at most."""

    def copy(
        self,
        name: str,
        key: str,
        size: int,
        part_bytes: int,
        digests: Sequence[bytes],
        go_on: Callable[[], None] = lambda: None,
    ) -> None:
        """Store a file that has the same bytes as a stored object, without moving them.

        `digests` are those of its parts. `go_on` is called before each of them that takes time;
        what it raises ends the copy. NotFound if the object is gone; StoreError if the copy
        turns out to be something else, by its size, and by its checksum if `checks_copies`. The
        file may be written after that.
        """

    def commit(self, name: str, manifest: bytes) -> None:
        """Write the manifest, and with it make this a checkpoint: durably, all at once.

        StoreError if it cannot be; then nothing is there.
        """

    def abort(self) -> None:
        """Remove what was written. Never raises."""


class Store(Protocol):
    """Where runs live. Every method raises StoreError if the store refuses or is out of reach.

    Methods may be called from several threads at once.
    """

    url: str
    fetches_at_once: int
    """How many calls of `fetch` side by side it takes to have all of its speed."""
    checks_copies: bool
    """Whether copies are compared by checksum, and fail where there is none to compare."""

    def read(self, key: str, limit: int) -> bytes:
        """The object. NotFound if there is none; StoreError if it is larger than `limit` bytes."""

    def stored(self, key: str) -> Stored:
        """Size and checksum of an object. NotFound if there is none."""

    def fetch(self, key: str, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset` on. NotFound if there is no object; StoreError if it ends."""

    def create(self, key: str, data: bytes) -> bool:
        """Create durably if absent: True if this call made it, False if it was there."""

    def replace(self, key: str, data: bytes) -> None:
        """Write durably and atomically over whatever there is."""

    def put(self, key: str, content: Content) -> tuple[bytes, ...]:
        """Write a file, large or small, over whatever there is; the SHA-256 of its parts.

        It is there as a whole or not at all. The name of the content says nothing here.
        """

    def children(self, prefix: str) -> list[str]:
        """Names directly below a prefix ("" is the root), sorted; nothing there is no error."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, the first one before the others. One that is not there is no error."""

    def stage(self, prefix: str, owner: str) -> Staging:
        """Begin a checkpoint that will be at `prefix`; `owner` keeps two writers apart.

        What the same owner staged there before, and did not commit, is gone then.
        """

    def sweep(self, prefix: str, is_stale: Callable[[str], bool]) -> list[str]:
        """Remove stagings below `prefix` that were begun under a stale name and never ended.

        And what is left elsewhere in the run of objects that a writer was killed at, if anything.
        """

    def hurry(self, deadline: float | None) -> None:
        """From now on no call lasts beyond this moment (`CLOCK_MONOTONIC` seconds).

        Calls that are under way hear of it too. None: there is no haste any more.
        """
