"""A run that is struck ends with the bits of one that is not: loops, places, and what is logged.

Scripts are functions that build everything anew in each attempt (see `harness`). Whatever a step
computes is noted as a fact, which must be the same whenever it is computed again; the digest of the
last checkpoint must be that of the undisturbed run.
"""

from __future__ import annotations

import itertools
import logging
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import runner
from runner.errors import RestoreError, SpoolTaken, UnknownName
from runner.plan import BestMetric
from runner.training import course as course_module
from tests.harness import INTERRUPT, KILL, PREEMPT, Life, Played, Script, Stage, Strike
from tests.slots import memory_folder

FEATURES = 3
BATCH = 4
SAMPLES = 18
BATCHES = 5  # of which the last is short
EPOCHS = 2


# ---------------------------------------------------------------- parts of scripts


class Noisy(Dataset[torch.Tensor]):
    """Augments with each of the process's generators."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.tensor([index / SAMPLES, random.gauss(0, 1), float(np.random.randn())])
        return noise + torch.rand(FEATURES)


def seed(number: int = 7) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


class Kit:
    """A model with dropout, an optimizer with momentum, a loader that shuffles and augments."""

    def __init__(self, life: Life, workers: int = 0, samples: int = SAMPLES) -> None:
        seed()
        self.life = life
        self.model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        self.loader = DataLoader(
            Noisy(samples), batch_size=BATCH, shuffle=True, num_workers=workers
        )

    def attach(self, **more: Any) -> runner.Run:
        return runner.attach(model=self.model, optimizer=self.optimizer, **more)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(batch).pow(2).mean()
        return loss

    def train(self, batch: torch.Tensor, key: Any) -> torch.Tensor:
        """One step; where it may be struck, gradients are there and not used yet."""
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.life.here("body")
        self.optimizer.step()
        self.life.fact(key, loss.item())
        self.life.trace.append(key)
        return loss.detach()

    def validate(self) -> float:
        """Draws from the process's generators, as the loader of a script does."""
        self.model.eval()
        with torch.no_grad():
            losses = [self.loss(batch).item() for batch in self.loader]
        self.model.train()
        self.life.here("validation")
        return float(np.mean(losses))


def play(script: Script, *strikes: Strike, **options: Any) -> Played:
    with memory_folder() as folder:
        return Stage(folder, **options).play(script, strikes)


def assert_exact(script: Script, histories: Iterable[Sequence[Strike]], **options: Any) -> None:
    """Whatever befalls the run: the same facts, the same result, the same last state."""
    with memory_folder() as folder:
        first = Stage(folder / "undisturbed", **options)
        undisturbed = first.play(script)
        for number, strikes in enumerate(histories):
            stage = Stage(folder / str(number), **options)
            stage.facts = dict(first.facts)
            played = stage.play(script, strikes)
            assert len(played.lives) > 1, f"{strikes} did not befall it"
            assert played.result == undisturbed.result, strikes
            assert stage.facts == first.facts, strikes
            assert played.digest == undisturbed.digest, strikes


def assert_exact_wherever(script: Script, how: str = PREEMPT, **options: Any) -> None:
    """The same for one strike at each of the points that the undisturbed run comes by."""
    points = 0

    def counting(life: Life) -> Any:
        class Counting(Life):
            def here(self, point: str) -> None:
                nonlocal points
                points += 1

        life.__class__ = Counting
        return script(life)

    play(counting, **options)
    assert points > 1
    assert_exact(script, [[Strike("", n, how)] for n in range(1, points + 1)], **options)


# ---------------------------------------------------------------- everything at once


def everything(life: Life, workers: int = 0) -> Any:
    """Dropout, shuffling, augmentation, EMA, accumulation, a scaler, a schedule, validation."""
    seed()
    model = nn.Sequential(
        nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=20)
    loader = DataLoader(Noisy(), batch_size=BATCH, shuffle=True, num_workers=workers)
    validation = DataLoader(Noisy(6), batch_size=3)
    run = runner.attach(
        model=model, optimizer=optimizer, ema=ema, scaler=scaler, scheduler=scheduler
    )
    run.state.setdefault("best", float("inf"))
    history = run.state.setdefault("seen", [])
    for epoch in run.epochs(EPOCHS):
        life.here("top")
        for i, batch in enumerate(run.batches(loader, accumulate=2)):
            loss = model(batch).pow(2).mean()
            scaler.scale(loss / 2).backward()
            if i == 3 and epoch == 0:  # an overflow: the scaler skips this step
                next(model.parameters()).grad[0, 0] = float("inf")
            life.here("body")
            if i % 2 or i == len(loader) - 1:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scheduler.step()
                ema.update_parameters(model)
            life.fact((epoch, i), (loss.item(), scaler.get_scale(), scheduler.get_last_lr()))
            run.log(train_loss=loss)
        with run.phase("validation"), torch.no_grad():
            ema.eval()
            losses = [ema(batch).pow(2).mean().item() for batch in validation]
            life.here("validation")
        run.log(val_loss=float(np.mean(losses)), scale=scaler.get_scale())
        history.append(losses)
        run.state["best"] = min(run.state["best"], float(np.mean(losses)))
    return run.history, run.state


