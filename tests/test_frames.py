"""A chunk comes back from its frame bit for bit, or it is refused."""

from __future__ import annotations

import json
import sys
import tracemalloc
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from runner.checkpoint import frames as module
from runner.checkpoint.format import ITEM_BYTES, TensorSpec, safetensors_header
from runner.checkpoint.frames import (
    Form,
    Forms,
    Frames,
    chunk_bytes_for,
    decode,
    encode,
    zstd_library,
)
from runner.errors import UsageError

FORMS = sorted({Form(width, turned) for width in (1, 2, 4, 8) for turned in (False, True)})
KNOWN = [form for form in FORMS if form != Form(1, turned=True)]
BLOCK = 1 << 18


def decoded(frame: bytes, size: int, digest: str) -> bytes:
    into = bytearray(b"\xaa" * size)
    decode(memoryview(frame), memoryview(into), digest)
    return bytes(into)


def digest_of(content: bytes) -> str:
    return sha256(content).hexdigest()


# ---------------------------------------------------------------- there and back


@given(content=st.binary(max_size=200), form=st.sampled_from(KNOWN))
def test_any_bytes_come_back(content: bytes, form: Form) -> None:
    frame = encode(memoryview(content), form)

    assert decoded(frame, len(content), digest_of(content)) == content


@pytest.mark.parametrize("form", KNOWN, ids=str)
@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 9, 3 * BLOCK + 7])
def test_bytes_of_several_blocks_come_back(form: Form, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)

    assert decoded(encode(memoryview(content), form), size, digest_of(content)) == content


@pytest.mark.parametrize("offset", [1, 3])
def test_memory_need_not_be_aligned(offset: int) -> None:
    content = np.random.default_rng(offset).bytes(1000)
    frame = encode(memoryview(bytes(offset) + content)[offset:], Form(4, turned=True))
    into = memoryview(bytearray(offset + 1000))[offset:]

    decode(memoryview(frame), into, digest_of(content))

    assert into == content


SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38], np.float32)


def test_special_values_keep_their_bits() -> None:
    payloads = np.array([0x7FC00001, 0xFFC12345, 0x7F800001], np.uint32).view(np.float32)
    content = np.concatenate([SPECIAL, payloads]).tobytes()

    frame = encode(memoryview(content), Form(4, turned=True))

    assert decoded(frame, len(content), digest_of(content)) == content


# ---------------------------------------------------------------- what it gains


def normal(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (0.02 * np.random.default_rng(0).standard_normal(count)).astype(np.float32)


GAINS = {
    "fp32": (normal(1 << 20).tobytes(), Form(4, turned=True), 0.165),
    "bf16": (
        (normal(1 << 21).view(np.uint32) >> 16).astype(np.uint16).tobytes(),
        Form(2, turned=True),
        0.33,
    ),
    "small whole numbers": (
        np.random.default_rng(0).integers(0, 18, 1 << 19).tobytes(),
        Form(8, turned=False),
        0.9,
    ),
    "zeros": (bytes(4 << 20), Form(4, turned=True), 0.999),
}


@pytest.mark.parametrize(("content", "form", "least"), GAINS.values(), ids=GAINS)
def test_so_much_is_saved_at_least(content: bytes, form: Form, least: float) -> None:
    assert 1 - len(encode(memoryview(content), form)) / len(content) >= least


def test_what_does_not_compress_takes_hardly_more_room() -> None:
    content = np.random.default_rng(0).bytes(4 << 20)

    assert len(encode(memoryview(content), Form(4, turned=True))) < len(content) * 1.0001


# ---------------------------------------------------------------- which form


def image_of(**dtypes: tuple[str, int]) -> bytes:
    header, ranges = safetensors_header(
        TensorSpec(name, dtype, (count,)) for name, (dtype, count) in dtypes.items()
    )
    return header + bytes(max(tensor.end for tensor in ranges.values()) - len(header))


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_dtype_has_a_form_that_comes_back(dtype: str) -> None:
    image = image_of(x=(dtype, 1000))
    form = Forms(memoryview(image), "x").between(0, len(image))

    assert decoded(encode(memoryview(image), form), len(image), digest_of(image)) == image
    assert form.turned == (dtype in {"F16", "BF16", "F32", "F64", "C64"})
    assert form.item_bytes == (4 if dtype == "C64" else ITEM_BYTES[dtype])


def test_each_stretch_has_the_form_of_most_of_its_bytes() -> None:
    image = image_of(a=("I64", 0), b=("F32", 1000), c=("F32", 0), d=("BF16", 500), e=("U8", 3000))
    forms = Forms(memoryview(image), "mixed")
    start = len(image) - 4000 - 1000 - 3000

    assert forms.between(0, start + 4000) == Form(4, turned=True)
    assert forms.between(start + 3000, start + 4100) == Form(4, turned=True)
    assert forms.between(start + 4000, start + 5000) == Form(2, turned=True)
    assert forms.between(start + 4500, start + 8000) == Form(1, turned=False)
    assert forms.between(start + 5000, start + 5001) == Form(1, turned=False)


def test_an_empty_tensor_does_not_hide_the_one_that_begins_with_it() -> None:
    entries = {
        "full": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]},
        "empty": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
    }
    text = json.dumps(entries).encode()
    image = len(text).to_bytes(8, "little") + text + bytes(4000)

    form = Forms(memoryview(image), "x").between(len(image) - 3000, len(image))

    assert form == Form(4, turned=True)


