"""What is saved comes back bit for bit: objects, tensors, plain values; or it is an error by name.

Most tests take two attempts (see `harness`): the first trains and is preempted at a boundary, the
second builds everything anew and is restored. Equal means equal bytes, types and memory layout.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import io
import json
import math
import pickle
import struct
import sys
import warnings
import weakref
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import partial
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import runner
from runner.errors import CaptureError, RestoreError
from runner.training.capture import TrainingState
from runner.training.tree import Decoder, Encoder
from tests.harness import PREEMPT, Life, Stage, Strike
from tests.slots import memory_folder

Parts = dict[str, Any]
c_unpickler = pickle.Unpickler


# ---------------------------------------------------------------- two attempts


def bits(value: Any) -> Any:
    """A value as something that compares equal only for the same types and the same bytes."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        content = plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return kind, value.dtype, tuple(value.shape), value.stride(), value.device, content
    if isinstance(value, np.ndarray):
        order = value.flags.c_contiguous, value.flags.f_contiguous
        return kind, str(value.dtype.descr), value.shape, order, value.tobytes()
    if isinstance(value, np.generic):
        return kind, str(value.dtype.descr), value.tobytes()
    if isinstance(value, float):
        return kind, struct.pack(">d", value)
    if isinstance(value, complex):
        return kind, struct.pack(">dd", value.real, value.imag)
    if isinstance(value, dict):
        extra = getattr(value, "default_factory", None)
        return kind, extra, [(bits(key), bits(item)) for key, item in value.items()]
    if isinstance(value, set | frozenset):
        return kind, sorted((bits(item) for item in value), key=repr)
    if isinstance(value, list | tuple | deque):
        return kind, getattr(value, "maxlen", None), [bits(item) for item in value]
    if isinstance(value, dt.datetime | dt.time):
        return kind, value.isoformat(), value.fold
    return kind, hex(value) if isinstance(value, int) else repr(value)


def carry_over(
    make: Callable[[], Any],
    train: Callable[[Any], None],
    registered: Callable[[Any], Parts] = vars,
    *,
    state: Callable[[], dict[Any, Any]] = dict,
    look: Callable[[Stage], None] = lambda stage: None,
) -> tuple[Any, Any, dict[Any, Any], dict[Any, Any]]:
    """Train in one attempt, restore in the next: the objects of both, and the states of both.

    `look` sees the stage between the two.
    """
    seen: list[Any] = []

    def script(life: Life) -> None:
        parts = make()
        values: dict[Any, Any] = {}
        run = runner.attach(state=values, **registered(parts))
        seen.append((parts, values))
        if life.attempt == 1:
            train(parts)
            values.update(state())
            life.hit(PREEMPT)
            run.boundary()
        for _ in run.epochs(1):
            break

    with memory_folder() as folder:
        stage = Stage(folder)
        stage.live(script)
        look(stage)
        stage.live(script)
    (before, saved), (after, restored) = seen
    return before, after, saved, restored


def carried(values: dict[Any, Any]) -> dict[Any, Any]:
    """Plain values, through a whole save and restore."""
    _, _, _, restored = carry_over(SimpleNamespace, lambda _: None, state=lambda: values)
    return restored


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        dtype = next(net.parameters()).dtype
        loss: torch.Tensor = net(torch.rand(5, 3).to(dtype)).float().pow(2).mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def parts_with(
    make_optimizer: Callable[..., torch.optim.Optimizer], **more: Any
) -> SimpleNamespace:
    net = model()
    optimizer = make_optimizer(net.parameters())
    extra = {name: make(optimizer) for name, make in more.items()}
    return SimpleNamespace(model=net, optimizer=optimizer, **extra)


def assert_goes_on_alike(before: Any, after: Any, go_on: Callable[[Any], None]) -> None:
    """Both take the same step from where they are."""
    for parts in (before, after):
        torch.manual_seed(11)
        go_on(parts)
    for name in vars(before):
        assert bits(getattr(after, name).state_dict()) == bits(getattr(before, name).state_dict())


# ---------------------------------------------------------------- optimizers and schedulers

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "SGD with momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "SGD fused": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "AdamW": torch.optim.AdamW,
    "AdamW foreach": partial(torch.optim.AdamW, foreach=True, amsgrad=True),
    "AdamW fused": partial(torch.optim.AdamW, fused=True),
    "AdamW with a tensor as learning rate": partial(torch.optim.AdamW, lr=torch.tensor(0.01)),
    "Adagrad": torch.optim.Adagrad,
    "RMSprop centered": partial(torch.optim.RMSprop, centered=True, momentum=0.5),
    "NAdam": torch.optim.NAdam,
    "Rprop": torch.optim.Rprop,
    "LBFGS": partial(torch.optim.LBFGS, max_iter=3, history_size=3, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_comes_back_bit_for_bit(
    make_optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    def train(parts: Any) -> None:
        for _ in range(3):
            step(parts.model, parts.optimizer)

    before, after, _, _ = carry_over(lambda: parts_with(make_optimizer), train)

    assert bits(after.optimizer.state_dict()) == bits(before.optimizer.state_dict())
    assert_goes_on_alike(before, after, lambda parts: step(parts.model, parts.optimizer))


def test_an_optimizer_that_has_no_state_yet_comes_back_without_one() -> None:
    before, after, _, _ = carry_over(lambda: parts_with(torch.optim.AdamW), lambda parts: None)
    assert after.optimizer.state_dict()["state"] == {}
    assert_goes_on_alike(before, after, lambda parts: step(parts.model, parts.optimizer))


def halved_each_time(epoch: int) -> float:
    return 0.5**epoch


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.StepLR(o, 2)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "LambdaLR with a function": lambda o: lr_scheduler.LambdaLR(o, halved_each_time),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9),
}


