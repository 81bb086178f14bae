"""What differs between the tensors of two checkpoints: names, shapes, and by how much.

Files whose digests are equal are not read. Of the others, one component of each checkpoint at a
time is brought, verified, into a file that is mapped, and compared piece by piece: the memory that
is needed does not depend on the size of the state. numpy is enough; dtypes that it lacks (bfloat16,
the 8-bit floats) are widened by their bits.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from runner.checkpoint import format as fmt
from runner.checkpoint.archive import Archive
from runner.checkpoint.format import TensorRange
from runner.checkpoint.manifest import FileEntry, Manifest

_PIECE_ITEMS = 1 << 20
_PLAIN = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4",
    "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip


@dataclass(frozen=True)
class TensorChange:
    """How a tensor of one checkpoint relates to that of the same name in another.

    `before` and `after` are dtype and shape, None where there is none. `norm` is the Euclidean
    norm of the difference, `relative` that over the norm before; None where the shapes differ.
    """

    file: str
    name: str
    before: tuple[str, tuple[int, ...]] | None
    after: tuple[str, tuple[int, ...]] | None
    norm: float | None = None
    relative: float | None = None
    largest: float | None = None


@dataclass(frozen=True)
class Side:
    """A checkpoint that is compared."""

    archive: Archive
    manifest: Manifest

    def files(self) -> dict[str, FileEntry]:
        """The files with tensors, by the name that the trainer sees."""
        return {
            file.content_name: file
            for file in self.manifest.files
            if file.content_name.endswith(fmt.TENSOR_SUFFIX)
        }


def changed_tensors(one: Side, other: Side) -> Iterator[TensorChange]:
    """Every tensor that is not the same in both, file by file. CheckpointCorrupt, StoreError.

    OSError if there is no room for the files in the temporary folder.
    """
    before, after = one.files(), other.files()
    for name in sorted(before.keys() | after.keys()):
        first, second = before.get(name), after.get(name)
        if first is not None and second is not None and _same(first, second):
            continue
        yield from _changes(name, _opened(one, first), _opened(other, second))


def _same(one: FileEntry, other: FileEntry) -> bool:
    return one.content_size == other.content_size and one.cut == other.cut


_Opened = tuple[memoryview, dict[str, TensorRange]]


def _opened(side: Side, file: FileEntry | None) -> _Opened:
    """The verified content of a file, mapped from one that has no name any more."""
    if file is None or file.content_size == 0:
        return memoryview(b""), {}
    with tempfile.TemporaryFile() as copy:
        os.posix_fallocate(copy.fileno(), 0, file.content_size)
        memory = memoryview(mmap.mmap(copy.fileno(), file.content_size))
    side.archive.load_file(side.manifest, file, memory)
    return memory, fmt.read_safetensors_header(memory, file.content_name)


def _changes(file: str, one: _Opened, other: _Opened) -> Iterator[TensorChange]:
    (memory, before), (later, after) = one, other
    for name in sorted(before.keys() | after.keys()):
        first, second = before.get(name), after.get(name)
        kinds = [None if t is None else (t.dtype, t.shape) for t in (first, second)]
        if first is None or second is None or first.shape != second.shape:
            yield TensorChange(file, name, kinds[0], kinds[1])
            continue
        if first.dtype == second.dtype and _bytes(memory, first) == _bytes(later, second):
            continue
        distance = _distance(memory, first, later, second)
        yield TensorChange(file, name, kinds[0], kinds[1], *distance)


def _bytes(memory: memoryview, where: TensorRange) -> memoryview:
    return memory[where.begin : where.end]


def _distance(
    memory: memoryview, first: TensorRange, later: memoryview, second: TensorRange
) -> tuple[float, float, float]:
    """Norm of the difference, that over the norm of the first, and the largest difference."""
    squares = before = largest = 0.0
    count = math.prod(first.shape)
    for at in range(0, count, _PIECE_ITEMS):
        items = min(_PIECE_ITEMS, count - at)
        a = widened(memory, first, at, items)
        b = widened(later, second, at, items)
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(b - a)
            squares += float(np.sum(apart**2))
            before += float(np.sum(np.abs(a) ** 2))
            largest = max(largest, float(apart.max()))
            if np.isnan(apart).any():
                largest = math.nan
    norm = math.sqrt(squares) if math.isfinite(squares) else squares
    base = math.sqrt(before) if math.isfinite(before) else before
    return norm, norm / base if base else math.inf, largest


def widened(memory: memoryview, where: TensorRange, at: int, items: int) -> Any:
    """`items` elements of a tensor, from `at` on, as float64 or complex128."""
    size = fmt.ITEM_BYTES[where.dtype]
    raw = memory[where.begin + at * size : where.begin + (at + items) * size]
    if where.dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    if where.dtype in _EIGHT_BITS:
        return _EIGHT_BITS[where.dtype][np.frombuffer(raw, "u1")]
    kind = np.complex128 if where.dtype == "C64" else np.float64
    return np.frombuffer(raw, _PLAIN[where.dtype]).astype(kind)


def _eight_bits(exponent_bits: int, bias: int, *, finite: bool) -> Any:
    """The values of all 256 patterns of an 8-bit float.

    `finite`: there are no infinities, and only all ones is NaN (E4M3FN); else as IEEE 754 has it.
    Source: https://arxiv.org/abs/2209.05433
    """
    mantissa_bits = 7 - exponent_bits
    values = []
    for pattern in range(256):
        sign = -1.0 if pattern & 0x80 else 1.0
        exponent = (pattern & 0x7F) >> mantissa_bits
        mantissa = pattern & ((1 << mantissa_bits) - 1)
        top = (1 << exponent_bits) - 1
        if finite and pattern & 0x7F == 0x7F:
            value = math.nan
        elif not finite and exponent == top:
            value = math.nan if mantissa else math.inf
        elif exponent == 0:
            value = mantissa / (1 << mantissa_bits) * 2.0 ** (1 - bias)
        else:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        values.append(sign * value)
    return np.array(values)


_EIGHT_BITS = {
    "F8_E4M3": _eight_bits(4, 7, finite=True),
    "F8_E5M2": _eight_bits(5, 15, finite=False),
}