@pytest.mark.parametrize("image", [b"", b"no header", safetensors.numpy.save({})])
def test_what_has_no_tensors_is_taken_as_bytes(image: bytes) -> None:
    assert Forms(memoryview(image), "x").between(0, 10) == Form(1, turned=False)


def test_chunks_are_short_and_not_too_many() -> None:
    assert chunk_bytes_for(1) == chunk_bytes_for(100 << 30) == 4 << 20
    assert (10 << 40) / chunk_bytes_for(10 << 40) <= 40_000


# ---------------------------------------------------------------- what is refused


def zstd(content: bytes) -> bytes:
    data: bytes = zstd_library().compress(content)
    return data


CONTENT = normal(100).tobytes()
GOOD = encode(memoryview(CONTENT), Form(4, turned=True))
BAD = {
    "empty": b"",
    "cut off": GOOD[:-1],
    "with something behind": GOOD + b"\0",
    "two frames": GOOD + GOOD,
    "no frame": b"\0" * len(GOOD),
    "too short": zstd(b"\x84" + CONTENT[:-1]),
    "too long": zstd(b"\x84" + CONTENT + b"\0"),
    "another form": zstd(b"\x03" + CONTENT),
    "other bytes": encode(memoryview(bytes(400)), Form(4, turned=True)),
}


@pytest.mark.parametrize("frame", BAD.values(), ids=BAD)
def test_a_frame_that_holds_something_else_is_refused(frame: bytes) -> None:
    with pytest.raises(ValueError, match=r"zstd frame|does not hold|form 3|other bytes"):
        decoded(frame, len(CONTENT), digest_of(CONTENT))


def test_a_flipped_bit_anywhere_never_gives_other_content() -> None:
    refused = 0
    for place in range(len(GOOD)):
        frame = bytearray(GOOD)
        frame[place] ^= 1 << place % 8
        try:
            assert decoded(bytes(frame), len(CONTENT), digest_of(CONTENT)) == CONTENT
        except ValueError:
            refused += 1
    assert refused > 0.95 * len(GOOD)


def test_no_more_is_decoded_than_there_is_room_for() -> None:
    bomb = zstd(bytes(50_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="does not hold 400 bytes"):
            decoded(bomb, 400, "")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert most < 1_000_000


def test_a_frame_cannot_ask_for_much_memory() -> None:
    parameter = zstd_library().CompressionParameter
    compressor = zstd_library().ZstdCompressor(options={parameter.window_log: 27})
    greedy = compressor.compress(b"x") + compressor.flush()  # its size is not known beforehand

    with pytest.raises(ValueError, match="no zstd frame"):
        decoded(greedy, 0, "")


FRAMES = Frames(size=2500, chunk_bytes=1000, lengths=(900, 800, 300), digests=("a" * 64,) * 3)
LIES = {
    "no size": (replace(FRAMES, size=0), 2000, 4096),
    "more chunks": (replace(FRAMES, size=3001), 2000, 4096),
    "fewer chunks": (replace(FRAMES, size=2000), 2000, 4096),
    "no chunks": (replace(FRAMES, chunk_bytes=0), 2000, 4096),
    "huge chunks": (replace(FRAMES, chunk_bytes=1 << 40), 2000, 4096),
    "a frame too many": (replace(FRAMES, lengths=(900, 800, 200, 100)), 2000, 4096),
    "a digest too few": (replace(FRAMES, digests=("a" * 64,) * 2), 2000, 4096),
    "frames that end too late": (FRAMES, 1999, 4096),
    "an empty frame": (replace(FRAMES, lengths=(1200, 800, 0)), 2000, 4096),
    "a negative frame": (replace(FRAMES, lengths=(1300, 800, -100)), 2000, 4096),
    "a frame longer than a part": (FRAMES, 2000, 899),
    "more than a frame can hold": (
        Frames(size=1 << 20, chunk_bytes=1 << 20, lengths=(31,), digests=("a" * 64,)),
        31,
        4096,
    ),
}


@pytest.mark.parametrize(("lie", "stored", "part_bytes"), LIES.values(), ids=LIES)
def test_an_index_that_contradicts_itself_is_found(
    lie: Frames, stored: int, part_bytes: int
) -> None:
    assert FRAMES.problem(2000, 4096) is None
    assert lie.problem(stored, part_bytes)


def test_the_most_that_zstd_expands_to_is_let_through() -> None:
    zeros = bytes(4 << 20)
    frame = encode(memoryview(zeros), Form(1, turned=False))

    frames = Frames(len(zeros), 4 << 20, (len(frame),), (digest_of(zeros),))

    assert frames.problem(len(frame), 8 << 20) is None


# ---------------------------------------------------------------- the library


def test_without_the_library_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("backports", "backports.zstd", "compression", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(UsageError, match=r"pip install 'runner\[zstd\]'"):
        module.zstd_library()
