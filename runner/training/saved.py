"""A saved state as it lies in a slot, or in a file like one: its place, its tree, its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoint import format as fmt
from runner.checkpoint.format import FileImage
from runner.checkpoint.manifest import Moment, moment_from_json
from runner.errors import RestoreError, SpoolError
from runner.spool import Marker, open_slot
from runner.training.tensors import TensorSource
from runner.training.tree import Decoder


@dataclass(frozen=True)
class SavedState:
    """A checkpoint as it lies in memory: where it was taken, its tree, its tensors.

    `components` names those that a new run begins with; empty where the whole run goes on.
    """

    moment: Moment
    document: Mapping[str, Any]
    source: TensorSource
    components: list[str]


def open_saved(path: Path, marker: Marker) -> SavedState:
    """Map a checkpoint and read its tree. SpoolError or RestoreError if that cannot be."""
    try:
        images = [FileImage(i["name"], i["offset"], i["size"]) for i in marker.images]
        memory = memoryview(open_slot(path, 0))
        fmt.check_images(images, len(memory), path.name)
        state = next(image for image in images if image.name == fmt.STATE_FILE)
        document = json.loads(bytes(memory[state.offset : state.offset + state.size]))
        moment = moment_from_json(marker.moment)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise SpoolError(f"{path} cannot be restored from: {error}") from error
    if document.get("version") != 1:
        raise RestoreError(f"state.json has version {document.get('version')!r}, not 1")
    components = list(marker.facts.get("components", ()))
    return SavedState(moment, document, TensorSource(memory, images), components)


def state_dicts(saved: SavedState) -> tuple[dict[str, Any], Any]:
    """The components by name, each as its `state_dict()` gave it, and the script's own state.

    Tensors are on the CPU, and are views of what is mapped.
    """
    decoder = Decoder(saved.source.view)
    document = saved.document
    components = {n: _own(decoder.decode(tree)) for n, tree in document["components"].items()}
    return components, decoder.decode(document.get("state"))


def _own(value: Any) -> Any:
    """What the object itself gave, without what is remembered of it beside that."""
    if isinstance(value, dict) and set(value) == {"state", "frozen", "eval"}:
        return value["state"]
    if isinstance(value, dict) and {"param_groups", "parameters"} < set(value):
        return {key: field for key, field in value.items() if key != "parameters"}
    return value
