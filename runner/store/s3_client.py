"""The boto3 client of a store: configured for large parts, without retries of its own.

boto3 finds the credentials in its own chain; nothing here reads, keeps or prints one. botocore's
retries are off because `s3_calls` asks again by itself, and knows deadlines, which botocore does
not. Checksums are ours, sent as headers: botocore's default ones would hash everything once more.
"""

from __future__ import annotations

import logging
import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore.config import Config
from botocore.credentials import (
    AssumeRoleCredentialFetcher,
    CredentialProvider,
    DeferredRefreshableCredentials,
)

from runner.errors import StoreUnfit
from runner.store.s3_options import S3Options

_CONNECT_SECONDS = 10.0
_READ_SECONDS = 20.0
# More than the lanes of an upload and the threads of a download together, tries in haste included.
_CONNECTIONS = 64
_ROLE_SESSION_NAME = "runner"
_AWS_KEY = re.compile(r"A(KI|SI)A[A-Z0-9]{16}")
# Servers outside AWS have no regions, but a signature names one.
_NO_REGION = "us-east-1"


def open_client(url: str, options: S3Options) -> Any:
    """A client for S3. No request to S3 is made; finding credentials may ask a machine's metadata.

    Raises StoreUnfit if the options cannot work, and botocore's errors where its chain fails.
    """
    # At DEBUG, botocore logs whole requests, session tokens included.
    for name in ("boto3", "botocore", "urllib3"):
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.INFO)
    if options.ca_bundle is not None and not Path(options.ca_bundle).is_file():
        raise StoreUnfit(url, f"there is no file {options.ca_bundle}", "correct ca_bundle")
    session = _session(url, options)
    if options.endpoint is not None:
        _refuse_plain_http(url, options.endpoint, session)
    return session.client(
        "s3",
        endpoint_url=options.endpoint,
        verify=options.ca_bundle,
        config=Config(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            max_pool_connections=_CONNECTIONS,
            retries={"total_max_attempts": 1, "mode": "standard"},
            tcp_keepalive=True,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # The SHA-256 of the content is a signed header. Without this, a body that goes over
            # plain http is hashed a second time, for the signature.
            s3={"addressing_style": options.addressing, "payload_signing_enabled": False},
        ),
    )


def endpoint_of(client: Any) -> str:
    """Where a client sends its requests, without anything that is secret."""
    parts = urlsplit(str(client.meta.endpoint_url))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def is_aws(endpoint: str | None) -> bool:
    """Whether requests go to Amazon rather than to another server."""
    if endpoint is None:
        return not any(os.environ.get(f"AWS_ENDPOINT_URL{s}") for s in ("", "_S3"))
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _session(url: str, options: S3Options) -> boto3.Session:
    inner = botocore.session.get_session()
    region = options.region or inner.get_config_variable("region")
    if region is None and not is_aws(options.endpoint):
        region = _NO_REGION
    if region is not None:
        inner.set_config_variable("region", region)
    if options.role is not None:
        source = inner.get_credentials()
        if source is None:
            raise StoreUnfit(url, f"there are no credentials to assume {options.role} with", (
                "give them in one of boto3's own ways: environment variables, a profile, or a "
                "role of the machine"
            ))  # fmt: skip
        asking = botocore.session.get_session()
        inner = botocore.session.get_session()
        if region is not None:
            asking.set_config_variable("region", region)
            inner.set_config_variable("region", region)
        inner.get_component("credential_provider").insert_before(
            "env", _RoleProvider(asking, source, options, url)
        )
    return boto3.Session(botocore_session=inner)


class _RoleProvider(CredentialProvider):  # type: ignore[misc] # botocore is not typed
    """Credentials of an assumed role, which botocore renews before they expire."""

    METHOD = "runner-role"
    CANONICAL_NAME = None

    def __init__(self, asking: Any, source: Any, options: S3Options, url: str) -> None:
        super().__init__()
        self._asking, self._source, self._options, self._url = asking, source, options, url

    def load(self) -> DeferredRefreshableCredentials:
        role = self._options.role
        fetcher = AssumeRoleCredentialFetcher(
            self._sts_client, self._source, role, {"RoleSessionName": _ROLE_SESSION_NAME}
        )

        def assume() -> dict[str, Any]:
            try:
                answer: dict[str, Any] = fetcher.fetch_credentials()
            except Exception as error:
                code = getattr(error, "response", {}).get("Error", {}).get("Code")
                # What STS says of it names the caller, and a caller's keys may be in it.
                if code is None:
                    raise
                raise StoreUnfit(self._url, f"the role {role} cannot be assumed ({code})", (
                    "let the role's trust policy name this user, and this user's policy allow "
                    "sts:AssumeRole"
                )) from None  # fmt: skip
            return answer

        return DeferredRefreshableCredentials(assume, self.METHOD)

    def _sts_client(self, name: str, **arguments: Any) -> Any:
        """STS of AWS, or of the server itself: Ceph and MinIO answer both at one address."""
        endpoint = self._options.endpoint
        named = any(os.environ.get(f"AWS_ENDPOINT_URL{s}") for s in ("", "_STS"))
        if endpoint is not None and not is_aws(endpoint) and not named:
            arguments["endpoint_url"] = endpoint
        if self._options.ca_bundle is not None:
            arguments["verify"] = self._options.ca_bundle
        config = Config(connect_timeout=_CONNECT_SECONDS, read_timeout=_READ_SECONDS)
        return self._asking.create_client(name, config=config, **arguments)


def _refuse_plain_http(url: str, endpoint: str, session: boto3.Session) -> None:
    """Keys of AWS do not travel unencrypted, not even as a signature."""
    parts = urlsplit(endpoint)
    if parts.scheme != "http" or _is_this_machine(parts.hostname or ""):
        return
    credentials = None if is_aws(endpoint) else session.get_credentials()
    key = getattr(credentials, "access_key", None) or ""
    if is_aws(endpoint) or _AWS_KEY.fullmatch(key):
        raise StoreUnfit(
            url,
            f"the endpoint {parts.scheme}://{parts.hostname} is not encrypted, and the credentials "
            "are those of AWS",
            "use its https address",
        )


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
