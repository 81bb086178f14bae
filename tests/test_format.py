from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slots import FOREIGN_NAMES, checkpoint_folder, commit, snapshot

from runner.checkpoint import format as fmt
from runner.checkpoint.format import (
    ITEM_BYTES,
    MEBIBYTE,
    CheckpointName,
    FileImage,
    TensorSpec,
    check_images,
    content_digest,
    is_file_name,
    read_safetensors_header,
    safetensors_header,
)
from runner.errors import CheckpointCorrupt, CheckpointInvalid
from runner.store import DirectoryStore

quick = settings(max_examples=80, deadline=None)

# ---------------------------------------------------------------- names


@quick
@given(
    attempt=st.integers(0, 999_999_999),
    save=st.integers(0, 999_999_999),
    step=st.integers(0, 10**18 - 1),
)
def test_a_name_is_read_back_as_it_was_written(attempt: int, save: int, step: int) -> None:
    name = CheckpointName(attempt, save, step)

    assert CheckpointName.parse(str(name)) == name


def test_a_name_is_written_as_documented() -> None:
    assert str(CheckpointName(attempt=12, save=7, step=1200)) == "step-000001200-a0012-s007"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "latest",
        "step-1200-a12-s7",
        "step-000001200-a0012",
        "step-000001200-a0012-s007\n",
        "step-000001200-a0012-s007/",
        " step-000001200-a0012-s007",
        ".tmp-step-000001200-a0012-s007",
        "step-0000001200-a0012-s007",
        "step-000001200-a00012-s007",
        "step-000001200-a0012-s0007",
        "step--00001200-a0012-s007",
        "step-٠٠٠٠٠١٢٠٠-a0012-s007",
        "step-" + "9" * 19 + "-a0012-s007",
    ],
)
def test_what_is_not_exactly_a_name_is_none(text: str) -> None:
    assert CheckpointName.parse(text) is None


def test_newest_is_highest_by_attempt_and_save_whatever_the_step() -> None:
    by_age = [
        CheckpointName(attempt=1, save=1, step=900),
        CheckpointName(attempt=1, save=2, step=950),
        CheckpointName(attempt=2, save=1, step=100),
        CheckpointName(attempt=2, save=10, step=100),
        CheckpointName(attempt=10, save=1, step=50),
        CheckpointName(attempt=10_000, save=1, step=0),
    ]

    assert sorted(by_age, key=str) != by_age
    assert sorted(by_age, key=lambda name: (name.step, name)) != by_age
    assert sorted(by_age) == by_age


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "ema_2.x-y", "A", "0" * 201])
def test_plain_names_may_become_files(name: str) -> None:
    assert is_file_name(name)


@pytest.mark.parametrize("name", [*FOREIGN_NAMES, None, 3, ["a"], b"a"])
def test_no_other_name_may_become_a_file(name: object) -> None:
    assert not is_file_name(name)


# ---------------------------------------------------------------- safetensors, written

SHAPES = [(), (0,), (1,), (3,), (2, 3), (0, 4), (2, 0, 3), (1, 1, 5)]
EVERY_DTYPE = [
    TensorSpec(f"{dtype} {shape}", dtype, shape) for dtype in ITEM_BYTES for shape in SHAPES
]
dtypes = st.sampled_from(sorted(ITEM_BYTES))
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
specs = st.dictionaries(st.text(max_size=8), st.tuples(dtypes, shapes), max_size=8).map(
    lambda found: [TensorSpec(name, dtype, shape) for name, (dtype, shape) in found.items()]
)


def image_of(tensors: list[TensorSpec], seed: int = 0) -> tuple[bytes, dict[str, bytes]]:
    """A whole file with random data (only 0 and 1, which every dtype allows), and the data."""
    header, ranges = safetensors_header(tensors)
    image = bytearray(header)
    image.extend(bytes(max([len(header), *(r.end for r in ranges.values())]) - len(header)))
    random = np.random.default_rng(seed)
    data = {}
    for spec in tensors:
        data[spec.name] = random.integers(0, 2, spec.nbytes, dtype=np.uint8).tobytes()
        image[ranges[spec.name].begin : ranges[spec.name].end] = data[spec.name]
    return bytes(image), data


def test_the_safetensors_library_reads_every_dtype_that_is_written() -> None:
    image, data = image_of(EVERY_DTYPE)

    read = dict(safetensors.deserialize(image))

    assert set(read) == set(data)
    for spec in EVERY_DTYPE:
        assert read[spec.name]["dtype"] == spec.dtype
        assert tuple(read[spec.name]["shape"]) == spec.shape
        assert bytes(read[spec.name]["data"]) == data[spec.name]


TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16,
    "I16": torch.int16, "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}  # fmt: skip


def test_torch_opens_a_written_file(tmp_path: Path) -> None:
    image, data = image_of(EVERY_DTYPE)
    (tmp_path / "model.safetensors").write_bytes(image)

    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict

    assert set(tensors) == set(data)
    for spec in EVERY_DTYPE:
        tensor = tensors[spec.name]
        assert tensor.dtype == TORCH_DTYPES[spec.dtype]
        assert tuple(tensor.shape) == spec.shape
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == data[spec.name]


def test_numpy_opens_a_written_file(tmp_path: Path) -> None:
    known = [
        spec for spec in EVERY_DTYPE if spec.dtype not in ("BF16", "F8_E4M3", "F8_E5M2", "C64")
    ]
    image, data = image_of(known)
    (tmp_path / "model.safetensors").write_bytes(image)

    arrays = safetensors.numpy.load_file(tmp_path / "model.safetensors")

    assert {name: array.tobytes() for name, array in arrays.items()} == data
    assert {name: array.shape for name, array in arrays.items()} == {
        spec.name: spec.shape for spec in known
    }


def test_a_file_without_tensors_is_a_header() -> None:
    image, _ = image_of([])

    assert safetensors.deserialize(image) == []
    assert read_safetensors_header(memoryview(image), "x") == {}


@quick
@given(specs)
def test_each_tensor_is_aligned_to_its_items_and_there_are_no_gaps(found: list[TensorSpec]) -> None:
    header, ranges = safetensors_header(found)

    assert len(header) % 64 == 0
    end = len(header)
    for where in sorted(ranges.values(), key=lambda where: (where.begin, where.end)):
        assert where.begin == end
        assert where.begin % ITEM_BYTES[where.dtype] == 0
        end = where.end


@quick
@given(specs)
def test_what_is_written_is_read_back(found: list[TensorSpec]) -> None:
    header, ranges = safetensors_header(found)
    image = header + bytes(sum(spec.nbytes for spec in found))

    assert read_safetensors_header(memoryview(image), "x") == ranges


def test_the_order_of_the_tensors_makes_no_difference() -> None:
    assert safetensors_header(EVERY_DTYPE) == safetensors_header(reversed(EVERY_DTYPE))


# ---------------------------------------------------------------- safetensors, read


