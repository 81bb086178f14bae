"""The place in the data: an interrupted loop continues with the same bits.

`play` is a training loop in miniature: its trace holds what each body saw and drew. It can be
stopped after a batch or at the end of an epoch, and started again from what it saved, with other
numbers in all generators. Whatever was saved goes through the codec of `state.json`.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import multiprocessing
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from runner.errors import PositionError, RestoreError, UsageError
from runner.training import wrappers
from runner.training.loader import Pass, Stream
from runner.training.order import index_checksum
from runner.training.rng import capture_rng, derive_seed, restore_rng, same_state, seed_process
from runner.training.tree import Decoder, Encoder

SAMPLES = 22
BATCH = 4
BATCHES = 6
EPOCHS = 2


# ---------------------------------------------------------------- data


class Numbers(Dataset[torch.Tensor]):
    """No randomness."""

    def __init__(self, length: int = SAMPLES) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


class Noisy(Numbers):
    """Augments with each of the process's generators."""

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.length:
            raise IndexError(index)
        noise = [random.gauss(0, 1), float(np.random.randn())]
        return torch.cat([torch.tensor([float(index), *noise]), torch.rand(1)])


class OwnGenerator(Numbers):
    """Augments with a generator of its own, and has the hook for it."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def reseed(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), self.rng.random()])


class Unhooked(Numbers):
    def __init__(self) -> None:
        super().__init__()
        self.transforms = [copy.copy(self), Numbers()]
        self.transforms[1].rng = np.random.default_rng(0)  # type: ignore[attr-defined]


class Fails(Numbers):
    def __getitem__(self, index: int) -> torch.Tensor:
        if index in (5, 13):
            raise ValueError(f"sample {index} is broken")
        return super().__getitem__(index)


class Flow(IterableDataset[torch.Tensor]):
    """Each worker gives its part, shuffled and augmented."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        mine = list(range(first, SAMPLES, step))
        random.shuffle(mine)
        return (torch.tensor([i, random.random()]) + torch.rand(1) for i in mine)


class Pages(Sequence[torch.Tensor]):
    """Batches that are made as they are asked for."""

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: Any) -> Any:
        if index >= BATCHES:
            raise IndexError(index)
        return torch.rand(2) + index


class Wrapped:
    """What tqdm and its like are: an iterable around a loader."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.inner = loader

    def __iter__(self) -> Iterator[Any]:
        yield from self.inner

    def __len__(self) -> int:
        return len(self.inner)


class Counted:
    """A loader that keeps its own place."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        if not self.order:
            self.order, self.at = random.sample(range(BATCHES), BATCHES), 0
        while self.at < BATCHES:
            self.at += 1
            yield torch.rand(1) + self.order[self.at - 1]
        self.order = []

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self.order), "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.at = list(state["order"]), state["at"]


