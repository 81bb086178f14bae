"""What a store must be able to do: a handful of methods, the same for a directory and for S3.

Keys are relative, `/`-separated, and made by this package only. A checkpoint is staged file by
file and exists from its commit on; everything else is one small object under one key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol


class Staging(Protocol):
    """A checkpoint in the making. Exactly one of `commit` and `abort` ends it."""

    def write(self, name: str, parts: Iterable[memoryview]) -> None:
        """Store one file, part by part."""

    def commit(self, name: str, manifest: bytes) -> None:
        """Write the manifest, and with it make this a checkpoint: durably, all at once.

        StoreError if it cannot be; then nothing is there.
        """

    def abort(self) -> None:
        """Remove what was written. Never raises."""


class Store(Protocol):
    """Where runs live. Every method raises StoreError if the store refuses or is out of reach."""

    url: str

    def read(self, key: str, limit: int) -> bytes:
        """The object. NotFound if there is none; StoreError if it is larger than `limit` bytes."""

    def size(self, key: str) -> int:
        """Bytes of an object. NotFound if there is none."""

    def fetch(self, key: str, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset` on. NotFound if there is no object; StoreError if it ends."""

    def create(self, key: str, data: bytes) -> bool:
        """Create durably if absent: True if this call made it, False if it was there."""

    def replace(self, key: str, data: bytes) -> None:
        """Write durably and atomically over whatever there is."""

    def children(self, prefix: str) -> list[str]:
        """Names directly below a prefix ("" is the root), sorted; nothing there is no error."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects in this order. One that is not there is no error."""

    def stage(self, prefix: str, owner: str) -> Staging:
        """Begin a checkpoint that will be at `prefix`; `owner` keeps two writers apart.

        What the same owner staged there before, and did not commit, is gone then.
        """

    def sweep(self, prefix: str, is_stale: Callable[[str], bool]) -> list[str]:
        """Remove stagings below `prefix` that were begun under a stale name and never ended."""