def with_header(header: object, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(
    shape: object = (4,), offsets: object = (0, 16), dtype: object = "F32"
) -> dict[str, Any]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_the_tensor_that_the_lies_are_made_from_is_accepted() -> None:
    assert list(read_safetensors_header(memoryview(with_header(tensor())), "x")) == ["t"]


HEADER_LIES = {
    "nothing": b"",
    "half a length": b"\1\0\0",
    "a length past the end": (100).to_bytes(8, "little") + b"{}",
    "the longest length": b"\xff" * 8 + b"{}",
    "no JSON": with_header(b"{", b""),
    "not UTF-8": with_header(b'{"\xff": 1}', b""),
    "a list": with_header([], b""),
    "a number": with_header(3, b""),
    "deep nesting": with_header(b"[" * 200_000, b""),
    "an entry that is none": with_header({"t": 3}),
    "an entry that is text": with_header({"t": "dtype"}),
    "no dtype": with_header({"t": {"shape": [4], "data_offsets": [0, 16]}}),
    "no shape": with_header({"t": {"dtype": "F32", "data_offsets": [0, 16]}}),
    "no offsets": with_header({"t": {"dtype": "F32", "shape": [4]}}),
    "an unknown dtype": with_header(tensor(dtype="F33")),
    "a dtype that is a list": with_header(tensor(dtype=["F32"])),
    "a negative extent": with_header(tensor(shape=[-4])),
    "two negative extents": with_header(tensor(shape=[-2, -2])),
    "an extent with a fraction": with_header(tensor(shape=[4.0])),
    "an extent that is text": with_header(tensor(shape=["4"])),
    "an extent that is true": with_header(tensor(shape=[4, True])),
    "an infinite extent": with_header(b'{"t": {"dtype": "F32", "shape": [Infinity], '
                                      b'"data_offsets": [0, 16]}}'),
    "an extent that overflows": with_header(b'{"t": {"dtype": "F32", "shape": [1e999], '
                                            b'"data_offsets": [0, 16]}}'),
    "a huge extent": with_header(tensor(shape=[2**63])),
    "a huge product": with_header(tensor(shape=[2**40] * 400)),
    "a shape that is text": with_header(tensor(shape="4")),
    "a shape that is an object": with_header(tensor(shape={"4": 4})),
    "a shape of one number": with_header(tensor(shape=4)),
    "one offset": with_header(tensor(offsets=[0])),
    "three offsets": with_header(tensor(offsets=[0, 8, 16])),
    "a negative offset": with_header(tensor(offsets=[-16, 0])),
    "offsets in the wrong order": with_header(tensor(offsets=[16, 0])),
    "an offset past the end": with_header(tensor(offsets=[16, 32])),
    "offsets with a fraction": with_header(tensor(offsets=[0.0, 16.0])),
    "offsets that are text": with_header(tensor(offsets=["0", "16"])),
    "an offset that is false": with_header(tensor(offsets=[False, 16])),
    "an offset that is no number": with_header(b'{"t": {"dtype": "F32", "shape": [4], '
                                               b'"data_offsets": [NaN, 16]}}'),
    "fewer bytes than the shape needs": with_header(tensor(offsets=[0, 12])),
    "more bytes than the shape needs": with_header(tensor(shape=[3])),
    "two tensors in one place": with_header({**tensor(), "u": tensor()["t"]}),
    "two tensors that overlap": with_header(
        {**tensor([2], [0, 8]), "u": tensor([2], [4, 12])["t"], "v": tensor([1], [12, 16])["t"]}
    ),
    "a gap before the first tensor": with_header(tensor([2], [8, 16])),
    "bytes behind the last tensor": with_header(tensor([2], [0, 8])),
}  # fmt: skip


@pytest.mark.parametrize("image", HEADER_LIES.values(), ids=HEADER_LIES)
def test_a_header_that_contradicts_itself_is_refused(image: bytes) -> None:
    with pytest.raises(CheckpointInvalid):
        read_safetensors_header(memoryview(image), "model.safetensors")


numbers = st.integers() | st.floats() | st.sampled_from([0, 4, 8, 16, 2**63, True, None, "4"])
entries = st.fixed_dictionaries(
    {
        "dtype": dtypes | st.text(max_size=3),
        "shape": st.lists(numbers, max_size=3) | numbers,
        "data_offsets": st.lists(numbers, min_size=1, max_size=3) | numbers,
    }
)


@quick
@given(
    st.binary(max_size=200)
    | st.binary(max_size=60).map(with_header)
    | st.dictionaries(st.text(max_size=3), entries | numbers, max_size=3).map(with_header)
)
def test_whatever_the_bytes_are_a_header_is_sound_or_refused(image: bytes) -> None:
    try:
        ranges = read_safetensors_header(memoryview(image), "model.safetensors")
    except (CheckpointInvalid, CheckpointCorrupt):
        return
    for where in ranges.values():
        assert all(type(extent) is int for extent in (*where.shape, where.begin, where.end))
        assert 8 <= where.begin <= where.end <= len(image)
        assert where.end - where.begin == TensorSpec("", where.dtype, where.shape).nbytes


# ---------------------------------------------------------------- parts and digests


@pytest.mark.parametrize(
    ("size", "part_mebibytes"),
    [
        (0, 16),
        (1, 16),
        (16 * MEBIBYTE, 16),
        (160_000 * MEBIBYTE, 16),
        (160_000 * MEBIBYTE + 1, 17),
        (5 * 1024**4, 525),
    ],
)
def test_parts_are_as_small_as_ten_thousand_of_them_allow(size: int, part_mebibytes: int) -> None:
    part_bytes = fmt.part_bytes_for(size)

    assert part_bytes == part_mebibytes * MEBIBYTE
    assert -(-size // part_bytes) <= 10_000


def test_the_digest_of_a_file_of_one_part_is_what_sha256sum_prints(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)

    manifest = commit(store, snapshot())

    folder = checkpoint_folder(store, manifest.name)
    for file in manifest.files:
        printed = subprocess.check_output(["sha256sum", folder / file.name], text=True)
        assert printed.split()[0] == file.digest
        assert file.parts == (file.digest,)
        assert file.size == (folder / file.name).stat().st_size


def test_the_digest_of_a_file_of_more_parts_is_that_of_their_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fmt, "part_bytes_for", lambda size: 100)
    store, taken = DirectoryStore(tmp_path), snapshot()

    manifest = commit(store, taken)

    assert max(len(file.parts) for file in manifest.files) > 1
    for file in manifest.files:
        content = taken.files[file.name]
        parts = [
            hashlib.sha256(content[at : at + 100]).digest() for at in range(0, len(content), 100)
        ]
        whole = hashlib.sha256(b"".join(parts)).hexdigest() if len(parts) > 1 else parts[0].hex()
        assert file.parts == tuple(part.hex() for part in parts)
        assert file.part_bytes == 100
        assert file.digest == whole


def test_an_empty_file_has_one_part(tmp_path: Path) -> None:
    taken = snapshot()
    empty = type(taken)(taken.moment, {**taken.files, "empty.bin": b""})

    manifest = commit(DirectoryStore(tmp_path), empty)

    nothing = hashlib.sha256(b"").hexdigest()
    assert next(file.parts for file in manifest.files if file.name == "empty.bin") == (nothing,)


# ---------------------------------------------------------------- images in a slot

STATE = FileImage("state.json", 0, 100)


def image(offset: object = 4096, size: object = 100, name: object = "m.safetensors") -> FileImage:
    return FileImage(name, offset, size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "images",
    [
        [STATE],
        [STATE, image()],
        [image(), STATE],
        [STATE, image(100, 0), image(100, 4096 - 100, "o.safetensors")],
        [STATE, image(8192, 0)],
    ],
)
def test_images_that_lie_side_by_side_are_accepted(images: list[FileImage]) -> None:
    check_images(images, 8192, "slot-0")


IMAGE_LIES = {
    "none": [],
    "no state.json": [image()],
    "overlap": [STATE, image(99)],
    "the same place": [STATE, image(0)],
    "one within another": [STATE, image(50, 10)],
    "past the end": [STATE, image(8192, 1)],
    "across the end": [STATE, image(8100, 93)],
    "a huge size": [STATE, image(size=2**63)],
    "a huge offset": [STATE, image(offset=2**63)],
    "a negative offset": [STATE, image(-10, 5)],
    "a negative size": [STATE, image(4096, -1)],
    "negative both": [image(-100, 100), STATE],
    "an offset with a fraction": [STATE, image(4096.0)],
    "an endless size": [STATE, image(size=float("inf"))],
    "an offset that is text": [STATE, image("4096")],
    "a size that is true": [STATE, image(size=True)],
    "no offset": [STATE, image(None)],
    "the same name twice": [STATE, image(), image(5000)],
    "state.json twice": [STATE, FileImage("state.json", 4096, 10)],
    "too many": [STATE, *(image(8192, 0, f"f{n}") for n in range(10_000))],
    "a name that is a list": [STATE, image(name=["m"])],
    "a name that is none": [STATE, image(name=None)],
} | {f"the name {name!r}": [STATE, image(name=name)] for name in FOREIGN_NAMES}


@pytest.mark.parametrize("images", IMAGE_LIES.values(), ids=IMAGE_LIES)
def test_images_that_lie_are_refused(images: list[FileImage]) -> None:
    with pytest.raises(CheckpointInvalid):
        check_images(images, 8192, "slot-0")


def test_each_image_begins_on_a_page() -> None:
    assert [fmt.next_image_offset(end) for end in (0, 1, 4095, 4096, 4097)] == [
        0, 4096, 4096, 4096, 8192,
    ]  # fmt: skip


# ---------------------------------------------------------------- what a checkpoint says

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)
BIAS = np.array([1, 2, 3, 4], dtype=np.int16)
TREE = {
    "version": 1,
    "components": {
        "model": {"weight": {"$": "tensor", "file": "model.safetensors", "name": "weight"}},
        "lr": 0.1,
        "epochs": [1, 2.0, True, None, "x", -0.0],
        "rng": {"$": "idle", "words": [1, 2, 3]},
    },
}
Files = dict[str, Any]