def noisy_collate(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(samples) * torch.rand(1) + random.random()


# ---------------------------------------------------------------- samplers


class Late(Sampler[int]):
    """Draws from the process's generators between one index and the next."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(SAMPLES):
            yield (random.randrange(7) + np.random.randint(7) + int(torch.randint(9, ()))) % SAMPLES

    def __len__(self) -> int:
        return SAMPLES


class Eager(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SAMPLES).tolist())

    def __len__(self) -> int:
        return SAMPLES


class Remembers(Sampler[int]):
    """Each order depends on how many there were before."""

    def __init__(self) -> None:
        self.times = 0

    def __iter__(self) -> Iterator[int]:
        self.times += 1
        return iter([(i * 5 + self.times) % SAMPLES for i in range(SAMPLES)])

    def __len__(self) -> int:
        return SAMPLES


class Saves(Remembers):
    def state_dict(self) -> dict[str, int]:
        return {"times": self.times}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.times = state["times"]


class Buckets:
    """A batch sampler that is no Sampler: arrays of different lengths, from its own generator."""

    def __init__(self) -> None:
        self.rng = random.Random(4)

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        for size in (5, 3, 4, 2, 6, 2):
            yield np.array(self.rng.sample(range(SAMPLES), size))

    def __len__(self) -> int:
        return BATCHES


# ---------------------------------------------------------------- loaders


class Transforms(DataLoader[Any]):
    """Does something at random in this process, one batch behind the loading."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        waiting = next(batches)
        for batch in batches:
            yield waiting * torch.rand(1)
            waiting = batch
        yield waiting * torch.rand(1)


def noisy(workers: int, **options: Any) -> DataLoader[Any]:
    options = {"batch_size": BATCH, "collate_fn": noisy_collate, "num_workers": workers, **options}
    return DataLoader(Noisy(), **options)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def replacing(workers: int) -> DataLoader[Any]:
    sampler = RandomSampler(Noisy(), replacement=True, num_samples=70, generator=seeded())
    return noisy(workers, sampler=sampler, batch_size=12)


def kept(workers: int) -> DataLoader[Any]:
    return noisy(workers, shuffle=True, persistent_workers=workers > 0)


MAP: dict[str, Callable[[int], Any]] = {
    "shuffled": lambda w: noisy(w, shuffle=True),
    "in sequence": lambda w: noisy(w),
    "with a generator": lambda w: noisy(w, shuffle=True, generator=seeded()),
    "with replacement": replacing,
    "weighted": lambda w: noisy(
        w, sampler=WeightedRandomSampler(list(range(1, SAMPLES)), 24, generator=seeded())
    ),
    "subset at random": lambda w: noisy(w, sampler=SubsetRandomSampler(range(3, 19))),
    "distributed": lambda w: noisy(w, sampler=DistributedSampler(Noisy(), 2, 1)),
    "late sampler": lambda w: noisy(w, sampler=Late()),
    "eager sampler": lambda w: noisy(w, sampler=Eager()),
    "saving sampler": lambda w: noisy(w, sampler=Saves()),
    "own batch sampler": lambda w: noisy(w, batch_sampler=Buckets(), batch_size=1),
    "no batches": lambda w: noisy(w, batch_size=None, shuffle=True, collate_fn=None),
    "drop last": lambda w: noisy(w, shuffle=True, drop_last=True),
    "prefetch": lambda w: noisy(w, shuffle=True, prefetch_factor=5 if w else None),
    "persistent": kept,
    "tensors": lambda w: DataLoader(
        Subset(TensorDataset(torch.arange(30.0)), range(SAMPLES)),
        BATCH,
        sampler=RandomSampler(range(SAMPLES), replacement=True, generator=seeded()),
        num_workers=w,
    ),
    "own generator": lambda w: DataLoader(
        ConcatDataset([Subset(OwnGenerator(), range(11)), OwnGenerator()]),
        BATCH,
        shuffle=True,
        num_workers=w,
    ),
}
OTHERS: dict[str, Callable[[int], Any]] = {
    "iterable": lambda w: DataLoader(Flow(), BATCH, collate_fn=noisy_collate, num_workers=w),
    "subclass": lambda w: Transforms(
        Noisy(), BATCH, shuffle=True, collate_fn=noisy_collate, num_workers=w
    ),
    "wrapped": lambda w: Wrapped(noisy(w, shuffle=True, generator=seeded())),
    "list": lambda w: [torch.tensor([float(i)]) for i in range(BATCHES)],
    "range": lambda w: range(BATCHES),
    "pages": lambda w: Pages(),
    "its own state": lambda w: Counted(),
}
LOADERS = MAP | OTHERS


# ---------------------------------------------------------------- a loop


Trace = list[tuple[Any, ...]]


def as_bytes(batch: Any) -> bytes:
    return batch.numpy().tobytes() if isinstance(batch, torch.Tensor) else repr(batch).encode()


def body_draws() -> tuple[float, ...]:
    return torch.rand(()).item(), random.gauss(0, 1), float(np.random.randn())


def through_json(state: Any) -> Any:
    tensors: list[torch.Tensor] = []

    def put(tensor: torch.Tensor, path: str) -> Any:
        tensors.append(tensor.clone())
        return {"$": "tensor", "v": len(tensors) - 1}

    tree = json.loads(json.dumps(Encoder(put).encode(state, "state")))
    return Decoder(lambda reference: tensors[reference["v"]]).decode(tree)


def play(
    make: Callable[[int], Any],
    workers: int = 0,
    saved: Any = None,
    *,
    stop_after: int | None = None,
    stop_at_epoch: int | None = None,
    epochs: int = EPOCHS,
    before_epoch: Callable[[Any, int], None] = lambda loader, epoch: None,
    body: Callable[[Any], Any] = lambda loader: None,
) -> tuple[Trace, Any]:
    """Run a loop to its end, or to where it is stopped; returns its trace and what it saved."""
    seed_process(derive_seed("start" if saved is None else f"garbage {stop_after}"))
    loader = make(workers)
    stream: Stream | None = None
    trace: Trace = []
    epoch, count, resume = 0, 0, None
    if saved is not None:
        epoch, count, resume = saved["epoch"], saved["count"], saved["pass"]
        restore_rng(saved["rng"])
    for epoch in range(epoch, epochs):  # noqa: B020
        if isinstance(getattr(loader, "sampler", None), DistributedSampler):
            loader.sampler.set_epoch(epoch)
        before_epoch(loader, epoch)
        if stream is None:  # a run knows of a loader only when it is used
            stream = Stream(loader)
            if saved is not None:
                stream.load_state(saved["stream"])
        batches = Pass(stream, resume)
        batches.open()
        if resume is not None:
            restore_rng(saved["rng"])
        resume = None
        for batch in batches:
            trace.append((epoch, as_bytes(batch), *body_draws(), body(loader)))
            batches.finish()
            count += 1
            if count == stop_after:
                place = {"epoch": epoch, "count": count, "pass": batches.state()}
                state = through_json(place | {"stream": stream.state(), "rng": capture_rng()})
                batches.close()
                return trace, state
        batches.close()
        trace.append((epoch, "validation", *body_draws()))
        if epoch == stop_at_epoch:
            place = {"epoch": epoch + 1, "count": count, "pass": None}
            return trace, through_json(place | {"stream": stream.state(), "rng": capture_rng()})
    return trace, None


REFERENCES: dict[tuple[str, int], Trace] = {}


def reference(name: str, workers: int = 0) -> Trace:
    """The trace without an interruption."""
    if (name, workers) not in REFERENCES:
        REFERENCES[name, workers], _ = play(LOADERS[name], workers)
    return REFERENCES[name, workers]


def interrupted(name: str, before: int, after: int, **stop: int) -> Trace:
    first, saved = play(LOADERS[name], before, **stop)
    second, _ = play(LOADERS[name], after, saved)
    return first + second


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("name", LOADERS)
def test_a_loop_that_is_stopped_after_any_batch_goes_on_with_the_same_bits(name: str) -> None:
    expected = reference(name)
    assert len(expected) >= 8
    for stop_after in range(1, len(expected) - EPOCHS + 1):
        assert interrupted(name, 0, 0, stop_after=stop_after) == expected


@pytest.mark.parametrize("name", LOADERS)
def test_a_loop_that_is_stopped_between_epochs_goes_on_with_the_same_bits(name: str) -> None:
    assert interrupted(name, 0, 0, stop_at_epoch=0) == reference(name)


WORKERS = [(2, 2, 9), (0, 2, 3), (2, 0, 4)]
IN_WORKERS = [
    ("shuffled", *WORKERS[0]),
    ("shuffled", *WORKERS[1]),
    ("shuffled", *WORKERS[2]),
    ("with replacement", *WORKERS[0]),
    ("with replacement", *WORKERS[2]),
    ("late sampler", *WORKERS[1]),
    ("late sampler", *WORKERS[2]),
    ("saving sampler", *WORKERS[2]),
    ("own batch sampler", *WORKERS[0]),
    ("no batches", *WORKERS[1]),
    ("prefetch", *WORKERS[2]),
    ("persistent", *WORKERS[0]),
    ("persistent", *WORKERS[1]),
    ("own generator", *WORKERS[0]),
    ("own generator", *WORKERS[2]),
]


@pytest.mark.parametrize(("name", "before", "after", "stop_after"), IN_WORKERS)
def test_workers_change_nothing_before_or_after_an_interruption(
    name: str, before: int, after: int, stop_after: int
) -> None:
    # One worker-less reference for all: neither the samples nor the loop's own random numbers
    # depend on the number of workers.
    assert interrupted(name, before, after, stop_after=stop_after) == reference(name)


@pytest.mark.parametrize("name", ["iterable", "subclass", "wrapped"])
def test_what_depends_on_the_number_of_workers_is_exact_with_as_many(name: str) -> None:
    expected = reference(name, 2)
    assert interrupted(name, 2, 2, stop_after=3) == expected
    assert interrupted(name, 2, 2, stop_at_epoch=0) == expected


def test_workers_that_are_spawned_find_what_seeds_them() -> None:
    def spawned(workers: int) -> DataLoader[Any]:
        context = "spawn" if workers else None
        return noisy(workers and 1, shuffle=True, multiprocessing_context=context)

    _, saved = play(spawned, 0, stop_after=10)

    trace, _ = play(spawned, 1, saved)

    assert trace == reference("shuffled")[-3:]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(LOADERS)),
    st.lists(st.integers(1, 2 * BATCHES), min_size=1, max_size=4, unique=True).map(sorted),
)
def test_a_loop_may_be_stopped_any_number_of_times(name: str, stops: list[int]) -> None:
    trace: Trace = []
    saved = None
    for stop in stops:
        part, saved = play(LOADERS[name], 0, saved, stop_after=stop)
        trace += part
        if saved is None:
            break
    else:
        trace += play(LOADERS[name], 0, saved)[0]
    assert trace == reference(name)


