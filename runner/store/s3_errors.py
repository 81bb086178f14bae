"""What an S3 server's refusal means: whether to ask again, and what to tell the user.

Judged by status, error code and type of exception, never by text. Messages are made here and only
from names: bucket, key, operation, code. What the server or botocore said is left out, because
both may quote a header or a signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from botocore import exceptions as boto

from runner.errors import NotFound, StoreDenied, StoreError, StoreUnfit


class Again(Enum):
    """Whether the same request may succeed later."""

    NEVER = "never"
    SHORTLY = "shortly"  # it may mend itself, but rarely does
    LATER = "later"


@dataclass(frozen=True)
class Verdict:
    """What becomes of a request that failed. `expired`: other credentials are needed first."""

    again: Again
    error: StoreError
    expired: bool = False


@dataclass(frozen=True)
class Call:
    """One request: the operation's name in the S3 API, and what it is about."""

    operation: str
    bucket: str
    key: str = ""

    @property
    def where(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    @property
    def action(self) -> str:
        """The permission that the operation needs."""
        return f"s3:{_ACTIONS.get(self.operation, self.operation)}"

    @property
    def resource(self) -> str:
        """What a policy must name to give that permission."""
        bucket = f"arn:aws:s3:::{self.bucket}"
        return bucket if self.action in _BUCKET_ACTIONS else f"{bucket}/{self.key}"


class AlreadyThere(StoreError):
    """A conditional write found an object under its key: maybe our own, of an earlier try."""


class NotImplementedThere(StoreUnfit):
    """A server that does not know what it is asked: conditional writes, most of all."""


class UploadGone(StoreError):
    """A multipart upload has ended: it was completed or aborted."""


class RangeOutside(StoreError):
    """An object ends before the range that was asked for."""


_ACTIONS = {
    "HeadObject": "GetObject",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
    "UploadPartCopy": "PutObject",
    "CopyObject": "PutObject",
    "DeleteObjects": "DeleteObject",
    "HeadBucket": "ListBucket",
    "ListObjectsV2": "ListBucket",
    "ListMultipartUploads": "ListBucketMultipartUploads",
}
_BUCKET_ACTIONS = {"s3:ListBucket", "s3:ListBucketMultipartUploads"}

_FULL = {
    "InsufficientStorage", "QuotaExceeded", "EntityTooLarge.Quota", "StorageFull",
    "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "507",
}  # fmt: skip
_BUSY = {
    "SlowDown", "SlowDownRead", "SlowDownWrite", "ServiceUnavailable", "InternalError",
    "InternalFailure", "Throttling", "ThrottlingException", "RequestThrottled",
    "RequestLimitExceeded", "TooManyRequests", "BandwidthLimitExceeded", "RequestTimeout",
    "RequestTimeoutException", "OperationAborted", "ConditionalRequestConflict",
    "ConcurrentModification",
}  # fmt: skip
_DAMAGED = {
    "BadDigest", "InvalidDigest", "IncompleteBody", "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}  # fmt: skip
_WRONG_KEYS = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity", "NotSignedUp",
    "UserSuspended", "InvalidClientTokenId", "UnrecognizedClientException",
    "MissingSecurityHeader", "AuthorizationQueryParametersError",
}  # fmt: skip
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}
_WRONG_REGION = {
    "PermanentRedirect", "TemporaryRedirect", "Redirect", "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException", "301", "307",
}  # fmt: skip
_CONNECTION = (
    boto.SSLError,
    boto.ConnectionError,  # refused, unreachable, no such name, time-outs
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    boto.FlexibleChecksumError,
    OSError,
)
_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.UnauthorizedSSOTokenError,
    boto.ProfileNotFound,
    boto.ConfigNotFound,
    boto.InvalidConfigError,
)


def judge(error: BaseException, call: Call, endpoint: str) -> Verdict:
    """What a failed request means, and whether it is worth another try."""
    if isinstance(error, StoreError):
        return Verdict(Again.NEVER, error)
    if isinstance(error, boto.ClientError):
        return _judge_answer(error, call, endpoint)
    if isinstance(error, _CREDENTIALS):
        return _unfit(call, "there are no usable credentials", (
            "give them in one of boto3's own ways: environment variables, a profile, or a role "
            "of the machine"
        ))  # fmt: skip
    if isinstance(error, boto.CredentialRetrievalError | boto.RefreshWithMFAUnsupportedError):
        return _unfit(call, "the credentials cannot be fetched or refreshed", (
            "look after the credential process, the profile or the machine's role"
        ), Again.SHORTLY)  # fmt: skip
    if isinstance(error, boto.SSLError) and _is_distrust(error):
        return _unfit(call, f"the certificate of {endpoint} is not trusted", (
            "set ca_bundle to a file with the certificate of its issuer, or correct the endpoint"
        ))  # fmt: skip
    if isinstance(error, _CONNECTION):
        return Verdict(Again.LATER, StoreError(
            f"{call.where}: {endpoint} does not answer {call.operation} "
            f"({type(error).__name__}); is the endpoint right, and the network up?"
        ))  # fmt: skip
    if isinstance(error, boto.NoRegionError | boto.InvalidRegionError):
        return _unfit(call, "no region is known", "set the store's region")
    if isinstance(error, boto.BotoCoreError) and "Parser" in type(error).__name__:
        return _not_s3(call, endpoint)
    if isinstance(error, boto.BotoCoreError | ValueError):
        return _unfit(call, f"the request cannot be made ({type(error).__name__})", (
            "check endpoint, region, addressing and the bucket's name"
        ))  # fmt: skip
    return Verdict(Again.NEVER, StoreError(f"{call.where}: {call.operation} failed: {error!r}"))


