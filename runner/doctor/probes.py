"""What a store allows, and how fast it is: each thing is tried on probe keys, removed again."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TypeVar

from runner.checkpoint.format import MANIFEST_FILE, MEBIBYTE
from runner.doctor.finding import Finding, fail, ok, size_text, warn
from runner.errors import RunnerError, StoreDenied, StoreError
from runner.job import is_s3
from runner.store import Content, Part, Store
from runner.supervisor.preflight import PROBES, check_listing, denial

_PATIENCE_SECONDS = 30.0
_TRANSFER_SECONDS = 120.0
_PART_BYTES = 8 * MEBIBYTE
_PARTS = 4
_SMALL_BYTES = 64
_SLOWEST_WORTH_SAYING = 10e6
_NAME = "probe.bin"

T = TypeVar("T")


@dataclass
class Probes:
    """Tries one store. `upload_bytes_per_second` is known after `speed`, if that has worked.

    No call lasts longer than half a minute, whatever the server does.
    """

    store: Store
    conditional_writes: bool
    upload_bytes_per_second: float | None = None
    _prefix: str = field(default_factory=lambda: f"{PROBES}-{secrets.token_hex(8)}")

    def permissions(self) -> Iterator[Finding]:
        """List, write, read and delete; nothing more is tried of a store that cannot be listed."""
        key = f"{self._prefix}/small"
        first, second = (secrets.token_hex(16).encode() for _ in range(2))
        listed = self._try("list", "s3:ListBucket", lambda: check_listing(self.store))
        yield listed
        if listed.verdict.value == "FAIL":
            return
        written = self._try("write", "s3:PutObject", lambda: self.store.create(key, first))
        yield written
        if written.verdict.value == "FAIL":
            return
        yield self._try("read", "s3:GetObject", lambda: self._read(key, first))
        yield self._race(key, second)
        yield self._try("delete", "s3:DeleteObject", lambda: self.store.delete([key]))
        if is_s3(self.store.url):
            yield self._unfinished_uploads()

    def speed(self) -> Iterator[Finding]:
        """Store a file of several parts and read it again; what comes back is compared."""
        size = _PARTS * _PART_BYTES
        memory = memoryview(os.urandom(size))
        parts = [memory[at : at + _PART_BYTES] for at in range(0, size, _PART_BYTES)]
        content = Content(_NAME, _PART_BYTES, [Part(part) for part in parts])
        with self._hurried(_TRANSFER_SECONDS):
            try:
                upload_seconds = self._upload(content)
                download_seconds = self._download(f"{self._prefix}/{_NAME}", parts)
            except RunnerError as error:
                yield _failed(self.store, "throughput", error)
                return
            finally:
                with contextlib.suppress(StoreError):
                    self.store.delete(
                        [f"{self._prefix}/{MANIFEST_FILE}", f"{self._prefix}/{_NAME}"]
                    )
        self.upload_bytes_per_second = size / upload_seconds
        up, down = (size_text(size / s) + "/s" for s in (upload_seconds, download_seconds))
        what = f"upload {up}, download and verification {down}, with {size_text(size)}"
        what += f" in {_PARTS} parts"
        if size / upload_seconds < _SLOWEST_WORTH_SAYING:
            yield warn("throughput", what, "choose a store that is nearer, or save less often")
        else:
            yield ok("throughput", what)

    def _read(self, key: str, expected: bytes) -> None:
        if self.store.read(key, _SMALL_BYTES) != expected:
            raise StoreError(f"{key} came back with other bytes than were written")

    def _race(self, key: str, content: bytes) -> Finding:
        """A second writer of a key must lose."""
        check = "conditional writes"
        try:
            with self._hurried(_PATIENCE_SECONDS):
                won = self.store.create(key, content)
        except RunnerError as error:
            return _failed(self.store, check, error)
        if won:
            return fail(
                check,
                "a second writer of one key was let in, so two supervisors cannot be kept apart",
                "use a server that knows If-None-Match, or say conditional_writes: off under s3",
            )
        if not self.conditional_writes:
            return warn(
                check,
                "conditional_writes is off: a look before the write, which is no proof",
                "say conditional_writes: on if this server knows If-None-Match",
            )
        return ok(check, "of two writers of one key, one wins")

    def _unfinished_uploads(self) -> Finding:
        """Whether uploads that a dead node has left can be seen. Nothing is aborted."""
        check = "clean up"
        try:
            with self._hurried(_PATIENCE_SECONDS):
                self.store.sweep(self._prefix, lambda name: False)
        except StoreDenied as error:
            return warn(
                check,
                f"uploads left by dead nodes cannot be found: {error.action} is missing",
                "allow it, or give the bucket a rule AbortIncompleteMultipartUpload",
            )
        except RunnerError as error:
            return _failed(self.store, check, error)
        return ok(check, "uploads left by dead nodes can be found")

    def _upload(self, content: Content) -> float:
        staging = self.store.stage(self._prefix, secrets.token_hex(8))
        try:
            begun = time.monotonic()
            staging.write([content])
            seconds = time.monotonic() - begun
            staging.commit(MANIFEST_FILE, b"{}")
        except BaseException:
            staging.abort()
            raise
        return max(seconds, 1e-6)

    def _download(self, key: str, parts: list[memoryview]) -> float:
        def is_same(index: int) -> bool:
            buffer = memoryview(bytearray(_PART_BYTES))
            self.store.fetch(key, index * _PART_BYTES, buffer)
            return sha256(buffer).digest() == sha256(parts[index]).digest()

        begun = time.monotonic()
        with ThreadPoolExecutor(_PARTS, "probe") as pool:
            same = list(pool.map(is_same, range(_PARTS)))
        if not all(same):
            raise StoreError(f"{key} came back with other bytes than were stored")
        return max(time.monotonic() - begun, 1e-6)

    def _try(self, check: str, permission: str, call: Callable[[], T]) -> Finding:
        try:
            with self._hurried(_PATIENCE_SECONDS):
                call()
        except RunnerError as error:
            return _failed(self.store, check, error)
        return ok(check, f"{permission} works" if is_s3(self.store.url) else "works")

    @contextlib.contextmanager
    def _hurried(self, seconds: float) -> Iterator[None]:
        self.store.hurry(time.monotonic() + seconds)
        try:
            yield
        finally:
            self.store.hurry(None)


def _failed(store: Store, check: str, error: RunnerError) -> Finding:
    return fail(check, denial(store, error) if isinstance(error, StoreDenied) else str(error))
