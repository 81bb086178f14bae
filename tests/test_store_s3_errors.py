from __future__ import annotations

import ssl
from base64 import b64encode
from hashlib import sha256
from typing import Any

import pytest
from botocore import exceptions as boto

from runner.errors import NotFound, StoreDenied, StoreError, StoreUnfit
from runner.store.s3_body import ViewBody, composite_of, digest_from
from runner.store.s3_errors import (
    Again,
    AlreadyThere,
    Call,
    NotImplementedThere,
    RangeOutside,
    UploadGone,
    Verdict,
    judge,
)

URL = "https://endpoint"


def answer(code: str, status: int, **headers: str) -> boto.ClientError:
    response: dict[str, Any] = {
        "Error": {"Code": code, "Message": "a secret of the server"},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers},
    }
    return boto.ClientError(response, "PutObject")


def verdict(error: BaseException, operation: str = "PutObject") -> Verdict:
    return judge(error, Call(operation, "bucket", "prefix/key"), URL)


# Code and status of an answer, whether to ask again, what it is, and what is said of it.
ANSWERS: list[tuple[str, int, Again, type[StoreError], str]] = [
    ("SlowDown", 503, Again.LATER, StoreError, "SlowDown"),
    ("InternalError", 500, Again.LATER, StoreError, "InternalError"),
    ("", 502, Again.LATER, StoreError, "502"),
    ("InternalError", 200, Again.LATER, StoreError, "InternalError"),
    ("TooManyRequests", 429, Again.LATER, StoreError, "429"),
    ("RequestTimeout", 400, Again.LATER, StoreError, "RequestTimeout"),
    ("ConditionalRequestConflict", 409, Again.LATER, StoreError, "Conflict"),
    ("OperationAborted", 409, Again.LATER, StoreError, "OperationAborted"),
    ("BadDigest", 400, Again.SHORTLY, StoreError, "do not arrive as sent"),
    ("IncompleteBody", 400, Again.SHORTLY, StoreError, "do not arrive as sent"),
    ("QuotaExceeded", 403, Again.SHORTLY, StoreError, "full"),
    ("", 507, Again.SHORTLY, StoreError, "full"),
    ("ExpiredToken", 400, Again.SHORTLY, StoreUnfit, "expired"),
    ("RequestTimeTooSkewed", 403, Again.SHORTLY, StoreUnfit, "clock"),
    ("NoSuchKey", 404, Again.NEVER, NotFound, "not in the store"),
    ("404", 404, Again.NEVER, NotFound, "not in the store"),
    ("NoSuchBucket", 404, Again.NEVER, StoreUnfit, "no bucket bucket at https://endpoint"),
    ("NoSuchUpload", 404, Again.NEVER, UploadGone, "ended"),
    ("PreconditionFailed", 412, Again.NEVER, AlreadyThere, "is there"),
    ("InvalidRange", 416, Again.NEVER, RangeOutside, "ends before"),
    ("AccessDenied", 403, Again.NEVER, StoreDenied, "s3:PutObject on arn:aws:s3:::bucket/prefix"),
    ("403", 403, Again.NEVER, StoreDenied, "s3:PutObject"),
    ("InvalidAccessKeyId", 403, Again.NEVER, StoreUnfit, "does not accept the credentials"),
    ("SignatureDoesNotMatch", 403, Again.NEVER, StoreUnfit, "does not accept the credentials"),
    ("NotImplemented", 501, Again.NEVER, NotImplementedThere, "conditional_writes: off"),
    ("MethodNotAllowed", 405, Again.NEVER, StoreUnfit, "does not answer as S3 does"),
    ("InvalidStorageClass", 400, Again.NEVER, StoreUnfit, "storage_class"),
    ("PermanentRedirect", 301, Again.NEVER, StoreUnfit, "own region"),
    ("AuthorizationHeaderMalformed", 400, Again.NEVER, StoreUnfit, "own region"),
]


@pytest.mark.parametrize(("code", "status", "again", "kind", "said"), ANSWERS)
def test_an_answer_is_judged_by_its_code_and_status(
    code: str, status: int, again: Again, kind: type[StoreError], said: str
) -> None:
    judged = verdict(answer(code, status))

    assert (judged.again, type(judged.error)) == (again, kind)
    assert said in str(judged.error)
    assert "a secret of the server" not in str(judged.error)
    assert judged.expired == (code == "ExpiredToken")