def _judge_answer(error: boto.ClientError, call: Call, endpoint: str) -> Verdict:
    response: dict[str, Any] = error.response
    code = str(response.get("Error", {}).get("Code", ""))
    metadata = response.get("ResponseMetadata", {})
    status = int(metadata.get("HTTPStatusCode") or 0)
    known = _by_code(code, status, call, endpoint, metadata.get("HTTPHeaders", {}))
    if known is not None:
        return known
    answer = f"{call.where}: the server answers {call.operation} with {code or status}"
    if call.operation == "AbortMultipartUpload" and status == 409:
        # Another is just ending it, or completing it: Ceph says BucketAlreadyExists then.
        return Verdict(Again.LATER, StoreError(answer))
    if code in _DAMAGED:
        return Verdict(Again.SHORTLY, StoreError(f"{answer}: the bytes do not arrive as sent"))
    if code in _BUSY or status >= 500 or status in (408, 429):
        return Verdict(Again.LATER, StoreError(f"{answer} ({status})"))
    if 400 <= status < 500:
        return _unfit(call, f"the server answers {call.operation} with {code} ({status})", (
            "check sse, kms_key, storage_class, addressing and the endpoint"
        ))  # fmt: skip
    return Verdict(Again.LATER, StoreError(answer))


def _by_code(
    code: str, status: int, call: Call, endpoint: str, headers: dict[str, str]
) -> Verdict | None:
    """The verdict where the code says it all."""
    if code == "NoSuchBucket":
        return _unfit(call, f"there is no bucket {call.bucket} at {endpoint}", (
            "create it, or correct the store's URL or endpoint"
        ))  # fmt: skip
    if code == "NoSuchUpload":
        return Verdict(Again.NEVER, UploadGone(f"{call.where}: its upload was ended meanwhile"))
    if code == "NoSuchKey" or (status == 404 and code in ("404", "NotFound", "")):
        return Verdict(Again.NEVER, NotFound(call.where))
    if code == "PreconditionFailed" or status == 412:
        return Verdict(Again.NEVER, AlreadyThere(f"{call.where} is there, or has changed"))
    if code == "InvalidRange" or status == 416:
        return Verdict(Again.NEVER, RangeOutside(f"{call.where} ends before that range"))
    if code in _FULL or status == 507:
        return Verdict(Again.SHORTLY, StoreError(
            f"{call.where}: the store is full ({code}); make room in it, or raise its quota"
        ))  # fmt: skip
    if code in _WRONG_KEYS:
        return _unfit(call, f"the server does not accept the credentials ({code})", (
            "check the access key, its secret, and whether they belong to this endpoint"
        ))  # fmt: skip
    if code in _EXPIRED:
        return Verdict(Again.SHORTLY, StoreUnfit(
            call.where, f"the credentials have expired ({code})", "renew them"
        ), expired=True)  # fmt: skip
    if code in ("RequestTimeTooSkewed", "RequestExpired"):
        return _unfit(call, "this machine's clock differs too much from the server's", (
            "set it right, with NTP for one"
        ), Again.SHORTLY)  # fmt: skip
    if code in _WRONG_REGION or status in (301, 307):
        region = headers.get("x-amz-bucket-region")
        step = f"set region to {region}" if region else "set the bucket's own region"
        return _unfit(call, f"the bucket {call.bucket} is not in the region that was asked", step)
    if status == 501 or code == "NotImplemented":
        return Verdict(Again.NEVER, NotImplementedThere(
            call.where,
            f"the server does not know {call.operation} as it is asked",
            "use a server that knows If-None-Match, or set conditional_writes: off",
        ))  # fmt: skip
    if status in (401, 403):
        return Verdict(Again.NEVER, StoreDenied(call.where, call.action, call.resource))
    if status == 405:
        return _not_s3(call, endpoint)
    return None


def code_of(error: BaseException) -> str:
    """The code in a server's answer, or the error's class: what may stand in a log."""
    if isinstance(error, boto.ClientError):
        return str(error.response.get("Error", {}).get("Code", "unknown"))
    return type(error).__name__


def _unfit(call: Call, problem: str, remedy: str, again: Again = Again.NEVER) -> Verdict:
    return Verdict(again, StoreUnfit(call.where, problem, remedy))


def _not_s3(call: Call, endpoint: str) -> Verdict:
    return _unfit(call, f"{endpoint} does not answer as S3 does", (
        "check the endpoint: scheme, host and port"
    ))  # fmt: skip


def _is_distrust(error: boto.SSLError) -> bool:
    """Whether TLS failed for good, because of a certificate, rather than on the way."""
    import ssl

    cause: BaseException | None = error.kwargs.get("error")
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return True
        inner = cause.args[0] if cause.args else None
        cause = inner if isinstance(inner, BaseException) else cause.__cause__
    return False
