"""Fixtures for tests against real servers.

S3: a bucket for the session, a prefix for each test. Docker: an engine that has the base image.
"""

from __future__ import annotations

import os
import secrets
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest

from runner.store import S3Options
from runner.store.s3 import S3Store
from servers.ceph import Ceph, Gateway, cache_folder, given
from servers.engine import Docker, LocalEngine
from servers.engine import given as given_engine
from servers.faultproxy import FaultProxy
from servers.podman import missing as missing_podman
from servers.podman import serving as podman_serving
from servers.rootless import Rootless
from servers.rootless import missing as missing_rootless
from servers.rootless import serving as rootless_serving


@dataclass(frozen=True)
class S3Server:
    """A gateway, a bucket in it, and a client of the tests' own to look behind the store's back."""

    gateway: Gateway
    bucket: str
    client: Any

    def options(self, **changes: Any) -> S3Options:
        given = {"endpoint": self.gateway.endpoint, "ca_bundle": self.gateway.ca_bundle}
        return S3Options(**{**given, **changes})

    def port(self, endpoint: str) -> int:
        port = urlsplit(endpoint).port
        assert port is not None
        return port

    def keys(self, prefix: str = "") -> list[str]:
        answer = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"].removeprefix(prefix) for item in answer.get("Contents", ())]

    def uploads(self, prefix: str) -> list[str]:
        """Keys of the multipart uploads that were begun and not ended."""
        answer = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=prefix)
        return [upload["Key"] for upload in answer.get("Uploads", ())]


@pytest.fixture(scope="session")
def gateway() -> Gateway:
    """A Ceph RADOS gateway: the one that is named, or one of our own."""
    found = given()
    if found is not None:
        return found
    if os.environ.get("RUNNER_TEST_SERVERS") != "1":
        pytest.skip("no S3 server: set S3_ENDPOINT, or RUNNER_TEST_SERVERS=1 to bring one up")
    if os.geteuid() != 0:
        pytest.skip("bringing up a Ceph gateway needs root; or set S3_ENDPOINT")
    return Ceph(cache_folder()).up()


@pytest.fixture(scope="session")
def s3_bucket(gateway: Gateway) -> Iterator[S3Server]:
    client = boto3.client(
        "s3",
        endpoint_url=gateway.endpoint,
        aws_access_key_id=gateway.access_key,
        aws_secret_access_key=gateway.secret_key,
        region_name="us-east-1",
    )
    bucket = f"runner-{secrets.token_hex(6)}"
    client.create_bucket(Bucket=bucket)
    yield S3Server(gateway, bucket, client)
    for upload in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
        client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        keys = [{"Key": item["Key"]} for item in page.get("Contents", ())]
        if keys:
            client.delete_objects(Bucket=bucket, Delete={"Objects": keys})
    client.delete_bucket(Bucket=bucket)


@pytest.fixture
def s3(s3_bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with its user's credentials where boto3 looks for them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_bucket.gateway.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_bucket.gateway.secret_key)
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    return s3_bucket


@pytest.fixture(scope="session")
def engine() -> Docker:
    """A Docker engine with the base image: the one that `DOCKER_HOST` names, or one of our own."""
    found = given_engine()
    if found is not None:
        return found
    if os.environ.get("RUNNER_TEST_SERVERS") != "1":
        pytest.skip("no Docker engine: set RUNNER_TEST_SERVERS=1 to bring one up")
    if os.geteuid() != 0:
        pytest.skip("bringing up a Docker engine needs root; or set DOCKER_HOST")
    return LocalEngine(cache_folder()).up()


@pytest.fixture(scope="session")
def podman(engine: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    """Podman's service with the base image, spoken to as if it were Docker's."""
    base = LocalEngine(cache_folder()).base
    if not base.exists():
        pytest.skip("the base image is that of an engine that was brought up by somebody else")
    if (problem := missing_podman()) is not None:
        pytest.skip(problem)
    with podman_serving(tmp_path_factory.mktemp("podman"), base) as docker:
        yield docker


@pytest.fixture(scope="module", params=["docker", "podman"])
def rootless(engine: Docker, request: pytest.FixtureRequest) -> Iterator[Rootless]:
    """The engine of an ordinary user, and what it takes to be that user."""
    base = LocalEngine(cache_folder()).base
    if not base.exists():
        pytest.skip("the base image is that of an engine that was brought up by somebody else")
    libraries = Path(sysconfig.get_path("purelib"))
    if (problem := missing_rootless(request.param, libraries)) is not None:
        pytest.skip(problem)
    with rootless_serving(request.param, base) as found:
        yield found


@pytest.fixture
def prefix() -> str:
    """A place of the test's own in the bucket."""
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.port(s3.gateway.endpoint)) as running:
        yield running


@pytest.fixture
def open_s3(s3: S3Server, prefix: str) -> Callable[..., S3Store]:
    """Opens the test's own store, with options changed."""
    return lambda **changes: S3Store(f"s3://{s3.bucket}/{prefix}", s3.options(**changes))
