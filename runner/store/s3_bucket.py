"""One bucket, and what can be asked of its objects: each method is one request, or few.

Every write carries the SHA-256 of its bytes, with the algorithm declared: some servers store a
checksum unchecked that comes without the declaration. Every answer that has a checksum is compared.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar
from urllib.parse import urlsplit

from botocore import exceptions as boto

from runner.errors import NotFound, StoreDenied, StoreError, StoreUnfit, UsageError
from runner.store.base import Stored
from runner.store.s3_body import Filling, ViewBody, base64_of, digest_from, read_into
from runner.store.s3_calls import SHORT_PATIENCE_SECONDS, Calls, Errand, Try
from runner.store.s3_client import endpoint_of, is_aws, open_client
from runner.store.s3_errors import AlreadyThere, Call, RangeOutside, UploadGone, Verdict, judge
from runner.store.s3_options import S3Options

log = logging.getLogger(__name__)

T = TypeVar("T")
Send = Callable[[Any, Try], T]


@dataclass
class Sent:
    """How often a write went out: after more than once, nobody knows which of them arrived."""

    count: int = 0


class Bucket:
    """A bucket and a prefix in it. Keys are relative to the prefix; no request is made at first."""

    def __init__(self, url: str, options: S3Options) -> None:
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise UsageError(f"{url!r} is no place in S3; write s3://bucket/prefix")
        self.url = url.rstrip("/")
        self.name = parts.netloc
        prefix = parts.path.strip("/")
        self._root = f"{prefix}/" if prefix else ""
        self.prefix = prefix
        self.options = options
        self.calls = Calls(self._judge, self._forget_client)
        self._client: Any = None
        self._opening = threading.Lock()

    # ------------------------------------------------------------------ names

    def full(self, key: str) -> str:
        """A key as the bucket knows it. StoreError if it is none of ours."""
        if not key or any(part in ("", ".", "..") or "\0" in part for part in key.split("/")):
            raise StoreError(f"{key!r} is no key")
        return self._root + key

    def below(self, prefix: str) -> str:
        """The beginning of all keys below a prefix, as the bucket knows it."""
        return f"{self.full(prefix)}/" if prefix else self._root

    def where(self, key: str) -> str:
        return f"{self.url}/{key}"

    def stored_as(self) -> dict[str, str]:
        """What is said of each new object besides its content."""
        said = {
            "ServerSideEncryption": self.options.sse,
            "SSEKMSKeyId": self.options.kms_key,
            "StorageClass": self.options.storage_class,
        }
        return {name: value for name, value in said.items() if value is not None}

    # ------------------------------------------------------------------ requests

    def ask(
        self,
        operation: str,
        full_key: str,
        send: Send[T],
        *,
        nbytes: int = 0,
        errand: Errand | None = None,
        patience_seconds: float | None = None,
    ) -> T:
        """Send a request, and again where that may help; see `Calls.ask`."""
        return self.calls.ask(
            Call(operation, self.name, full_key),
            lambda one: send(self._opened(), one),
            nbytes=nbytes,
            errand=errand,
            patience_seconds=patience_seconds,
        )

    def read(self, key: str, limit: int) -> bytes:
        """A whole object; botocore verifies it where it came in one part."""

        def send(client: Any, one: Try) -> bytes:
            answer = client.get_object(Bucket=self.name, Key=full, ChecksumMode="ENABLED")
            if answer["ContentLength"] > limit:
                answer["Body"].close()
                raise StoreError(f"{self.where(key)} is larger than {limit} bytes")
            data: bytes = answer["Body"].read()
            return data

        full = self.full(key)
        return self.ask("GetObject", full, send)

    def stored(self, key: str) -> Stored:
        full = self.full(key)
        try:
            return self.ask("HeadObject", full, lambda client, one: self._head(client, full))
        except NotFound:
            self._check_presence()
            raise

    def _head(self, client: Any, full: str) -> Stored:
        try:
            answer = client.head_object(Bucket=self.name, Key=full, ChecksumMode="ENABLED")
        except boto.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code.isdigit() and code != "404":
                # The answer to HEAD has no body that could say why. That of GET has.
                client.get_object(Bucket=self.name, Key=full, Range="bytes=0-0")["Body"].close()
            raise
        return Stored(answer["ContentLength"], digest_from(answer.get("ChecksumSHA256")))

    def _check_presence(self) -> None:
        """StoreUnfit if the whole bucket is gone: then nothing is known of an object in it."""
        call = Call("HeadBucket", self.name)
        try:
            self.ask("HeadBucket", "", lambda client, one: client.head_bucket(Bucket=self.name))
        except NotFound:
            raise StoreUnfit(
                call.where,
                f"there is no bucket {self.name}",
                "create it, or correct the store's URL or endpoint",
            ) from None
        except StoreDenied:
            return  # it is there

    def fetch(self, key: str, offset: int, into: memoryview) -> None:
        """A range, read on from where it stopped as often as need be."""
        full, filling = self.full(key), Filling(into)
        if filling.length == 0:
            self.stored(key)
            return
        version: dict[str, str] = {}

        def send(client: Any, one: Try) -> None:
            begin, end = offset + filling.done, offset + filling.length
            asked = {"Range": f"bytes={begin}-{end - 1}", **version}
            answer = client.get_object(Bucket=self.name, Key=full, **asked)
            body = answer["Body"]
            try:
                version["IfMatch"] = answer["ETag"]
                first, total = _range_of(answer)
                if first != begin:
                    raise StoreUnfit(
                        self.where(key), "the server does not send the range asked", "use another"
                    )
                if total < end:
                    raise StoreError(f"{self.where(key)} ends at {total} bytes")
                read_into(body, filling, begin - offset)
            finally:
                body.close()
            if filling.done < filling.length:
                raise boto.IncompleteReadError(
                    actual_bytes=filling.done, expected_bytes=filling.length
                )

        try:
            self.ask("GetObject", full, send, nbytes=filling.length)
        except RangeOutside:
            raise StoreError(f"{self.where(key)} ends at {self.stored(key).size} bytes") from None
        except AlreadyThere:
            raise StoreError(f"{self.where(key)} was changed while it was read") from None
        finally:
            filling.close()

    def put(
        self, key: str, memory: memoryview, digest: bytes, errand: Errand | None = None
    ) -> None:
        """Write an object in one part, over whatever there is."""
        send = self._putting(key, memory, digest, {})
        self.ask("PutObject", self.full(key), send, nbytes=len(memory), errand=errand)

    def put_new(self, key: str, data: bytes, sent: Sent, *, known: bool) -> bool:
        """Write an object if there is none: True if it is there by a write of ours.

        An object that is there already may be the work of an earlier try whose acknowledgement was
        lost: then it has our bytes. `known` says that it may even be that of an earlier call.
        """
        condition = {"IfNoneMatch": "*"} if self.options.conditional_writes else {}
        write = self._putting(key, memoryview(data), sha256(data).digest(), condition)

        def send(client: Any, one: Try) -> None:
            sent.count += 1
            write(client, one)

        if not condition and self._is_there(key):
            return known and self._has(key, data)
        try:
            self.ask("PutObject", self.full(key), send, nbytes=len(data))
        except AlreadyThere:
            return (known or sent.count > 1) and self._has(key, data)
        return True

    def _putting(
        self, key: str, memory: memoryview, digest: bytes, condition: dict[str, str]
    ) -> Send[None]:
        full, checksum = self.full(key), base64_of(digest)

        def send(client: Any, one: Try) -> None:
            body = ViewBody(memory)
            one.when_unwanted(body.close)
            answer = client.put_object(
                Bucket=self.name,
                Key=full,
                Body=body,
                ChecksumAlgorithm="SHA256",
                ChecksumSHA256=checksum,
                **condition,
                **self.stored_as(),
            )
            self.compare(key, answer.get("ChecksumSHA256"), checksum)

        return send

    def _is_there(self, key: str) -> bool:
        try:
            self.stored(key)
        except NotFound:
            return False
        return True

    def _has(self, key: str, data: bytes) -> bool:
        """Whether an object has exactly these bytes."""
        try:
            return self.stored(key).size == len(data) and self.read(key, len(data)) == data
        except NotFound:
            return False

    def delete_one(self, full: str, patience_seconds: float | None = None) -> None:
        """Delete an object; one that is not there is no error."""
        self.ask(
            "DeleteObject",
            full,
            lambda client, one: client.delete_object(Bucket=self.name, Key=full),
            patience_seconds=patience_seconds,
        )

    def delete_several(self, full: Sequence[str]) -> None:
        """Delete up to 1000 objects in one request; what failed is asked for again.

        One by one where the server knows no batches, or wants an MD5 that is no longer sent.
        """
        left = list(full)
        call = Call("DeleteObjects", self.name, self._root)

        def send(client: Any, one: Try) -> None:
            answer = client.delete_objects(
                Bucket=self.name,
                Delete={"Objects": [{"Key": key} for key in left], "Quiet": True},
            )
            failed = {item["Key"]: item for item in answer.get("Errors", ())}
            left[:] = [key for key in left if key in failed]
            for key, item in failed.items():
                raise boto.ClientError(
                    {
                        "Error": {"Code": item.get("Code", "")},
                        "ResponseMetadata": {"HTTPStatusCode": _status_of(item.get("Code", ""))},
                    },
                    f"DeleteObjects {key}",
                )

        if len(left) == 1:
            self.delete_one(left[0])
            return
        try:
            self.calls.ask(call, lambda one: send(self._opened(), one))
        except StoreUnfit:
            for key in left:
                self.delete_one(key)

    def abort_upload(self, full: str, upload: str) -> None:
        """End a multipart upload; its parts go. One that has ended is no error."""
        try:
            self.ask(
                "AbortMultipartUpload",
                full,
                lambda client, one: client.abort_multipart_upload(
                    Bucket=self.name, Key=full, UploadId=upload
                ),
                patience_seconds=SHORT_PATIENCE_SECONDS,
            )
        except UploadGone:
            return

    def compare(self, key: str, theirs: str | None, ours: str) -> None:
        """StoreError if the server's checksum of what it stored is another than ours."""
        if theirs is not None and theirs != ours:
            raise StoreError(f"{self.where(key)} is stored with bytes that were not sent")

    # ------------------------------------------------------------------ the client

    def _opened(self) -> Any:
        with self._opening:
            if self._client is None:
                self._client = open_client(self.url, self.options)
            return self._client

    def _forget_client(self) -> None:
        """Go through the chain of credentials again: a profile may have been rewritten."""
        with self._opening:
            self._client = None

    def _judge(self, error: BaseException, call: Call) -> Verdict:
        client = self._client
        if client is not None:
            endpoint = endpoint_of(client)
        else:
            endpoint = "AWS" if is_aws(self.options.endpoint) else "the endpoint"
        return judge(error, call, endpoint)


def _status_of(code: str) -> int:
    """The status that a server would answer with this code if it were about one object."""
    return 403 if code == "AccessDenied" else 500


def _range_of(answer: dict[str, Any]) -> tuple[int, int]:
    """Where the body of an answer begins in its object, and how large the object is."""
    told = answer.get("ContentRange")
    if told is None:
        return 0, int(answer["ContentLength"])
    place, _, total = told.removeprefix("bytes ").partition("/")
    return int(place.partition("-")[0]), int(total)