def test_a_loop_goes_on_in_another_process(tmp_path: Path) -> None:
    code = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_loader import *
first, saved = play(LOADERS["late sampler"], 2, stop_after=7)
print(json.dumps([repr(first), Encoder(None).encode(saved, "saved")]))
"""
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    first, tree = json.loads(output.stdout)
    saved = Decoder(lambda reference: torch.empty(0)).decode(tree)

    second, _ = play(LOADERS["late sampler"], 0, saved)

    expected = reference("late sampler")
    assert first == repr(expected[: -len(second)])
    assert second == expected[-len(second) :]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_generator_that_the_body_draws_from_as_well(workers: int) -> None:
    def body(loader: Any) -> float:
        return torch.rand((), generator=loader.sampler.generator).item()

    expected, _ = play(replacing, body=body)
    first, saved = play(replacing, workers, stop_after=4, body=body)
    second, _ = play(replacing, workers, saved, body=body)

    assert first + second == expected


@pytest.mark.parametrize(
    ("stride", "stop"),
    [
        (1, {"stop_at_epoch": 0}),
        (1, {"stop_at_epoch": 1}),
        (1, {"stop_after": 9}),
        # After its first epoch, such a script looks like one that has seeded once for all.
        (0, {"stop_at_epoch": 1}),
        (0, {"stop_after": 9}),
    ],
)
def test_a_generator_that_the_script_seeds_for_each_epoch(
    stride: int, stop: dict[str, int]
) -> None:
    def before_epoch(loader: Any, epoch: int) -> None:
        loader.generator.manual_seed(50 + stride * epoch)

    make = MAP["with a generator"]
    expected, _ = play(make, epochs=3, before_epoch=before_epoch)
    first, saved = play(make, epochs=3, before_epoch=before_epoch, **stop)
    second, _ = play(make, 0, saved, epochs=3, before_epoch=before_epoch)

    assert first + second == expected


def test_torchdatas_loader_continues_from_its_own_state() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make(workers: int) -> Any:
        return stateful.StatefulDataLoader(
            Noisy(), BATCH, shuffle=True, collate_fn=noisy_collate, num_workers=workers
        )

    expected, _ = play(make)
    for stop in ({"stop_after": 2}, {"stop_after": 6}, {"stop_after": 8}, {"stop_at_epoch": 0}):
        first, saved = play(make, **stop)  # type: ignore[arg-type]
        assert first + play(make, 0, saved)[0] == expected


class Shuffled(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        order = list(range(SAMPLES))
        random.shuffle(order)
        yield from torch.tensor(order)


def test_torchdatas_loader_keeps_an_order_that_is_drawn_at_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make(workers: int) -> Any:
        return stateful.StatefulDataLoader(Shuffled(), BATCH)

    expected, _ = play(make)
    first, saved = play(make, stop_after=3)

    assert first + play(make, 0, saved)[0] == expected
    assert "may differ from a run without the interruption" in caplog.text


# ---------------------------------------------------------------- like the plain loader


def unnoisy(sampler: Any = None, **options: Any) -> Callable[[int], DataLoader[Any]]:
    def make(workers: int) -> DataLoader[Any]:
        given = {"sampler": sampler() if sampler else None, "num_workers": workers, **options}
        given = {key: value() if callable(value) else value for key, value in given.items()}
        return DataLoader(Numbers(), **given)

    return make


PLAIN = {
    "in sequence": unnoisy(batch_size=BATCH),
    "shuffled": unnoisy(batch_size=BATCH, shuffle=True),
    "with a generator": unnoisy(batch_size=BATCH, shuffle=True, generator=seeded),
    "random sampler": unnoisy(lambda: RandomSampler(Numbers()), batch_size=BATCH, drop_last=True),
    "with replacement": unnoisy(
        lambda: RandomSampler(Numbers(), replacement=True, num_samples=70, generator=seeded())
    ),
    "weighted": unnoisy(lambda: WeightedRandomSampler(range(SAMPLES), 9), batch_size=BATCH),
    "subset": unnoisy(lambda: SubsetRandomSampler(range(9), seeded()), batch_size=BATCH),
    "distributed": unnoisy(lambda: DistributedSampler(Numbers(), 2, 0), batch_size=BATCH),
    "eager": unnoisy(Eager, batch_size=BATCH),
    "batches": unnoisy(batch_sampler=lambda: BatchSampler(RandomSampler(Numbers()), 5, False)),
    "no batches": unnoisy(batch_size=None, shuffle=True),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_an_undisturbed_loop_is_that_of_the_plain_loader(make: Any) -> None:
    seed_process(derive_seed("start"))
    loader, expected = make(0), []
    for epoch in range(3):
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        expected += [(epoch, as_bytes(batch), *body_draws(), None) for batch in loader]
        expected += [(epoch, "validation", *body_draws())]

    assert play(make, epochs=3)[0] == expected


def test_with_workers_the_order_is_that_of_the_plain_loader_too() -> None:
    loader = DataLoader(Numbers(), BATCH, shuffle=True, generator=seeded(), num_workers=2)
    expected = [as_bytes(batch) for _ in range(2) for batch in loader]

    trace, _ = play(PLAIN["with a generator"], 2)

    assert [entry[1] for entry in trace if entry[1] != "validation"] == expected


@pytest.mark.parametrize("count", [31, 40])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_is_left_early_leaves_generators_where_the_plain_loader_does(
    workers: int, count: int
) -> None:
    # The sampler draws 32 indices at a time, and two workers prefetch 4.
    plain, loader = PLAIN["with replacement"](0), PLAIN["with replacement"](workers)
    expected = [as_bytes(batch) for _, batch in zip(range(count), plain, strict=False)]
    batches = Pass(Stream(loader))
    batches.open()
    assert [as_bytes(batch) for _, batch in zip(range(count), batches, strict=False)] == expected
    batches.close()

    assert torch.equal(loader.sampler.generator.get_state(), plain.sampler.generator.get_state())


def test_a_generator_that_the_body_has_drawn_from_stays_where_the_body_left_it() -> None:
    loader = PLAIN["with replacement"](0)
    for _ in opened(loader):
        torch.rand((), generator=loader.sampler.generator)
        left = loader.sampler.generator.get_state()

    assert torch.equal(loader.sampler.generator.get_state(), left)


@pytest.mark.parametrize("name", LOADERS)
def test_loading_does_not_touch_the_random_numbers_of_the_body(name: str) -> None:
    for workers in (0, 2) if name in ("late sampler", "iterable", "wrapped", "subclass") else (0,):
        batches = opened(LOADERS[name](workers))
        for _ in range(3):
            before = capture_rng()
            next(batches)
            assert same_state(capture_rng(), before)
        batches.close()


class Recorded(Sampler[int]):
    def __init__(self) -> None:
        self.drawn: list[float] = []

    def __iter__(self) -> Iterator[int]:
        for index in range(SAMPLES):
            self.drawn += body_draws()
            yield index


def test_what_loading_draws_is_not_what_the_body_draws() -> None:
    sampler = Recorded()
    from_body = [x for _ in opened(noisy(0, sampler=sampler)) for x in body_draws()]
    # The first index is drawn from the live streams, as in the plain loader; then they part.
    assert len(sampler.drawn) == 3 * SAMPLES
    assert not set(sampler.drawn) & set(from_body)

    pages = [batch % 1 for _ in range(2) for batch in opened(Pages())]
    noise = [x for page in pages for x in page.tolist()]
    assert len(set(noise)) == len(noise) == 4 * BATCHES


class CountsEpochs(DataLoader[Any]):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.epoch = 0

    def __iter__(self) -> Any:
        self.sampler.set_epoch(self.epoch)  # type: ignore[union-attr]
        self.epoch += 1
        return super().__iter__()


def test_a_subclass_that_counts_its_epochs_gives_what_it_gives_alone() -> None:
    def make(workers: int) -> Any:
        return CountsEpochs(Numbers(), BATCH, sampler=DistributedSampler(Numbers(), 2, 0))

    loader = make(0)
    expected = [as_bytes(batch) for _ in range(3) for batch in loader]
    stream = Stream(make(0))

    assert [as_bytes(batch) for _ in range(3) for batch in all_of(stream)] == expected
    assert len(set(expected)) == len(expected)


def test_the_scripts_loader_is_not_touched() -> None:
    loader = noisy(2, shuffle=True, persistent_workers=True)
    before = dict(vars(loader))
    batches = Pass(Stream(loader))
    batches.open()
    next(batches)

    assert vars(loader) == before
    assert len(batches) == len(loader) == BATCHES


def test_what_the_script_changes_in_its_loader_counts_from_the_next_pass() -> None:
    loader = DataLoader(Numbers(), BATCH)
    stream = Stream(loader)
    assert all_of(stream)[0].shape == (4, 1)
    loader.collate_fn = len

    assert all_of(stream) == [4, 4, 4, 4, 4, 2]


def opened(loader: Any) -> Pass:
    batches = Pass(Stream(loader))
    batches.open()
    return batches


def all_of(stream: Stream) -> list[Any]:
    batches = Pass(stream)
    batches.open()
    return list(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_one_batch_uses_it_up_as_in_the_plain_loader(workers: int) -> None:
    def through(batches: Any) -> tuple[list[Any], Any]:
        seen: list[Any] = []
        state, begin = None, getattr(batches, "done", 0)
        while True:
            try:
                seen.append(next(batches).flatten().tolist())
            except ValueError:
                seen.append("error")
                assert not isinstance(batches, Pass) or batches.done == begin + len(seen)
                continue
            except StopIteration:
                return seen, state
            if isinstance(batches, Pass):
                batches.finish()
                assert batches.done == begin + len(seen)
                if len(seen) == 3:
                    state = batches.state()

    loader = DataLoader(Fails(), BATCH, num_workers=workers)
    expected, _ = through(iter(loader))
    batches = Pass(Stream(loader))
    batches.open()
    seen, state = through(batches)
    resumed = Pass(Stream(loader), through_json(state))
    resumed.open()

    assert expected[1] == expected[3] == "error"
    assert seen == expected
    assert batches.done == len(expected) == 6
    assert through(resumed)[0] == expected[3:]


def test_an_interrupt_while_loading_leaves_the_batch_to_be_done() -> None:
    class Interrupted(Numbers):
        def __getitem__(self, index: int) -> torch.Tensor:
            if index == 5:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    batches = opened(DataLoader(Interrupted(), BATCH))
    next(batches)
    batches.finish()
    with pytest.raises(KeyboardInterrupt):
        next(batches)

    resumed = Pass(Stream(DataLoader(Numbers(), BATCH)), through_json(batches.state()))
    resumed.open()

    assert batches.done == 1
    assert next(resumed).flatten().tolist() == [4, 5, 6, 7]


# ---------------------------------------------------------------- workers and threads


class SeedOfWorker(Numbers):
    def __getitem__(self, index: int) -> torch.Tensor:
        info = get_worker_info()
        return torch.tensor([index, 0 if info is None else info.seed])


@pytest.mark.parametrize("persistent", [False, True])
def test_a_worker_is_given_the_seed_that_it_would_have_had(persistent: bool) -> None:
    def make(workers: int) -> Any:
        return DataLoader(SeedOfWorker(), 11, num_workers=1, persistent_workers=persistent)

    expected, _ = play(make)
    seeds = {entry[1][8:16] for entry in expected if entry[1] != "validation"}
    assert len(seeds) == (1 if persistent else 2)

    for stop in ({"stop_after": 1}, {"stop_after": 3}, {"stop_at_epoch": 0}):
        first, saved = play(make, **stop)  # type: ignore[arg-type]
        assert first + play(make, 0, saved)[0] == expected


class OwnFlow(IterableDataset[torch.Tensor]):
    def __init__(self) -> None:
        self.rng = random.Random(0)

    def reseed(self, seed: int) -> None:
        self.rng.seed(seed)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.tensor([self.rng.random()]) for _ in range(SAMPLES))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_hook_of_an_iterable_data_set_is_called_for_each_batch(workers: int) -> None:
    def make(workers: int) -> Any:
        return DataLoader(OwnFlow(), BATCH, num_workers=workers)

    expected, _ = play(make, workers)
    batches = [entry[1] for entry in expected if entry[1] != "validation"]
    assert len(set(batches)) == len(batches) == EPOCHS * BATCHES * max(workers, 1)
    first, saved = play(make, workers, stop_after=8)

    assert first + play(make, workers, saved)[0] == expected


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_workers_stop_at_once_when_a_pass_is_left(leave: str) -> None:
    gc.collect()
    assert not multiprocessing.active_children()
    stream = Stream(noisy(2, shuffle=True))
    batches = Pass(stream)
    batches.open()
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    gc.disable()
    try:
        if leave == "close":
            batches.close()
        else:
            del batches
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_persistent_workers_stay_from_pass_to_pass_even_after_a_break() -> None:
    stream = Stream(noisy(2, shuffle=True, persistent_workers=True))
    batches = Pass(stream)
    batches.open()
    next(batches)
    batches.close()
    children = {child.pid for child in multiprocessing.active_children()}
    assert len(children) == 2

    assert len(all_of(stream)) == BATCHES

    assert {child.pid for child in multiprocessing.active_children()} == children
    del stream, batches
    assert not multiprocessing.active_children()


def in_thread(action: Callable[[], Any]) -> BaseException | None:
    errors: list[BaseException | None] = [None]

    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001
            errors[0] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    return errors[0]


def test_another_thread_may_not_iterate() -> None:
    batches = Pass(Stream(noisy(0)))
    batches.open()

    error = in_thread(lambda: next(batches))

    assert isinstance(error, RuntimeError)
    assert "thread that opened it" in str(error)


class InBackground(DataLoader[Any]):
    """Loads in a thread, as some do to prefetch without workers."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches, loaded = super().__iter__(), []
        in_thread(lambda: loaded.extend(batches))
        return iter(loaded)