@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_comes_back_and_goes_on_alike(make_scheduler: Callable[..., Any]) -> None:
    def go_on(parts: Any) -> None:
        step(parts.model, parts.optimizer)
        plateau = isinstance(parts.scheduler, lr_scheduler.ReduceLROnPlateau)
        parts.scheduler.step(*([1.0] if plateau else []))

    def train(parts: Any) -> None:
        for _ in range(3):
            go_on(parts)

    def make() -> Any:
        sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        return parts_with(sgd, scheduler=make_scheduler)

    before, after, _, _ = carry_over(make, train)

    assert bits(after.scheduler.state_dict()) == bits(before.scheduler.state_dict())
    for _ in range(4):
        assert_goes_on_alike(before, after, go_on)


def test_a_parameter_group_that_was_added_on_the_way_comes_back() -> None:
    """Here the script adds it again, at the top of its epoch."""
    assert_group_comes_back(script_adds_it_again=True)


def test_a_parameter_group_that_was_added_on_the_way_comes_back_by_itself() -> None:
    assert_group_comes_back(script_adds_it_again=False)


def assert_group_comes_back(script_adds_it_again: bool) -> None:
    seen: list[torch.optim.Optimizer] = []

    def script(life: Life) -> None:
        net = model()
        optimizer = torch.optim.AdamW(net[0].parameters(), 0.1)
        run = runner.attach(model=net, optimizer=optimizer)
        seen.append(optimizer)
        for epoch in run.epochs(2):
            if epoch == 1 and (life.attempt == 1 or script_adds_it_again):
                optimizer.add_param_group({"params": net[2].parameters(), "lr": 0.3})
            for _ in run.steps(2 * (epoch + 1)):
                step(net, optimizer)
                life.here("body")

    with memory_folder() as folder:
        stage = Stage(folder)
        stage.live(script, strike_in_step(3))
        assert stage.newest().moment.step == 3
        stage.live(script)
        undisturbed = Stage(folder / "other").play(script)
        assert stage.archive.digest(stage.newest()) == undisturbed.digest
    assert [group["lr"] for group in seen[1].param_groups] == [0.1, 0.3]


def strike_in_step(number: int) -> Strike:
    return Strike("body", number)


