"""Objects ⇄ values: what each kind of object keeps, and how it is put back exactly as it was.

A component is anything registered with `attach`. Modules keep their names through `torch.compile`
and DDP; optimizers keep the names of their parameters, so that moments never meet another weight.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import nn

from runner.errors import RestoreError
from runner.training.rng import (
    GENERATOR_TYPES,
    Generator,
    generator_state,
    set_generator_state,
)
from runner.training.tensors import TensorSource
from runner.training.tree import Decoder, Encoder, Json

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")  # the name of a file as well


class Component(Protocol):
    """One registered object."""

    def encode(self, encoder: Encoder) -> Json:
        """The state as JSON; its tensors go to the encoder, live and not copied."""

    def check(self, saved: Json, source: TensorSource, *, final: bool) -> None:
        """RestoreError if a state does not fit, as far as that can be seen before it is put back.

        Nothing is changed, and no tensor is copied.
        """

    def decode(self, saved: Json, source: TensorSource) -> Any:
        """The state as values, for `restore` or `load`: nothing that may be kept is a view."""

    def restore(self, value: Any, *, final: bool) -> None:
        """Put a state back that fits.

        `final` is False at `attach`, and True when the loop has come back to the saved place.
        """

    def load(self, value: Any) -> None:
        """Put only the values back, as `run.load` wants it: no flags, nothing added."""


class Parameters:
    """The parameters of all registered modules: `model.encoder.weight` ⇄ the object."""

    def __init__(self) -> None:
        self.modules: list[ModuleComponent] = []

    def named(self) -> dict[str, nn.Parameter]:
        """Every parameter under each of its names."""
        return {
            f"{component.name}.{name}": parameter
            for component in self.modules
            for name, parameter in component.parameters()
        }

    def names(self) -> dict[int, str]:
        """The first name of every parameter, by `id`."""
        names: dict[int, str] = {}
        for name, parameter in self.named().items():
            names.setdefault(id(parameter), name)
        return names


def component_for(name: str, target: Any, parameters: Parameters) -> Component:
    """The component for an object. TypeError if it is none that can be saved."""
    if _NAME.fullmatch(name) is None:
        raise TypeError(f"attach({name}=…): a name has ASCII letters, digits and _ only")
    if isinstance(target, nn.Module):
        module = ModuleComponent(name, target)
        parameters.modules.append(module)
        return module
    if isinstance(target, torch.optim.Optimizer):
        return OptimizerComponent(name, target, parameters)
    if isinstance(target, GENERATOR_TYPES):
        return GeneratorComponent(name, target)
    if callable(getattr(target, "state_dict", None)) and callable(
        getattr(target, "load_state_dict", None)
    ):
        return ObjectComponent(name, target)
    raise TypeError(
        f"attach({name}=…) got a {type(target).__qualname__}: it has no state_dict() and "
        "load_state_dict(), and is no random generator; plain values belong into run.state"
    )


class ModuleComponent:
    """A torch module: parameters, persistent buffers, what is frozen, what is in eval mode."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self._canonical_names: dict[str, str] = {}

    def encode(self, encoder: Encoder) -> Json:
        saved = {self._canonical(key): value for key, value in self.module.state_dict().items()}
        frozen = [name for name, p in self.parameters() if not p.requires_grad]
        in_eval = [self._canonical(n) for n, m in self.module.named_modules() if not m.training]
        return {"state": encoder.encode(saved, self.name), "frozen": frozen, "eval": in_eval}

    def check(self, saved: Json, source: TensorSource, *, final: bool) -> None:
        state, live = Decoder(source.view).decode(saved["state"]), self._live()
        missing = [name for name in live if name not in state]
        extra = [name for name in state if name not in live]
        if missing or extra:
            which = f"{missing[0]!r} is not in it" if missing else f"only it has {extra[0]!r}"
            raise RestoreError(f"{self.name} does not fit the checkpoint: {which}")
        for name in self._copied():
            if name in live:
                self._check(name, state[name], live[name][1])

    def decode(self, saved: Json, source: TensorSource) -> Any:
        own, state = Decoder(source.own), saved["state"]
        if "$" in state:  # what a parameter may be called, and then the tree is another one
            return own.decode(saved)
        # A view is memory of a slot, in which later snapshots lie: who keeps it changes them.
        view, copied = Decoder(source.view), set(self._copied())
        values = {n: (view if n in copied else own).decode(tree) for n, tree in state.items()}
        return {"state": values, "frozen": saved["frozen"], "eval": saved["eval"]}

    def restore(self, value: Any, *, final: bool) -> None:
        self.load(value)
        frozen, in_eval = set(value["frozen"]), set(value["eval"])
        for name, parameter in self.parameters():
            if parameter.requires_grad == (name in frozen):
                parameter.requires_grad_(name not in frozen)
        for name, module in self.module.named_modules():
            module.training = self._canonical(name) not in in_eval

    def load(self, value: Any) -> None:
        saved = value["state"]
        self.module.load_state_dict({key: saved[name] for name, (key, _) in self._live().items()})
        # What a module loads in its own way may take another shape by it: seen only now.
        of_torch, live = set(self._copied()), self._live()
        for name in live.keys() & saved.keys() - of_torch:
            if name.rpartition(".")[2] != "_extra_state":
                self._check(name, saved[name], live[name][1])

    def _live(self) -> dict[str, tuple[str, Any]]:
        """By the saved name: the name now, with all wrappers, and the value."""
        state = self.module.state_dict()
        return {self._canonical(key): (key, value) for key, value in state.items()}

    def _copied(self) -> Iterator[str]:
        """The parameters and buffers that torch copies a saved value into: it keeps none."""
        if _is_of_torch(self.module.load_state_dict):
            yield from map(self._canonical, _loaded_by_torch(self.module))

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter with its name, a tied one under each of its names."""
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            yield self._canonical(name), parameter

    def _check(self, name: str, saved: Any, live: Any) -> None:
        if not isinstance(live, torch.Tensor) or nn.parameter.is_lazy(live):
            return
        if not isinstance(saved, torch.Tensor):
            raise RestoreError(f"{self.name}.{name} was no tensor when it was saved")
        if saved.shape != live.shape or saved.dtype != live.dtype:
            raise RestoreError(
                f"{self.name}.{name} was saved as {saved.dtype} {list(saved.shape)} "
                f"and is {live.dtype} {list(live.shape)} now"
            )

    def _canonical(self, key: str) -> str:
        """A name without the layers that torch.compile and DDP put around a module."""
        known = self._canonical_names.get(key)
        if known is None:
            kept: list[str] = []
            module: nn.Module | None = self.module
            for part in key.split(".") if key else []:
                if module is None or part != _wrapped_attribute(module):
                    kept.append(part)
                module = module._modules.get(part) if module is not None else None
            known = self._canonical_names[key] = ".".join(kept)
        return known


def _loaded_by_torch(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """The names of all parameters and buffers below, without those of modules with a way of their
    own to load them: that, or a hook before it, is given what belongs to its children as well."""
    hooks = [getattr(h, "hook", h) for h in module._load_state_dict_pre_hooks.values()]
    if not all(map(_is_of_torch, [module._load_from_state_dict, *hooks])):
        return
    for name in [*module._parameters.keys(), *module._buffers.keys()]:
        yield prefix + name
    for name, child in module._modules.items():
        if child is not None:
            yield from _loaded_by_torch(child, f"{prefix}{name}.")


def _is_of_torch(function: Any) -> bool:
    """Whether it is defined in `torch.nn`: batch norms and lazy modules load in ways of their own,
    but keep nothing. Those of `torch.ao` do."""
    return str(getattr(function, "__module__", "")).startswith("torch.nn.")


def _wrapped_attribute(module: nn.Module) -> str | None:
    """The attribute under which a wrapper holds the module that the user means.

    By type, not by name: `AveragedModel` has a `module` by nature, and it stays in the names.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return "module"
    # OptimizedModule is what torch.compile returns; importing it would load the whole compiler.
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" else None


