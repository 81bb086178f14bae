"""The bytes of a checkpoint: names, file images, and the digest of what they say.

A checkpoint is a few plain files. `*.safetensors` hold tensors, one file for each component that
has any; `state.json` holds everything else. The same bytes lie in a slot of the spool, one image
after another, so that persisting is hashing and copying ranges and never serializing.

The layout of a safetensors file is written here by hand, because the header must stand in the slot
before its tensors are copied in behind it: 8 bytes of little-endian length, JSON, the data.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from runner.errors import CheckpointInvalid

STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
VALIDATION_FILE = "validation.json"  # written later, see `validation`
TENSOR_SUFFIX = ".safetensors"
COMPRESSED_SUFFIX = ".safetensors.zst"

MEBIBYTE = 1 << 20
MAX_JSON_BYTES = 256 * MEBIBYTE
MAX_HEADER_BYTES = 100 * MEBIBYTE  # the limit of the safetensors library itself
MAX_FILES = 10_000
_HEADER_ALIGNMENT = 64
_IMAGE_ALIGNMENT = 4096
_MIN_PART_BYTES = 16 * MEBIBYTE
_MIN_COMPRESSED_PART_BYTES = 8 * MEBIBYTE
_MAX_PARTS = 10_000  # of one S3 multipart upload

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_CHECKPOINT_NAME = re.compile(r"step-([0-9]{9,18})-a([0-9]{4,9})-s([0-9]{3,9})")


def is_file_name(name: object) -> bool:
    """Whether a name from outside may become a file of a checkpoint: plain, and none of ours."""
    return (
        isinstance(name, str)
        and _FILE_NAME.fullmatch(name) is not None
        and ".." not in name
        and name not in (MANIFEST_FILE, VALIDATION_FILE)
    )


class CheckpointName(NamedTuple):
    """`step-000001200-a0012-s007`. Newest is highest by (attempt, save), never by step or clock."""

    attempt: int
    save: int
    step: int

    def __str__(self) -> str:
        return f"step-{self.step:09d}-a{self.attempt:04d}-s{self.save:03d}"

    @classmethod
    def parse(cls, text: str) -> CheckpointName | None:
        """The name that `text` spells, or None where it spells none."""
        match = _CHECKPOINT_NAME.fullmatch(text)
        if match is None:
            return None
        step, attempt, save = (int(digits) for digits in match.groups())
        name = cls(attempt, save, step)
        return name if str(name) == text else None


def part_bytes_for(size: int) -> int:
    """Bytes of a part, so that a file of `size` bytes has at most 10,000 parts."""
    needed = -(-size // _MAX_PARTS)
    return max(_MIN_PART_BYTES, -(-needed // MEBIBYTE) * MEBIBYTE)


def compressed_name(name: str) -> str:
    """Under which name a tensor file is stored when it is compressed."""
    return name.removesuffix(TENSOR_SUFFIX) + COMPRESSED_SUFFIX


def plain_name(name: str) -> str:
    """The name of the tensor file that a compressed one holds."""
    return name.removesuffix(COMPRESSED_SUFFIX) + TENSOR_SUFFIX


def compressed_part_bytes_for(size: int) -> int:
    """The same for a file of `size` bytes that is compressed on its way, which may gain nothing.

    These parts are no views of a slot but take memory, so they are shorter.
    """
    needed = -(-(size + size // 1000) // _MAX_PARTS)
    return max(_MIN_COMPRESSED_PART_BYTES, -(-needed // MEBIBYTE) * MEBIBYTE)


def file_digest(part_digests: Sequence[bytes]) -> str:
    """The digest of a file from the raw SHA-256 of its parts, as 64 hex digits.

    One part: the SHA-256 of the file, as `sha256sum` prints it. More: SHA-256 over the part
    digests, which is what S3 calls the composite checksum.
    """
    if len(part_digests) == 1:
        return part_digests[0].hex()
    return hashlib.sha256(b"".join(part_digests)).hexdigest()


# ---------------------------------------------------------------------------- safetensors


class TensorSpec(NamedTuple):
    """A tensor as a safetensors header names it: dtype like "F32", and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count * ITEM_BYTES[self.dtype]


