"""A run that is struck ends with the bits of one that is not: loops, places, and what is logged.

Scripts are functions that build everything anew in each attempt (see `harness`). Whatever a step
computes is noted as a fact, which must be the same whenever it is computed again; the digest of the
last checkpoint must be that of the undisturbed run.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import subprocess
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

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
from runner.checkpoint.keeper import Origin
from runner.errors import CaptureError, RestoreError, SpoolTaken, UnknownName
from runner.plan import BestMetric, Interval
from runner.spool import Marker, RankSpool
from runner.training import rhythm as rhythm_module
from tests.harness import INTERRUPT, KILL, PREEMPT, Life, Played, Script, Stage, Strike
from tests.slots import memory_folder
from tests.waiting import wait_until

# The first step of `everything` is skipped by its scaler, and other scripts step theirs on purpose
# where it is put back.
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")

FEATURES = 3
BATCH = 4
SAMPLES = 14
BATCHES = 4  # of which the last is short
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
        self.held_out = DataLoader(Noisy(3), batch_size=3)

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
            losses = [self.loss(batch).item() for batch in self.held_out]
        self.model.train()
        self.life.here("validation")
        return float(np.mean(losses))


def play(script: Script, *strikes: Strike, **options: Any) -> Played:
    with memory_folder() as folder:
        return Stage(folder, **options).play(script, strikes)


def assert_exact(
    script: Script, histories: Iterable[Sequence[Strike]], *, whole: bool = True, **options: Any
) -> None:
    """Whatever befalls the run: the same facts, the same result, the same last state.

    Without `whole`, the facts alone: where the last state remembers what no later step depends on.
    """
    with memory_folder() as folder:
        first = Stage(folder / "undisturbed", **options)
        undisturbed = first.play(script)
        for number, strikes in enumerate(histories):
            stage = Stage(folder / str(number), **options)
            stage.facts = dict(first.facts)
            played = stage.play(script, strikes)
            assert len(played.lives) > 1, f"{strikes} did not befall it"
            assert stage.facts == first.facts, strikes
            if not whole:
                continue
            assert played.result == undisturbed.result, strikes
            assert played.digest == undisturbed.digest, strikes


def assert_exact_wherever(
    script: Script, how: str = PREEMPT, *, whole: bool = True, **options: Any
) -> None:
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
    histories = [[Strike("", n, how)] for n in range(1, points + 1)]
    assert_exact(script, histories, whole=whole, **options)


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
            if i == 1 and epoch == 0:  # an overflow: the scaler skips this step
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
        stage = Stage(folder, every=Interval(steps=2))
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

        def script(life: Life) -> Any:
            try:
                return everything(life, workers[life.attempt > 1])
            except runner.Preempted:
                life.trace.append(multiprocessing.active_children())
                raise

        played = stage.play(script, [Strike("body", 3)])

        assert len(played.lives) == 2
        assert played.lives[0].trace == [[]], "the workers end when the state is saved"
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
            for part in range(2):
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
            if i == 1:
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


def two_loaders_that_look_alike(life: Life) -> Any:
    """The second one is first used where the first one was left."""
    kit = Kit(life)
    loaders = [
        DataLoader(
            Noisy(9),
            batch_size=BATCH,
            shuffle=True,
            generator=torch.Generator().manual_seed(number),
        )
        for number in range(2)
    ]
    run = kit.attach()
    for epoch in run.epochs(3):
        for part, loader in enumerate(loaders):
            for i, batch in enumerate(run.batches(loader)):
                kit.train(batch, (epoch, part, i))
                if i == 1:
                    break
    return run.step


def body_with_continue(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for epoch in run.epochs(EPOCHS):
        for i, batch in enumerate(run.batches(kit.loader)):
            if i in (1, BATCHES - 1):
                life.here("continue")
                continue
            run.log(loss=kit.train(batch, (epoch, i)))
    return run.step, run.history


def steps_through_several_passes(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for i, batch in enumerate(run.batches(kit.loader, steps=9)):
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
            if i == 1:
                break
    for i, batch in enumerate(run.batches(kit.loader, steps=3)):
        kit.train(batch, ("fine-tuning", i))
    for step in run.steps(13):
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
            if (epoch, i) == (1, 1):
                run.stop("good enough")
                life.here("stopped")
        run.log(val=kit.validate())
    return run.step, run.stopped, run.history


def stopped_without_epochs(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for i, batch in enumerate(run.batches(kit.loader, steps=99)):
        kit.train(batch, i)
        if i == 5:
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
    two_loaders_that_look_alike,
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


def test_a_finished_run_stays_finished() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        for epoch in run.epochs(1):
            for batch in run.batches(kit.loader):
                kit.train(batch, (epoch, run.batch))
        return run.step, run.epoch, run.history

    with memory_folder() as folder:
        stage = Stage(folder)
        first = stage.play(script)
        again = stage.play(script)
        assert again.lives[-1].trace == []
        assert (again.result, again.digest) == (first.result, first.digest)
        assert [life.board.finished for life in again.lives] == [1, 1]


def test_a_finished_run_goes_on_where_the_script_wants_more_epochs() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        for epoch in run.epochs(life.attempt):
            for batch in run.batches(kit.loader):
                kit.train(batch, (epoch, run.batch))
        return run.history

    with memory_folder() as folder:
        stage = Stage(folder)
        stage.play(script)
        assert [record["epoch"] for record in stage.play(script).result] == [0, 1]
        at_once = play(lambda life: script(_as_attempt(life, 2)))
        assert stage.archive.digest(stage.newest()) == at_once.digest


def _as_attempt(life: Life, attempt: int) -> Life:
    life.attempt = attempt
    return life


def test_going_through_the_epochs_once_more_does_nothing() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        epochs = run.epochs(2)
        return list(epochs), list(epochs), run.epoch

    assert play(script).result == ([0, 1], [], 2)


def test_a_loop_inside_of_another_one_is_refused() -> None:
    """It would end the outer one, without a word."""

    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        for epoch in run.epochs(1):
            for i, batch in enumerate(run.batches(kit.loader)):
                kit.train(batch, (epoch, i))
                for _ in run.batches(kit.held_out):
                    pass

    with pytest.raises(RuntimeError, match="iterate over the plain loader"):
        play(script)


def test_a_loop_that_the_saved_run_was_in_must_come_again() -> None:
    """Whether there is a first loop depends on what it changes, so the second one is not found."""

    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        for _ in run.epochs(1):
            if "warm" not in run.state:
                for batch in run.batches(kit.loader):
                    kit.train(batch, ("first", run.batch))
                run.state["warm"] = True
            for batch in run.batches(kit.loader):
                kit.train(batch, ("second", run.batch))

    with pytest.raises(RestoreError, match="loop 2 of epoch 0"):
        play(script, Strike("body", BATCHES + 1))


def two_loaders_with_one_generator(life: Life) -> Any:
    kit = Kit(life)
    generator = torch.Generator().manual_seed(3)
    loaders = [
        DataLoader(Noisy(n), batch_size=BATCH, shuffle=True, generator=generator) for n in (9, 7)
    ]
    run = kit.attach()
    for epoch in run.epochs(EPOCHS):
        for part, loader in enumerate(loaders):
            for batch in run.batches(loader):
                kit.train(batch, (epoch, part, run.batch))
    return run.step


def test_two_loaders_may_share_a_generator() -> None:
    """A loader that the last attempt did not use is saved as it was in the one before."""
    assert_exact_wherever(two_loaders_with_one_generator, whole=False)


def test_a_generator_may_be_shared_by_script_and_loader() -> None:
    """The loader is first used after the resume, when the script has drawn from it again."""

    def script(life: Life) -> Any:
        kit = Kit(life)
        generator = torch.Generator().manual_seed(3)
        other = DataLoader(Noisy(6), batch_size=BATCH, shuffle=True, generator=generator)
        run = kit.attach(generator=generator)
        for epoch in run.epochs(4):
            for batch in run.batches(kit.loader if epoch % 2 else other):
                kit.train(batch, (epoch, run.batch))
            life.fact(("draw", epoch), float(torch.rand((), generator=generator)))
        return run.step

    assert_exact_wherever(script, whole=False)


def test_length_of_a_loop_is_that_of_the_whole_loop_also_after_a_resume() -> None:
    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        loop = run.batches(kit.loader, steps=5, accumulate=2)
        life.trace.append((len(run.batches(kit.loader)), len(loop), len(run.steps(6))))
        for i, batch in enumerate(loop):
            kit.train(batch, i)

    lives = play(script, Strike("body", 3)).lives
    assert [life.trace[0] for life in lives] == [(BATCHES, 10, 6)] * 2


# ---------------------------------------------------------------- boundaries


def accumulating(life: Life, **told: int) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for epoch in run.epochs(EPOCHS):
        for i, batch in enumerate(run.batches(kit.loader, **told)):
            loss = kit.loss(batch)
            loss.backward()
            life.here("body")
            life.fact((epoch, i), loss.item())
            if i % 3 == 2 or i == len(kit.loader) - 1:
                kit.optimizer.step()
                kit.optimizer.zero_grad()
    return run.step


def test_accumulation_that_the_loop_was_not_told_of_is_seen_and_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert play(accumulating).result == 2 * EPOCHS
    assert [r.message for r in caplog.records if "accumulate=k" in r.message] != []

    caplog.clear()
    assert play(lambda life: accumulating(life, accumulate=3)).result == 2 * EPOCHS
    assert "accumulate=k" not in caplog.text


@pytest.mark.parametrize("told", [{}, {"accumulate": 3}], ids=["not told", "told"])
def test_half_gathered_gradients_are_never_a_boundary(told: dict[str, int]) -> None:
    assert_exact_wherever(lambda life: accumulating(life, **told))


def test_gradients_carried_into_the_next_epoch_put_its_boundary_off() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        count = run.state.setdefault("count", [0])
        for epoch in run.epochs(3):
            for i, batch in enumerate(run.batches(kit.loader)):
                loss = kit.loss(batch)
                loss.backward()
                life.here("body")
                life.fact((epoch, i), loss.item())
                count[0] += 1
                if count[0] % 3 == 0:
                    kit.optimizer.step()
                    kit.optimizer.zero_grad()
            run.log(val=1.0)
            run.log(val=2.0)
        return run.step, [record["val"] for record in run.history]

    assert play(script).result == (4, [2.0, 2.0, 2.0])
    assert_exact_wherever(script)


def test_what_is_zeroed_in_place_is_not_gathered() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        for _epoch in run.epochs(EPOCHS):
            for i, batch in enumerate(run.batches(kit.loader)):
                kit.optimizer.zero_grad(set_to_none=False)
                if i == 1:
                    life.here("continue")
                    continue
                kit.loss(batch).backward()
                life.here("body")
                kit.optimizer.step()
            life.here("end")
        return run.step

    assert play(script).result == EPOCHS * BATCHES
    assert_exact_wherever(script)


def test_a_run_that_is_stopped_while_gradients_are_gathered_ends_at_the_next_boundary() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        for i, batch in enumerate(run.batches(kit.loader, steps=9, accumulate=2)):
            kit.loss(batch).backward()
            life.here("body")
            if i == 4:
                run.stop("enough")
            if i % 2:
                kit.optimizer.step()
                kit.optimizer.zero_grad()
            life.trace.append(i)
        return run.step

    played = play(script)
    assert (played.result, played.lives[0].trace) == (3, [0, 1, 2, 3, 4, 5])
    assert played.newest.moment.triggers == ("final",)
    assert_exact_wherever(script)


def test_a_step_that_the_scaler_skips_is_a_boundary() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        run = kit.attach(scaler=scaler)
        for i, batch in enumerate(run.batches(kit.loader, steps=3)):
            kit.optimizer.zero_grad()
            scaler.scale(kit.loss(batch) * (float("inf") if i < 2 else 1.0)).backward()
            life.here("body")
            scaler.step(kit.optimizer)
            scaler.update()
            life.trace.append(run.step)
        return scaler.get_scale()

    played = play(script)
    assert (played.lives[0].trace, played.result) == ([0, 1, 2], 2.0)
    assert_exact_wherever(script)


class Lookahead(torch.optim.Optimizer):
    """A wrapper that leaves `Optimizer.__init__` out, as a library's does: no hook is called."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._optimizer_step_pre_hooks: Any = OrderedDict()
        self._optimizer_step_post_hooks: Any = OrderedDict()
        self.base, self.param_groups = base, base.param_groups
        self.defaults, self.state = base.defaults, defaultdict(dict)

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return self.base.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.base.load_state_dict(state)
        self.param_groups = self.base.param_groups


