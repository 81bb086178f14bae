"""How an S3 server is reached: whether somebody is there, who asks, whether the clocks agree."""

from __future__ import annotations

import contextlib
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from runner.doctor.finding import Finding, fail, ok, warn
from runner.errors import StoreError, UsageError
from runner.store import S3Options, Store
from runner.store.credentials import credential_source
from runner.supervisor.preflight import check_endpoint, endpoint_of

_LARGEST_SKEW_SECONDS = 15 * 60  # "RequestTimeTooSkewed", S3 API reference, error responses
_NOTICEABLE_SKEW_SECONDS = 60
_SOON_SECONDS = 15 * 60
_SECONDS = 10.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def server(store: Store, options: S3Options) -> Iterator[Finding]:
    """Somebody listens at the endpoint, and nobody can listen in on the way."""
    try:
        check_endpoint(store, options)
    except UsageError as error:
        yield fail("server", str(error))
        return
    _, endpoint = endpoint_of(options)
    if endpoint is None:
        yield ok("server", f"AWS, region {options.region or 'as boto3 finds it'}")
        return
    url = urlsplit(endpoint)
    if url.scheme == "http" and url.hostname not in _LOOPBACK:
        yield warn("server", f"{endpoint} is not encrypted", "use https outside a private network")
    else:
        yield ok("server", endpoint)


def credentials(options: S3Options) -> Iterator[Finding]:
    """Which of boto3's providers has some; nothing of what they are."""
    remedy = (
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give the machine a role"
    )
    try:
        source = credential_source()
    except StoreError as error:
        yield fail("credentials", str(error), remedy)
        return
    if source is None:
        yield fail("credentials", "boto3 finds none", remedy)
        return
    facts = f"from {source.provider}"
    if options.role is not None:
        facts += f", to assume {options.role}"
    if source.expires_at is None:
        yield ok("credentials", facts)
        return
    left = (source.expires_at - datetime.now(UTC)).total_seconds()
    facts += f", valid until {source.expires_at:%Y-%m-%d %H:%M} UTC"
    if left < _SOON_SECONDS:
        yield warn("credentials", facts, "see that they are renewed while the run goes on")
    else:
        yield ok("credentials", f"{facts}; boto3 renews them")


def clock(options: S3Options) -> Iterator[Finding]:
    """S3 refuses what is signed a quarter of an hour early or late. Nothing where nobody tells."""
    skew = _skew_seconds(options)
    if skew is None:
        return
    facts = f"this machine is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the server"
    if abs(skew) >= _LARGEST_SKEW_SECONDS:
        yield fail("clock", facts, "set the clock: the server refuses such requests")
    elif abs(skew) >= _NOTICEABLE_SKEW_SECONDS:
        yield warn("clock", facts, "set the clock before it drifts to a quarter of an hour")
    else:
        yield ok("clock", "agrees with the server's within a minute")


def _skew_seconds(options: S3Options) -> float | None:
    """From the Date of any answer, also of a refusal: the request is not signed."""
    _, endpoint = endpoint_of(options)
    region = options.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    url = endpoint or (
        f"https://s3.{region}.amazonaws.com" if region else "https://s3.amazonaws.com"
    )
    bundle = options.ca_bundle or os.environ.get("AWS_CA_BUNDLE")
    with contextlib.suppress(OSError, ValueError):
        context = ssl.create_default_context(cafile=bundle)
        date: str | None = None
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS, context=context) as answer:
                date = answer.headers.get("Date")
        except urllib.error.HTTPError as refusal:
            date = refusal.headers.get("Date")
        now = datetime.now(UTC)
        if date is not None:
            return (now - parsedate_to_datetime(date)).total_seconds()
    return None
