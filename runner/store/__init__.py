"""Where checkpoints live."""

from runner.store.base import Content, Part, Staging, Store, Stored
from runner.store.local import DirectoryStore
from runner.store.s3_options import S3Options

__all__ = [
    "Content",
    "DirectoryStore",
    "Part",
    "S3Options",
    "Staging",
    "Store",
    "Stored",
    "open_store",
]


def open_store(location: str, options: S3Options | None = None) -> Store:
    """The store at a location: a directory, absolute by now, or `s3://bucket/prefix`.

    No request is made. `options` say how to reach an S3 server.
    """
    from pathlib import Path

    if location.startswith("s3://"):
        # boto3 takes half a second to import, and a trainer must never have it.
        from runner.store.s3 import S3Store

        return S3Store(location, options or S3Options())
    return DirectoryStore(Path(location))