class OptimizerComponent:
    """A torch optimizer, with the names of its parameters in their order."""

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, parameters: Parameters) -> None:
        self._name, self._optimizer, self._registered = name, optimizer, parameters

    def encode(self, encoder: Encoder) -> Json:
        saved = dict(self._optimizer.state_dict()) | {"parameters": self._parameters()}
        return _encode_fields(encoder, self._name, saved)

    def check(self, saved: Json, source: TensorSource, *, final: bool) -> None:
        if final or not self._lacks_groups(saved):
            self._check_parameters(saved["parameters"], may_add=final)

    def decode(self, saved: Json, source: TensorSource) -> Any:
        return Decoder(source.own).decode(saved)

    def restore(self, value: Any, *, final: bool) -> None:
        if self._lacks_groups(value):
            if not final:
                return  # the script may add the group itself on its way to the saved place
            self._add_groups(value)
        self.load(value)

    def load(self, value: Any) -> None:
        saved = {key: content for key, content in value.items() if key != "parameters"}
        self._optimizer.load_state_dict(saved)
        self._put_back_as_saved(saved.get("state", {}))

    def _lacks_groups(self, saved: Mapping[str, Any]) -> bool:
        return len(self._optimizer.param_groups) < len(saved["parameters"])

    def _parameters(self) -> list[list[str]]:
        names = self._registered.names()
        return [
            [names.get(id(p), f"unnamed {list(p.shape)}") for p in group["params"]]
            for group in self._optimizer.param_groups
        ]

    def _check_parameters(self, saved: list[list[str]], *, may_add: bool) -> None:
        live = self._parameters()
        if may_add and len(live) < len(saved):
            live += self._groups_to_add(saved)
        if len(saved) != len(live):
            raise RestoreError(
                f"{self._name} had {len(saved)} parameter groups and has {len(live)} now"
            )
        for group, (before, now) in enumerate(zip(saved, live, strict=True)):
            where = f"{self._name}.param_groups[{group}]"
            if len(before) != len(now):
                raise RestoreError(f"{where} had {len(before)} parameters and has {len(now)} now")
            for index, (one, other) in enumerate(zip(before, now, strict=True)):
                if one != other:
                    raise RestoreError(
                        f"{where}['params'][{index}] was {one} and is {other} now: "
                        "its state would meet another parameter"
                    )

    def _groups_to_add(self, saved: list[list[str]]) -> list[list[str]]:
        """The names of the groups that the saved optimizer got on its way."""
        registered = self._registered.named()
        added = saved[len(self._optimizer.param_groups) :]
        for group, names in enumerate(added, len(self._optimizer.param_groups)):
            unknown = [name for name in names if name not in registered]
            if unknown:
                raise RestoreError(
                    f"{self._name}.param_groups[{group}] was added while the run went on, and "
                    f"{unknown[0]} belongs to no registered module"
                )
        return added

    def _add_groups(self, value: Any) -> None:
        registered, begin = self._registered.named(), len(self._optimizer.param_groups)
        for group, names in enumerate(self._groups_to_add(value["parameters"]), begin):
            options = {k: v for k, v in value["param_groups"][group].items() if k != "params"}
            params = [registered[name] for name in names]
            self._optimizer.add_param_group({"params": params, **options})

    def _put_back_as_saved(self, saved: Mapping[Any, Any]) -> None:
        """`Optimizer.load_state_dict` casts state to the parameter's dtype, and takes a string for
        a collection: undo it.

        Source: `_process_value_according_to_param_policy` in torch/optim/optimizer.py.
        """
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for index, entries in saved.items():
            of_parameter = type(index) is int and 0 <= index < len(parameters)
            live = self._optimizer.state.get(parameters[index] if of_parameter else index, {})
            for key, value in entries.items() if isinstance(entries, dict) else ():
                if key in live:
                    live[key] = _placed(value, live[key])


