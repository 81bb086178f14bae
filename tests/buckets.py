"""A bucket of its own for a test, on a real S3 server, whose credentials are in the environment.

with new_bucket(gateway) as bucket:
    job = node.job("true", **bucket.keys)    # the keys `store` and `s3` of a job file
    bucket.deny("s3:PutObject")              # from now on, for everybody
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from servers.ceph import Gateway

from runner.checkpoint.archive import Archive
from runner.store import S3Options, Store, open_store


@dataclass(frozen=True)
class Bucket:
    """A bucket and the server that it is on."""

    name: str
    endpoint: str
    client: Any
    prefix = "some/prefix"

    @property
    def url(self) -> str:
        """A prefix in it."""
        return f"s3://{self.name}/{self.prefix}"

    @property
    def keys(self) -> dict[str, Any]:
        """What a job file says to have its store there."""
        return {"store": self.url, "s3": {"endpoint": self.endpoint, "region": "us-east-1"}}

    @property
    def opened(self) -> Store:
        return open_store(self.url, S3Options(endpoint=self.endpoint))

    def archive(self, run_id: str = "job") -> Archive:
        return Archive(self.opened, run_id)

    def objects(self) -> dict[str, bytes]:
        """Everything in the bucket."""
        listed = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        keys = [entry["Key"] for entry in listed]
        return {
            key: self.client.get_object(Bucket=self.name, Key=key)["Body"].read() for key in keys
        }

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=body)

    def deny(self, action: str) -> None:
        """Refuse this to everybody, the owner included."""
        arn = f"arn:aws:s3:::{self.name}"
        statement = {
            "Effect": "Deny",
            "Principal": "*",
            "Action": action,
            "Resource": arn if "Bucket" in action else f"{arn}/*",
        }
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        self.client.put_bucket_policy(Bucket=self.name, Policy=json.dumps(policy))


@contextlib.contextmanager
def new_bucket(gateway: Gateway) -> Iterator[Bucket]:
    """A bucket that is removed again, with all that is in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", gateway.access_key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", gateway.secret_key)
        for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        client = boto3.client("s3", endpoint_url=gateway.endpoint, region_name="us-east-1")
        bucket = Bucket(f"runner-test-{secrets.token_hex(6)}", gateway.endpoint, client)
        client.create_bucket(Bucket=bucket.name)
        try:
            yield bucket
        finally:
            _remove(bucket)


def _remove(bucket: Bucket) -> None:
    client, name = bucket.client, bucket.name
    client.delete_bucket_policy(Bucket=name)
    for upload in client.list_multipart_uploads(Bucket=name).get("Uploads", ()):
        client.abort_multipart_upload(Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"])
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        for entry in page.get("Contents", ()):
            client.delete_object(Bucket=name, Key=entry["Key"])
    client.delete_bucket(Bucket=name)
