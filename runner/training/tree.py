"""Python values as JSON without loss: what `state.json` holds beside the tensors.

JSON alone would turn tuples into lists, keys into strings, and drop infinities, bytes and types.
Here a plain list, string-keyed dict, string, bool, None, small int and finite float stand for
themselves; everything else is `{"$": kind, …}`. A type that is not listed is an error that names
the path of the value: nothing is skipped in silence, and nothing is pickled.
"""

from __future__ import annotations

import base64
import datetime as dt
import math
import struct
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import numpy as np
import torch

from runner.errors import CaptureError, RestoreError

Json = Any
_FACTORIES: dict[str, Callable[[], Any]] = {
    factory.__name__: factory
    for factory in (int, float, complex, str, bytes, bool, list, tuple, dict, set, frozenset)
}
_SAFE_INT = 1 << 53  # beyond this, other readers of JSON lose digits
_MAX_DEPTH = 200
_INLINE_ARRAY_BYTES = 16 << 10  # a larger array goes beside the tensors, not into the JSON


class Encoder:
    """Turns values into JSON, handing tensors to `tensor(value, path)`, which gives a reference."""

    def __init__(self, tensor: Callable[[torch.Tensor, str], Json]) -> None:
        self._tensor = tensor

    def encode(self, value: Any, path: str, depth: int = 0) -> Json:
        """The JSON of a value. CaptureError names the path of the first one that cannot be."""
        if depth > _MAX_DEPTH:
            raise CaptureError(path, "is nested too deeply, or contains itself")
        kind = type(value)
        if value is None or kind is str or kind is bool:
            return value
        if kind is int:
            return value if -_SAFE_INT < value < _SAFE_INT else {"$": "int", "v": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$": "float", "v": _float_bits(value)}
        if kind is list:
            return self._items(value, path, depth)
        if kind is dict:
            return self._dict(value, path, depth)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        encode = _ENCODERS.get(kind)
        if encode is not None:
            return encode(self, value, path, depth)
        if isinstance(value, np.generic):
            dtype = _dtype_description(value.dtype, path)
            return {"$": "numpy", "dtype": dtype, "v": _base64(value.tobytes())}
        if kind in _PATHS.values():
            return {"$": "path", "type": kind.__name__, "v": str(value)}
        raise CaptureError(
            path,
            f"is a {_describe(value)}, which cannot be saved; keep it out of the state, or give "
            "its owner a state_dict() of plain values",
        )

    def _items(self, values: Any, path: str, depth: int) -> list[Json]:
        if all(type(v) is int and -_SAFE_INT < v < _SAFE_INT for v in values):
            return list(values)  # the state of `random` is 625 of them, at every snapshot
        return [self.encode(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(values)]

    def _pairs(self, value: Mapping[Any, Any], path: str, depth: int) -> list[Json]:
        return [
            [
                self.encode(k, f"a key of {path}", depth + 1),
                self.encode(v, f"{path}[{_repr(k)}]", depth + 1),
            ]
            for k, v in value.items()
        ]

    def _dict(self, value: dict[Any, Any], path: str, depth: int) -> Json:
        if all(type(key) is str for key in value) and "$" not in value:
            return {k: self.encode(v, f"{path}[{k!r}]", depth + 1) for k, v in value.items()}
        return {"$": "dict", "v": self._pairs(value, path, depth)}

    def _set(self, value: Any, path: str, depth: int) -> Json:
        encoded = [self.encode(v, f"an element of {path}", depth + 1) for v in value]
        # Sets have no order of their own; one is chosen so that equal sets are equal bytes.
        return {"$": type(value).__name__, "v": sorted(encoded, key=repr)}

    def _defaultdict(self, value: defaultdict[Any, Any], path: str, depth: int) -> Json:
        factory = value.default_factory
        name = None if factory is None else getattr(factory, "__name__", "")
        if name is not None and _FACTORIES.get(name) is not factory:
            raise CaptureError(path, "is a defaultdict whose factory is no builtin type")
        return {"$": "defaultdict", "factory": name, "v": self._pairs(value, path, depth)}

    def _array(self, value: np.ndarray[Any, Any], path: str, depth: int) -> Json:
        if value.dtype.hasobject:
            raise CaptureError(path, "is an array of Python objects, which cannot be saved")
        if (
            value.nbytes > _INLINE_ARRAY_BYTES
            and value.dtype.isnative
            and value.dtype.kind in "biufc"
        ):
            try:
                return {"$": "array", "v": self._tensor(_as_tensor(value), path)}
            except TypeError:
                pass  # a dtype that torch does not have
        order: Literal["C", "F"] = "F" if value.flags.fnc else "C"
        return {
            "$": "ndarray",
            "dtype": _dtype_description(value.dtype, path),
            "shape": list(value.shape),
            "order": order,
            "v": _base64(value.tobytes(order)),
        }


_ENCODERS: dict[type, Callable[[Encoder, Any, str, int], Json]] = {
    tuple: lambda e, v, p, d: {"$": "tuple", "v": e._items(v, p, d)},
    torch.Size: lambda e, v, p, d: {"$": "size", "v": list(v)},
    set: Encoder._set,
    frozenset: Encoder._set,
    OrderedDict: lambda e, v, p, d: {"$": "OrderedDict", "v": e._pairs(v, p, d)},
    Counter: lambda e, v, p, d: {"$": "Counter", "v": e._pairs(v, p, d)},
    defaultdict: Encoder._defaultdict,
    deque: lambda e, v, p, d: {"$": "deque", "maxlen": v.maxlen, "v": e._items(v, p, d)},
    bytes: lambda e, v, p, d: {"$": "bytes", "v": _base64(v)},
    bytearray: lambda e, v, p, d: {"$": "bytearray", "v": _base64(v)},
    complex: lambda e, v, p, d: {"$": "complex", "v": [_float_bits(v.real), _float_bits(v.imag)]},
    dt.datetime: lambda e, v, p, d: _instant(v, p, "datetime"),
    dt.date: lambda e, v, p, d: {"$": "date", "v": v.isoformat()},
    dt.time: lambda e, v, p, d: _instant(v, p, "time"),
    dt.timedelta: lambda e, v, p, d: {"$": "timedelta", "v": [v.days, v.seconds, v.microseconds]},
    np.ndarray: Encoder._array,
    torch.dtype: lambda e, v, p, d: {"$": "dtype", "v": str(v).removeprefix("torch.")},
    torch.device: lambda e, v, p, d: {"$": "device", "v": str(v)},
}


class Decoder:
    """The inverse. `tensor(reference)` gives what the encoder's `tensor` referred to."""

    def __init__(self, tensor: Callable[[Mapping[str, Any]], torch.Tensor]) -> None:
        self._tensor = tensor

    def decode(self, tree: Json) -> Any:
        """The value. RestoreError if the JSON is none that an encoder wrote."""
        try:
            return self._decode(tree)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise RestoreError(f"{_STATE} holds a value that cannot be read: {error!r}") from error

    def _decode(self, tree: Json) -> Any:
        if isinstance(tree, list):
            return [self._decode(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        if "$" not in tree:
            return {key: self._decode(value) for key, value in tree.items()}
        kind = tree["$"]
        if kind == "tensor":
            return self._tensor(tree)
        if kind == "array":
            return self._tensor(tree["v"]).numpy()
        if kind == "idle":
            return self._decode(tree["v"])
        return _DECODERS[kind](self, tree)

    def _pairs(self, pairs: list[Json]) -> list[tuple[Any, Any]]:
        return [(self._decode(key), self._decode(value)) for key, value in pairs]


_STATE = "state.json"
_PATHS = {cls.__name__: cls for cls in (Path, PosixPath, PurePosixPath, PureWindowsPath)}
_DECODERS: dict[str, Callable[[Decoder, dict[str, Any]], Any]] = {
    "int": lambda d, t: int(t["v"], 0),
    "float": lambda d, t: _float_from_bits(t["v"]),
    "complex": lambda d, t: complex(*map(_float_from_bits, t["v"])),
    "tuple": lambda d, t: tuple(d._decode(t["v"])),
    "size": lambda d, t: torch.Size(t["v"]),
    "set": lambda d, t: set(d._decode(t["v"])),
    "frozenset": lambda d, t: frozenset(d._decode(t["v"])),
    "dict": lambda d, t: dict(d._pairs(t["v"])),
    "OrderedDict": lambda d, t: OrderedDict(d._pairs(t["v"])),
    "Counter": lambda d, t: Counter(dict(d._pairs(t["v"]))),
    "defaultdict": lambda d, t: defaultdict(
        None if t["factory"] is None else _FACTORIES[t["factory"]], d._pairs(t["v"])
    ),
    "deque": lambda d, t: deque(d._decode(t["v"]), t["maxlen"]),
    "bytes": lambda d, t: base64.b64decode(t["v"], validate=True),
    "bytearray": lambda d, t: bytearray(base64.b64decode(t["v"], validate=True)),
    "datetime": lambda d, t: _completed(dt.datetime.fromisoformat(t["v"]), t),
    "date": lambda d, t: dt.date.fromisoformat(t["v"]),
    "time": lambda d, t: _completed(dt.time.fromisoformat(t["v"]), t),
    "timedelta": lambda d, t: dt.timedelta(*t["v"]),
    "path": lambda d, t: _PATHS[t["type"]](t["v"]),
    "numpy": lambda d, t: _array_from(t["v"], t["dtype"], [])[()],
    "ndarray": lambda d, t: _array_from(t["v"], t["dtype"], t["shape"], t["order"]),
    "dtype": lambda d, t: torch_dtype(t["v"]),
    "device": lambda d, t: torch.device(t["v"]),
}


def is_idle(tree: Json) -> bool:
    """Whether a value is saved without being part of what the digest of the content covers."""
    return isinstance(tree, dict) and tree.get("$") == "idle"


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of this name, `float32` for `torch.float32`. ValueError if torch has none."""
    value = getattr(torch, name, None)
    if not isinstance(value, torch.dtype):
        raise ValueError(f"this version of torch has no dtype {name!r}")
    return value


def first_difference(before: Json, after: Json, path: str) -> str | None:
    """Where two encoded trees first differ, as a path with both values; None if they are equal."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(k for k in after if k not in before)]:
            inner = f"{path}[{key!r}]"
            if key not in before or key not in after:
                return f"{inner} is in one of them only"
            found = first_difference(before[key], after[key], inner)
            if found:
                return found
        return None
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            found = first_difference(one, other, f"{path}[{index}]")
            if found:
                return found
        return None
    same = type(before) is type(after) and before == after
    return None if same else f"{path}: {_short(before)} became {_short(after)}"


def _repr(key: Any) -> str:
    try:
        return repr(key)
    except ValueError:  # an int of more than 4,300 digits
        return "…"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _describe(value: Any) -> str:
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


def _float_bits(value: float) -> str:
    return struct.pack(">d", value).hex()


def _float_from_bits(text: str) -> float:
    value: float = struct.unpack(">d", bytes.fromhex(text))[0]
    return value


def _instant(value: dt.datetime | dt.time, path: str, kind: str) -> Json:
    if value.tzinfo is not None and type(value.tzinfo) is not dt.timezone:
        raise CaptureError(path, "has a named time zone, which cannot be saved; convert it to UTC")
    tree: dict[str, Any] = {"$": kind, "v": value.isoformat(), "fold": value.fold}
    offset = None if value.tzinfo is None else value.tzinfo.utcoffset(None)
    if offset is not None and offset.microseconds:
        # Python 3.11 reads an offset of less than a second as none.
        tree["offset"] = [offset.days, offset.seconds, offset.microseconds]
    return tree


def _completed(value: Any, tree: dict[str, Any]) -> Any:
    """With what the ISO format does not say, or is not read from it."""
    if "offset" in tree:
        value = value.replace(tzinfo=dt.timezone(dt.timedelta(*tree["offset"])))
    return value.replace(fold=tree["fold"])


def _as_tensor(value: np.ndarray[Any, Any]) -> torch.Tensor:
    """The same memory where torch can have it, strided as it is."""
    if any(stride < 0 or stride % value.itemsize for stride in value.strides):
        value = np.ascontiguousarray(value)
    if value.flags.writeable:
        return torch.from_numpy(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is only read
        return torch.from_numpy(value)


def _array_from(
    content: str, description: Json, shape: list[int], order: Literal["C", "F"] = "C"
) -> np.ndarray[Any, Any]:
    dtype, raw = _dtype_from(description), base64.b64decode(content, validate=True)
    if dtype.itemsize == 0:  # an empty string
        return np.zeros(shape, dtype)
    if len(raw) != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{len(raw)} bytes for an array of {shape} {dtype}")
    return np.ndarray(shape, dtype, bytearray(raw) or None, order=order)


def _dtype_description(dtype: np.dtype[Any], path: str) -> Json:
    if dtype.names is None:
        return dtype.str
    try:
        return dtype.descr
    except ValueError as error:
        raise CaptureError(path, f"is of a dtype that cannot be saved: {error}") from error


def _dtype_from(description: Json) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.lib.format.descr_to_dtype(_fields_from(description))
    return dtype


def _fields_from(description: Json) -> Any:
    """What JSON has made lists of: fields (name or title and name, dtype, maybe a shape)."""
    if isinstance(description, str):
        return description
    return [
        (
            tuple(name) if isinstance(name, list) else name,
            _fields_from(inner),
            *(tuple(extents) for extents in shape),
        )
        for name, inner, *shape in description
    ]
