"""A checkpoint on its way into a bucket.

    <prefix>/<file> …         written first, several at once, in parts that the server verifies
    <prefix>/manifest.json    written last and only if absent: the commit

The files lie under their final keys from the beginning. Without a manifest they are no checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

from runner.errors import NotFound, StoreDenied, StoreError, StoreUnfit
from runner.store.base import Content, Part
from runner.store.s3_body import ViewBody, base64_of, composite_of, digest_from
from runner.store.s3_bucket import Bucket, Sent
from runner.store.s3_calls import SHORT_PATIENCE_SECONDS, Errand, Try
from runner.store.s3_errors import UploadGone
from runner.store.s3_lanes import Job, Lanes

log = logging.getLogger(__name__)


class StagedObjects:
    """A `Staging` under a prefix of a bucket. `ended` is told when nothing is left to clean up.

    `doubts` are the prefixes at which a manifest may still arrive, whoever has staged there.
    """

    def __init__(
        self,
        bucket: Bucket,
        lanes: Lanes,
        prefix: str,
        doubts: set[str],
        ended: Callable[[], object],
    ) -> None:
        self._bucket, self._lanes, self._prefix, self._ended = bucket, lanes, prefix, ended
        self._doubts = doubts
        self._errand = Errand()
        self._files: list[_File] = []

    def write(self, contents: Sequence[Content]) -> list[tuple[bytes, ...]]:
        """Several files and parts at once, each part taken when there is a lane for it."""
        files = [self._file(content.name, self._errand) for content in contents]
        self._run(_uploading(files, contents), self._errand)
        return [file.digests() for file in files]  # which asks whether all of it is there

    def copy(
        self,
        name: str,
        key: str,
        size: int,
        part_bytes: int,
        digests: Sequence[bytes],
        go_on: Callable[[], None] = lambda: None,
    ) -> None:
        """A copy on the server, of the same parts, so that it has the same checksum.

        It fails alone: the file may be written instead.
        """
        errand = Errand(self._errand)
        file = self._file(name, errand)
        try:
            self._run(file.copying(key, size, part_bytes, digests, go_on), errand)
            file.digests()
        except BaseException:
            self._end_uploads([file])  # if that fails, `clean` tries it once more
            raise

    def commit(self, name: str, manifest: bytes) -> None:
        """One conditional write. One that is there with these bytes is our own, of another try."""
        key, sent = self._key(name), Sent()
        was_in_doubt = self._prefix in self._doubts
        self._doubts.add(self._prefix)
        try:
            made = self._bucket.put_new(key, manifest, sent, known=True)
        except (StoreDenied, StoreUnfit):
            if sent.count <= 1 and not was_in_doubt:
                self._doubts.discard(self._prefix)
            raise
        if not made:
            raise StoreError(f"{self._bucket.where(key)} is there, and another has written it")
        self._doubts.discard(self._prefix)
        self._ended()

    def abort(self) -> None:
        """Remove the files, unless a manifest may have come to them: then they are left.

        A manifest whose write was not acknowledged may still arrive. With its files it is a sound
        checkpoint; without them it would be a corrupt one. In haste nothing is waited for, and
        whole files are left, too: to the next try, which overwrites them, or to a later sweep.
        """
        try:
            self.clean()
        except StoreError as error:
            log.warning("%s: remains of a save: %s", self._bucket.where(self._prefix), error)

    def clean(self) -> None:
        """`abort`, and StoreError if something is left that there was time for."""
        self._bucket.calls.cancel(self._errand)
        errors = self._end_uploads(self._files)
        for full_key in (
            () if self._prefix in self._doubts else {file.full_key for file in self._files}
        ):
            if self._bucket.calls.in_haste:
                return
            errors += _errors_of(partial(self._bucket.delete_one, full_key, SHORT_PATIENCE_SECONDS))
        if errors:
            raise errors[0]
        self._ended()

    def give_up(self) -> None:
        """End what is under way as far as that can be; what was there before stays."""
        self._bucket.calls.cancel(self._errand)
        self._end_uploads(self._files)

    def _end_uploads(self, files: Sequence[_File]) -> list[StoreError]:
        errors: list[StoreError] = []
        for at, file in enumerate(files):
            if self._bucket.calls.in_haste:
                _aside(*(late.end_uploads for late in files[at:]))
                break
            errors += _errors_of(file.end_uploads)
        return errors

    def _run(self, jobs: Iterator[Job], errand: Errand) -> None:
        self._lanes.run(jobs, lambda: self._bucket.calls.cancel(errand))

    def _file(self, name: str, errand: Errand) -> _File:
        file = _File(self._bucket, self._key(name), errand)
        self._files.append(file)
        return file

    def _key(self, name: str) -> str:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise StoreError(f"{name!r} is no plain file name")
        return f"{self._prefix}/{name}"


def _errors_of(call: Callable[[], None]) -> list[StoreError]:
    """What it raises: the rest is to be cleaned up nevertheless."""
    try:
        call()
    except StoreError as error:
        return [error]
    return []


def _aside(*calls: Callable[[], None]) -> None:
    """End uploads as far as there is time, waiting for none of it.

    The parts of an upload that is not ended take room until the next attempt sweeps them away.
    """

    def end() -> None:
        for call in calls:
            for error in _errors_of(call):
                log.info("remains of a save: %s", error)

    with contextlib.suppress(RuntimeError):  # the interpreter is shutting down
        threading.Thread(target=end, name="remains", daemon=True).start()


def _uploading(files: Sequence[_File], contents: Sequence[Content]) -> Iterator[Job]:
    """A job for each part, made when it is asked for; one part is looked at ahead."""
    for file, content in zip(files, contents, strict=True):
        number, ahead = 0, None
        for part in content.parts:
            if ahead is not None:
                number += 1
                yield file.sending(number, ahead)
            ahead = part
        if ahead is None:
            raise StoreError(f"{content.name} has no parts")
        if number == 0:
            yield file.putting(ahead)
        else:
            file.number_of_parts = number + 1
            yield file.sending(number + 1, ahead)


class _File:
    """One object being written, by several threads."""

    def __init__(self, bucket: Bucket, key: str, errand: Errand) -> None:
        self._bucket, self._key, self._errand = bucket, key, errand
        self.full_key = bucket.full(key)
        self._lock = threading.Lock()
        self._upload: str | None = None
        self._begun: set[str] = set()  # and not ended; also by tries that came too late
        self._noting = threading.Lock()
        self._digests: dict[int, bytes] = {}
        self._done: dict[int, dict[str, Any]] = {}
        self._completed = self._is_copy = False
        self.number_of_parts: int | None = None

    def digests(self) -> tuple[bytes, ...]:
        """Of all parts, in their order. StoreError if the file is not there as a whole."""
        if not self._completed:
            raise StoreError(f"{self._bucket.where(self._key)} was not stored as a whole")
        return self._digests_so_far()

    def _digests_so_far(self) -> tuple[bytes, ...]:
        return tuple(self._digests[number] for number in sorted(self._digests))

    # ------------------------------------------------------------------ jobs

    def putting(self, part: Part) -> Job:
        """The whole file is one part."""

        def job() -> int:
            digest = part.digest or sha256(part.memory).digest()
            self._bucket.put(self._key, part.memory, digest, self._errand)
            self._digests[1] = digest
            self._completed = True
            return len(part.memory)

        return job

    def sending(self, number: int, part: Part) -> Job:
        def job() -> int:
            upload = self._begin()
            digest = part.digest or sha256(part.memory).digest()
            nbytes = len(part.memory)
            self._finish(number, digest, self._send(upload, number, part.memory, digest))
            return nbytes

        return job

    def copying(
        self,
        key: str,
        size: int,
        part_bytes: int,
        digests: Sequence[bytes],
        go_on: Callable[[], None],
    ) -> Iterator[Job]:
        self._is_copy = True
        whole = digests[0].hex() if len(digests) == 1 else digest_from(composite_of(digests))
        self._check(key, whole, size)  # before anything is copied for nothing
        source = {"Bucket": self._bucket.name, "Key": self._bucket.full(key)}
        if len(digests) == 1:
            go_on()
            yield lambda: self._copy_whole(source, digests[0])
            return
        self.number_of_parts = len(digests)
        for number, digest in enumerate(digests, 1):
            go_on()
            begin = (number - 1) * part_bytes
            end = min(size, begin + part_bytes)
            yield self._copying_part(source, number, begin, end, digest)

    def _copying_part(
        self, source: dict[str, str], number: int, begin: int, end: int, digest: bytes
    ) -> Job:
        def job() -> int:
            upload = self._begin()

            def send(client: Any, one: Try) -> dict[str, Any]:
                answer: dict[str, Any] = client.upload_part_copy(
                    Bucket=self._bucket.name,
                    Key=self.full_key,
                    UploadId=upload,
                    PartNumber=number,
                    CopySource=source,
                    CopySourceRange=f"bytes={begin}-{end - 1}",
                )["CopyPartResult"]
                return answer

            copied = self._bucket.ask("UploadPartCopy", self.full_key, send, errand=self._errand)
            self._bucket.compare(self._key, copied.get("ChecksumSHA256"), base64_of(digest))
            self._finish(number, digest, copied)
            return 0

        return job

    def _copy_whole(self, source: dict[str, str], digest: bytes) -> int:
        def send(client: Any, one: Try) -> None:
            client.copy_object(
                Bucket=self._bucket.name,
                Key=self.full_key,
                CopySource=source,
                ChecksumAlgorithm="SHA256",
                **self._bucket.stored_as(),
            )

        self._bucket.ask("CopyObject", self.full_key, send, errand=self._errand)
        self._digests[1] = digest
        self._check(self._key, digest.hex())
        self._completed = True
        return 0

    # ------------------------------------------------------------------ requests

    def _begin(self) -> str:
        """The id of the multipart upload, which the first part begins."""

        def send(client: Any, one: Try) -> str:
            answer = client.create_multipart_upload(
                Bucket=self._bucket.name,
                Key=self.full_key,
                ChecksumAlgorithm="SHA256",
                **self._bucket.stored_as(),
            )
            upload = str(answer["UploadId"])
            self._note(upload)  # before it is asked whether `end_uploads` was there already
            if one.unwanted:
                self._end(upload)
            return upload

        with self._lock:
            if self._upload is None:
                self._upload = self._bucket.ask(
                    "CreateMultipartUpload", self.full_key, send, errand=self._errand
                )
                if others := self._begun - {self._upload}:  # in haste two tries may succeed at once
                    _aside(*(partial(self._end, other) for other in others))
            return self._upload

    def _send(self, upload: str, number: int, memory: memoryview, digest: bytes) -> dict[str, Any]:
        checksum = base64_of(digest)

        def send(client: Any, one: Try) -> dict[str, Any]:
            body = ViewBody(memory)
            one.when_unwanted(body.close)
            answer: dict[str, Any] = client.upload_part(
                Bucket=self._bucket.name,
                Key=self.full_key,
                UploadId=upload,
                PartNumber=number,
                Body=body,
                ChecksumAlgorithm="SHA256",
                ChecksumSHA256=checksum,
            )
            self._bucket.compare(self._key, answer.get("ChecksumSHA256"), checksum)
            return answer

        return self._bucket.ask(
            "UploadPart", self.full_key, send, nbytes=len(memory), errand=self._errand
        )

    def _finish(self, number: int, digest: bytes, answer: dict[str, Any]) -> None:
        """Note that a part is there; whoever brings the last one completes the upload."""
        part = {"PartNumber": number, "ETag": answer["ETag"]}
        if "ChecksumSHA256" in answer:
            part["ChecksumSHA256"] = answer["ChecksumSHA256"]
        with self._lock:
            self._digests[number], self._done[number] = digest, part
            if len(self._done) != self.number_of_parts:
                return
        self._complete()

    def _complete(self) -> None:
        ours = composite_of(self._digests_so_far())
        tries = 0

        def send(client: Any, one: Try) -> str | None:
            nonlocal tries
            tries += 1
            # A completion that was cut off may have been done, or be going on.
            if tries > 1 and self._is_stored(digest_from(ours)):
                return ours
            answer = client.complete_multipart_upload(
                Bucket=self._bucket.name,
                Key=self.full_key,
                UploadId=self._upload,
                MultipartUpload={"Parts": [self._done[n] for n in sorted(self._done)]},
            )
            told: str | None = answer.get("ChecksumSHA256")
            return told

        try:
            theirs = self._bucket.ask(
                "CompleteMultipartUpload", self.full_key, send, errand=self._errand
            )
        except UploadGone:
            if not self._is_stored(digest_from(ours)):
                raise
            theirs = ours
        self._completed = True
        self._take(str(self._upload))
        if theirs is None:
            self._check(self._key, digest_from(ours))
        else:
            self._bucket.compare(self._key, theirs, ours)

    def _is_stored(self, digest: str | None) -> bool:
        try:
            return self._bucket.stored(self._key).digest == digest
        except NotFound:
            return False

    def _check(self, key: str, digest: str | None, size: int | None = None) -> None:
        """Compare a stored object's checksum, where the server keeps any; of copies it has to.

        What was sent, it has verified then: a copy nobody has.
        """
        stored, where = self._bucket.stored(key), self._bucket.where(key)
        if size is not None and stored.size != size:
            raise StoreError(f"{where} has {stored.size} bytes instead of {size}")
        if stored.digest is None and self._is_copy:
            raise StoreError(
                f"{where}: the server keeps no SHA-256 that a copy could be checked by"
            )
        if stored.digest is None:
            log.warning("%s: the server keeps no SHA-256 of it", where)
        elif stored.digest != digest:
            raise StoreError(f"{where} has other bytes than it should")

    def end_uploads(self) -> None:
        """End what was begun and is not complete. Raises the first error, when all were tried."""
        with self._noting:
            begun = sorted(self._begun)
        errors = [error for upload in begun for error in _errors_of(partial(self._end, upload))]
        if errors:
            raise errors[0]

    def _end(self, upload: str) -> None:
        """End an upload, unless another thread does so just now, or it is complete."""
        if not self._take(upload):
            return
        try:
            self._bucket.abort_upload(self.full_key, upload)
        except BaseException:
            self._note(upload)
            raise

    def _note(self, upload: str) -> None:
        with self._noting:
            self._begun.add(upload)

    def _take(self, upload: str) -> bool:
        """Whether it is this call that took the upload from those to be ended."""
        with self._noting:
            if upload not in self._begun:
                return False
            self._begun.remove(upload)
            return True
