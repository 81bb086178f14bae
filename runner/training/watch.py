"""Whether the state is consistent: an optimizer has stepped, and no gradient is half gathered."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_Gradient = tuple[weakref.ref[torch.Tensor], int]  # with the version that it had


class OptimizerWatch:
    """Watches the registered optimizers through their public hooks.

    TypeError names the component if it is an optimizer that has none.
    """

    def __init__(self, stateful: Mapping[str, Any]) -> None:
        self.optimizers: list[torch.optim.Optimizer] = []
        self._stepped = False
        self._used: dict[torch.nn.Parameter, _Gradient] = {}
        for name, target in stateful.items():
            if isinstance(target, torch.optim.Optimizer):
                self.optimizers.append(target)
                self._watch_optimizer(name, target)
            elif isinstance(target, torch.amp.GradScaler):
                self._watch_scaler(target)

    def midway(self) -> bool:
        """Whether gradients have been gathered since `settled` that no optimizer has used.

        Those that a script leaves lying after a step count for nothing: a resumed run has none.
        """
        if self._stepped or not self.optimizers:
            return False
        return any(
            gradient is not None
            and not _is_same(self._used.get(parameter), gradient)
            and _holds_something(gradient)
            for parameter, gradient in self._gradients()
        )

    def settled(self) -> None:
        """A boundary has been passed."""
        self._stepped = False
        self._used = {
            parameter: (weakref.ref(gradient), gradient._version)
            for parameter, gradient in self._gradients()
            if gradient is not None
        }

    def _gradients(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor | None]]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter, parameter.grad

    def learning_rate(self) -> float | None:
        """Of the first group of the first optimizer."""
        if not self.optimizers:
            return None
        return float(self.optimizers[0].param_groups[0]["lr"])

    def bytes_to_come(self) -> int:
        """Roughly what the optimizers will hold after their first step and do not hold yet."""
        return sum(
            _moments(optimizer) * parameter.nbytes
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter not in optimizer.state
        )

    def _on_step(self, *_: Any) -> None:
        self._stepped = True

    def _watch_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        try:
            optimizer.register_step_post_hook(self._on_step)
        except AttributeError as error:  # a wrapper that is an optimizer by name only
            raise TypeError(
                f"attach({name}=…) got a {type(optimizer).__qualname__} that has no step hooks, so "
                "its steps cannot be seen; attach the optimizer inside it"
            ) from error
        if not getattr(type(optimizer).step, "hooked", False):
            self._watch_step(optimizer)

    def _watch_step(self, optimizer: torch.optim.Optimizer) -> None:
        """`Optimizer.__init__` has `step` call the hooks; a wrapper may leave it out.

        Not the class is changed, as torch does it: a scheduler may have got hold of its `step`.
        """
        step = optimizer.step

        @functools.wraps(step)
        def watched(_: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self._stepped = True
            return result

        # A method, because schedulers ask for its `__func__`.
        optimizer.step = types.MethodType(watched, optimizer)  # type: ignore[method-assign]

    def _watch_scaler(self, scaler: torch.amp.GradScaler) -> None:
        """A step that the scaler skips, because gradients overflowed, is a step all the same."""
        update = scaler.update

        @functools.wraps(update)
        def watched(*args: Any, **kwargs: Any) -> None:
            update(*args, **kwargs)
            self._stepped = True

        scaler.update = watched  # type: ignore[method-assign]


def _is_same(used: _Gradient | None, gradient: torch.Tensor) -> bool:
    return used is not None and used[0]() is gradient and used[1] == gradient._version


def _holds_something(gradient: torch.Tensor) -> bool:
    """Whether it was not just zeroed in place."""
    return bool((gradient._values() if gradient.is_sparse else gradient).any())


def _moments(optimizer: torch.optim.Optimizer) -> int:
    """Tensors of a parameter's size that an optimizer keeps for it, guessed from its options."""
    if "betas" in optimizer.defaults:
        return 3 if optimizer.defaults.get("amsgrad") else 2
    plain_descent = optimizer.defaults.get("momentum", 1) == 0
    return 0 if plain_descent else 1
