"""The manifest: what a checkpoint is, and the proof that its files are the ones that were saved.

It is written last, so without it there is no checkpoint. It comes back from places where anybody
may have written, so every field is checked before it is used, and nothing in it becomes a path or
an allocation unchecked. Its own digest finds the flipped bit that every other check would let pass.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from runner.checkpoint import format as fmt
from runner.checkpoint.frames import Frames
from runner.errors import CheckpointInvalid

VERSION = 1
TRIGGERS = ("interval", "best", "preemption", "interrupt", "manual", "final")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file: size in bytes, bytes of a part, SHA-256 of each part, and the file's digest.

    All of the bytes as they are stored. `frames` says what they hold if the file is compressed.
    """

    name: str
    size: int
    part_bytes: int
    parts: tuple[str, ...]
    digest: str
    frames: Frames | None = None

    @property
    def content_name(self) -> str:
        """The name of the file that the trainer sees."""
        return self.name if self.frames is None else fmt.plain_name(self.name)

    @property
    def content_size(self) -> int:
        """Bytes of the file that the trainer sees."""
        return self.size if self.frames is None else self.frames.size

    @property
    def cut(self) -> tuple[int, tuple[str, ...]]:
        """Bytes of the stretches of its content that have a SHA-256 each, and those."""
        if self.frames is None:
            return self.part_bytes, self.parts
        return self.frames.chunk_bytes, self.frames.digests


def plain_entry(name: str, content: memoryview) -> FileEntry:
    """What a manifest says of a file with this content."""
    part_bytes = fmt.part_bytes_for(len(content))
    starts = range(0, max(1, len(content)), part_bytes)
    parts = [hashlib.sha256(content[at : at + part_bytes]).digest() for at in starts]
    hexed = tuple(part.hex() for part in parts)
    return FileEntry(name, len(content), part_bytes, hexed, fmt.file_digest(parts))


