"""Slots, as files that are mapped, and the markers that say what is in them."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import SpoolError, SpoolFull
from runner.regular import open_regular
from runner.spool.files import Owner, read_json


@dataclass(frozen=True)
class Weights:
    """That of a slot only these components are to be stored, and under which number of a save."""

    save: int
    components: Sequence[str]


@dataclass(frozen=True)
class Marker:
    """A complete slot: a moment of the run (plain JSON, see `manifest.Moment`) and its images.

    `must` says that it is to be persisted whatever comes after it; with `weights`, not all of it.
    """

    slot: int
    must: bool
    moment: Mapping[str, Any]
    images: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any]
    weights: Weights | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Newest is highest."""
        return int(self.moment["attempt"]), int(self.moment["save"])


def read_marker(path: Path) -> Marker | None:
    """A marker, or None if it is gone or is not one."""
    content = read_json(path)
    if content is None:
        return None
    try:
        marker = Marker(
            slot=int(content["slot"]),
            must=bool(content["must"]),
            moment=dict(content["moment"]),
            images=list(content["images"]),
            facts=dict(content["facts"]),
            weights=_weights(content.get("weights")),
        )
        _ = marker.order
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return marker


def _weights(content: Mapping[str, Any] | None) -> Weights | None:
    if content is None:
        return None
    return Weights(int(content["save"]), [str(name) for name in content["components"]])


def open_slot(path: Path, nbytes: int, owner: Owner | None = None) -> mmap.mmap:
    """Map a slot of at least `nbytes`, its memory reserved before it is used; it is `owner`'s then.

    Without the reservation a tmpfs that is full answers a store into the mapping with SIGBUS.
    Raises SpoolFull if there is no room; a slot that was there keeps its content then.
    """
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        size = max(os.fstat(descriptor).st_size, nbytes, 1)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
                raise
            raise SpoolFull(
                f"{path.parent} has no room for a slot of {nbytes / 1e6:.1f} MB"
            ) from error
        if owner is not None:
            os.fchown(descriptor, *owner)
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def view_slot(path: Path) -> memoryview:
    """Map a slot for reading. SpoolError if it is not there or is empty."""
    try:
        descriptor = open_regular(path)
        try:
            return memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise SpoolError(f"{path} cannot be read: {error}") from error


def is_cut_short(content: memoryview) -> bool:
    """Whether somebody has cut the file of a mapped slot since: reading what it lost is a SIGBUS.

    False for what lies in no file.
    """
    mapped = content.obj
    return isinstance(mapped, mmap.mmap) and mapped.size() < len(mapped)
