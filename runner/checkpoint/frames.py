"""A chunk of a tensor file and the zstd frame that it is stored as.

Trained weights do not repeat themselves, so a general compressor finds next to nothing in them. But
their exponents take few values: with the bytes of equal rank beside each other, those that hold
exponents compress and those that hold mantissas are stored as they are. The sign stands before the
exponent and is as random as a mantissa, so each float is turned by one bit to put it behind. See
M. Hershcovitch et al., "ZipNN: Lossless Compression for AI Models", https://arxiv.org/abs/2411.05239

    content of a frame:  form | bytes 0 of all items | bytes 1 of all items | … | remainder
    form:                bytes of an item, plus 128 if the items are turned

zstd is in the standard library from Python 3.14 on; before that it comes with `runner[zstd]`.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from types import ModuleType
from typing import NamedTuple

from runner.checkpoint import format as fmt
from runner.errors import CheckpointInvalid, UsageError

MOST_EXPANSION = 1 << 15
"""A frame's content is at most so many times as long: 128 KiB from a block of four bytes."""

_LEAST_CHUNK_BYTES = 4 * fmt.MEBIBYTE
_MOST_CHUNKS = 40_000
_LEVEL = 1
# A matcher that finds nothing but long runs. Exponents are noise from a small alphabet: every short
# match in it is a coincidence, and costs more than the literals it stands for (measured, normally
# distributed fp32: 16.9 % saved instead of 16.0 %, at twice the speed).
_HASH_LOG = 6
_MOST_WINDOW_LOG = 23
_TURNED = 128
_BLOCK_BYTES = 1 << 18  # so much at a time is rearranged within a core's cache