class TensorRange(NamedTuple):
    """Where a tensor lies: begin and end in bytes from the start of its file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def safetensors_header(specs: Iterable[TensorSpec]) -> tuple[bytes, dict[str, TensorRange]]:
    """The first bytes of a safetensors file, and where each tensor goes behind them.

    Tensors with wide items come first, so that each is aligned to its own item size although the
    format allows no gaps.
    """
    ordered = sorted(specs, key=lambda spec: (-ITEM_BYTES[spec.dtype], spec.name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in ordered:
        begin, end = end, end + spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_ALIGNMENT)
    start = 8 + len(text)
    ranges = {
        spec.name: TensorRange(
            spec.dtype,
            spec.shape,
            start + entries[spec.name]["data_offsets"][0],
            start + entries[spec.name]["data_offsets"][1],
        )
        for spec in ordered
    }
    return len(text).to_bytes(8, "little") + text, ranges


def read_safetensors_header(image: memoryview, file: str) -> dict[str, TensorRange]:
    """The tensors of a safetensors image. CheckpointInvalid if it contradicts itself."""
    try:
        return _read_header(image)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointInvalid(file, f"its safetensors header is unreadable ({error})") from error


def _read_header(image: memoryview) -> dict[str, TensorRange]:
    if len(image) < 8:
        raise ValueError("the file is shorter than a header")
    length = int.from_bytes(image[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(image) - 8):
        raise ValueError(f"a header of {length} bytes in a file of {len(image)}")
    start = 8 + length
    ranges: dict[str, TensorRange] = {}
    for name, entry in json.loads(bytes(image[8:start])).items():
        if name == "__metadata__":
            continue
        begin, end = _whole_numbers(entry["data_offsets"])
        spec = TensorSpec(name, entry["dtype"], _whole_numbers(entry["shape"]))
        if end - begin != spec.nbytes:
            raise ValueError(f"tensor {name!r} has {end - begin} bytes instead of {spec.nbytes}")
        ranges[name] = TensorRange(spec.dtype, spec.shape, start + begin, start + end)
    place = start
    for name, where in sorted(ranges.items(), key=lambda item: (item[1].begin, item[1].end)):
        if where.begin != place:
            raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
        place = where.end
    if place != len(image):
        raise ValueError(f"its tensors end at {place} of {len(image)} bytes")
    return ranges


def _whole_numbers(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError("its offsets and extents are not all whole numbers")
    return tuple(values)


# ---------------------------------------------------------------------------- images in a slot


@dataclass(frozen=True)
class FileImage:
    """One file of a checkpoint as it lies in a slot: `size` bytes from `offset` on."""

    name: str
    offset: int
    size: int


def next_image_offset(end: int) -> int:
    """Where the image behind one that ends at `end` begins: on a page of its own."""
    return -(-end // _IMAGE_ALIGNMENT) * _IMAGE_ALIGNMENT


def check_images(images: Sequence[FileImage], slot_bytes: int, where: str) -> None:
    """Refuse images that lie about themselves: foreign names, overlaps, ranges past the end."""
    if len(images) > MAX_FILES:
        raise CheckpointInvalid(where, f"it names {len(images)} files")
    names = [image.name for image in images]
    foreign = [name for name in names if not is_file_name(name)]
    if foreign:
        raise CheckpointInvalid(where, f"{foreign[0]!r} is no plain file name")
    if len(set(names)) != len(names) or STATE_FILE not in names:
        raise CheckpointInvalid(where, f"its files are not {STATE_FILE} and others, once each")
    if not all(type(number) is int for i in images for number in (i.offset, i.size)):
        raise CheckpointInvalid(where, "its offsets and sizes are not all whole numbers")
    end = 0
    for image in sorted(images, key=lambda image: (image.offset, image.size)):
        if image.offset < end or image.size < 0 or image.offset + image.size > slot_bytes:
            raise CheckpointInvalid(
                where,
                f"{image.name} claims bytes {image.offset} to {image.offset + image.size} "
                f"of a slot of {slot_bytes}, where {end} are taken",
            )
        end = image.offset + image.size


# ---------------------------------------------------------------------------- what it says


def content_digest(files: Mapping[str, memoryview]) -> str:
    """One SHA-256 (64 hex digits) over the typed content of all components.

    Names, dtypes, shapes and bytes of every tensor, and the tree that holds them together. Not the
    bytes of the files: two checkpoints with the same content have the same digest, whatever run,
    attempt or time they come from. Values that are marked as idle (`{"$": "idle", …}`: random
    streams that the run has never used) are passed over.
    """
    total = hashlib.sha256(b"runner content 1\n")
    for file in sorted(name for name in files if name.endswith(TENSOR_SUFFIX)):
        image = files[file]
        for name, tensor in sorted(read_safetensors_header(image, file).items()):
            typed = json.dumps([file, name, tensor.dtype, list(tensor.shape)])
            total.update(len(typed).to_bytes(8, "little") + typed.encode())
            total.update(image[tensor.begin : tensor.end])
    tree = json.loads(bytes(files[STATE_FILE]), object_hook=_without_idle)
    total.update(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())
    return total.hexdigest()


def _without_idle(node: dict[str, Any]) -> dict[str, Any] | None:
    return None if node.get("$") == "idle" else node