def test_moments_in_another_precision_than_their_parameters_stay_so() -> None:
    """`load_state_dict` casts them to the parameter's; also those that are nested."""

    class Fp32Moments(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            with torch.enable_grad():
                closure()
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state.setdefault("moment", torch.zeros(p.shape)).add_(p.grad.float() / 3)
                    state.setdefault("nested", {"of": [torch.full((2,), 1 / 3)]})
                    state.setdefault("window", deque([torch.full((2,), 1 / 3), None, "x"], 3))
                    state.setdefault("mode", "warm")
                    p.data.sub_(state["moment"].to(p.dtype))

    def make() -> Any:
        net = model().to(torch.bfloat16)
        return SimpleNamespace(model=net, optimizer=Fp32Moments(net.parameters(), 0.1))

    before, after, _, _ = carry_over(make, lambda parts: step(parts.model, parts.optimizer))

    state = next(iter(after.optimizer.state.values()))
    assert state["moment"].dtype == state["nested"]["of"][0].dtype == torch.float32
    assert bits(after.optimizer.state_dict()) == bits(before.optimizer.state_dict())


class Slowing(torch.optim.SGD):
    """Has state that belongs to no parameter, which torch keeps under any other key."""

    def step(self, closure: Any = None) -> Any:
        shared = self.state["shared"]
        shared["steps"] = shared.get("steps", 0) + 1
        shared.setdefault("norm", torch.zeros((), dtype=torch.float64)).add_(1 / 3)
        for group in self.param_groups:
            group["lr"] = 0.1 / shared["steps"]
        return super().step(closure)


class Stateless(torch.optim.SGD):
    """Sign descent needs none."""

    def state_dict(self) -> dict[str, Any]:
        return {"param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({"state": {}, **state})


@pytest.mark.parametrize("kind", [Slowing, Stateless])
def test_an_optimizer_may_have_state_of_no_parameter_or_none_at_all(
    kind: Callable[..., torch.optim.Optimizer],
) -> None:
    before, after, _, _ = carry_over(
        lambda: parts_with(partial(kind, lr=0.1, momentum=0.9 if kind is Slowing else 0)),
        lambda parts: step(parts.model, parts.optimizer),
    )
    assert bits(after.optimizer.state_dict()) == bits(before.optimizer.state_dict())
    assert_goes_on_alike(before, after, lambda parts: step(parts.model, parts.optimizer))


def test_the_moments_that_attach_restored_are_put_in_place_for_good_where_they_are() -> None:
    """New memory would cost more than the copy, and be a second copy of them for a while."""

    class Witness:
        """Loaded after the optimizer, so that one has its moments then."""

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            if moments:
                seen.append(moments[0]() is optimizers[-1].state[weights[-1]]["exp_avg"])

    seen: list[bool] = []
    moments: list[Any] = []
    optimizers: list[torch.optim.Optimizer] = []
    weights: list[torch.nn.Parameter] = []

    def script(life: Life) -> None:
        net = model()
        optimizers.append(torch.optim.AdamW(net.parameters()))
        weights.append(net[0].weight)
        run = runner.attach(model=net, optimizer=optimizers[-1], witness=Witness())
        if life.attempt > 1:
            moment = optimizers[-1].state[net[0].weight]["exp_avg"]
            moments.append(weakref.ref(moment))
            moment.zero_()
            del moment
        for _ in run.steps(2):
            if life.attempt > 1 and run.step == 1:
                assert moments[0]().abs().sum() > 0
            step(net, optimizers[-1])
            life.here("body")

    with memory_folder() as folder:
        Stage(folder).play(script, [strike_in_step(1)])
    assert seen == [True]


def test_a_model_with_its_parameters_in_another_order_is_refused() -> None:
    """Shapes agree, so torch itself would give each weight the other one's momentum."""
    order = iter([(0, 1), (1, 0)])

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = {"left": nn.Linear(3, 3), "right": nn.Linear(3, 3)}
            for index in next(order):
                name = list(layers)[index]
                self.add_module(name, layers[name])

        def forward(self, x: torch.Tensor) -> Any:
            return self.left(x) + self.right(x)  # type: ignore[operator]

    def make() -> Any:
        net = Pair()
        return SimpleNamespace(model=net, optimizer=torch.optim.AdamW(net.parameters()))

    with pytest.raises(RestoreError, match=r"was model\.left\.weight and is model\.right\.weight"):
        carry_over(make, lambda parts: step(parts.model, parts.optimizer))


# ---------------------------------------------------------------- other components


def test_averaged_models_keep_their_names_and_their_count() -> None:
    def make() -> Any:
        net = model()
        ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        return SimpleNamespace(model=net, ema=ema)

    def train(parts: Any) -> None:
        for factor in (2.0, 3.0):
            nn.init.constant_(parts.model[0].weight, factor)
            parts.ema.update_parameters(parts.model)

    def look(stage: Stage) -> None:
        with safe_open(stage.file("ema.safetensors"), "pt") as file:
            assert {"n_averaged", "module.0.weight"} <= set(file.keys())

    before, after, _, _ = carry_over(make, train, look=look)
    assert bits(after.ema.state_dict()) == bits(before.ema.state_dict())
    assert int(after.ema.n_averaged) == 2


class Shadow:
    """An average of weights as many scripts have it."""

    def __init__(self, net: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in net.named_parameters()}
        self.updates = 0

    def update(self, net: nn.Module) -> None:
        self.updates += 1
        for name, p in net.named_parameters():
            self.shadow[name].lerp_(p.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.updates = state["shadow"], state["updates"]


def test_a_class_of_the_users_own_comes_back() -> None:
    def make() -> Any:
        net = model()
        return SimpleNamespace(model=net, shadow=Shadow(net))

    def train(parts: Any) -> None:
        nn.init.constant_(parts.model[0].weight, 5.0)
        parts.shadow.update(parts.model)

    before, after, _, _ = carry_over(make, train)
    assert bits(after.shadow.state_dict()) == bits(before.shadow.state_dict())
    with torch.no_grad():
        after.shadow.shadow["0.weight"].zero_()
    assert float(after.model[0].weight.detach().sum()) == 60.0, "it has its own memory"


@pytest.mark.parametrize("enabled", [True, False])
def test_a_grad_scaler_comes_back(enabled: bool) -> None:
    def make() -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2, enabled=enabled)
        return parts_with(partial(torch.optim.SGD, lr=0.1), scaler=lambda _: scaler)

    def train(parts: Any) -> None:
        for _ in range(3):
            parts.scaler.scale(parts.model(torch.rand(5, 3)).sum()).backward()
            parts.scaler.step(parts.optimizer)
            parts.scaler.update()
            parts.optimizer.zero_grad()

    before, after, _, _ = carry_over(make, train)
    assert bits(after.scaler.state_dict()) == bits(before.scaler.state_dict())
    assert after.scaler.get_scale() == (16.0 if enabled else 1.0)
    assert_goes_on_alike(before, after, train)


GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch": (
        lambda: torch.Generator().manual_seed(1),
        lambda g: torch.randn(3, generator=g).tolist(),
    ),
    "numpy": (lambda: np.random.default_rng(1), lambda g: g.normal(size=3).tolist()),
    "numpy MT19937": (
        lambda: np.random.Generator(np.random.MT19937(1)),
        lambda g: g.integers(9, size=3, dtype=np.int32).tolist(),
    ),
    "numpy, the old one": (
        lambda: np.random.RandomState(1),
        lambda g: g.normal(size=3).tolist(),
    ),
    "random": (lambda: __import__("random").Random(1), lambda g: [g.gauss(0, 1) for _ in "abc"]),
}


@pytest.mark.parametrize(("make", "draw"), GENERATORS.values(), ids=GENERATORS)
def test_a_generator_goes_on_where_it_was(
    make: Callable[[], Any], draw: Callable[[Any], Any]
) -> None:
    def train(parts: Any) -> None:
        draw(parts.generator)

    before, after, _, _ = carry_over(lambda: SimpleNamespace(generator=make()), train)
    assert [draw(after.generator) for _ in range(3)] == [draw(before.generator) for _ in range(3)]


def test_a_generator_of_another_kind_is_refused_by_name() -> None:
    kinds = iter([torch.Generator(), np.random.default_rng()])
    with pytest.raises(RestoreError, match="draws"):
        carry_over(lambda: SimpleNamespace(draws=next(kinds)), lambda parts: None)


def test_what_an_object_does_not_load_is_an_error_with_its_name() -> None:
    class Picky:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("weights")

    with pytest.raises(RestoreError, match=r"picky.*weights"):
        carry_over(lambda: SimpleNamespace(picky=Picky()), lambda parts: None)


# ---------------------------------------------------------------- modules


def test_tied_weights_are_stored_once_and_are_tied_after_the_restore() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    def look(stage: Stage) -> None:
        with safe_open(stage.file("model.safetensors"), "pt") as file:
            assert list(file.keys()) == ["embedding.weight"]

    before, after, _, _ = carry_over(
        lambda: SimpleNamespace(model=Tied()),
        lambda parts: nn.init.normal_(parts.model.head.weight),
        look=look,
    )
    assert after.model.head.weight is after.model.embedding.weight
    assert bits(after.model.state_dict()) == bits(before.model.state_dict())