def zstd_library() -> ModuleType:
    """The module `compression.zstd` of Python 3.14, or its backport. UsageError without either."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise UsageError(
            "checkpoint.compression: zstd needs a library that is not installed; install it with "
            "pip install 'runner[zstd]', or say compression: off (checkpoints that are compressed "
            "already cannot be read without it)"
        ) from error
    return zstd


def chunk_bytes_for(size: int) -> int:
    """Bytes of a chunk of a file of `size` bytes: four of them are no longer than a part."""
    return max(_LEAST_CHUNK_BYTES, -(-size // _MOST_CHUNKS))


@dataclass(frozen=True)
class Frames:
    """What the frames of a stored file hold: a file of `size` bytes, in chunks of `chunk_bytes`.

    `lengths` are those of the frames as they are stored, one after another; `digests` the SHA-256
    of the chunks.
    """

    size: int
    chunk_bytes: int
    lengths: tuple[int, ...]
    digests: tuple[str, ...]

    def problem(self, stored_bytes: int, part_bytes: int) -> str | None:
        """Why this cannot be what a file of `stored_bytes` holds; None if it can.

        Afterwards the sizes are safe to allocate for whoever has seen that many stored bytes.
        """
        count = -(-self.size // max(1, self.chunk_bytes))
        if not self.size:
            return "frames of nothing"
        if not 1 <= self.chunk_bytes <= max(_LEAST_CHUNK_BYTES, part_bytes):
            return f"chunks of {self.chunk_bytes} bytes in parts of {part_bytes}"
        if len(self.lengths) != count or len(self.digests) != count:
            return f"{len(self.lengths)} frames and {len(self.digests)} digests of {count} chunks"
        if sum(self.lengths) != stored_bytes or not all(
            0 < length <= part_bytes for length in self.lengths
        ):
            return f"frames that do not make up its {stored_bytes} bytes"
        for index, length in enumerate(self.lengths):
            begin, end = self.chunk(index)
            if end - begin > length * MOST_EXPANSION:
                return f"a frame of {length} bytes for {end - begin}"
        return None

    def chunk(self, index: int) -> tuple[int, int]:
        """Where a chunk begins and ends in the file."""
        begin = index * self.chunk_bytes
        return begin, min(self.size, begin + self.chunk_bytes)


class Form(NamedTuple):
    """How the bytes of a chunk are arranged: bytes of an item, and whether items are turned."""

    item_bytes: int
    turned: bool


_PLAIN = Form(1, turned=False)
_FORMS = {dtype: Form(nbytes, turned=False) for dtype, nbytes in fmt.ITEM_BYTES.items()} | {
    "F16": Form(2, turned=True),
    "BF16": Form(2, turned=True),
    "F32": Form(4, turned=True),
    "C64": Form(4, turned=True),
    "F64": Form(8, turned=True),
}
_FORM_OF_TAG = {form.item_bytes | _TURNED * form.turned: form for form in _FORMS.values()}
_TAG_OF_FORM = {form: tag for tag, form in _FORM_OF_TAG.items()}


class Forms:
    """Which form suits which stretch of a safetensors file."""

    def __init__(self, image: memoryview, file: str) -> None:
        try:
            ranges = list(fmt.read_safetensors_header(image, file).values())
        except CheckpointInvalid:  # it is stored as it is, whatever it is
            ranges = []
        filled = (tensor for tensor in ranges if tensor.begin < tensor.end)
        self._ranges = sorted(filled, key=lambda tensor: tensor.begin)
        self._begins = [tensor.begin for tensor in self._ranges]

    def between(self, begin: int, end: int) -> Form:
        """That of most bytes there."""
        shares: Counter[Form] = Counter()
        at = max(0, bisect_right(self._begins, begin) - 1)
        for tensor in self._ranges[at:]:
            if tensor.begin >= end:
                break
            shares[_FORMS[tensor.dtype]] += min(end, tensor.end) - max(begin, tensor.begin)
        return max(shares, key=lambda form: shares[form], default=_PLAIN)


def encode(chunk: memoryview, form: Form) -> bytes:
    """The frame of a chunk."""
    import numpy as np

    zstd = zstd_library()
    source, width = np.asarray(chunk), form.item_bytes
    whole = len(chunk) - len(chunk) % width
    content = np.empty(1 + len(chunk), np.uint8)
    content[0] = _TAG_OF_FORM[form]
    planes = content[1 : 1 + whole].reshape(width, whole // width)
    content[1 + whole :] = source[whole:]
    items = source[:whole].view(f"<u{width}")
    for at in range(0, len(items), _BLOCK_BYTES // width):
        block = items[at : at + _BLOCK_BYTES // width]
        if form.turned:
            block = block << 1 | block >> (8 * width - 1)
        planes[:, at : at + len(block)] = block.view(np.uint8).reshape(len(block), width).T
    parameter = zstd.CompressionParameter
    options = {parameter.compression_level: _LEVEL, parameter.hash_log: _HASH_LOG}
    frame: bytes = zstd.compress(content.data, options=options)
    return frame


def decode(frame: memoryview, into: memoryview, digest: str) -> None:
    """Fill `into` with the chunk that a frame holds. ValueError if it is not that one."""
    import numpy as np

    form, data = _decompress(frame, len(into))
    target, width = np.asarray(into), form.item_bytes
    whole = len(into) - len(into) % width
    content = np.frombuffer(data, np.uint8, offset=1)
    planes = content[:whole].reshape(width, whole // width)
    target[whole:] = content[whole:]
    items = target[:whole].view(f"<u{width}")
    for at in range(0, len(items), _BLOCK_BYTES // width):
        rows = np.empty((min(_BLOCK_BYTES // width, len(items) - at), width), np.uint8)
        for rank in range(width):  # two and a half times as fast as to transpose
            rows[:, rank] = planes[rank, at : at + len(rows)]
        block = rows.view(f"<u{width}")[:, 0]
        if form.turned:
            block = block >> 1 | block << (8 * width - 1)
        items[at : at + len(block)] = block
    if sha256(into).hexdigest() != digest:
        raise ValueError("it holds other bytes than those saved")


def _decompress(frame: memoryview, nbytes: int) -> tuple[Form, bytes]:
    """What a frame holds: the form, and that byte and `nbytes` others. ValueError if not."""
    zstd = zstd_library()
    options = {zstd.DecompressionParameter.window_log_max: _MOST_WINDOW_LOG}
    decompressor = zstd.ZstdDecompressor(options=options)
    try:
        data = decompressor.decompress(frame, max_length=1 + nbytes)
    except zstd.ZstdError as error:
        raise ValueError(f"it is no zstd frame ({error})") from error
    if len(data) != 1 + nbytes or not decompressor.eof or decompressor.unused_data:
        raise ValueError(f"it does not hold {nbytes} bytes")
    form = _FORM_OF_TAG.get(data[0])
    if form is None:
        raise ValueError(f"its bytes have form {data[0]}, which this version does not know")
    return form, data