@pytest.mark.parametrize("is_scheduled_before", [True, False])
def test_an_optimizer_that_calls_no_hooks_has_boundaries_all_the_same(
    is_scheduled_before: bool,
) -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        kit.optimizer = Lookahead(kit.optimizer)  # type: ignore[assignment]
        if is_scheduled_before:  # which puts a `step` of its own into the optimizer
            scheduler = StepLR(kit.optimizer, 2, 0.5)
            run = kit.attach(scheduler=scheduler)
        else:
            run = kit.attach()
            scheduler = StepLR(kit.optimizer, 2, 0.5)
        for epoch in run.epochs(EPOCHS):
            for i, batch in enumerate(run.batches(kit.loader)):
                kit.train(batch, (epoch, i))
                if is_scheduled_before:
                    scheduler.step()
            life.fact(("steps", epoch), run.step)
        return run.step

    assert play(script).result == EPOCHS * BATCHES
    assert_exact_wherever(script)


def test_an_optimizer_whose_steps_cannot_be_seen_is_refused_by_name() -> None:
    class Around(torch.optim.Optimizer):
        """As a wrapper that is an optimizer by name only."""

        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner

        param_groups = property(lambda self: self.inner.param_groups)  # type: ignore[assignment]

    def script(life: Life) -> None:
        kit = Kit(life)
        runner.attach(model=kit.model, wrapped=Around(kit.optimizer))

    with pytest.raises(TypeError, match=r"attach\(wrapped=…\).*attach the optimizer inside it"):
        play(script)