def test_frozen_parameters_and_eval_modes_come_back() -> None:
    def train(parts: Any) -> None:
        parts.model[0].weight.requires_grad_(False)
        parts.model[1].eval()

    _, after, _, _ = carry_over(lambda: SimpleNamespace(model=model()), train)
    frozen = [name for name, p in after.model.named_parameters() if not p.requires_grad]
    modes = [module.training for module in after.model.modules()]
    assert (frozen, modes) == (["0.weight"], [True, True, False, True])


def test_layouts_and_odd_shapes_of_parameters_and_buffers_come_back() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
            self.weight = nn.Parameter(torch.rand(4, 6).t()[::2])
            self.register_buffer("count", torch.tensor(3))
            self.register_buffer("nothing", torch.empty(0, 4))
            self.register_buffer("mask", torch.tensor([True, False]))
            self.register_buffer("local", torch.zeros(1), persistent=False)

        def get_extra_state(self) -> Any:
            return {"version": (1, 2)}

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    def train(parts: Any) -> None:
        optimizer = parts.optimizer
        parts.model.conv(torch.rand(1, 3, 4, 4)).sum().backward()
        parts.model.weight.pow(2).sum().backward()
        optimizer.step()
        parts.model.count += 1

    def make() -> Any:
        torch.manual_seed(2)
        net = Odd()
        return SimpleNamespace(model=net, optimizer=torch.optim.AdamW(net.parameters()))

    before, after, _, _ = carry_over(make, train)
    assert bits(after.model.state_dict()) == bits(before.model.state_dict())
    assert bits(after.optimizer.state_dict()) == bits(before.optimizer.state_dict())
    assert after.model.extra == {"version": (1, 2)}
    moment = after.optimizer.state[after.model.conv.weight]["exp_avg"]
    assert moment.is_contiguous(memory_format=torch.channels_last)


def test_a_lazy_module_is_made_whole_by_what_was_saved() -> None:
    def make() -> Any:
        return SimpleNamespace(model=nn.Sequential(nn.LazyLinear(4)))

    before, after, _, _ = carry_over(make, lambda parts: parts.model(torch.rand(2, 7)))
    assert bits(after.model.state_dict()) == bits(before.model.state_dict())