FAILURES: dict[str, tuple[BaseException, Again, type[StoreError], str]] = {
    "refused": (boto.EndpointConnectionError(endpoint_url="u"), Again.LATER, StoreError, "answer"),
    "slow": (boto.ReadTimeoutError(endpoint_url="u"), Again.LATER, StoreError, "answer"),
    "torn": (boto.ConnectionClosedError(endpoint_url="u"), Again.LATER, StoreError, "answer"),
    "short": (
        boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), Again.LATER, StoreError, ""),
    "TLS torn": (
        boto.SSLError(endpoint_url="u", error=ssl.SSLError("eof")), Again.LATER, StoreError, ""),
    "TLS distrust": (
        boto.SSLError(endpoint_url="u", error=ssl.SSLCertVerificationError("self-signed")),
        Again.NEVER, StoreUnfit, "ca_bundle"),
    "no credentials": (boto.NoCredentialsError(), Again.NEVER, StoreUnfit, "no usable"),
    "metadata": (
        boto.CredentialRetrievalError(provider="p", error_msg="secret"),
        Again.SHORTLY, StoreUnfit, "fetched or refreshed"),
    "no region": (boto.NoRegionError(), Again.NEVER, StoreUnfit, "region"),
    "bad parameter": (
        boto.ParamValidationError(report="secret"), Again.NEVER, StoreUnfit, "cannot be made"),
    "our own": (StoreDenied("w", "s3:A", "r"), Again.NEVER, StoreDenied, "s3:A"),
}  # fmt: skip


@pytest.mark.parametrize(("error", "again", "kind", "said"), FAILURES.values(), ids=FAILURES)
def test_a_failure_is_judged_by_its_type(
    error: BaseException, again: Again, kind: type[StoreError], said: str
) -> None:
    judged = verdict(error)

    assert (judged.again, type(judged.error)) == (again, kind)
    assert said in str(judged.error)
    assert "secret" not in str(judged.error)


@pytest.mark.parametrize(
    ("operation", "action", "resource"),
    [
        ("HeadObject", "s3:GetObject", "arn:aws:s3:::bucket/prefix/key"),
        ("UploadPart", "s3:PutObject", "arn:aws:s3:::bucket/prefix/key"),
        ("DeleteObjects", "s3:DeleteObject", "arn:aws:s3:::bucket/prefix/key"),
        ("AbortMultipartUpload", "s3:AbortMultipartUpload", "arn:aws:s3:::bucket/prefix/key"),
        ("ListObjectsV2", "s3:ListBucket", "arn:aws:s3:::bucket"),
        ("ListMultipartUploads", "s3:ListBucketMultipartUploads", "arn:aws:s3:::bucket"),
    ],
)
def test_a_denied_request_names_the_permission(operation: str, action: str, resource: str) -> None:
    error = verdict(answer("AccessDenied", 403), operation).error

    assert isinstance(error, StoreDenied)
    assert (error.action, error.resource) == (action, resource)
    assert f"lack {action} on {resource};" in str(error)


def test_the_region_is_told_where_the_server_tells_it() -> None:
    error = answer("PermanentRedirect", 301, **{"x-amz-bucket-region": "eu-west-1"})

    assert "set region to eu-west-1" in str(verdict(error).error)


# ---------------------------------------------------------------- bodies and checksums


def test_a_body_is_read_in_views_and_can_be_read_again() -> None:
    memory = bytearray(600_000)
    body = ViewBody(memoryview(memory))
    assert (body.seek(0, 2), body.tell(), body.seek(0)) == (600_000, 600_000, 0)

    pieces = list(iter(lambda: body.read(8192), memoryview(b"")))
    body.seek(1)
    memory[1] = 7

    assert [len(piece) for piece in pieces] == [262_144, 262_144, 75_712]
    assert body.read(10)[0] == 7  # a view of the memory, no copy
    body.seek(599_999)
    assert len(body.read()) == 1


def test_a_body_that_is_closed_sends_nothing_more() -> None:
    body = ViewBody(memoryview(b"bytes"))
    body.close()

    with pytest.raises(OSError, match="given up"):
        body.read(10)


def test_checksums_are_those_that_s3_and_manifests_have() -> None:
    digests = [bytes([number]) * 32 for number in range(3)]
    joined = sha256(b"".join(digests))

    assert composite_of(digests) == f"{b64encode(joined.digest()).decode()}-3"
    assert digest_from(composite_of(digests)) == joined.hexdigest()
    assert digest_from("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=") == bytes(range(32)).hex()
    assert digest_from("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=-1") is None
    assert digest_from(None) is None