def test_a_preemption_leaves_with_75_and_an_interrupt_as_well() -> None:
    """Under a supervisor: which of them it was, it knows itself."""

    def script(life: Life) -> None:
        kit = Kit(life)
        for batch in kit.attach().batches(kit.loader, steps=4):
            kit.train(batch, len(life.trace) + life.attempt)

    with memory_folder() as folder:
        stage = Stage(folder)
        stage.play(script, [Strike("body"), Strike("body", how=INTERRUPT)])
        assert [life.exit_code for life in stage.lives] == [75, 75, 0]
        triggers = [manifest.moment.triggers for manifest in stage.manifests()]
        assert triggers == [("preemption",), ("interrupt",), ("final",)]


def test_finally_blocks_run_when_a_run_is_preempted() -> None:
    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        try:
            for batch in run.batches(kit.loader, steps=4):
                kit.train(batch, run.step)
        finally:
            life.trace.append("closed")

    assert [life.trace[-1] for life in play(script, Strike("body")).lives] == ["closed"] * 2


def test_run_boundary_inside_of_a_loop_is_refused() -> None:
    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        for _ in run.batches(kit.loader, steps=2):
            run.boundary()

    with pytest.raises(RuntimeError, match="where the body of the loop ends"):
        play(script)


# ---------------------------------------------------------------- when a checkpoint is made