STRIKES = st.builds(
    Strike,
    point=st.sampled_from(["", "body", "body", "validation", "top"]),
    nth=st.integers(1, 7),
    how=st.sampled_from([PREEMPT, PREEMPT, INTERRUPT, KILL]),
    lost=st.booleans(),
)


@pytest.fixture(scope="module")
def undisturbed() -> tuple[str, Any, dict[Any, Any]]:
    with memory_folder() as folder:
        stage = Stage(folder)
        played = stage.play(everything)
        return played.digest, played.result, stage.facts


@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(strikes=st.lists(STRIKES, min_size=1, max_size=4))
def test_whatever_befalls_a_run_it_ends_with_the_bits_of_an_undisturbed_one(
    undisturbed: tuple[str, Any, dict[Any, Any]], strikes: list[Strike]
) -> None:
    with memory_folder() as folder:
        stage = Stage(folder, every_steps=2)
        stage.facts = dict(undisturbed[2])

        played = stage.play(everything, strikes)

        assert (played.digest, played.result) == undisturbed[:2]


def test_a_run_may_be_struck_at_every_single_point() -> None:
    assert_exact_wherever(everything)


def test_twice_in_a_row_without_a_step_between_is_as_good_as_once() -> None:
    twice = [Strike("body", 3), Strike("top"), Strike("top", how=KILL), Strike("top")]
    assert_exact(everything, [twice])


@pytest.mark.parametrize("workers", [(2, 2), (0, 2), (2, 0)], ids=str)
def test_it_does_not_matter_how_many_workers_load_the_data(
    undisturbed: tuple[str, Any, dict[Any, Any]], workers: tuple[int, int]
) -> None:
    with memory_folder() as folder:
        stage = Stage(folder)
        stage.facts = dict(undisturbed[2])

        played = stage.play(
            lambda life: everything(life, workers[life.attempt > 1]), [Strike("body", 3)]
        )

        assert len(played.lives) == 2
        assert (played.digest, played.result) == undisturbed[:2]


def test_the_digest_of_another_run_is_another_one() -> None:
    """What the tests here compare can differ."""

    def other(life: Life) -> None:
        everything(life)
        torch.rand(1)  # after the last boundary: not saved

    def one_draw_more(life: Life) -> None:
        life.here = lambda point: torch.rand(1)  # type: ignore[method-assign]
        everything(life)

    digests = [play(script).digest for script in (everything, other, one_draw_more)]
    assert digests[0] == digests[1] != digests[2]


# ---------------------------------------------------------------- wrappers around a loop

WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "enumerate": enumerate,
    "enumerate from 1": lambda loop: enumerate(loop, 1),
    "tqdm": lambda loop: tqdm(loop, disable=True),
    "tqdm of enumerate": lambda loop: tqdm(enumerate(loop), disable=True),
    "islice": lambda loop: itertools.islice(loop, 4),
    "enumerate of islice": lambda loop: enumerate(itertools.islice(loop, 4)),
    "islice of enumerate": lambda loop: itertools.islice(enumerate(loop), 4),
    "islice with an end beyond the data": lambda loop: itertools.islice(loop, 40),
    "enumerate of enumerate": lambda loop: enumerate(enumerate(loop)),
    "islice that ends with the struck batch": lambda loop: itertools.islice(loop, 2),
}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_counts_on_over_an_interruption(wrapper: Callable[[Any], Any]) -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        for epoch in run.epochs(EPOCHS):
            for item in wrapper(run.batches(kit.loader)):
                numbers = []
                while isinstance(item, tuple):
                    numbers.append(item[0])
                    item = item[1]
                kit.train(item, (epoch, run.batch, tuple(numbers)))
            life.here("end")
        return run.step

    assert_exact_wherever(script)


def test_enumerate_around_a_progress_bar_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """It cannot be wound forward: the bar's generator is running."""

    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        for epoch in run.epochs(1):
            for i, batch in enumerate(tqdm(run.batches(kit.loader), disable=True)):
                life.trace.append(i)
                kit.train(batch, (epoch, run.batch))

    lives = play(script, Strike("body", 2)).lives
    assert [life.trace[0] for life in lives] == [0, 0]
    assert "run.batch" in caplog.text