class Window(nn.Module):
    """Has grown by what it has seen; a new one takes the size of what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.empty(0))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.seen.resize_(state[prefix + "seen"].shape)
        super()._load_from_state_dict(state, prefix, *rest)


class Packed(nn.Module):
    """Has its extra state as a tensor of bytes, as long as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.content = b""

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(list(self.content), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.content = bytes(state.tolist())


class Ready(nn.Module):
    """Its way to load may do nothing, which torch does not notice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.empty(0))

    def _load_from_state_dict(self, *arguments: Any) -> None:
        pass


def test_a_module_may_take_the_shape_of_what_it_loads() -> None:
    def make() -> Any:
        return SimpleNamespace(model=nn.ModuleDict({"window": Window(), "packed": Packed()}))

    def train(parts: Any) -> None:
        parts.model["window"].seen = torch.rand(7)
        parts.model["packed"].content = b"abc"

    before, after, _, _ = carry_over(make, train)
    assert bits(after.model.state_dict()) == bits(before.model.state_dict())
    assert after.model["packed"].content == b"abc"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_model_that_is_prepared_for_quantization_comes_back() -> None:
    """Scales have the size of what was observed: one for each channel, and none before that."""
    quantization = pytest.importorskip("torch.ao.quantization")

    def make() -> Any:
        torch.manual_seed(4)
        net = nn.Sequential(quantization.QuantStub(), nn.Linear(3, 4), quantization.DeQuantStub())
        net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        return SimpleNamespace(model=quantization.prepare_qat(net.train()))

    before, after, _, _ = carry_over(make, lambda parts: parts.model(torch.rand(5, 3)))
    assert bits(after.model.state_dict()) == bits(before.model.state_dict())


def test_what_a_module_did_not_take_is_an_error_with_its_name() -> None:
    def train(parts: Any) -> None:
        parts.model.seen = torch.rand(7)

    with pytest.raises(
        RestoreError, match=r"model did not take .*model\.seen was saved as .*\[7\]"
    ):
        carry_over(lambda: SimpleNamespace(model=Ready()), train)


def test_names_are_those_of_the_model_inside_of_a_compiled_one() -> None:
    def make() -> Any:
        net = model()
        net[0] = torch.compile(net[0], backend="eager")
        whole = torch.compile(net, backend="eager")
        return SimpleNamespace(
            model=whole, optimizer=torch.optim.AdamW(whole.parameters()), net=net
        )

    assert_wrapped_is_saved_plainly(make)


def test_names_are_those_of_the_model_inside_of_ddp(tmp_path: Path) -> None:
    rendezvous = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", rendezvous, rank=0, world_size=1)
    try:

        def make() -> Any:
            net = model()
            whole = nn.parallel.DistributedDataParallel(net)
            return SimpleNamespace(
                model=whole, optimizer=torch.optim.AdamW(whole.parameters()), net=net
            )

        assert_wrapped_is_saved_plainly(make)
    finally:
        torch.distributed.destroy_process_group()


def assert_wrapped_is_saved_plainly(make_wrapped: Callable[[], Any]) -> None:
    """Saved wrapped and restored plain, and the other way round."""

    def make_plain() -> Any:
        net = model()
        return SimpleNamespace(model=net, optimizer=torch.optim.AdamW(net.parameters()), net=net)

    def train(parts: Any) -> None:
        step(parts.model, parts.optimizer)
        parts.net[2].eval()
        parts.net[2].bias.requires_grad_(False)

    def registered(parts: Any) -> Parts:
        return {"model": parts.model, "optimizer": parts.optimizer}

    def look(stage: Stage) -> None:
        with safe_open(stage.file("model.safetensors"), "pt") as file:
            assert set(file.keys()) == set(model().state_dict())

    for order in ([make_wrapped, make_plain], [make_plain, make_wrapped]):
        makers = iter(order)
        before, after, _, _ = carry_over(
            lambda makers=makers: next(makers)(), train, registered, look=look
        )
        mine, others = before.model.state_dict().values(), after.model.state_dict().values()
        assert [bits(one) for one in mine] == [bits(one) for one in others]
        assert bits(after.optimizer.state_dict()) == bits(before.optimizer.state_dict())
        assert not after.net[2].training
        assert not after.net[2].bias.requires_grad


# ---------------------------------------------------------------- what does not fit


def refused(
    first: Callable[[], Parts], second: Callable[[], Parts], train: Callable[[Any], Any] = id
) -> str:
    """The error with which the second attempt's components are refused."""
    makers = iter([first, second])
    with pytest.raises(RestoreError) as error:
        carry_over(lambda: SimpleNamespace(**next(makers)()), lambda parts: train(parts) and None)
    return str(error.value)


def linear(inputs: int, dtype: torch.dtype = torch.float32) -> Parts:
    return {"model": nn.Linear(inputs, 2, dtype=dtype)}


MISFITS: dict[str, tuple[Callable[[], Parts], Callable[[], Parts], str]] = {
    "a component is missing": (
        lambda: linear(3) | {"ema": nn.Linear(1, 1)},
        lambda: linear(3),
        "component 'ema' is in the checkpoint, not in attach(…)",
    ),
    "a component is new": (
        lambda: linear(3),
        lambda: linear(3) | {"ema": nn.Linear(1, 1)},
        "component 'ema' is in no checkpoint, only in attach(…)",
    ),
    "a component is renamed": (
        lambda: {"net": nn.Linear(1, 1)},
        lambda: {"model": nn.Linear(1, 1)},
        "component 'model' is in no checkpoint",
    ),
    "another shape": (
        lambda: linear(3),
        lambda: linear(4),
        "model.weight was saved as torch.float32 [2, 3] and is torch.float32 [2, 4] now",
    ),
    "another dtype": (
        lambda: linear(3),
        lambda: linear(3, torch.float64),
        "model.weight was saved as torch.float32 [2, 3] and is torch.float64 [2, 3] now",
    ),
    "a parameter is new": (
        lambda: {"model": nn.Linear(3, 2, bias=False)},
        lambda: linear(3),
        "model does not fit the checkpoint: 'bias' is not in it",
    ),
    "a parameter is missing": (
        lambda: linear(3),
        lambda: {"model": nn.Linear(3, 2, bias=False)},
        "model does not fit the checkpoint: only it has 'bias'",
    ),
    "an optimizer with other parameters": (
        lambda: _optimizer_of(2),
        lambda: _optimizer_of(1),
        "optimizer.param_groups[0] had 2 parameters and has 1 now",
    ),
    "an optimizer with fewer groups": (
        lambda: _optimizer_of(1),
        lambda: _optimizer_of(1, 1),
        "optimizer had 1 parameter groups and has 2 now",
    ),
    "a scaler that is switched off": (
        lambda: {"scaler": torch.amp.GradScaler("cpu", enabled=False)},
        lambda: {"scaler": torch.amp.GradScaler("cpu")},
        "scaler",
    ),
}


def _optimizer_of(*counts: int) -> Parts:
    net = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(sum(counts)))
    parameters = iter(net.parameters())
    groups = [{"params": [next(parameters) for _ in range(count)]} for count in counts]
    optimizer = torch.optim.SGD(groups, 0.1)
    full = nn.ModuleList([*net, *(nn.Linear(1, 1, bias=False) for _ in range(3 - len(net)))])
    return {"model": full, "optimizer": optimizer}