@contextlib.contextmanager
def each_save_is_begun() -> Iterator[None]:
    """No state that is to be saved is overtaken by a newer one: steps here take no time."""
    publish = RankSpool.publish

    def publish_and_wait(rank: RankSpool, marker: Marker) -> None:
        publish(rank, marker)
        wait_until(lambda: not any(m.must for m in rank.complete()), what="the keeper to take it")

    with mock.patch.object(RankSpool, "publish", publish_and_wait):
        yield


def triggers_of(script: Script, **options: Any) -> list[tuple[int, int, tuple[str, ...]]]:
    """Step, epoch and triggers of each checkpoint, oldest first."""
    with memory_folder() as folder:
        stage = Stage(folder, **options)
        with each_save_is_begun():
            stage.play(script)
        moments = [manifest.moment for manifest in stage.manifests()]
        return [(moment.step, moment.epoch, moment.triggers) for moment in moments]


def plain(life: Life) -> Any:
    kit = Kit(life)
    run = kit.attach()
    for epoch in run.epochs(3):
        for i, batch in enumerate(run.batches(kit.loader)):
            run.log(loss=kit.train(batch, (epoch, i)))
        run.log(val=[0.3, 0.1, 0.2][epoch])
    return run.history


def test_a_checkpoint_every_n_steps() -> None:
    assert triggers_of(plain, every=Interval(steps=5)) == [
        (5, 1, ("interval",)),
        (10, 2, ("interval",)),
        (12, 3, ("final",)),
    ]


def test_a_checkpoint_every_n_epochs_is_made_when_validation_is_over() -> None:
    assert triggers_of(plain, every=Interval(epochs=2)) == [
        (8, 2, ("interval",)),
        (12, 3, ("final",)),
    ]


def test_a_step_that_ends_by_a_break_counts_for_the_interval() -> None:
    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        for epoch in run.epochs(2):
            for i, batch in enumerate(run.batches(kit.loader)):
                kit.train(batch, (epoch, i))
                if i == 1:
                    break

    made = triggers_of(script, every=Interval(steps=2))
    assert made == [(2, 1, ("interval",)), (4, 2, ("final", "interval"))]


def test_a_checkpoint_every_n_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    class Clock:
        monotonic = staticmethod(lambda: now[0])
        monotonic_ns = staticmethod(lambda: int(1e9 * now[0]))

    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        for batch in run.batches(kit.loader, steps=10):
            kit.train(batch, run.step)
            now[0] += 31

    monkeypatch.setattr(rhythm_module, "time", Clock)
    made = triggers_of(script, every=Interval(minutes=2))
    assert [step for step, _, triggers in made if "interval" in triggers] == [4, 8]


def scopes_of(script: Script, **options: Any) -> list[tuple[int, str]]:
    with memory_folder() as folder:
        stage = Stage(folder, **options)
        with each_save_is_begun():
            stage.play(script)
        return [(manifest.moment.step, manifest.moment.scope) for manifest in stage.manifests()]


def test_weights_have_a_rhythm_of_their_own_and_are_never_stored_beside_a_full_state() -> None:
    every, weights = Interval(epochs=2), Interval(epochs=1)
    epoch = [BATCHES, 2 * BATCHES, 3 * BATCHES]

    assert scopes_of(plain, every=every, weights_every=weights) == [
        (epoch[0], "weights"),
        (epoch[1], "full"),
        (epoch[2], "full"),
    ]
    assert scopes_of(plain, every=every, weights_every=Interval(steps=3)) == [
        (3, "weights"),
        (6, "weights"),
        (epoch[1], "full"),
        (9, "weights"),
        (epoch[2], "weights"),  # after its last step, and then its end
        (epoch[2], "full"),
    ]


