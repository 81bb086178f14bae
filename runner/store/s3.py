"""A store in a bucket of S3, or of a server that speaks its protocol.

    s3://bucket/prefix/<run>/checkpoints/step-…/manifest.json    the commit: written last, once

Safe because one key is atomic, a write may ask for the key to be absent, and every byte is stored
under a SHA-256 that the server has verified. Nothing is atomic over several keys: data goes first,
the manifest last, and deletion goes the other way round.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from typing import Any

from runner.errors import NotFound, StoreDenied, StoreError, StoreUnfit
from runner.store.base import Content, Stored
from runner.store.s3_bucket import Bucket, Sent
from runner.store.s3_calls import Try
from runner.store.s3_errors import NotImplementedThere
from runner.store.s3_lanes import Lanes
from runner.store.s3_options import S3Options
from runner.store.s3_upload import StagedObjects

_DELETED_AT_ONCE = 1000


class S3Store:
    """A `Store` below a prefix of a bucket. Making one sends no request."""

    fetches_at_once = 8  # measured: 590 MiB/s of 16 MiB ranges, with 2 at once 370
    checks_copies = True

    def __init__(self, url: str, options: S3Options = S3Options()) -> None:  # noqa: B008 - frozen
        self._bucket = Bucket(url, options)
        self._lanes = Lanes()
        self._unfinished: dict[tuple[str, str], StagedObjects] = {}
        self._doubts: set[str] = set()
        self.url = self._bucket.url

    def read(self, key: str, limit: int) -> bytes:
        return self._bucket.read(key, limit)

    def stored(self, key: str) -> Stored:
        return self._bucket.stored(key)

    def fetch(self, key: str, offset: int, into: memoryview) -> None:
        self._bucket.fetch(key, offset, into)

    def create(self, key: str, data: bytes) -> bool:
        return self._bucket.put_new(key, data, Sent(), known=False)

    def replace(self, key: str, data: bytes) -> None:
        self._bucket.put(key, memoryview(data), sha256(data).digest())

    def put(self, key: str, content: Content) -> tuple[bytes, ...]:
        prefix, _, name = key.rpartition("/")
        staged = StagedObjects(self._bucket, self._lanes, prefix, set(), lambda: None)
        try:
            [digests] = staged.write([replace(content, name=name)])
        except BaseException:
            staged.give_up()
            raise
        return digests

    def children(self, prefix: str) -> list[str]:
        below = self._bucket.below(prefix)
        names = set()
        for page in self._pages("list_objects_v2", "ListObjectsV2", below, Delimiter="/"):
            names |= {item["Key"].removeprefix(below) for item in page.get("Contents", ())}
            names |= {
                item["Prefix"].removeprefix(below).rstrip("/")
                for item in page.get("CommonPrefixes", ())
            }
        return sorted(names - {""})  # the prefix itself may be an object, made by a console

    def delete(self, keys: Sequence[str]) -> None:
        full = [self._bucket.full(key) for key in keys]
        if full:
            self._bucket.delete_one(full[0])
        for at in range(1, len(full), _DELETED_AT_ONCE):
            self._bucket.delete_several(full[at : at + _DELETED_AT_ONCE])

    def stage(self, prefix: str, owner: str) -> StagedObjects:
        """Sends no request, unless an earlier staging there could not be cleaned up yet.

        Two owners' files of one prefix are not kept apart, as the attempt in it has one owner;
        which of two commits is decided by the condition.
        """
        self._bucket.full(prefix)
        left = self._unfinished.get((prefix, owner))
        if left is not None:
            left.clean()
        place = (prefix, owner)
        staged = StagedObjects(
            self._bucket,
            self._lanes,
            prefix,
            self._doubts,
            ended=lambda: self._unfinished.pop(place, None),
        )
        self._unfinished[place] = staged
        return staged

    def sweep(self, prefix: str, is_stale: Callable[[str], bool]) -> list[str]:
        """Abort multipart uploads; whole files without a manifest are left to retention."""
        below = self._bucket.below(prefix)
        stale = []
        for page in self._pages("list_multipart_uploads", "ListMultipartUploads", below):
            for upload in page.get("Uploads", ()):
                name, _, _ = upload["Key"].removeprefix(below).partition("/")
                if is_stale(name):
                    stale.append((name, upload["Key"], upload["UploadId"]))
        for _, key, upload_id in stale:
            self._bucket.abort_upload(key, upload_id)
        return sorted({name for name, _, _ in stale})

    def hurry(self, deadline: float | None) -> None:
        self._bucket.calls.hurry(deadline)

    def check_conditional_writes(self) -> bool:
        """Whether exactly one of two claims of one key wins, as must be; the key is removed.

        Also finds an object where a prefix is expected: StoreUnfit. False, too, where the server
        knows no conditional writes or they are switched off.
        """
        self._check_prefix()
        if not self._bucket.options.conditional_writes:
            return False
        key = f".probe-{secrets.token_hex(8)}"

        def claim(content: bytes) -> bool:
            return self.create(key, content)

        try:
            with ThreadPoolExecutor(2, "probe") as pool:
                won = list(pool.map(claim, (secrets.token_bytes(16), secrets.token_bytes(16))))
        except NotImplementedThere:
            return False
        finally:
            self.delete([key])
        return won.count(True) == 1

    def _check_prefix(self) -> None:
        prefix = self._bucket.prefix
        if not prefix:
            return
        try:
            self._bucket.ask(
                "HeadObject",
                prefix,
                lambda client, one: client.head_object(Bucket=self._bucket.name, Key=prefix),
            )
        except (NotFound, StoreDenied):
            return
        raise StoreUnfit(self.url, "is an object, and a prefix is expected", "name another prefix")

    def _pages(
        self, method: str, operation: str, below: str, **arguments: Any
    ) -> Iterator[dict[str, Any]]:
        """All pages of a listing, each asked for again where that helps."""
        place: dict[str, Any] = {}

        def send(client: Any, one: Try) -> dict[str, Any]:
            answer: dict[str, Any] = getattr(client, method)(
                Bucket=self._bucket.name, Prefix=below, **arguments, **place
            )
            return answer

        while True:
            page = self._bucket.ask(operation, below, send)
            yield page
            if not page.get("IsTruncated"):
                return
            if "NextContinuationToken" in page:
                place = {"ContinuationToken": page["NextContinuationToken"]}
            elif "NextKeyMarker" in page:
                place = {
                    "KeyMarker": page["NextKeyMarker"],
                    "UploadIdMarker": page.get("NextUploadIdMarker", ""),
                }
            else:
                raise StoreError(f"{self.url}: the server does not say how {operation} goes on")
