"""Values of a checkpoint's tree as plain JSON, for readers that have never heard of this package.

The tree is that of `runner.training.tree`, read without torch. What JSON does not have is refused,
not bent: an export must say what was saved.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

from runner.errors import UsageError

_LISTS = ("tuple", "size", "set", "frozenset", "deque")
_TEXTS = ("path", "date", "datetime", "dtype", "device")


def to_plain(tree: Any, path: str, tensor: Callable[[Mapping[str, Any]], Any]) -> Any:
    """The value of a tree; arrays and tensors as nested lists, which `tensor` gives for the latter.

    UsageError names the path of what JSON cannot hold.
    """
    if isinstance(tree, list):
        return [to_plain(item, f"{path}[{i}]", tensor) for i, item in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get("$")
    if kind is None:
        return {key: to_plain(item, f"{path}.{key}", tensor) for key, item in tree.items()}
    if kind == "tensor":
        return tensor(tree)
    value = tree.get("v")
    if kind == "array":
        return to_plain(value, path, tensor)
    if kind in ("ndarray", "numpy"):
        return _array(tree)
    if kind in _LISTS:
        return to_plain(value, path, tensor)
    if kind in _TEXTS:
        return str(value)
    if kind == "int":
        return int(str(value), 16)
    raise UsageError(f"{path} is a {kind}, which JSON does not have; leave it out of export.state")


def _array(tree: Mapping[str, Any]) -> Any:
    import numpy as np

    dtype = tree["dtype"]
    if not isinstance(dtype, str):
        raise UsageError("an array with named fields cannot be exported as JSON")
    flat = np.frombuffer(base64.b64decode(tree["v"]), np.dtype(dtype))
    if "shape" not in tree:
        return flat[0].item()
    return flat.reshape(tree["shape"], order=tree.get("order", "C")).tolist()
