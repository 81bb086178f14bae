"""Tensors of a state and the safetensors files that they go to and come from.

`TensorSink` collects live tensors while a state is encoded, each shared storage once.
`TensorSource` gives them back from a slot: as views where they are copied into something that
lives, as tensors of their own where they become part of it.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from runner.checkpoint import format as fmt
from runner.checkpoint.format import FileImage, TensorRange, TensorSpec
from runner.errors import CaptureError, RestoreError
from runner.training.tree import torch_dtype

SAFETENSORS_DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
_TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
_PATH_STEP = re.compile(r"\[(['\"]?)(.*?)\1\]")


class TensorSink:
    """The tensors of one snapshot: `files[file][name]` is live, nothing has been copied."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, torch.Tensor]] = {}
        self._seen: dict[tuple[Any, ...], dict[str, str]] = {}

    def add(self, tensor: torch.Tensor, path: str) -> dict[str, Any]:
        """Take a tensor in and give the reference that stands for it in the tree.

        `path` is as the user would write it: `optimizer.state[0]['exp_avg']`. Its first word names
        the file. A tensor that is the same memory as one before it gets that one's place.
        """
        _check(tensor, path)
        tensor = tensor.detach().resolve_conj().resolve_neg()
        component = re.split(r"[.\[]", path, maxsplit=1)[0]
        file = component + fmt.TENSOR_SUFFIX
        key = (
            file,
            tensor.untyped_storage().data_ptr(),
            tensor.device,
            tensor.dtype,
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
        )
        place = self._seen.get(key) if tensor.numel() else None
        if place is None:
            tensors = self.files.setdefault(file, {})
            name = _PATH_STEP.sub(r".\2", path[len(component) :]).lstrip(".") or component
            while name in tensors or name == "__metadata__":  # a word of the format's own
                name += "_"
            tensors[name] = tensor
            place = self._seen[key] = {"file": file, "name": name}
        reference: dict[str, Any] = {"$": "tensor", **place}
        if tensor.device.type != "cpu":
            reference["device"] = str(tensor.device)
        if tensor.dtype not in SAFETENSORS_DTYPES:
            reference["dtype"] = str(tensor.dtype).removeprefix("torch.")
            reference["shape"] = list(tensor.shape)
        if not tensor.is_contiguous() and _is_dense(tensor):
            reference["stride"] = list(tensor.stride())
        return reference


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """How a tensor stands in a safetensors header. A dtype that the format lacks goes as bytes."""
    dtype = SAFETENSORS_DTYPES.get(tensor.dtype)
    if dtype is None:
        return TensorSpec(name, "U8", (*tensor.shape, tensor.element_size()))
    return TensorSpec(name, dtype, tuple(tensor.shape))


def place_for(memory: memoryview, where: TensorRange, tensor: torch.Tensor) -> torch.Tensor:
    """The place in a slot that `tensor` is copied to: of its shape, or bytes (see `as_bytes`)."""
    place = _view(memory, where)
    return place.reshape(tensor.shape) if place.dtype == tensor.dtype else place.reshape(-1)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor in their order, as one row of bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class TensorSource:
    """The tensors of a checkpoint that lies in memory."""

    def __init__(self, memory: memoryview, images: Sequence[FileImage]) -> None:
        self.memory, self.images = memory, images
        self._files: dict[str, tuple[memoryview, dict[str, TensorRange]]] = {}
        for image in images:
            if image.name.endswith(fmt.TENSOR_SUFFIX):
                content = memory[image.offset : image.offset + image.size]
                ranges = fmt.read_safetensors_header(content, image.name)
                self._files[image.name] = content, ranges
        self._owned: dict[tuple[str, str], torch.Tensor] = {}
        self._earlier: dict[tuple[str, str], weakref.ref[torch.Tensor]] = {}

    def anew(self) -> TensorSource:
        """The same one, which keeps nothing alive of what this one has handed out.

        What is still in use of that gets its saved values once more, where it is: new memory costs
        several times as much as a copy.
        """
        again = TensorSource(self.memory, self.images)
        again._earlier = {key: weakref.ref(tensor) for key, tensor in self._owned.items()}
        return again

    def view(self, reference: Mapping[str, Any]) -> torch.Tensor:
        """The saved tensor where it lies, on the CPU, to be copied from and then let go."""
        try:
            content, ranges = self._files[reference["file"]]
            where = ranges[reference["name"]]
        except KeyError as error:
            raise RestoreError(
                f"state.json refers to {reference.get('file')}:{reference.get('name')}, "
                "which is not there"
            ) from error
        tensor = _view(content, where)
        if "dtype" in reference:
            dtype = torch_dtype(reference["dtype"])
            tensor = tensor.reshape(-1).clone().view(dtype).reshape(reference["shape"])
        return tensor

    def own(self, reference: Mapping[str, Any]) -> torch.Tensor:
        """A copy of the saved tensor: on its device where there is one, strided as it was.

        References to one tensor give one tensor, so what was tied stays tied.
        """
        key = reference["file"], reference["name"]
        if key not in self._owned:
            saved = self.view(reference)
            device = torch.device(reference.get("device", "cpu"))
            if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
                device = torch.device("cpu")
            stride = reference.get("stride")
            earlier = self._earlier[key]() if key in self._earlier else None
            tensor = (
                torch.empty(saved.shape, dtype=saved.dtype, device=device)
                if stride is None
                else torch.empty_strided(saved.shape, stride, dtype=saved.dtype, device=device)
            )
            if earlier is not None and _is_alike(earlier, tensor):
                tensor = earlier
            self._owned[key] = tensor.copy_(saved)
        return self._owned[key]


def _is_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether one can stand for the other: a plain value, of the same kind and shape in memory."""
    return (
        not one.requires_grad
        and (one.shape, one.dtype, one.device, one.stride())
        == (other.shape, other.dtype, other.device, other.stride())
        and one._base is None
    )


def _view(memory: memoryview, where: TensorRange) -> torch.Tensor:
    dtype = _TORCH_DTYPES[where.dtype]
    if where.begin == where.end:
        return torch.empty(where.shape, dtype=dtype)
    raw = torch.frombuffer(
        memory, dtype=torch.uint8, count=where.end - where.begin, offset=where.begin
    )
    return raw.view(dtype).reshape(where.shape)


def _check(tensor: torch.Tensor, path: str) -> None:
    problem = None
    if tensor.is_meta:
        problem = "is a tensor without data (device meta)"
    elif tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        problem = f"is a {tensor.layout}, quantized or nested tensor, which has no plain bytes"
    elif type(tensor) not in (torch.Tensor, torch.nn.Parameter) and not isinstance(
        tensor, getattr(torch.nn, "Buffer", ())
    ):
        problem = f"is a {type(tensor).__qualname__}, not a plain tensor"
    if problem is not None:
        raise CaptureError(path, f"{problem}, and cannot be saved")


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps."""
    expected = 1
    for stride, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if extent == 1:
            continue
        if stride != expected:
            return False
        expected *= extent
    return True