def said(files: Files) -> str:
    images = {
        name: memoryview(
            json.dumps(content).encode()
            if name == "state.json"
            else content
            if isinstance(content, bytes)
            else safetensors.numpy.save(content)
        )
        for name, content in files.items()
    }
    return content_digest(images)


def base() -> Files:
    return {
        "model.safetensors": {"weight": WEIGHT, "bias": BIAS},
        "ema.safetensors": {"weight": WEIGHT + 1},
        "state.json": json.loads(json.dumps(TREE)),
    }


def change_tensors(**tensors: np.ndarray) -> Callable[[Files], None]:
    return lambda files: files.__setitem__("model.safetensors", tensors)


def change_tree(*path: Any, to: Any) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        node = files["state.json"]
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = to

    return change


def flip_one_bit(files: Files) -> None:
    weight = WEIGHT.copy()
    weight.view(np.uint8)[-1, -1] ^= 1
    files["model.safetensors"]["weight"] = weight


def rename_a_file(files: Files) -> None:
    files["net.safetensors"] = files.pop("model.safetensors")


def swap_two_files(files: Files) -> None:
    files["ema.safetensors"], files["model.safetensors"] = (
        files["model.safetensors"],
        files["ema.safetensors"],
    )


CHANGES = {
    "one bit": flip_one_bit,
    "a tensor's name": change_tensors(weight_=WEIGHT, bias=BIAS),
    "names swapped": change_tensors(weight=BIAS, bias=WEIGHT),
    "a dtype of the same bytes": change_tensors(weight=WEIGHT.view(np.int32), bias=BIAS),
    "a shape of the same bytes": change_tensors(weight=WEIGHT.reshape(3, 2), bias=BIAS),
    "another extent of 1": change_tensors(weight=WEIGHT.reshape(1, 2, 3), bias=BIAS),
    "a tensor less": change_tensors(weight=WEIGHT),
    "a tensor more": change_tensors(weight=WEIGHT, bias=BIAS, empty=np.zeros(0, np.float32)),
    "bytes moved to the next tensor": change_tensors(weight=WEIGHT.reshape(-1)[:5], bias=BIAS),
    "a file's name": rename_a_file,
    "files swapped": swap_two_files,
    "a file less": lambda files: files.pop("ema.safetensors"),
    "an empty tensor's dtype": change_tensors(weight=WEIGHT, bias=BIAS, e=np.zeros(0, np.int8)),
    "an empty tensor's shape": change_tensors(weight=WEIGHT, bias=BIAS, e=np.zeros((0, 2), "i1")),
    "a number in the tree": change_tree("components", "lr", to=0.2),
    "the last bit of a number": change_tree("components", "lr", to=0.1 + 2**-56),
    "a whole number for a float": change_tree("components", "epochs", 1, to=2),
    "a float for a whole number": change_tree("components", "epochs", 0, to=1.0),
    "1 for true": change_tree("components", "epochs", 2, to=1),
    "false for null": change_tree("components", "epochs", 3, to=False),
    "text in the tree": change_tree("components", "epochs", 4, to="y"),
    "the sign of zero": change_tree("components", "epochs", 5, to=0.0),
    "an item more": change_tree("components", "epochs", to=[1, 2.0, True, None, "x", -0.0, 0]),
    "another order of a list": change_tree("components", "epochs", to=[2.0, 1, True, None, "x"]),
    "a key more": change_tree("components", "more", to=None),
    "a reference": change_tree("components", "model", "weight", "name", to="bias"),
    "a stream that is used now": change_tree(
        "components", "rng", to={"$": "words", "words": [1, 2, 3]}
    ),
}