@pytest.mark.parametrize(("first", "second", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused_by_name(
    first: Callable[[], Parts], second: Callable[[], Parts], message: str
) -> None:
    assert message in refused(first, second)


def test_nothing_is_changed_where_a_component_does_not_fit() -> None:
    made: list[nn.Linear] = []

    def other_dtype() -> Parts:
        made.append(nn.Linear(3, 2))
        return {"first": made[0], "model": nn.Linear(3, 2, dtype=torch.float64)}

    torch.manual_seed(1)
    fresh = nn.Linear(3, 2).weight.tolist()

    def again() -> Parts:
        torch.manual_seed(1)
        return other_dtype()

    refused(lambda: {"first": nn.Linear(3, 2)} | linear(3), again)
    assert made[0].weight.tolist() == fresh


# ---------------------------------------------------------------- tensors

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32,
    torch.uint64, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def of_dtype(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits; for bool, those that are allowed."""
    count = math.prod(shape)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count * size,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_tensors_of_every_dtype_come_back_bit_for_bit() -> None:
    values = {
        f"{dtype} {shape}": of_dtype(dtype, *shape)
        for dtype in DTYPES
        for shape in ((), (0,), (3,), (2, 3), (2, 0, 3))
    }
    restored = carried(dict(values))
    assert list(restored) == list(values)
    for name, value in values.items():
        assert bits(restored[name]) == bits(value), name


def test_infinities_nans_and_negative_zeros_in_tensors_come_back() -> None:
    numbers = [math.inf, -math.inf, math.nan, -0.0, 5e-324]
    values = {
        str(dtype): torch.tensor(numbers, dtype=dtype) for dtype in (torch.float64, torch.half)
    }
    assert bits(carried(dict(values))) == bits(values)


def test_views_and_layouts_of_tensors_come_back() -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    dense = {
        "transposed": base.transpose(0, 2),
        "channels last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "conjugate": torch.rand(3, dtype=torch.complex64).conj(),
        "transposed bytes": of_dtype(torch.float8_e4m3fnuz, 3, 4).t(),
    }
    gaps = {
        "slice": base[:, ::2],
        "expanded": torch.ones(1).expand(3, 2),
        "one element wide": base[:, :1, :1],
        "parameter": nn.Parameter(torch.rand(2)),
        "conjugate of a slice": torch.rand(6, dtype=torch.complex128)[::2].conj(),
    }
    restored = carried(dense | gaps)
    for name, value in dense.items():
        assert bits(restored[name]) == bits(value.resolve_conj()), name
    for name, value in gaps.items():
        assert torch.equal(restored[name], value), name
        assert type(restored[name]) is torch.Tensor


def test_a_tensor_that_is_referred_to_twice_is_stored_once_and_is_one_again() -> None:
    one = torch.rand(3)
    restored = carried({"a": one, "b": [one], "c": one.clone()})
    assert restored["a"] is restored["b"][0]
    assert restored["a"] is not restored["c"]


def test_two_views_of_one_memory_keep_their_values() -> None:
    base = torch.arange(6.0)
    restored = carried({"whole": base, "part": base[2:4], "same": base.view(2, 3)})
    assert restored["part"].tolist() == [2, 3]
    assert restored["same"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_conjugate_or_negative_view_is_another_value_than_what_it_views() -> None:
    base = torch.tensor([1 + 2j, 3 - 4j])
    restored = carried({"base": base, "conjugate": base.conj(), "negative": base.conj().imag})
    assert restored["base"].tolist() == [1 + 2j, 3 - 4j]
    assert restored["conjugate"].tolist() == [1 - 2j, 3 + 4j]
    assert restored["negative"].tolist() == [-2, 4]


def test_names_of_tensors_may_be_anything() -> None:
    keys = ["a", "a.b", "__metadata__", "", ".", "'", '"', "]", "[0]", "ключ", 0, (1, 2), "0", "a_"]
    values = {key: torch.tensor([i]) for i, key in enumerate(keys)}
    restored = carried(values | {"nested": {"a": {"b": torch.tensor([90])}, "x": values}})
    expected = {key: i for i, key in enumerate(keys)}
    assert {key: int(restored[key]) for key in keys} == expected
    assert {key: int(value) for key, value in restored["nested"]["x"].items()} == expected
    assert int(restored["nested"]["a"]["b"]) == 90


class Fake(torch.Tensor):
    """A subclass, as DTensor is one."""


NO_TENSORS: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse CSR": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: torch.empty(3, device="meta"),
    "a subclass": lambda: torch.rand(3).as_subclass(Fake),
    "nested": lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8),
    "uninitialized": lambda: nn.LazyLinear(3).weight,
    "mkldnn": lambda: torch.rand(3).to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", NO_TENSORS.values(), ids=NO_TENSORS)
def test_a_tensor_without_plain_bytes_is_an_error_that_names_its_path(
    make: Callable[[], Any],
) -> None:
    with pytest.raises(CaptureError, match=r"state\['here'\]\[0\] .*cannot be saved"):
        carried({"here": [make()]})


# ---------------------------------------------------------------- what cannot be saved

Point = namedtuple("Point", "x y")


class Colour(IntEnum):
    RED = 1


class MyPath(type(Path())):  # type: ignore[misc]
    pass


NOT_SAVABLE: dict[str, Any] = {
    "function": len,
    "lambda": lambda: None,
    "object": object(),
    "class": int,
    "enum": Colour.RED,
    "named tuple": Point(1, 2),
    "generator": (i for i in ()),
    "array of objects": np.array([object()]),
    "module": math,
    "range": range(3),
    "named time zone": dt.datetime(2024, 1, 1, tzinfo=__import__("zoneinfo").ZoneInfo("UTC")),
    "defaultdict with a lambda": defaultdict(lambda: 0),
    "subclass of dict": type("Mine", (dict,), {})(),
    "subclass of a path": MyPath("x"),
    "masked array": np.ma.masked_array([1.0], [True]),
}


@pytest.mark.parametrize("value", NOT_SAVABLE.values(), ids=NOT_SAVABLE)
def test_what_cannot_be_saved_is_an_error_that_names_its_path(value: Any) -> None:
    with pytest.raises(CaptureError) as error:
        carried({"a": {3: [None, value]}})
    assert str(error.value).startswith("state['a'][3][1] ")


def test_the_path_of_what_cannot_be_saved_is_that_of_the_users_object() -> None:
    def train(parts: Any) -> None:
        parts.optimizer.param_groups[0]["hook"] = lambda: None

    with pytest.raises(
        CaptureError, match=r"^optimizer\.param_groups\[0\]\['hook'\] is a function"
    ):
        carry_over(lambda: parts_with(torch.optim.AdamW), train)


def test_a_value_that_contains_itself_is_an_error() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(CaptureError, match="contains itself"):
        carried({"endless": endless})


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: (v,), lambda v: OrderedDict({1: v})])
def test_whatever_is_not_nested_too_deeply_to_be_saved_can_be_restored(
    wrap: Callable[[Any], Any],
) -> None:
    value: Any = 0
    depth = 0
    saved = None
    with contextlib.suppress(CaptureError):
        for depth in range(1000):  # noqa: B007
            saved = json.loads(json.dumps(encode(value)))
            value = wrap(value)
    assert 50 < depth < 999
    assert encode(decode(saved)) == saved
    assert "deep" in carried({"deep": decode(saved)[0] if isinstance(value, list) else 0})


# ---------------------------------------------------------------- plain values


def _no_tensors(*_: Any) -> Any:
    raise AssertionError("there are no tensors in it")


def encode(value: Any) -> Any:
    return Encoder(_no_tensors).encode(value, "value")


def decode(tree: Any) -> Any:
    return Decoder(_no_tensors).decode(tree)


INTS = st.integers() | st.sampled_from([2**53, -(2**53), 2**64, 10**30, -(7**60)])
FLOATS = st.floats() | st.integers(0, 2**64 - 1).map(
    lambda raw: struct.unpack(">d", struct.pack(">Q", raw))[0]
)
TEXTS = st.text() | st.text(st.characters()) | st.sampled_from(["$", "\ud800", "\x00"])
ZONES = st.none() | st.timedeltas(
    dt.timedelta(hours=-23), dt.timedelta(hours=23)
).map(dt.timezone)  # fmt: skip
SCALARS = hnp.scalar_dtypes().flatmap(
    lambda dtype: hnp.arrays(dtype, ()).map(lambda array: array[()])
)
HASHABLE = st.recursive(
    st.none() | st.booleans() | INTS | FLOATS | TEXTS | st.binary() | st.dates() | st.timedeltas(),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
LEAVES = st.one_of(
    HASHABLE,
    st.binary().map(bytearray),
    st.complex_numbers(),
    st.builds(dt.datetime.replace, st.datetimes(timezones=ZONES), fold=st.integers(0, 1)),
    st.builds(dt.time.replace, st.times(timezones=ZONES), fold=st.integers(0, 1)),
    st.sampled_from([Path("/a/b"), PurePosixPath("c"), PureWindowsPath("C:\\d")]),
    st.sampled_from([*DTYPES, torch.device("cpu"), torch.device("cuda", 3), torch.device("meta")]),
    st.lists(st.integers(0, 9), max_size=3).map(torch.Size),
    SCALARS,
    hnp.arrays(
        hnp.scalar_dtypes() | hnp.byte_string_dtypes() | hnp.unicode_string_dtypes(),
        hnp.array_shapes(min_dims=0, min_side=0, max_side=3),
    ),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(TEXTS, inner, max_size=3),
        st.dictionaries(HASHABLE, inner, max_size=3),
        st.dictionaries(HASHABLE, inner, max_size=3).map(OrderedDict),
        st.dictionaries(HASHABLE, st.integers(), max_size=3).map(Counter),
        st.builds(
            defaultdict,
            st.sampled_from([None, int, list, dict, set, float, str, tuple]),
            st.dictionaries(HASHABLE, inner, max_size=3),
        ),
        st.builds(deque, st.lists(inner, max_size=3), st.none() | st.integers(0, 5)),
        st.sets(HASHABLE, max_size=3),
    ),
    max_leaves=6,
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(VALUES)
@example(dt.datetime(2000, 1, 1, tzinfo=dt.timezone(dt.timedelta(microseconds=1))))
def test_plain_values_come_back_with_their_types_and_bits(value: Any) -> None:
    text = json.dumps(encode(value), allow_nan=False)
    assert bits(decode(json.loads(text))) == bits(value)


def test_integers_of_any_size_come_back_as_values_and_as_keys() -> None:
    huge = -(7**6000)  # more digits than Python turns into decimals
    assert bits(carried({huge: [huge]})) == bits({huge: [huge]})


ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "strings": np.array(["a", "bcd", ""]),
    "bytes": np.array([b"a", b"\x00b"]),
    "dates": np.array(["2024-01-01", "NaT"], dtype="datetime64[ns]"),
    "seconds": np.array([3, 4], dtype="timedelta64[25s]"),
    "big-endian": np.arange(6, dtype=">f4").reshape(2, 3),
    "empty": np.empty((0, 3)),
    "no dimensions": np.array(7.5),
    "long double": np.array([1 / 3], dtype=np.longdouble),
    "Fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "structured": np.array([(1, 2.5, b"x")], dtype=[("a", "i4"), ("b", ">f8"), ("c", "S3")]),
    "structured with a sub-array": np.zeros(2, dtype=[("a", "f4", (2, 3)), ("b", "i1", 2)]),
    "nested structures": np.ones(2, dtype=[("a", [("x", "i2"), ("y", [("z", "f8")])])]),
    "aligned structure": np.ones(2, dtype=np.dtype([("a", "i1"), ("b", "f8")], align=True)),
    "titles": np.ones(1, dtype=[(("a title", "a"), "i4")]),
    "large": np.arange(5000.0),
    "large in Fortran order": np.asfortranarray(np.random.rand(60, 70)),
    "large and reversed": np.arange(5000, dtype=np.int16)[::-1],
    "large, transposed": np.arange(24_000, dtype=np.uint32).reshape(20, 30, 40).transpose(1, 0, 2),
    "large and complex": np.arange(5000) * 1j,
    "large and structured": np.zeros(3000, dtype=[("a", "f8")]),
    "large, of strings": np.array(["abcdefgh"] * 1000),
    "large and big-endian": np.arange(5000, dtype=">i4"),
    "large and read-only": np.broadcast_to(np.arange(100.0), (100, 100)),
    "large long doubles": np.ones(3000, dtype=np.longdouble),
    "large and boolean": np.arange(20_000) % 3 == 0,
}


def test_arrays_of_all_kinds_come_back() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        restored = carried(dict(ARRAYS))
    for name, value in ARRAYS.items():
        mine = restored[name]
        assert mine.dtype == value.dtype, name
        assert mine.shape == value.shape, name
        assert mine.tobytes() == value.tobytes(), name
        assert mine.flags.writeable, name
        if value.flags.f_contiguous or value.flags.c_contiguous:
            assert mine.flags.f_contiguous == value.flags.f_contiguous, name


def test_numpy_scalars_of_all_kinds_come_back() -> None:
    values = {
        "structured": np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")])[0],
        "string": np.str_("añ"),
        "empty string": np.str_(""),
        "empty bytes": np.bytes_(b""),
        "date": np.datetime64("2024-02-29T12", "m"),
        "bool": np.True_,
        "half": np.float16(0.1),
        "long double": np.longdouble(1) / 3,
    }
    assert bits(carried(dict(values))) == bits(values)


def test_state_json_keeps_plain_things_plain() -> None:
    """A person reads it, and so do other programs."""
    value = {"epoch": 3, "best": 0.5, "names": ["a", None, True], "nested": {"x": -0.0}}
    assert encode(value) == value


@pytest.mark.parametrize(
    "tree",
    [{"$": "unknown"}, {"$": "int"}, {"$": "int", "v": "x"}, {"$": "dtype", "v": "Tensor"},
     {"$": "path", "type": "str", "v": "x"}, {"$": "bytes", "v": "!"},
     {"$": "defaultdict", "factory": "eval", "v": []}, {"$": "dict", "v": [[[], 1]]}],
    ids=str,
)  # fmt: skip
def test_json_that_no_encoder_wrote_is_an_error(tree: Any) -> None:
    with pytest.raises(RestoreError):
        decode(tree)


# ---------------------------------------------------------------- files, and no pickle


def test_the_files_open_with_the_safetensors_library() -> None:
    def train(parts: Any) -> None:
        step(parts.model, parts.optimizer)

    found: dict[str, torch.Tensor] = {}

    def look(stage: Stage) -> None:
        names = [file.name for file in stage.newest().files]
        assert names == ["model.safetensors", "optimizer.safetensors", "state.safetensors",
                         "state.json"]  # fmt: skip
        for name in names[:-1]:
            with safe_open(stage.file(name), "pt") as file:
                assert file.metadata() == {"format": "pt"}
                found.update({f"{name}:{key}": file.get_tensor(key) for key in file.keys()})  # noqa: SIM118

    before, _, _, _ = carry_over(
        lambda: parts_with(torch.optim.AdamW),
        train,
        state=lambda: {"mean": np.arange(5000.0), "half": torch.ones(3, dtype=torch.bfloat16)},
        look=look,
    )
    for name, value in before.model.state_dict().items():
        assert bits(found[f"model.safetensors:{name}"]) == bits(value)
    moment = before.optimizer.state_dict()["state"][0]["exp_avg"]
    assert bits(found["optimizer.safetensors:state.0.exp_avg"]) == bits(moment)
    assert found["state.safetensors:mean"].tolist() == list(range(5000))


class Digits(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3,), float(index)) + torch.rand(3)


class PickleUsed(Exception):
    pass


@functools.cache
def _audited() -> list[bool]:
    """Its one entry says whether an unpickler may look for a class. A hook cannot be removed."""
    refusing = [False]

    def on_event(event: str, _: Any) -> None:
        if refusing[0] and event == "pickle.find_class":
            raise PickleUsed(event)

    sys.addaudithook(on_event)
    return refusing


@contextlib.contextmanager
def no_pickle() -> Iterator[None]:
    """Whoever writes or reads a pickle in here gets an exception."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise PickleUsed

    with pytest.MonkeyPatch.context() as patch:
        for module in (torch, pickle):
            for name in ("save", "load", "dump", "dumps", "loads", "Pickler", "Unpickler"):
                if hasattr(module, name):
                    patch.setattr(module, name, refuse)
        _audited()[0] = True
        try:
            yield
        finally:
            _audited()[0] = False


def test_nothing_is_pickled() -> None:
    def script(life: Life) -> None:
        net = model()
        optimizer = torch.optim.AdamW(net.parameters())
        scheduler = lr_scheduler.StepLR(optimizer, 1)
        scaler = torch.amp.GradScaler("cpu")
        ema = AveragedModel(net)
        loader = DataLoader(Digits(), batch_size=2, shuffle=True)
        parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "ema": ema}
        run = runner.attach(model=net, **parts)
        run.state["values"] = [torch.rand(2), np.arange(5000), {1: (2, 3)}]
        for epoch in run.epochs(2):
            for batch in run.batches(loader):
                net(batch).sum().backward()
                life.here("body")
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
            run.log(epoch_number=epoch)
        run.load("latest")

    with memory_folder() as folder, no_pickle():
        stage = Stage(folder)
        stage.play(script, [strike_in_step(2), strike_in_step(2)])
        assert len(stage.lives) == 3


@pytest.mark.parametrize(
    "use",
    [
        lambda path: torch.save({}, path),
        lambda path: torch.load(path),
        lambda _: pickle.loads(pickle.dumps(1)),  # noqa: S301
        lambda _: c_unpickler(io.BytesIO(b"cmath\nsin\n.")).load(),
    ],
    ids=["torch.save", "torch.load", "pickle", "an unpickler that was imported before"],
)
def test_a_pickle_would_have_been_noticed(use: Callable[[Path], Any], tmp_path: Path) -> None:
    with no_pickle(), pytest.raises(PickleUsed):
        use(tmp_path / "x")


# ---------------------------------------------------------------- streams that nobody uses


def documents(draw: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    for seed in (1, 2):
        np.random.seed(seed)
        state = TrainingState({}, {})
        draw()
        yield state.encode({})[0]["rng"]


def test_a_stream_that_nobody_draws_from_is_marked_and_another_is_not() -> None:
    for rng in documents(lambda: None):
        assert (rng["python"]["$"], rng["numpy"]["$"]) == ("idle", "idle")
    for rng in documents(lambda: np.random.rand()):
        assert rng["python"]["$"] == "idle"
        assert rng["numpy"].get("$") != "idle"


def test_paths_are_restored_as_the_kind_that_they_were() -> None:
    assert type(decode(encode(Path("x")))) is PosixPath
