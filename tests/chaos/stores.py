"""Where the run of a history keeps its checkpoints, and how that fails: a folder, or a bucket."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from buckets import Bucket, new_bucket
from servers.ceph import Ceph, Gateway, cache_folder, given
from servers.faultproxy import Fault, FaultProxy

from runner.checkpoint.manifest import Manifest

ALWAYS = 10**9
BALLAST_MB = 18  # more than one part, so that there are multipart uploads


class ChaosStore(Protocol):
    keys: dict[str, Any]
    """What a job file says to have its store there."""
    params: dict[str, Any]
    more_outages: int
    """How much likelier than other events they are, and kills that leave uploads behind."""
    bucket: Bucket | None

    def exists(self) -> bool:
        """Whether anything was ever written there."""

    def away(self, chance: random.Random) -> contextlib.AbstractContextManager[None]:
        """Out of reach, for those who run."""

    def damage(self, manifest: Manifest, name: str, at: int, bit: int) -> None:
        """Flip a bit of a file."""

    def remains(self) -> list[str]:
        """Of saves that did not come to an end."""


@dataclass
class FolderStore:
    folder: Path
    keys: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    more_outages: int = 0
    bucket: None = None

    def exists(self) -> bool:
        return self.folder.exists()

    @contextlib.contextmanager
    def away(self, chance: random.Random) -> Iterator[None]:
        """Its file system is unmounted; nothing may be written where it was."""
        unmounted = self.folder.rename(self.folder.with_name("unmounted"))
        self.folder.mkdir()
        yield
        strays = list(self.folder.rglob("*"))
        assert not strays, f"written into a mount point with nothing mounted on it: {strays}"
        shutil.rmtree(self.folder)
        unmounted.rename(self.folder)

    def damage(self, manifest: Manifest, name: str, at: int, bit: int) -> None:
        path = self.folder / manifest.run_id / "checkpoints" / manifest.name / name
        content = bytearray(path.read_bytes())
        content[at] ^= bit
        path.write_bytes(content)

    def remains(self) -> list[str]:
        return [str(path) for path in self.folder.rglob(".tmp-*")]


@dataclass
class BucketStore:
    """Runs reach it through the proxy, whoever looks afterwards does not."""

    bucket: Bucket
    proxy: FaultProxy
    more_outages: int = 4

    def __post_init__(self) -> None:
        s3 = {"endpoint": self.proxy.url, "region": "us-east-1"}
        self.keys: dict[str, Any] = {"store": self.bucket.url, "s3": s3}
        self.params: dict[str, Any] = {"ballast": BALLAST_MB}

    def exists(self) -> bool:
        return True

    @contextlib.contextmanager
    def away(self, chance: random.Random) -> Iterator[None]:
        """Nobody listens, or every request is reset, answered 503, or done and never answered."""
        kind = chance.choice(["refuse", "reset", "status", "drop_response"])
        if kind == "refuse":
            with self.proxy.away():
                yield
            return
        self.proxy.add("", Fault(kind, 503), times=ALWAYS)
        yield
        self.proxy.clear()

    def damage(self, manifest: Manifest, name: str, at: int, bit: int) -> None:
        key = f"{self.bucket.prefix}/{manifest.run_id}/checkpoints/{manifest.name}/{name}"
        client, place = self.bucket.client, {"Bucket": self.bucket.name, "Key": key}
        content = bytearray(client.get_object(**place)["Body"].read())
        content[at] ^= bit
        client.put_object(**place, Body=bytes(content), ChecksumAlgorithm="SHA256")

    def remains(self) -> list[str]:
        listed = self.bucket.client.list_multipart_uploads(Bucket=self.bucket.name)
        return [upload["Key"] for upload in listed.get("Uploads", ())]


def gateway() -> Gateway:
    """The S3 server that the environment names, or one of our own."""
    return given() or Ceph(cache_folder()).up()


@contextlib.contextmanager
def store_in(folder: Path, server: Gateway | None) -> Iterator[ChaosStore]:
    """A store for one history, gone afterwards: on a server, or else in the folder of its nodes."""
    if server is None:
        yield FolderStore(folder / "store")
        return
    port = urlsplit(server.endpoint).port
    assert port is not None
    with new_bucket(server) as bucket, FaultProxy(port) as proxy:
        yield BucketStore(bucket, proxy)