def test_weights_alone_can_be_loaded_and_the_run_resumes_from_its_full_state() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        for epoch in run.epochs(3):
            for i, batch in enumerate(run.batches(kit.loader)):
                kit.train(batch, (epoch, i))
            life.fact(("weights", epoch), kit.model[0].weight.tolist())
            life.here("end")
        steps = kit.optimizer.state_dict()["state"]
        with pytest.raises((RestoreError, UnknownName), match="optimizer"):
            run.load(str(2 * BATCHES), components=["model", "optimizer"])
        run.load(str(2 * BATCHES), components=["model"])
        assert kit.optimizer.state_dict()["state"] == steps
        return kit.model[0].weight.tolist(), life.facts[("weights", 1)]

    for strikes in ([], [Strike("end", 1)]):
        with memory_folder() as folder:
            stage = Stage(folder, weights_every=Interval(epochs=1), snapshot_steps=1)
            loaded, saved = stage.play(script, strikes).result
            assert loaded == saved
            first = ("full", ("preemption",)) if strikes else ("weights", ("interval",))
            made = [(m.moment.scope, m.moment.triggers) for m in stage.manifests()]
            assert made == [first, ("weights", ("interval",)), ("full", ("final",))]


def test_run_save_makes_one_at_the_next_boundary() -> None:
    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        for epoch in run.epochs(2):
            for i, batch in enumerate(run.batches(kit.loader)):
                kit.train(batch, (epoch, i))
                if (epoch, i) == (0, 1):
                    run.save()
            if epoch == 0:
                run.save()

    assert triggers_of(script) == [
        (2, 0, ("manual",)),
        (4, 1, ("manual",)),
        (8, 2, ("final",)),
    ]