def test_a_loader_that_loads_in_a_thread_is_refused() -> None:
    batches = Pass(Stream(InBackground(Noisy(), BATCH)))
    batches.open()

    with pytest.raises(RuntimeError, match="read by another thread"):
        next(batches)


class InPairs(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        return zip(batches, batches, strict=True)


def test_a_loader_that_merges_batches_is_refused() -> None:
    batches = Pass(Stream(InPairs(Noisy(), BATCH)))
    batches.open()
    next(batches)

    with pytest.raises(UsageError, match="used 2 batches of its sampler for one"):
        next(batches)


class MadeAhead(DataLoader[Any]):
    """Keeps one endless iterator, made in the constructor, as some do to keep workers."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.made = super().__iter__()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for _ in range(len(self)):
            yield next(self.made)


def test_a_loader_that_ignores_its_sampler_is_refused() -> None:
    with pytest.raises(UsageError, match="does not take its order from its sampler"):
        Pass(Stream(MadeAhead(Noisy(), BATCH))).open()


# ---------------------------------------------------------------- refused at a resume


def saved_after(make: Callable[[int], Any], workers: int = 0) -> Any:
    return play(make, workers, stop_after=3)[1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda: noisy(0, shuffle=True, batch_size=8), "batch size of .* was 4 .* is 8"),
        (
            lambda: DataLoader(Noisy(30), BATCH, shuffle=True, collate_fn=noisy_collate),
            "number of samples of .* was 22 .* is 30",
        ),
        (
            lambda: noisy(0, sampler=RandomSampler(Noisy(), num_samples=9)),
            "number of batches of .* was 6 .* is 3",
        ),
        (
            lambda: noisy(0),
            r"BatchSampler\(RandomSampler\) .* is BatchSampler\(SequentialSampler\)",
        ),
        (lambda: list(range(6)), "kind of .* was map .* is sequence"),
    ],
)
def test_data_that_changed_in_the_middle_of_a_pass_is_an_error_with_both_values(
    changed: Callable[[], Any], message: str
) -> None:
    saved = saved_after(LOADERS["shuffled"])

    with pytest.raises(PositionError, match=message):
        Pass(Stream(changed()), saved["pass"]).open()


def test_between_passes_batch_size_and_data_may_change() -> None:
    _, saved = play(LOADERS["with a generator"], stop_at_epoch=0)
    loader = DataLoader(Noisy(30), 8, shuffle=True, generator=seeded())
    stream = Stream(loader)

    stream.load_state(saved["stream"])

    assert len(all_of(stream)) == 4


def test_a_sampler_with_hidden_state_does_not_go_on_in_another_order() -> None:
    def make(workers: int) -> Any:
        return noisy(workers, sampler=Remembers())

    _, saved = play(make, stop_after=8)

    with pytest.raises(PositionError, match="did not repeat the order of the 2 batches"):
        play(make, 0, saved)
    with pytest.raises(PositionError, match="did not repeat the order"):
        play(make, 2, saved)
    assert not multiprocessing.active_children()


def test_a_loader_with_fewer_generators_is_refused() -> None:
    saved = saved_after(LOADERS["with a generator"])

    with pytest.raises(RestoreError, match=r"had 1 random number generators .* have 0 now"):
        Pass(Stream(noisy(0, shuffle=True)), saved["pass"]).open()


def test_an_iterable_data_set_is_not_resumed_with_another_number_of_workers() -> None:
    saved = saved_after(LOADERS["iterable"])

    with pytest.raises(PositionError, match=r"had 0 workers when .* set num_workers=0"):
        play(LOADERS["iterable"], 2, saved)


def test_a_stream_of_batches_that_ends_too_early_is_refused() -> None:
    saved = saved_after(lambda w: iter([1, 2, 3, 4]))

    with pytest.raises(PositionError, match="ends after 2 now"):
        Pass(Stream(iter([1, 2])), saved["pass"]).open()


def test_a_generator_object_can_be_resumed_but_not_used_twice() -> None:
    def make(workers: int) -> Iterator[float]:
        return (i + random.random() for i in range(5))

    expected, _ = play(make, epochs=1)
    first, saved = play(make, epochs=1, stop_after=2)

    assert first + play(make, 0, saved, epochs=1)[0] == expected
    with pytest.raises(UsageError, match="once only"):
        play(make, epochs=2)


def test_a_torchdata_loader_with_a_sampler_that_it_does_not_save_is_refused() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    loader = stateful.StatefulDataLoader(Noisy(), BATCH, sampler=RandomSampler(Noisy()))

    with pytest.raises(UsageError, match="RandomSampler"):
        Pass(Stream(loader)).open()


# ---------------------------------------------------------------- said in the log


@pytest.mark.parametrize("name", ["iterable", "wrapped"])
def test_reading_again_is_announced(name: str, caplog: pytest.LogCaptureFixture) -> None:
    saved = saved_after(LOADERS[name])
    assert not caplog.messages

    play(LOADERS[name], 0, saved)

    assert [m for m in caplog.messages if "first 3" in m and "read again and dropped" in m]


NOT_EXACT = {
    "in_order": (lambda: noisy(2, in_order=False), "in spite of in_order=False"),
    "persistent": (  # and the workers are gone after the pass, below
        lambda: DataLoader(Flow(), BATCH, num_workers=1, persistent_workers=True),
        "in spite of persistent_workers=True",
    ),
    "generator": (
        lambda: DataLoader(Subset(Unhooked(), range(9))),
        "dataset.dataset.transforms[1].rng is a random number generator that is not saved",
    ),
}


@pytest.mark.parametrize(("make", "message"), NOT_EXACT.values(), ids=NOT_EXACT)
def test_what_is_not_exact_is_said_once(
    make: Callable[[], Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    stream = Stream(make())
    all_of(stream)
    assert [m for m in caplog.messages if message in m] == caplog.messages
    assert len(caplog.messages) == 1
    assert not multiprocessing.active_children()

    all_of(stream)

    assert len(caplog.messages) == 1


# ---------------------------------------------------------------- parts


def test_a_fingerprint_says_what_a_loader_is() -> None:
    assert Stream(LOADERS["shuffled"](2)).fingerprint() == {
        "kind": "map",
        "batch_size": 4,
        "dataset_length": 22,
        "length": 6,
        "sampler": "BatchSampler(RandomSampler)",
    }
    kinds = {name: Stream(make(0)).fingerprint()["kind"] for name, make in OTHERS.items()}
    assert kinds == {
        "iterable": "iterable",
        "subclass": "map",
        "wrapped": "replayed",
        "list": "sequence",
        "range": "sequence",
        "pages": "sequence",
        "its own state": "stateful",
    }


def test_a_pass_counts_finished_bodies_only() -> None:
    batches = Pass(Stream([1, 2, 3]))
    with pytest.raises(RuntimeError, match="open"):
        next(batches)
    batches.open()
    assert batches.done == 0
    assert next(batches) == 1
    assert batches.done == 0
    batches.finish()
    batches.finish()
    assert batches.done == 1
    assert [next(batches), next(batches)] == [2, 3]
    with pytest.raises(StopIteration):
        next(batches)
    batches.finish()
    assert batches.done == len(batches) == 3


def test_a_pass_without_a_length_has_none() -> None:
    with pytest.raises(TypeError):
        len(Pass(Stream(x for x in "abc")))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1, 2, 3], [1, 3, 2]),
        ([1, 2], [1, 2, 3]),
        ([[1], [2]], [[1, 2]]),
        (["a", "b"], ["b", "a"]),
        ({"a": 1}, {"a": 2}),
        (np.arange(5000), np.arange(5000)[::-1]),  # their repr is cut in the middle
        (np.r_[0:2000, 5, 0:2000], np.r_[0:2000, 6, 0:2000]),
        (torch.arange(6), torch.arange(6).view(2, 3)),
        ([torch.tensor([1.0])], [torch.tensor([2.0])]),
        (1, 2),
        (1.0, 1.5),
        ((1, 2**70), (1, 2**71)),
    ],
    ids=str,
)
def test_other_indices_have_another_checksum(a: Any, b: Any) -> None:
    assert index_checksum(a) != index_checksum(b)
    assert index_checksum(a) == index_checksum(copy.deepcopy(a))
    assert index_checksum(a, 1) != index_checksum(a, 2)


def test_a_checksum_goes_by_value_and_not_by_address() -> None:
    assert index_checksum([1, 2]) == index_checksum([np.int64(1), torch.tensor(2)])
    assert index_checksum(7) == index_checksum(np.int32(7))
    assert index_checksum(SequentialSampler([1])) == index_checksum(SequentialSampler([1]))


def test_a_checksum_is_the_same_in_every_version() -> None:
    # Written down: a pass that was saved by an earlier version must find its place again.
    assert index_checksum([3, 1, 2], index_checksum(("a", 2.5))) == 2781903726


def test_looking_for_what_counts_from_outside_asks_no_object_for_its_class() -> None:
    """Some warn when they are asked, such as `torch.distributed.reduce_op`."""

    class Touchy:
        @property
        def __class__(self) -> type:  # type: ignore[override]
            asked.append(True)
            return Touchy

    asked: list[bool] = []
    touchy = Touchy()

    assert not wrappers._is_counted_from_outside()
    assert asked == []
    assert isinstance(touchy, Touchy)
