"""Where S3 is measured: a prefix of its own in a bucket of the server that `S3_ENDPOINT` names."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator

from runner.store import S3Options, Store, open_store


def options() -> S3Options:
    return S3Options(endpoint=os.environ["S3_ENDPOINT"], addressing="path")


class Bucket:
    """A fresh prefix, and boto3's own client for the same place."""

    def __init__(self) -> None:
        import boto3
        from botocore.config import Config

        self.name = os.environ.get("S3_BUCKET", "runner-bench")
        self.prefix = f"bench-{secrets.token_hex(4)}"
        # As it comes: what somebody who calls upload_file has.
        self.client = boto3.client(
            "s3",
            endpoint_url=os.environ["S3_ENDPOINT"],
            config=Config(s3={"addressing_style": "path"}, max_pool_connections=16),
        )
        with contextlib.suppress(self.client.exceptions.BucketAlreadyOwnedByYou):
            self.client.create_bucket(Bucket=self.name)

    @property
    def url(self) -> str:
        return f"s3://{self.name}/{self.prefix}"

    def store(self) -> Store:
        return open_store(self.url, options())

    @property
    def section(self) -> dict[str, str]:
        """The job file's."""
        return {"endpoint": os.environ["S3_ENDPOINT"], "addressing": "path"}

    def remove(self) -> None:
        pages = self.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.name, Prefix=self.prefix):
            keys = [{"Key": item["Key"]} for item in page.get("Contents", ())]
            if keys:
                self.client.delete_objects(Bucket=self.name, Delete={"Objects": keys})


@contextlib.contextmanager
def bucket() -> Iterator[Bucket]:
    made = Bucket()
    try:
        yield made
    finally:
        made.remove()