def test_best_is_made_only_for_the_state_for_which_the_metric_was_logged() -> None:
    """Also where the metric is logged every other epoch: an old value is not the best again."""

    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        for epoch in run.epochs(6):
            kit.train(torch.rand(BATCH, FEATURES), epoch)
            if epoch % 2 == 1 and epoch < 4:
                run.log(loss=0.01)
            if epoch % 2 == 0:
                run.log(val=[0.3, 0.1, 0.2][epoch // 2])
            life.here("end")

    best = BestMetric("val", "min", 2)
    made = triggers_of(script, best=best)
    assert [epoch for _, epoch, triggers in made if "best" in triggers] == [1, 3, 5]
    assert_exact_wherever(script, best=best)


def test_best_may_be_the_largest() -> None:
    made = triggers_of(plain, best=BestMetric("val", "max", 1))
    assert made == [(4, 1, ("best",)), (12, 3, ("final",))]


def test_no_metric_is_best_that_is_not_finite() -> None:
    def script(life: Life) -> None:
        kit = Kit(life)
        for _ in (run := kit.attach()).epochs(2):
            run.log(val=float("nan"))

    made = triggers_of(script, best=BestMetric("val"))
    assert made == [(0, 2, ("final",))]


def test_a_checkpoint_tells_the_metrics_and_whether_they_are_sound() -> None:
    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        for epoch in run.epochs(3):
            for batch in run.batches(kit.loader):
                kit.train(batch, (epoch, run.batch))
                run.log(train_loss=torch.tensor(float("nan") if epoch == 1 else 2.0))
                run.save()
            run.log(val_rmse=float("inf") if epoch == 2 else 1.0)

    with memory_folder() as folder:
        stage = Stage(folder)
        stage.play(script)
        moments = [manifest.moment for manifest in stage.manifests()]
        assert [moment.healthy for moment in moments] == [True] * 4 + [False] * 4 + [True] * 5
        assert moments[-1].metrics == {"train_loss": 2.0, "val_rmse": float("inf")}
        assert (moments[0].batch_size, moments[0].batches_per_epoch) == (BATCH, BATCHES)

    with memory_folder() as folder:
        stage = Stage(folder, health_metrics=("val_rmse",))
        stage.play(script)
        healthy = [manifest.moment.healthy for manifest in stage.manifests()]
        assert healthy == [True] * 12 + [False]


def test_the_run_may_end_before_the_loop_that_seemed_to_be_the_last() -> None:
    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        for i, batch in enumerate(run.batches(kit.loader, steps=2)):
            kit.train(batch, ("warm-up", i))
        life.trace.append(life.board.finished)
        for _ in run.epochs(2):
            for batch in run.batches(kit.loader):
                kit.train(batch, (run.epoch, run.batch))
                life.trace.append(life.board.finished)

    played = play(script)
    finished = [entry for entry in played.lives[0].trace if isinstance(entry, int)]
    assert finished == [1, 1] + [0] * (2 * BATCHES - 1)
    assert played.lives[0].board.finished == 1


# ---------------------------------------------------------------- what objects keep of their state


class Centred(nn.Module):
    """Subtracts a running mean, which it changes in place; how it is loaded is the subclasses'."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, 1)
        self.register_buffer("mean", torch.zeros(FEATURES))

    def forward(self, batch: torch.Tensor) -> Any:
        self.mean.lerp_(batch.mean(0), 0.1)
        return self.head(batch - self.mean)


class WithExtraState(Centred):
    def __init__(self) -> None:
        super().__init__()
        del self.mean
        self.mean = torch.zeros(FEATURES)

    def get_extra_state(self) -> Any:
        return {"mean": self.mean}

    def set_extra_state(self, state: Any) -> None:
        self.mean = state["mean"]


class WithAnArray(Centred):
    """So many numbers that they are saved beside the tensors."""

    def __init__(self) -> None:
        super().__init__()
        del self.mean
        self.sums = np.zeros(3000)

    def forward(self, batch: torch.Tensor) -> Any:
        self.sums += float(batch.sum())
        return self.head(batch) * self.sums[0]

    def get_extra_state(self) -> Any:
        return self.sums

    def set_extra_state(self, state: Any) -> None:
        self.sums = state


class WithAWayToLoad(Centred):
    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.mean = state[prefix + "mean"]
        super()._load_from_state_dict(state, prefix, *rest)


class WithAHook(Centred):
    """The hook of a parent is given what belongs to a child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Module()
        self.child.register_buffer("mean", self.mean)
        del self.mean
        self.register_load_state_dict_pre_hook(self.keep)

    mean = property(lambda self: self.child.mean)

    @staticmethod
    def keep(module: Any, state: Any, prefix: str, *rest: Any) -> None:
        module.child.mean = state[prefix + "child.mean"]


class WithAWayToLoadAll(Centred):
    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        self.mean = state["mean"]
        return super().load_state_dict(state, strict, assign)


@pytest.mark.parametrize(
    "kind", [WithExtraState, WithAnArray, WithAWayToLoad, WithAHook, WithAWayToLoadAll]
)
def test_no_snapshot_changes_by_what_a_module_keeps_of_its_saved_state(
    kind: Callable[[], Centred],
) -> None:
    def script(life: Life) -> Any:
        seed()
        net = kind()
        optimizer = torch.optim.SGD(net.head.parameters(), 0.01)
        run = runner.attach(model=net, optimizer=optimizer)
        for step in run.steps(9):
            loss = net(torch.randn(BATCH, FEATURES)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            life.here("body")
            optimizer.step()
            life.fact(step, loss.item())
        return net.head.weight.tolist()

    kills = [[Strike("body", 3), Strike("body", n, KILL)] for n in range(1, 5)]
    assert_exact(script, [[Strike("body", 3)], *kills])


def test_a_generator_has_no_child_twice() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        generator = np.random.default_rng(5)
        generator.spawn(1)
        run = kit.attach(generator=generator, state={"drawn": []})
        for epoch in run.epochs(EPOCHS):
            # Gone through again in the middle of an epoch, and put back.
            run.state["drawn"].append(float(generator.spawn(1)[0].random()))
            for i, batch in enumerate(run.batches(kit.loader)):
                kit.train(batch, (epoch, i))
                run.state["drawn"].append(float(generator.spawn(1)[0].random()))
        return run.state["drawn"]

    assert len(set(play(script).result)) == EPOCHS * (1 + BATCHES)
    assert_exact_wherever(script)
    assert_exact_wherever(script, KILL)


# ---------------------------------------------------------------- what is logged


def test_the_history_has_means_over_the_body_and_last_values_beside_it() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        for epoch in run.epochs(EPOCHS):
            run.log(epoch_number=epoch)
            for batch in run.batches(kit.loader):
                kit.train(batch, (epoch, run.batch))
                run.log(loss=float(run.batch), size=torch.tensor([len(batch)]))
            run.log(val=1.0)
            run.log(val=2.0)
        return run.history

    expected = [
        {
            "epoch": epoch,
            "step": BATCHES * (epoch + 1),
            "lr": 0.01,
            "loss": 1.5,
            "size": SAMPLES / BATCHES,
            "val": 2.0,
            "epoch_number": float(epoch),
        }
        for epoch in range(EPOCHS)
    ]
    assert play(script).result == expected
    assert_exact_wherever(script)


def test_a_logged_tensor_counts_as_it_was_when_it_was_logged() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        total = torch.zeros(())
        for epoch in run.epochs(1):
            for batch in run.batches(kit.loader):
                kit.train(batch, (epoch, run.batch))
                total += 1
                run.log(total=total)
        return run.history[0]["total"]

    assert play(script, snapshot_steps=100).result == 2.5


class OnDevice:
    """A value that a GPU has: to read it is to wait for the GPU."""

    device = torch.device("cuda")

    def __init__(self, reads: list[str], name: str) -> None:
        self.reads, self.name = reads, name

    def detach(self) -> OnDevice:
        return self

    def clone(self) -> OnDevice:
        return self

    def numel(self) -> int:
        return 1

    def __float__(self) -> float:
        self.reads.append(self.name)
        return 1.0


def test_no_boundary_waits_for_a_value_on_a_device_that_it_does_not_need() -> None:
    def reads(steps: int, **options: Any) -> tuple[int, int]:
        names: list[str] = []

        def script(life: Life) -> None:
            kit = Kit(life)
            run = kit.attach()
            for step in run.steps(steps):
                if step == 1:
                    names.clear()  # the first boundary has its snapshot
                kit.train(torch.ones(BATCH, FEATURES), step)
                run.log(loss=OnDevice(names, "loss"))
                if step % 5 == 4:
                    run.log(val=OnDevice(names, "val"))
                if step == steps - 1:
                    counted.append((names.count("loss"), names.count("val")))

        counted: list[tuple[int, int]] = []
        play(script, snapshot_steps=1000, **options)
        return counted[0]

    assert reads(10) == reads(20) == (0, 0)
    best = BestMetric("val", count=1)
    assert reads(20, best=best)[1] == reads(10, best=best)[1] + 2


def test_the_history_that_a_script_holds_goes_on_after_a_resume() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        history = run.history
        for epoch in run.epochs(2):
            for batch in run.batches(kit.loader):
                kit.train(batch, (epoch, run.batch))
        return len(history)

    assert play(script, Strike("body", 2), Strike("body", 4)).result == 2


@pytest.mark.parametrize("value", ["0.5", True, None, torch.zeros(2), [1.0]], ids=repr)
def test_what_is_logged_must_be_a_number(value: Any) -> None:
    def script(life: Life) -> None:
        Kit(life).attach().log(loss=value)

    with pytest.raises(CaptureError, match="loss"):
        play(script)


# ---------------------------------------------------------------- what a script sees


def test_a_script_is_told_where_it_resumed_from() -> None:
    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        life.trace.append((run.attempt, run.resumed_from, run.step, run.epoch, run.batch))
        for epoch in run.epochs(2):
            for batch in run.batches(kit.loader):
                run.log(loss=0.5)
                kit.train(batch, (epoch, run.batch))
            run.log(val=0.25)
            life.here("end")

    lives = play(script, Strike("body", BATCHES + 1), Strike("end")).lives
    first, second, third = (life.trace[0] for life in lives)
    assert first == (1, None, 0, 0, 0)
    assert second[2:] == (BATCHES + 1, 1, 1)
    assert (second[1].step, second[1].epoch, second[1].triggers, second[1].metrics) == (
        BATCHES + 1,
        1,
        ("preemption",),
        {"loss": 0.5},
    )
    assert (third[1].step, third[1].triggers) == (2 * BATCHES, ("final", "preemption"))
    assert third[1].metrics == {"loss": 0.5, "val": 0.25}


def test_what_a_script_holds_of_its_state_is_what_is_saved() -> None:
    """Lists, arrays and tensors that it got out of run.state before the loop stay the live ones."""

    def script(life: Life) -> Any:
        kit = Kit(life)
        state: dict[str, Any] = {
            "list": [{"inner": []}],
            "array": np.zeros(2),
            "large": np.zeros((100, 50), order="F"),
            "tensor": torch.zeros(2),
            "set": set(),
            "window": deque([0, 0], maxlen=2),
        }
        held, inner = dict(state), state["list"][0]["inner"]
        run = kit.attach(state=state)
        assert run.state is state
        for epoch in run.epochs(EPOCHS):
            for i, batch in enumerate(run.batches(kit.loader)):
                kit.train(batch, (epoch, i))
                inner.append(i)
                held["array"] += 1
                held["large"][3] += 1
                held["tensor"] += 1
                held["set"].add((epoch, i))
                held["window"].append(i + epoch)
            life.here("end")
        assert all(state[name] is value for name, value in held.items())
        sums = held["array"].tolist(), float(held["large"].sum())
        return inner, *sums, len(held["set"]), list(held["window"])

    assert play(script).result[1:] == ([8.0, 8.0], 400.0, 8, [3, 4])
    assert_exact_wherever(script)


def test_run_params_are_what_runner_params_gave() -> None:
    def script(life: Life) -> Any:
        given = runner.params(epochs=3, lr=0.1)
        run = Kit(life).attach()
        for _ in run.epochs(0):
            raise AssertionError
        run.boundary()
        return given, run.params

    with memory_folder() as folder:
        stage = Stage(folder)
        stage.params = {"lr": 0.2, "more": [1]}
        given, params = stage.play(script).result
    assert given == params == {"epochs": 3, "lr": 0.2, "more": [1]}


def test_the_output_directory_exists_and_is_the_same_in_each_attempt() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        assert run.run_id == "run"
        (run.output_dir / f"{run.attempt}.txt").write_text("")
        for batch in run.batches(kit.loader, steps=3):
            kit.train(batch, run.step)
        return sorted(path.name for path in run.output_dir.iterdir())

    assert play(script, Strike("body")).result == ["1.txt", "2.txt"]


def test_a_phase_is_shown_for_as_long_as_it_lasts() -> None:
    def script(life: Life) -> None:
        kit = Kit(life)
        run = kit.attach()
        for _ in run.epochs(1):
            before = life.board.progress
            with run.phase("validation"):
                life.trace.append(life.board.phase)
                run.alive()
            life.trace.append(life.board.phase)
            assert life.board.progress >= before + 3

    assert play(script).lives[0].trace == ["validation", "between loops"]


def test_the_best_checkpoint_can_be_loaded_into_the_live_objects() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        for epoch in run.epochs(3):
            for i, batch in enumerate(run.batches(kit.loader)):
                kit.train(batch, (epoch, i))
            life.fact(("weights", epoch), kit.model[0].weight.tolist())
            run.log(val=[0.3, 0.1, 0.2][epoch])
        steps = kit.optimizer.state_dict()["state"]
        draw = torch.random.get_rng_state()
        loaded = run.load("best", components=["model"])
        life.fact("held", (Path(os.environ["RUNNER_SPOOL"]) / "rank-00000" / "fetched").exists())
        assert kit.optimizer.state_dict()["state"] == steps
        assert torch.equal(torch.random.get_rng_state(), draw)
        with pytest.raises(UnknownName, match="optimiser"):
            run.load("latest", components=["optimiser"])
        with pytest.raises(RestoreError, match="step-77"):
            run.load("step-77")
        assert run.load("latest", components=[]).epoch == 3
        return loaded, kit.model[0].weight.tolist(), life.facts[("weights", 1)]

    for strikes in ([], [Strike("body", 2 * BATCHES + 1)]):
        played = play(script, *strikes, best=BestMetric("val"))
        loaded, live, saved = played.result
        assert live == saved
        assert played.lives[-1].facts["held"] is False
        assert (loaded.step, loaded.epoch, loaded.triggers) == (2 * BATCHES, 2, ("best",))
        assert loaded.metrics["val"] == 0.1


def test_a_run_may_begin_with_some_components_of_another_one() -> None:
    def script(life: Life) -> Any:
        kit = Kit(life)
        run = kit.attach()
        begun = run.step, run.resumed_from, kit.model[0].weight.tolist()
        moments = len(kit.optimizer.state)
        for batch in run.batches(kit.loader, steps=3):
            kit.train(batch, run.step)
        return begun, moments, kit.model[0].weight.tolist()

    with memory_folder() as folder:
        first = Stage(folder / "first")
        learned = first.play(script).result[2]
        second = Stage(folder / "second")
        second.origin = Origin(first.archive, "latest", ("model",))
        undisturbed = second.play(script)
        assert undisturbed.result[:2] == ((0, None, learned), 0)

        struck = Stage(folder / "third")
        struck.origin, struck.facts = second.origin, dict(second.facts)
        played = struck.play(script, [Strike("body", 2)])
        assert played.lives[1].trace == [2]
        assert played.digest == undisturbed.digest


def test_streams_that_a_script_neither_seeds_nor_uses_do_not_count() -> None:
    """They begin at another place in each process; what is equal apart from them is equal."""
    begin = itertools.count()

    def script(life: Life) -> None:
        kit = Kit(life)
        random.seed(f"process {next(begin)}")
        np.random.seed(next(begin))
        loader = DataLoader(range(8), batch_size=2, shuffle=True)
        run = kit.attach()
        for epoch in run.epochs(EPOCHS):
            for batch in run.batches(loader):
                kit.train(batch[:, None] * torch.rand(2, FEATURES), (epoch, run.batch))

    assert_exact(script, [[Strike("body", 2), Strike("body", 3)], [Strike("body", 4)]])

    def drawing(life: Life) -> None:
        script(life)
        Kit(life)

    def using(life: Life) -> None:
        life.here = lambda _: random.random()  # type: ignore[method-assign]
        script(life)

    assert play(drawing).digest == play(script).digest
    assert play(using).digest != play(using).digest


def test_a_process_attaches_once() -> None:
    def script(life: Life) -> None:
        run = Kit(life).attach()
        with pytest.raises(SpoolTaken, match="RUNNER_SPOOL"):
            Kit(life).attach()
        run.boundary()

    play(script)


def test_a_script_that_the_script_starts_cannot_join_in() -> None:
    child = "import runner, torch; runner.attach(model=torch.nn.Linear(1, 1))"

    def script(life: Life) -> str:
        run = Kit(life).attach()
        ended = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
        run.boundary()
        assert ended.returncode == 1
        return ended.stderr

    said = play(script).result
    assert "SpoolTaken" in said
    assert "RUNNER_SPOOL" in said


def test_what_changed_on_the_way_to_the_loop_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def script(life: Life) -> None:
        kit = Kit(life)
        scheduler = StepLR(kit.optimizer, 1, 0.5)
        run = kit.attach(scheduler=scheduler)
        for epoch in run.epochs(1):
            if life.attempt > 1:
                scheduler.step()
            for batch in run.batches(kit.loader):
                kit.train(batch, (epoch, run.batch))

    play(script, Strike("body"))
    (said,) = [r.message for r in caplog.records if "put back" in r.message]
    assert "components['optimizer']['param_groups'][0]['lr']: 0.01 became 0.005" in said


def test_attach_takes_only_names_that_can_be_files() -> None:
    def script(life: Life) -> None:
        runner.attach(mödel=nn.Linear(1, 1))

    with pytest.raises(TypeError, match="mödel"):
        play(script)


def test_attach_refuses_what_it_cannot_save() -> None:
    def script(life: Life) -> None:
        runner.attach(model=nn.Linear(1, 1), epochs=3)

    with pytest.raises(TypeError, match=r"attach\(epochs=…\) got a int.*run\.state"):
        play(script)
