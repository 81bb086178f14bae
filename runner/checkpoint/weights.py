"""The weights of a full state: what a checkpoint of scope `weights` is made of.

A snapshot is always of the full state, so that a run can continue from it. Where only the weights
are to be stored, their components' part of the tree is kept, and the files that it refers to.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from runner.checkpoint.format import STATE_FILE


def weights_alone(
    files: Mapping[str, memoryview], components: Collection[str]
) -> dict[str, memoryview]:
    """The files of these components, and a `state.json` that has nothing else."""
    document = json.loads(bytes(files[STATE_FILE]))
    kept = {name: tree for name, tree in document["components"].items() if name in components}
    reduced = json.dumps(
        {"version": document["version"], "components": kept},
        separators=(",", ":"),
        allow_nan=False,
    )
    wanted = set(_files_of(kept))
    chosen = {name: memory for name, memory in files.items() if name in wanted}
    return {**chosen, STATE_FILE: memoryview(reduced.encode())}


def _files_of(tree: Any) -> Iterator[str]:
    """The files that a tree refers to: a tied tensor may lie in another component's."""
    if isinstance(tree, list):
        for item in tree:
            yield from _files_of(item)
    elif isinstance(tree, dict):
        if tree.get("$") == "tensor":
            yield tree["file"]
        for item in tree.values():
            yield from _files_of(item)
