"""What differs between where two checkpoints come from: their manifests, fact by fact. Pure.

config       the job as it was submitted, the parameters, the arguments of the model
code         commit, branch, uncommitted changes, command
data         what the script has fingerprinted
environment  packages, Python, torch, drivers, machine, settings, seeds
model        the tree of the model's parts
place        step, epoch, triggers
metrics      what was logged for the very state
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.checkpoint.manifest import Manifest, moment_to_json

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "config": ("job", "params", "notes"),
    "code": ("git", "command"),
    "data": ("dataset",),
    "environment": (
        *("packages", "python", "torch", "cuda", "cudnn", "driver", "gpus", "cpu", "host"),
        *("platform", "image", "environment", "settings", "seeds"),
    ),
    "model": ("model",),
    "tracker": ("tracker",),
}
_PLACE = ("attempt", "step", "epoch", "batch", "triggers", "scope", "healthy")


@dataclass(frozen=True)
class Change:
    """A fact that is not the same in both; None where there is none."""

    section: str
    key: str
    before: Any
    after: Any


def changed_facts(one: Manifest, other: Manifest) -> list[Change]:
    """All facts that differ, section by section; what no section names is in `other`."""
    changes: list[Change] = []
    named = {key for keys in SECTIONS.values() for key in keys}
    rest = tuple(sorted((one.provenance.keys() | other.provenance.keys()) - named))
    for section, keys in {**SECTIONS, "other": rest}.items():
        for key in keys:
            before, after = one.provenance.get(key), other.provenance.get(key)
            changes += (Change(section, *found) for found in _differences(key, before, after))
    moments = moment_to_json(one.moment), moment_to_json(other.moment)
    for key in _PLACE:
        changes += (Change("place", *f) for f in _differences(key, *(m[key] for m in moments)))
    for name in sorted(moments[0]["metrics"].keys() | moments[1]["metrics"].keys()):
        values = [moment["metrics"].get(name) for moment in moments]
        if values[0] != values[1]:
            changes.append(Change("metrics", name, values[0], values[1]))
    return changes


def _differences(key: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for inner in [*one, *(name for name in other if name not in one)]:
            yield from _differences(f"{key}.{inner}", one.get(inner), other.get(inner))
    elif one != other or type(one) is not type(other):
        yield key, one, other