@dataclass(frozen=True)
class Moment:
    """What a snapshot is of: the place in the run, why it was made, and what was measured there.

    `metrics` are those logged for exactly this state. `productive_seconds` counts the steps that
    led here over all attempts, without those that were lost. It crosses from the trainer to the
    supervisor in a slot's marker and stands in the manifest as it is.
    """

    attempt: int
    save: int
    step: int
    epoch: int
    batch: int
    batch_size: int | None = None
    batches_per_epoch: int | None = None
    triggers: tuple[str, ...] = ()
    scope: str = "full"
    metrics: Mapping[str, float] = field(default_factory=dict)
    healthy: bool = True
    created_at: str = ""
    productive_seconds: float = 0.0
    snapshot_seconds: float = 0.0

    @property
    def name(self) -> fmt.CheckpointName:
        return fmt.CheckpointName(self.attempt, self.save, self.step)


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint, as `manifest.json` describes it."""

    run_id: str
    moment: Moment
    files: tuple[FileEntry, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.moment.name)

    @property
    def nbytes(self) -> int:
        """Bytes in the store."""
        return sum(file.size for file in self.files)

    @property
    def content_nbytes(self) -> int:
        """Bytes of the state that it holds."""
        return sum(file.content_size for file in self.files)

    def to_json(self) -> bytes:
        document = {
            "format": VERSION,
            "run_id": self.run_id,
            **moment_to_json(self.moment),
            "files": [_file_to_json(file) for file in self.files],
            "provenance": self.provenance,
        }
        document["digest"] = _digest(document)
        return json.dumps(document, indent=1, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, name: str) -> Manifest:
        """Read and check. CheckpointInvalid names the first thing that is wrong."""
        try:
            document = json.loads(data)
            if not isinstance(document, dict):
                raise ValueError("it is no JSON object")
            version = document.get("format")
            if type(version) is not int or version != VERSION:
                raise ValueError(f"it has format {version!r}, this version reads {VERSION}")
            if document.pop("digest", None) != _digest(document):
                raise ValueError("it is not what was written")
            manifest = cls(
                run_id=_text(document, "run_id"),
                moment=moment_from_json(document),
                files=tuple(_file_from_json(entry) for entry in document["files"]),
                provenance=_object(document, "provenance"),
            )
            names = [file.content_name for file in manifest.files]
            if len(set(names)) != len(names) or fmt.STATE_FILE not in names:
                raise ValueError(f"its files are not {fmt.STATE_FILE} and others, once each")
            if manifest.name != name:
                raise ValueError(f"it describes {manifest.name}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointInvalid(name, f"its manifest is unusable: {error!s}") from error
        return manifest


def _digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its digest, as JSON with sorted keys and no spaces."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def moment_to_json(moment: Moment) -> dict[str, Any]:
    """Plain JSON; metrics that are not finite become strings, which JSON can carry."""
    return asdict(moment) | {
        "triggers": list(moment.triggers),
        "metrics": {
            name: value if math.isfinite(value) else str(value)
            for name, value in moment.metrics.items()
        },
    }


def moment_from_json(document: Mapping[str, Any]) -> Moment:
    """The inverse. ValueError, KeyError or TypeError where a field is missing or wrong."""
    triggers = document["triggers"]
    if not isinstance(triggers, list | tuple) or not set(triggers) <= set(TRIGGERS):
        raise ValueError(f"triggers is {triggers!r}")
    if document["scope"] not in ("full", "weights"):
        raise ValueError(f"scope is {document['scope']!r}")
    if type(document["healthy"]) is not bool:
        raise ValueError(f"healthy is {document['healthy']!r}")
    return Moment(
        attempt=_count(document, "attempt"),
        save=_count(document, "save"),
        step=_count(document, "step"),
        epoch=_count(document, "epoch"),
        batch=_count(document, "batch"),
        batch_size=_optional_count(document, "batch_size"),
        batches_per_epoch=_optional_count(document, "batches_per_epoch"),
        triggers=tuple(triggers),
        scope=document["scope"],
        metrics={name: _metric(value) for name, value in _object(document, "metrics").items()},
        healthy=document["healthy"],
        created_at=_text(document, "created_at"),
        productive_seconds=_seconds(document, "productive_seconds"),
        snapshot_seconds=_seconds(document, "snapshot_seconds"),
    )


def _file_to_json(file: FileEntry) -> dict[str, Any]:
    """A file that is not compressed has no word of frames."""
    entry = asdict(file)
    if file.frames is None:
        del entry["frames"]
    return entry


def _file_from_json(entry: Mapping[str, Any]) -> FileEntry:
    name, size, part_bytes = entry["name"], _count(entry, "size"), _count(entry, "part_bytes")
    if not fmt.is_file_name(name):
        raise ValueError(f"{name!r} is no plain file name")
    parts = tuple(entry["parts"])
    if part_bytes < 1 or len(parts) != max(1, -(-size // part_bytes)):
        raise ValueError(f"{name} has {len(parts)} parts of {part_bytes} bytes for {size} bytes")
    if not all(isinstance(part, str) and _SHA256.fullmatch(part) for part in parts):
        raise ValueError(f"{name} has a part without a SHA-256")
    digest = fmt.file_digest([bytes.fromhex(part) for part in parts])
    if entry["digest"] != digest:
        raise ValueError(f"the digest of {name} is not that of its parts")
    frames = _frames_from_json(entry["frames"]) if "frames" in entry else None
    if (frames is not None) != name.endswith(fmt.COMPRESSED_SUFFIX):
        raise ValueError(f"{name} is compressed by its name or by its frames, but not by both")
    if frames is not None and (problem := frames.problem(size, part_bytes)):
        raise ValueError(f"{name} has {problem}")
    return FileEntry(name, size, part_bytes, parts, digest, frames)


def _frames_from_json(entry: Mapping[str, Any]) -> Frames:
    lengths, digests = entry["lengths"], entry["digests"]
    if not isinstance(lengths, list) or not all(type(n) is int and n > 0 for n in lengths):
        raise ValueError("the lengths of frames are not all whole numbers")
    if not isinstance(digests, list) or not all(
        isinstance(digest, str) and _SHA256.fullmatch(digest) for digest in digests
    ):
        raise ValueError("the digests of chunks are not all SHA-256")
    return Frames(
        _count(entry, "size"), _count(entry, "chunk_bytes"), tuple(lengths), tuple(digests)
    )


def _count(document: Mapping[str, Any], key: str) -> int:
    value = document[key]
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{key} is {value!r}")
    return value


def _optional_count(document: Mapping[str, Any], key: str) -> int | None:
    return None if document.get(key) is None else _count(document, key)


def _seconds(document: Mapping[str, Any], key: str) -> float:
    value = _metric(document[key])
    if not math.isfinite(value):
        raise ValueError(f"{key} is {value!r}")
    return value


def _metric(value: object) -> float:
    """A number of JSON, or the name of one that JSON lacks (see `moment_to_json`)."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if type(value) is float or (type(value) is int and abs(value) < 1 << 1023):
        return float(value)
    raise ValueError(f"{value!r} is no number")


def _object(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document[key]
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}")
    return value


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}")
    return value