def test_every_change_of_the_content_changes_the_digest() -> None:
    digests = {"nothing": said(base())}
    for name, change in CHANGES.items():
        files = base()
        change(files)
        digests[name] = said(files)

    assert len(digests["nothing"]) == 64
    same = {
        (one, other) for one in digests for other in digests
        if one < other and digests[one] == digests[other]
    }  # fmt: skip
    assert same == set()


def written_otherwise() -> bytes:
    """The same two tensors: in the other order, with other metadata and other padding."""
    header = {
        "bias": {"data_offsets": [0, 8], "shape": [4], "dtype": "I16"},
        "weight": {"shape": [2, 3], "data_offsets": [8, 32], "dtype": "F32"},
        "__metadata__": {"tool": "another", "note": "x"},
    }
    text = json.dumps(header, indent=2).encode() + b" " * 77
    return with_header(text, BIAS.tobytes() + WEIGHT.tobytes())


def test_how_a_file_is_written_does_not_change_the_digest() -> None:
    files = base()
    files["model.safetensors"] = written_otherwise()
    assert files["model.safetensors"] != safetensors.numpy.save(base()["model.safetensors"])

    assert said(files) == said(base())


def test_the_order_of_keys_and_files_does_not_change_the_digest() -> None:
    files = dict(reversed(base().items()))
    files["state.json"] = dict(reversed(files["state.json"].items()))

    assert said(files) == said(base())


def test_random_streams_that_were_never_used_do_not_change_the_digest() -> None:
    files = base()
    files["state.json"]["components"]["rng"]["words"] = [7, 8]

    assert said(files) == said(base())


def test_an_image_that_lies_has_no_digest() -> None:
    with pytest.raises(CheckpointInvalid):
        said({**base(), "model.safetensors": HEADER_LIES["two tensors that overlap"]})
