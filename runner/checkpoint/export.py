"""What deployment needs of a checkpoint, and nothing else, as files that any tool opens.

model.safetensors   the weights, or their average, under the module's own names
config.json         the run's params, unless the job exports a config of its own
<key>.json          each key of run.state that the job names: statistics, for example
metrics.json        what was measured for exactly these weights
README.md           the model card: where all this comes from
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from runner.checkpoint import format as fmt
from runner.checkpoint.archive import Archive
from runner.checkpoint.copies import copy_file
from runner.checkpoint.manifest import Manifest, moment_to_json
from runner.checkpoint.plain import to_plain
from runner.errors import CheckpointInvalid, UnknownName, UsageError

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"
_AVERAGED = "module."  # AveragedModel of torch holds the module under this name


@dataclass(frozen=True)
class Wanted:
    """Which component's weights, and which values of run.state; `params` is what the job has."""

    component: str = "model"
    state: Sequence[str] = ()
    params: Mapping[str, Any] | None = None


class _Source:
    """The files of a checkpoint that are needed, copied and verified on their first use."""

    def __init__(self, archive: Archive, manifest: Manifest, folder: Path) -> None:
        self._archive, self._manifest, self._folder = archive, manifest, folder
        self._open: dict[str, tuple[memoryview, dict[str, fmt.TensorRange]]] = {}

    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self._path(fmt.STATE_FILE).read_bytes())
        return document

    def tensor(self, reference: Mapping[str, Any], what: str) -> tuple[fmt.TensorSpec, memoryview]:
        """The bytes of a tensor that the tree refers to."""
        if "dtype" in reference:
            raise UsageError(f"{what} is of {reference['dtype']}, which safetensors does not have")
        memory, ranges = self._file(str(reference["file"]))
        where = ranges[str(reference["name"])]
        spec = fmt.TensorSpec(what, where.dtype, where.shape)
        return spec, memory[where.begin : where.end]

    def _file(self, name: str) -> tuple[memoryview, dict[str, fmt.TensorRange]]:
        if name not in self._open:
            with self._path(name).open("rb") as file:
                memory = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            self._open[name] = memory, fmt.read_safetensors_header(memory, name)
        return self._open[name]

    def _path(self, name: str) -> Path:
        for entry in self._manifest.files:
            if entry.content_name == name:
                copy_file(self._archive, self._manifest, entry, self._folder)
                return self._folder / name
        raise CheckpointInvalid(self._manifest.name, f"it refers to {name}, which it does not have")


def export_model(archive: Archive, manifest: Manifest, wanted: Wanted, folder: Path) -> None:
    """Write the files into an empty folder; `parts` in it is for the copies that are read.

    UnknownName if the checkpoint has no such component or value, UsageError for a value that JSON
    does not hold.
    """
    parts = folder / "parts"
    parts.mkdir()
    source = _Source(archive, manifest, parts)
    document = source.document()
    digest = _write_weights(source, document, wanted.component, folder / WEIGHTS_FILE)
    values = document.get("state") or {}
    for key in wanted.state:
        if key not in values:
            raise UnknownName("value", key, list(values), f"in run.state of {manifest.name}")
        plain = to_plain(values[key], f"run.state[{key!r}]", lambda ref: _numbers(source, ref))
        _write_json(folder / f"{key}.json", plain)
    if not (folder / CONFIG_FILE).exists():
        _write_json(folder / CONFIG_FILE, manifest.provenance.get("params") or wanted.params or {})
    moment = moment_to_json(manifest.moment)
    _write_json(folder / "metrics.json", moment["metrics"])
    (folder / CARD_FILE).write_text(_card(manifest, wanted.component, digest))
    for path in parts.iterdir():
        path.unlink()
    parts.rmdir()


def _write_weights(source: _Source, document: Mapping[str, Any], component: str, path: Path) -> str:
    """One tensor for each name of the module, tied ones too; the SHA-256 of the file."""
    components = document["components"]
    if component not in components:
        raise UnknownName("component", component, list(components), "in the checkpoint")
    state = components[component].get("state")
    if not isinstance(state, dict) or "$" in state:
        raise UsageError(f"{component} is no module, so it has no weights to export")
    tensors = {}
    averaged = all(name.startswith(_AVERAGED) or name == "n_averaged" for name in state)
    for name, reference in state.items():
        if averaged and name == "n_averaged":
            continue
        if not isinstance(reference, dict) or reference.get("$") != "tensor":
            raise UsageError(f"{component}.{name} is no tensor, so safetensors cannot hold it")
        tensors[name.removeprefix(_AVERAGED) if averaged else name] = reference
    found = {name: source.tensor(reference, name) for name, reference in tensors.items()}
    header, ranges = fmt.safetensors_header(spec for spec, _ in found.values())
    digest = sha256(header)
    with path.open("xb") as file:
        file.write(header)
        for name in sorted(found, key=lambda name: ranges[name].begin):
            file.write(found[name][1])
            digest.update(found[name][1])
    return digest.hexdigest()


def _numbers(source: _Source, reference: Mapping[str, Any]) -> Any:
    """A tensor or a large array in run.state, as nested lists."""
    import numpy as np

    spec, memory = source.tensor(reference, str(reference.get("name")))
    kinds = {"F": "<f", "I": "<i", "U": "<u"}
    if spec.dtype[0] not in kinds or not spec.dtype[1:].isdigit():
        raise UsageError(f"{spec.name} is of {spec.dtype}, which JSON does not have")
    dtype = np.dtype(f"{kinds[spec.dtype[0]]}{int(spec.dtype[1:]) // 8}")
    return np.frombuffer(memory, dtype).reshape(spec.shape).tolist()


def _write_json(path: Path, value: Any) -> None:
    try:
        path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    except ValueError as error:
        raise UsageError(f"{path.name}: {error}; JSON has no nan and no inf") from error


def _card(manifest: Manifest, component: str, digest: str) -> str:
    moment = manifest.moment
    metrics = "".join(f"| {name} | {value:.6g} |\n" for name, value in moment.metrics.items())
    git = manifest.provenance.get("git") or {}
    commit = f"{git.get('commit') or 'unknown'}{' (with changes)' if git.get('dirty') else ''}"
    provenance = json.dumps(manifest.provenance, indent=1)
    return f"""# {manifest.run_id}, step {moment.step}

`{component}` of checkpoint `{manifest.name}`, saved {moment.created_at} (epoch {moment.epoch}).
Code: {commit}. SHA-256 of `{WEIGHTS_FILE}`: `{digest}`.

    import safetensors.torch
    model.load_state_dict(safetensors.torch.load_file("{WEIGHTS_FILE}"))

| metric | value |
|---|---|
{metrics}
## Provenance

```json
{provenance}
```
"""
