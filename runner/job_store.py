"""Where a job's checkpoints live: a directory, or a bucket and prefix on S3, and how to get there.

Credentials are not part of a job. boto3 finds them by itself, so that no file of ours holds any;
what looks like one is refused here, and is not repeated in the message.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from runner.job_types import Part, Switch, Text, some_text

S3_SCHEME = "s3://"
WHERE_CREDENTIALS_BELONG = (
    "; credentials never stand in a job file: boto3 finds them in AWS_ACCESS_KEY_ID and"
    " AWS_SECRET_ACCESS_KEY, in the profile that AWS_PROFILE names, or from the machine's role"
)

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*:/"
STORE_PATTERN = rf"^(?!(?!s3://){_SCHEME})"  # in the JSON Schema: no scheme but s3
# A key of S3 has at most 1024 bytes; what a run adds to the prefix is shorter than 512.
_LONGEST_PREFIX_BYTES = 512
_CREDENTIAL_KEY = re.compile(r"access_?key|secret|token|password|credential|profile", re.I)


def is_s3(location: str) -> bool:
    """Whether a store's location is a bucket and prefix, not a directory."""
    return location.startswith(S3_SCHEME)


def s3_url(text: str) -> str:
    """A URL `s3://bucket/prefix` in its one spelling. ValueError says what is wrong with it.

    Sources: "General purpose bucket naming rules" and "Naming Amazon S3 objects" in the user guide
    of Amazon S3.
    """
    bucket, _, prefix = text.removeprefix(S3_SCHEME).partition("/")
    prefix = prefix.rstrip("/")
    if "@" in bucket:
        raise ValueError("expected s3://bucket/prefix, without anything before the bucket")
    if not bucket:
        raise ValueError("expected s3://bucket/prefix")
    if problem := _bucket_problem(bucket) or _prefix_problem(prefix):
        raise ValueError(problem)
    return f"{S3_SCHEME}{bucket}/{prefix}" if prefix else f"{S3_SCHEME}{bucket}"


def store_location(text: str) -> str:
    """What the job file may say after `store:`."""
    text = some_text(text)
    if is_s3(text):
        return s3_url(text)
    if scheme := re.match(_SCHEME, text):
        raise ValueError(f"expected a directory or s3://bucket/prefix, not a place on {scheme[0]}/")
    return text


def is_credential(path: tuple[str | int, ...]) -> bool:
    """Whether an unknown key of a job looks like one that would hold credentials."""
    place, key = path[:-1], str(path[-1])
    return place in ((), ("s3",)) and _CREDENTIAL_KEY.search(key) is not None


def _bucket_problem(bucket: str) -> str | None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket) or ".." in bucket:
        return (
            f"{bucket!r} cannot be a bucket: expected 3 to 63 lower-case letters, digits, '-' and"
            " single '.', with a letter or a digit at both ends"
        )
    try:
        ipaddress.ip_address(bucket)
    except ValueError:
        return None
    return f"{bucket!r} cannot be a bucket: it is an address; the server belongs to s3.endpoint"


def _prefix_problem(prefix: str) -> str | None:
    if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
        return f"the prefix {prefix!r} has an empty part, '.' or '..'"
    if any(ord(character) < 0x20 or ord(character) == 0x7F for character in prefix):
        return "the prefix contains a control character"
    if len(prefix.encode()) > _LONGEST_PREFIX_BYTES:
        return f"expected a prefix of at most {_LONGEST_PREFIX_BYTES} bytes"
    return None


def _endpoint(text: str) -> str:
    """The URL of a server. Nothing of a URL that holds credentials is repeated."""
    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
    except ValueError:
        host, port, url = None, None, urlsplit("")
    if url.username is not None or url.password is not None:
        raise ValueError("expected a URL without credentials" + WHERE_CREDENTIALS_BELONG)
    if url.scheme not in ("http", "https") or not host or port == 0:
        raise ValueError("expected the URL of a server, such as https://storage.example:9000")
    if url.path not in ("", "/") or url.query or url.fragment:
        raise ValueError("expected only a server; the bucket and the prefix belong to store")
    if url.scheme == "http" and re.search(r"(^|\.)amazonaws\.com(\.cn)?$", host):
        raise ValueError("expected https: AWS is not spoken to without encryption")
    return text.rstrip("/")


def _matches(pattern: str, expected: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"expected {expected}")
        return text

    return AfterValidator(check)


class S3(Part):
    """How to reach the S3 server. Only with a store that is `s3://bucket/prefix`."""

    endpoint: Annotated[Text, AfterValidator(_endpoint)] | None = Field(
        default=None,
        description="The server's URL; default: AWS, or what boto3 is told by its environment.",
        examples=["https://storage.example:9000"],
    )
    region: (
        Annotated[str, _matches(r"[a-z0-9][a-z0-9-]{0,62}", "a region, such as eu-central-1")]
        | None
    ) = Field(
        default=None,
        description="The bucket's region; default: what boto3 finds.",
        examples=["eu-central-1"],
    )
    addressing: Literal["auto", "path", "virtual"] = Field(
        default="auto",
        description="Whether the bucket stands in the path or in the host's name.",
    )
    sse: Literal["AES256", "aws:kms"] | None = Field(
        default=None, description="Encryption by the server; default: the bucket's own."
    )
    kms_key: Text | None = Field(
        default=None, description="The key for sse aws:kms; default: the bucket's own."
    )
    storage_class: (
        Annotated[str, _matches(r"[A-Z][A-Z0-9_]{0,63}", "a storage class, such as STANDARD_IA")]
        | None
    ) = Field(default=None, description="The class of the checkpoints' files.")
    role: (
        Annotated[str, _matches(r"arn:[\w-]+:(iam|sts):[\w-]*:\d*:\S{1,1900}", "the ARN of a role")]
        | None
    ) = Field(
        default=None,
        description="The ARN of a role to assume.",
        examples=["arn:aws:iam::123456789012:role/training"],
    )
    ca_bundle: Text | None = Field(
        default=None,
        description="A file with the certificates to trust, relative to the workdir.",
    )
    conditional_writes: Switch = Field(
        default=True,
        description="`off` for a server that knows no If-None-Match; two supervisors of one run"
        " are then not kept apart for certain.",
    )

    @field_validator("kms_key")
    @classmethod
    def _belongs_to_sse(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("sse", "aws:kms") != "aws:kms":
            raise ValueError("expected only with sse: aws:kms")
        return value