def _placed(saved: Any, live: Any) -> Any:
    """The saved value, its tensors on the devices where those of `live` are."""
    if isinstance(saved, torch.Tensor):
        return saved.to(live.device) if isinstance(live, torch.Tensor) else saved
    if isinstance(saved, dict):
        for key, value in saved.items():
            saved[key] = _placed(value, live.get(key) if isinstance(live, dict) else None)
        return saved
    if isinstance(saved, list | tuple | deque):
        others = live if isinstance(live, list | tuple | deque) else ()
        placed = [_placed(one, other) for one, other in zip_longest(saved, others)]
        return deque(placed, saved.maxlen) if isinstance(saved, deque) else type(saved)(placed)
    return saved


class GeneratorComponent:
    """A random generator of the script's own."""

    def __init__(self, name: str, generator: Generator) -> None:
        self._name, self.generator = name, generator

    def encode(self, encoder: Encoder) -> Json:
        return _encode_fields(encoder, self._name, generator_state(self.generator))

    def check(self, saved: Json, source: TensorSource, *, final: bool) -> None:
        """Whether it fits is seen when it is set."""

    def decode(self, saved: Json, source: TensorSource) -> Any:
        return Decoder(source.own).decode(saved)

    def restore(self, value: Any, *, final: bool) -> None:
        self.load(value)

    def load(self, value: Any) -> None:
        set_generator_state(self.generator, value)


class ObjectComponent:
    """Anything with `state_dict` and `load_state_dict`: schedulers, scalers, a user's own class."""

    def __init__(self, name: str, target: Any) -> None:
        self._name, self._target = name, target

    def encode(self, encoder: Encoder) -> Json:
        return _encode_fields(encoder, self._name, self._target.state_dict())

    def check(self, saved: Json, source: TensorSource, *, final: bool) -> None:
        """Only the object itself knows what fits."""

    def decode(self, saved: Json, source: TensorSource) -> Any:
        return Decoder(source.own).decode(saved)

    def restore(self, value: Any, *, final: bool) -> None:
        self.load(value)

    def load(self, value: Any) -> None:
        self._target.load_state_dict(value)


def _encode_fields(encoder: Encoder, name: str, value: Any) -> Json:
    """Encode with paths as one would write them: `optimizer.state[0]`, not `optimizer['state']`."""
    if type(value) is dict and all(type(key) is str and key.isidentifier() for key in value):
        return {key: encoder.encode(field, f"{name}.{key}") for key, field in value.items()}
    return encoder.encode(value, name)
