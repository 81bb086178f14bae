"""Everything that a run has to remember, as one tree: components, the script's values, all RNGs.

What the components are and keep is in `components`; here they become the content of `state.json`
and the tensors beside it, and come back from there.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from runner.errors import RestoreError, UnknownName
from runner.training.components import (
    GeneratorComponent,
    ModuleComponent,
    Parameters,
    component_for,
)
from runner.training.rng import (
    Generator,
    capture_rng,
    restore_rng,
)
from runner.training.tensors import TensorSink, TensorSource
from runner.training.tree import Decoder, Encoder, Json, is_idle

STATE_VERSION = 1


class TrainingState:
    """Everything that a run has to remember: the components, the script's values, all RNGs."""

    def __init__(self, stateful: Mapping[str, Any], values: dict[Any, Any]) -> None:
        parameters = Parameters()
        self.values = values
        self._idle = _Idle(_encode_rng())
        self.components = {
            name: component_for(name, target, parameters) for name, target in stateful.items()
        }

    @property
    def generators(self) -> list[Generator]:
        """The random generators that are components."""
        parts = self.components.values()
        return [part.generator for part in parts if isinstance(part, GeneratorComponent)]

    @property
    def modules(self) -> list[str]:
        """The names of the components that are modules: those with weights."""
        return list(self.models)

    @property
    def models(self) -> dict[str, nn.Module]:
        """The components that are modules, by name."""
        parts = self.components.items()
        return {name: part.module for name, part in parts if isinstance(part, ModuleComponent)}

    def encode(self, progress: Mapping[str, Any]) -> tuple[dict[str, Json], TensorSink]:
        """The content of `state.json`, and the live tensors that go beside it.

        CaptureError names the path of the first value that cannot be saved.
        """
        sink = TensorSink()
        encoder = Encoder(sink.add)
        components = {name: part.encode(encoder) for name, part in self.components.items()}
        document = {
            "version": STATE_VERSION,
            "components": components,
            "state": encoder.encode(self.values, "state"),
            "progress": encoder.encode(dict(progress), "progress"),
            "rng": _encode_rng(),
        }
        return self._idle.mark(document), sink

    def restore(self, document: Mapping[str, Any], source: TensorSource, *, final: bool) -> None:
        """Put everything but the progress in place. RestoreError if it does not fit."""
        saved = document["components"]
        odd = sorted(set(saved) ^ set(self.components))
        if odd:
            where = "the checkpoint, not in" if odd[0] in saved else "no checkpoint, only in"
            raise RestoreError(f"component {odd[0]!r} is in {where} attach(…) of this script")
        for name, part in self.components.items():
            part.check(saved[name], source, final=final)
        for name, part in self.components.items():
            with _naming(name):
                part.restore(part.decode(saved[name], source), final=final)
        put_into(self.values, Decoder(source.own).decode(document["state"]))
        self._idle.restored(document["rng"])
        restore_rng(Decoder(source.own).decode(document["rng"]))

    def load(self, document: Mapping[str, Any], source: TensorSource, names: list[str]) -> None:
        """Put the saved values of some components into the live objects."""
        for name in names:
            if name not in self.components or name not in document["components"]:
                raise UnknownName("component", name, list(document["components"]))
        saved = document["components"]
        for name in names:
            self.components[name].check(saved[name], source, final=True)
        for name in names:
            part = self.components[name]
            with _naming(name):
                part.load(part.decode(saved[name], source))


class _Idle:
    """Streams of random numbers that nobody has drawn from since the run began.

    Python and numpy begin each process at another place unless they are seeded. In a run that never
    uses one of them, where it stands means nothing: it is saved all the same, but marked, and the
    digest of the content passes over it. Otherwise no two runs of a script that seeds torch alone
    would ever have the same digest.
    """

    def __init__(self, rng: Mapping[str, Json]) -> None:
        self._at_start = {name: rng[name] for name in ("python", "numpy")}

    def restored(self, rng: Mapping[str, Json]) -> None:
        """Take over what is idle from a saved state."""
        saved = {name: rng[name] for name in ("python", "numpy")}
        self._at_start = {name: value["v"] for name, value in saved.items() if is_idle(value)}

    def mark(self, document: dict[str, Json]) -> dict[str, Json]:
        """Mark the idle streams, also where a loop remembers how they stood when it began."""
        rng = document["rng"]
        self._at_start = {n: value for n, value in self._at_start.items() if rng[n] == value}
        document["rng"] = self._marked(rng)
        loop = document["progress"]["loop"] if document["progress"] else None
        if loop is not None:
            document["progress"]["loop"] = self._marked(loop)
        return document

    def _marked(self, tree: Json) -> Json:
        if any(tree == value for value in self._at_start.values()):
            return {"$": "idle", "v": tree}
        if isinstance(tree, dict):
            return {key: self._marked(value) for key, value in tree.items()}
        if isinstance(tree, list) and len(tree) < 100:
            return [self._marked(value) for value in tree]
        return tree


@contextlib.contextmanager
def _naming(component: str) -> Iterator[None]:
    """Whatever an object raises while it is loaded says which one it is."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, RestoreError) else repr(error)
        raise RestoreError(f"{component} did not take its saved state: {reason}") from error


def put_into(live: Any, saved: Any) -> Any:
    """Give `live` the value of `saved` where it can be changed, else `saved`.

    A script holds on to what it got out of `run.state`: a list that it appends to, an array that
    its data set reads. These objects stay the same ones.
    """
    if type(live) is not type(saved):
        return saved
    if isinstance(live, dict):
        items = {k: put_into(live[k], v) if k in live else v for k, v in saved.items()}
        live.clear()
        live.update(items)
    elif isinstance(live, list):
        known = [put_into(one, other) for one, other in zip(live, saved, strict=False)]
        live[:] = known + saved[len(known) :]
    elif isinstance(live, deque) and live.maxlen == saved.maxlen:
        live.clear()
        live.extend(saved)
    elif isinstance(live, set):
        live.clear()
        live.update(saved)
    elif isinstance(live, np.ndarray) and live.flags.writeable and _alike(live, saved):
        live[...] = saved
    elif isinstance(live, torch.Tensor) and live.device == saved.device and _alike(live, saved):
        with torch.no_grad():
            live.copy_(saved)
    else:
        return saved
    return live


def _alike(live: Any, saved: Any) -> bool:
    if isinstance(live, torch.Tensor) and (live.stride() != saved.stride() or live.is_inference()):
        return False  # cannot be written to, or holds its elements otherwise
    return bool(live.shape == saved.shape and live.dtype == saved.dtype)


def _encode_rng() -> dict[str, Json]:
    return {
        name: Encoder(TensorSink().add).encode(value, f"rng.{name}")
        for name, value in capture_rng().items()
    }