@pytest.mark.parametrize("bounds", [(1, 4), (0, 4, 2)], ids=str)
def test_an_islice_that_leaves_batches_out_is_refused_at_the_resume(bounds: Any) -> None:
    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        for epoch in run.epochs(1):
            for batch in itertools.islice(run.batches(kit.loader), *bounds):
                kit.train(batch, (epoch, run.batch))

    with pytest.raises(RestoreError, match="islice"):
        play(script, Strike("body", 2))


def test_one_loop_may_be_gone_through_in_slices() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        seen = run.state.setdefault("seen", [])
        for epoch in run.epochs(EPOCHS):
            batches = iter(run.batches(kit.loader))
            for part in range(3):
                for i, batch in enumerate(itertools.islice(batches, 2)):
                    kit.train(batch, (epoch, part, i))
                seen.append(kit.validate())
        return seen

    assert_exact_wherever(script)


def test_a_loop_may_be_asked_by_hand() -> None:
    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        for epoch in run.epochs(EPOCHS):
            batches = iter(run.batches(kit.loader))
            while (batch := next(batches, None)) is not None:
                kit.train(batch, (epoch, run.batch))

    assert_exact_wherever(script)


# ---------------------------------------------------------------- shapes of loops


def loop_left_by_break(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for epoch in run.epochs(3):
        for i, batch in enumerate(run.batches(kit.loader)):
            run.log(loss=kit.train(batch, (epoch, i)))
            if i == 2:
                break
        run.log(val=kit.validate())
    return run.step, run.history


def two_loops_in_an_epoch(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for epoch in run.epochs(EPOCHS):
        for part in range(2):
            for batch in run.batches(kit.loader):
                kit.train(batch, (epoch, part, run.batch))
            kit.validate()
    return run.step


def two_loaders_and_a_break(life: Life) -> Any:
    kit = Kit(life)
    generator = torch.Generator().manual_seed(3)
    other = DataLoader(Noisy(9), batch_size=2, shuffle=True, generator=generator)
    run = kit.attach()
    for epoch in run.epochs(EPOCHS):
        for i, batch in enumerate(run.batches(kit.loader)):
            kit.train(batch, (epoch, "first", i))
            if i == 1:
                break
        for i, batch in enumerate(run.batches(other)):
            kit.train(batch, (epoch, "second", i))
            if i == 2:
                break
    return run.step


def body_with_continue(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for epoch in run.epochs(EPOCHS):
        for i, batch in enumerate(run.batches(kit.loader)):
            if i in (1, 4):
                life.here("continue")
                continue
            run.log(loss=kit.train(batch, (epoch, i)))
    return run.step, run.history


def steps_through_several_passes(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for i, batch in enumerate(run.batches(kit.loader, steps=13)):
        run.log(loss=kit.train(batch, (i, run.epoch, run.batch)))
    return run.step, run.epoch, run.history


def accumulating_steps_through_several_passes(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for i, batch in enumerate(run.batches(kit.loader, steps=5, accumulate=2)):
        loss = kit.loss(batch)
        loss.backward()
        life.here("body")
        life.fact(i, loss.item())
        if run.batch % 2 or run.batch == len(kit.loader) - 1:
            kit.optimizer.step()
            kit.optimizer.zero_grad()
    return run.step, run.epoch, run.history


def data_in_the_state(life: Life) -> Any:
    kit = Kit(life)
    draws = torch.Generator().manual_seed(5)
    run = kit.attach(draws=draws)
    for step in run.steps(7):
        batch = torch.rand(BATCH, FEATURES, generator=draws)
        run.log(loss=kit.train(batch, step))
    return run.step


def steps_in_epochs(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for epoch in run.epochs(EPOCHS):
        for step in run.steps(3 * (epoch + 1)):
            kit.train(torch.rand(BATCH, FEATURES), (epoch, step))
        kit.validate()
    return run.step


def boundaries_by_hand(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    while run.step < 6:
        loss = kit.train(torch.rand(BATCH, FEATURES), run.step)
        run.boundary(loss=loss)
    return run.step


def new_loader_for_each_epoch(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for epoch in run.epochs(3):
        generator = torch.Generator().manual_seed(epoch)
        loader = DataLoader(Noisy(), batch_size=BATCH, shuffle=True, generator=generator)
        for i, batch in enumerate(run.batches(loader)):
            kit.train(batch, (epoch, i))
        kit.validate()
    return run.step


def busy_top_of_an_epoch(life: Life) -> Any:
    """Draws, steps a scheduler, logs, counts and switches modes where it will be done again."""
    kit = Kit(life)
    scheduler = StepLR(kit.optimizer, 1, 0.5)
    run = kit.attach(scheduler=scheduler)
    tops = run.state.setdefault("tops", [])
    for epoch in run.epochs(3):
        tops.append(random.random() + float(np.random.rand()))
        run.log(temperature=torch.rand(()))
        kit.model[1].train(epoch != 1)
        kit.model[2].bias.requires_grad_(epoch != 2)
        scheduler.step()
        life.here("top")
        for i, batch in enumerate(run.batches(kit.loader)):
            run.log(loss=kit.train(batch, (epoch, i)))
        kit.validate()
    return tops, run.history, scheduler.get_last_lr()


def a_loop_before_the_epochs(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for i, batch in enumerate(run.batches(kit.loader, steps=3)):
        kit.train(batch, ("warm-up", i))
    for epoch in run.epochs(2):
        for i, batch in enumerate(run.batches(kit.loader)):
            kit.train(batch, (epoch, i))
    return run.step


def a_loop_behind_the_epochs(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for i, batch in enumerate(run.batches(kit.loader, steps=2)):
        kit.train(batch, ("warm-up", i))
    for epoch in run.epochs(3):
        for i, batch in enumerate(run.batches(kit.loader, accumulate=1)):
            kit.train(batch, (epoch, i))
            if i == 2:
                break
    for i, batch in enumerate(run.batches(kit.loader, steps=3)):
        kit.train(batch, ("fine-tuning", i))
    for step in run.steps(17):
        kit.train(torch.rand(BATCH, FEATURES), ("more", step))
    return run.step


def epochs_in_two_parts(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for epoch in run.epochs(1):
        for i, batch in enumerate(run.batches(kit.loader)):
            kit.train(batch, ("head", epoch, i))
    for epoch in run.epochs(3):
        for i, batch in enumerate(run.batches(kit.loader)):
            kit.train(batch, ("all", epoch, i))
        kit.validate()
    return run.step, run.history


def passes_without_epochs(life: Life) -> Any:
    """The script has a loop of its own around; the loops are told apart by their order."""
    kit = Kit(life)
    run = kit.attach()
    for part in range(3):
        for i, batch in enumerate(run.batches(kit.loader)):
            kit.train(batch, (part, i))
    return run.step


def epochs_without_batches(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for epoch in run.epochs(4):
        run.log(loss=kit.train(torch.rand(BATCH, FEATURES), epoch))
    return run.history


def epochs_left_by_break(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for epoch in run.epochs(5):
        for i, batch in enumerate(run.batches(kit.loader)):
            run.log(loss=kit.train(batch, (epoch, i)))
        if epoch == 1:
            break
        kit.validate()
    return run.step, run.history


def stopped_in_validation(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for epoch in run.epochs(9):
        for i, batch in enumerate(run.batches(kit.loader)):
            kit.train(batch, (epoch, i))
        run.log(val=kit.validate())
        if epoch == 1:
            run.stop("good enough")
            life.here("stopped")
    return run.step, run.stopped, run.history


def stopped_in_the_body(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for epoch in run.epochs(9):
        for i, batch in enumerate(run.batches(kit.loader)):
            run.log(loss=kit.train(batch, (epoch, i)))
            if (epoch, i) == (1, 2):
                run.stop("good enough")
                life.here("stopped")
        run.log(val=kit.validate())
    return run.step, run.stopped, run.history


def stopped_without_epochs(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for i, batch in enumerate(run.batches(kit.loader, steps=99)):
        kit.train(batch, i)
        if i == 7:
            run.stop("good enough")
    return run.step, run.stopped


def stopped_in_the_steps(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for step in run.steps(99):
        kit.train(torch.rand(BATCH, FEATURES), step)
        if step == 4:
            run.stop("good enough")
    return run.step, run.stopped


def boundary_by_hand_before_a_loop(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    if run.step == 0:
        kit.train(torch.rand(BATCH, FEATURES), "first")
        run.boundary()
    for i, batch in enumerate(run.batches(kit.loader, steps=4)):
        kit.train(batch, i)
    return run.step


SCRIPTS: list[Script] = [
    loop_left_by_break,
    two_loops_in_an_epoch,
    two_loaders_and_a_break,
    body_with_continue,
    steps_through_several_passes,
    accumulating_steps_through_several_passes,
    data_in_the_state,
    steps_in_epochs,
    boundaries_by_hand,
    new_loader_for_each_epoch,
    busy_top_of_an_epoch,
    a_loop_before_the_epochs,
    a_loop_behind_the_epochs,
    epochs_in_two_parts,
    passes_without_epochs,
    epochs_without_batches,
    epochs_left_by_break,
    stopped_in_validation,
    stopped_in_the_body,
    stopped_without_epochs,
    stopped_in_the_steps,
    boundary_by_hand_before_a_loop,
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_loop_of_this_shape_goes_on_where_it_was(script: Script) -> None:
    assert_exact_wherever(script)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_loop_of_this_shape_goes_on_after_a_kill(script: Script) -> None:
    assert_exact(script, [[Strike("body", 3, KILL), Strike("body", 2, KILL, lost=True)]])
