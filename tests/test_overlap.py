"""Copies beside the computation never tear, shown with a device that copies as late as it may.

The device of these tests is made of CPU tensors. It performs a copy when it is waited for, by the
host or by the compute stream, and not before: whatever was changed too early shows in the copy.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from harness import PREEMPT, Life, Stage
from slots import read_slot
from waiting import wait_until

from runner import attach
from runner.checkpoint.manifest import Moment
from runner.errors import SpoolFull
from runner.plan import BestMetric
from runner.training import overlap, session
from runner.training.overlap import Overlap, Pair
from runner.training.snapshot import SnapshotWriter

PROGRAM = Path(__file__).parent / "child_programs" / "leaves_a_copy_under_way.py"


class LateDevice:
    """Every tensor lives on it. `release` lets the host's waiting end."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.held = 0

    def handles(self, tensor: torch.Tensor) -> bool:
        return True

    def register(self, memory: mmap.mmap) -> None: ...

    def unregister(self, memory: mmap.mmap) -> None: ...

    def copy_now(self, pairs: Sequence[Pair]) -> None:
        for place, tensor in pairs:
            place.copy_(tensor)

    def copy_beside(self, pairs: Sequence[Pair]) -> Any:
        return {"pairs": list(pairs), "lock": threading.Lock(), "done": False}

    def hold_compute(self, ticket: Any) -> None:
        self.held += 1
        self._perform(ticket)

    def wait(self, ticket: Any) -> None:
        self.released.wait(10)
        self._perform(ticket)

    def _perform(self, ticket: Any) -> None:
        with ticket["lock"], torch.no_grad():
            if not ticket["done"]:
                self.copy_now(ticket["pairs"])
                ticket["done"] = True


class Bench:
    """A model with everything that can tear: parameters, moments, a buffer, an EMA."""

    def __init__(self, device: LateDevice | None = None) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.ema = [p.detach().clone() for p in self.model.parameters()]
        self.device = device or LateDevice()
        self.overlap = Overlap(self.device, [self.optimizer], enabled=True)
        self.step()
        self.published = threading.Event()

    def tensors(self) -> list[torch.Tensor]:
        moments = [v for s in self.optimizer.state.values() for v in s.values()]
        buffers = list(self.model.buffers())
        return [*(p.detach() for p in self.model.parameters()), *moments, *buffers, *self.ema]

    def forward_and_backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 4)).pow(2).mean().backward()

    def step(self) -> None:
        self.forward_and_backward()
        self.optimizer.step()
        for average, parameter in zip(self.ema, self.model.parameters(), strict=True):
            average.lerp_(parameter.detach(), 0.5)

    def snapshot(
        self, *, beside: bool = True, publish: Callable[[], None] | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        live = self.tensors()
        truth = [tensor.clone() for tensor in live]
        places = [torch.full_like(tensor, -1) for tensor in live]
        pairs = list(zip(places, live, strict=True))
        self.overlap.copy(pairs, publish or self.published.set, beside=beside)
        return places, truth

    def land(self) -> None:
        self.device.released.set()
        self.overlap.land()


def equal(places: list[torch.Tensor], truth: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, t) for p, t in zip(places, truth, strict=True))


def test_a_step_after_the_boundary_waits_for_the_copy_on_the_device() -> None:
    bench = Bench()
    places, truth = bench.snapshot()
    assert not bench.published.is_set()

    bench.step()
    bench.step()
    bench.land()

    assert bench.device.held == 1
    assert bench.published.is_set()
    assert equal(places, truth)


def test_what_forward_and_the_script_change_is_copied_at_the_boundary() -> None:
    bench = Bench()
    places, truth = bench.snapshot()

    bench.forward_and_backward()  # running statistics move
    for average in bench.ema:
        average.zero_()
    bench.land()

    assert equal(places, truth)


def test_a_copy_that_has_landed_before_the_step_holds_nothing_up() -> None:
    bench = Bench()
    places, truth = bench.snapshot()
    bench.land()
    bench.step()

    assert bench.device.held == 0
    assert equal(places, truth)


def clamp(bench: Bench) -> None:
    for parameter in bench.model.parameters():
        parameter.clamp_(0, 0)


def swap_in_an_average(bench: Bench) -> None:
    for parameter, average in zip(bench.model.parameters(), bench.ema, strict=True):
        parameter.copy_(average)


def reset_a_moment(bench: Bench) -> None:
    next(iter(bench.optimizer.state.values()))["exp_avg"].zero_()


UNHOOKED = {
    "clamped in place": clamp,
    "an EMA swapped in": swap_in_an_average,
    "a moment reset": reset_a_moment,
}


@pytest.mark.parametrize("then_step", [False, True])
@pytest.mark.parametrize("change", UNHOOKED.values(), ids=UNHOOKED)
def test_an_unhooked_change_throws_the_snapshot_away_and_turns_overlap_off(
    change: Callable[[Bench], None], then_step: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    bench.snapshot()
    with torch.no_grad():
        change(bench)
    if then_step:
        bench.step()
    bench.land()

    assert not bench.published.is_set()
    assert not bench.overlap.enabled
    assert caplog.text.count("without their optimizer") == 1

    places, truth = bench.snapshot()  # from now on the loop waits
    assert bench.published.is_set()
    assert equal(places, truth)


def test_what_cannot_be_handed_over_keeps_nothing_after_it_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench()

    def publish() -> None:
        raise SpoolFull("it is full")

    bench.snapshot(publish=publish)
    bench.land()
    assert "passed over: it is full" in caplog.text
    bench.step()
    places, truth = bench.snapshot()
    landing = threading.Thread(target=bench.land, daemon=True)
    landing.start()
    landing.join(30)

    assert not landing.is_alive()
    assert bench.published.is_set()
    assert equal(places, truth)


def test_a_step_without_a_hook_leaves_nothing_to_be_copied_beside_the_next() -> None:
    bench = Bench()
    bench.overlap.pass_boundary()
    replay(bench)
    places, truth = bench.snapshot()
    assert bench.published.is_set()
    replay(bench)

    assert equal(places, truth)


def test_only_what_belongs_to_an_optimizer_that_has_stepped_is_copied_beside() -> None:
    bench = Bench()
    other = torch.nn.Parameter(torch.ones(3))
    taking_turns = torch.optim.SGD([other], lr=0.1)
    both = Overlap(bench.device, [bench.optimizer, taking_turns], enabled=True)
    other.grad = torch.ones(3)
    taking_turns.step()
    places = [torch.zeros(3), torch.zeros(4, 4)]
    live = [other.detach(), next(bench.model.parameters()).detach()]
    both.copy(zip(places, live, strict=True), bench.published.set, beside=True)

    assert not places[0].any()
    assert torch.equal(places[1], live[1])
    bench.device.released.set()
    both.land()
    assert torch.equal(places[0], live[0])


def replay(bench: Bench) -> None:
    """What a CUDA graph does: neither a hook nor a version shows it."""
    bench.forward_and_backward()
    for parameter in bench.model.parameters():
        assert parameter.grad is not None
        parameter.data.sub_(parameter.grad)


def test_nothing_is_left_for_later_where_the_loop_must_wait() -> None:
    bench = Bench()
    places, truth = bench.snapshot(beside=False)

    assert bench.published.is_set()
    assert equal(places, truth)


def test_without_an_optimizer_there_is_no_overlap() -> None:
    idle = Overlap(LateDevice(), [], enabled=True)
    place, tensor, published = torch.zeros(3), torch.ones(3), threading.Event()

    idle.copy([(place, tensor)], published.set, beside=True)

    assert published.is_set()
    assert torch.equal(place, tensor)


@pytest.mark.parametrize("how", ["end", "raise"])
def test_a_copy_under_way_is_handed_over_before_the_script_is_gone(how: str) -> None:
    command = [sys.executable, str(PROGRAM), how]
    ended = subprocess.run(command, capture_output=True, text=True)

    assert ended.stdout == "published", ended.stderr
    assert ended.returncode == (how == "raise")


def test_the_end_of_a_script_waits_for_a_dead_device_no_longer_than_it_may(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(overlap, "_LEAVE_SECONDS", 0.0)
    bench = Bench()
    bench.snapshot()

    overlap.land_at_exit(weakref.ref(bench.overlap))

    assert not bench.published.is_set()
    assert "the last snapshot is lost" in caplog.text
    bench.land()


# ---------------------------------------------------------------- in a run


class LateInARun(LateDevice):
    """Copies in the next body of the loop, when that has changed what it wants to change."""

    def __init__(self) -> None:
        super().__init__()
        self.besides = 0

    def copy_beside(self, pairs: Sequence[Pair]) -> Any:
        self.besides += 1
        self.released.clear()
        return super().copy_beside(pairs)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateInARun]:
    device = LateInARun()
    monkeypatch.setattr(session, "engine_for_this_machine", lambda: device)
    yield device
    device.released.set()


Change = Callable[[int, Any, torch.nn.Linear], None]


def train(life: Life, device: LateDevice, scores: Sequence[float], change: Change) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = attach(model=model, optimizer=optimizer)
    for i in run.steps(len(scores)):
        optimizer.zero_grad()
        with torch.no_grad():
            change(i, run, model)
        device.released.set()
        model(torch.randn(4, 3)).pow(2).mean().backward()
        optimizer.step()
        run.log(score=scores[i])


def in_a_phase(run: Any, swap: Callable[[], None]) -> Iterator[int]:
    for i in run.steps(4):
        if i == 2:
            with run.phase("validation"):
                swap()
        yield i


def after_a_loop(run: Any, swap: Callable[[], None]) -> Iterator[int]:
    for _ in run.epochs(1):
        yield from run.steps(2)
        swap()


@pytest.mark.parametrize("where", [in_a_phase, after_a_loop])
def test_weights_that_are_swapped_where_a_script_may_do_so_are_not_taken_for_the_runs(
    where: Callable[[Any, Callable[[], None]], Iterator[int]],
    tmp_path: Path,
    device: LateInARun,
) -> None:
    stage = Stage(tmp_path)
    kept = []

    def script(life: Life) -> None:
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = attach(model=model, optimizer=optimizer)

        def land() -> None:
            device.released.set()
            wait_until(lambda: has_landed(run, stage), 20, what="the snapshot")

        def swap() -> None:
            weight = model.weight.detach().clone()
            model.weight.data.fill_(7)  # as torch_ema does it: no version shows it
            land()
            marker = stage.rank.complete()[-1]
            stored = safetensors.torch.load(read_slot(stage.rank, marker)["model.safetensors"])
            kept.append(torch.equal(stored["weight"], weight))
            model.weight.data.copy_(weight)

        for _ in where(run, swap):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).pow(2).mean().backward()
            optimizer.step()
            land()
        land()

    stage.play(script)
    assert kept == [True]


def test_a_run_whose_steps_call_no_hook_any_more_copies_at_the_boundary(
    tmp_path: Path, device: LateInARun
) -> None:
    besides = []

    def script(life: Life) -> None:
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = attach(model=model, optimizer=optimizer)
        for i in run.steps(5):
            besides.append(device.besides)
            device.released.set()
            wait_until(lambda: has_landed(run, stage), 20, what="the snapshot")
            if i < 2:
                model(torch.randn(4, 3)).pow(2).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                model.weight.data.mul_(0.9)

    stage = Stage(tmp_path)
    stage.play(script)
    assert besides == [0, 1, 2, 2, 2]


def test_a_loop_that_was_left_by_a_break_has_its_copy_waited_for_when_the_next_begins(
    tmp_path: Path, device: LateInARun
) -> None:
    def script(life: Life) -> None:
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = attach(model=model, optimizer=optimizer)
        for i in run.steps(4):
            if i == 1:
                break
            model(torch.randn(4, 3)).pow(2).mean().backward()
            optimizer.step()
        assert device.held == 0
        batches = iter(run.batches([torch.zeros(1), torch.zeros(1)]))
        next(batches)
        assert device.held == 1
        device.released.set()
        life.hit(PREEMPT)
        next(batches)

    assert Stage(tmp_path).live(script).ended == "preempted"


def has_landed(run: Any, stage: Stage) -> bool:
    """Whether the state of this step is complete, and the next one will not be passed over."""
    return newest_step(stage) == run.step and not run._course.session._overlap.in_flight


def newest_step(stage: Stage) -> int:
    return max((int(marker.moment["step"]) for marker in stage.rank.complete()), default=0)


def test_a_save_that_has_a_reason_is_never_thrown_away(tmp_path: Path, device: LateInARun) -> None:
    def change(i: int, run: Any, model: torch.nn.Linear) -> None:
        if i == 2:
            run.save()
        if i in (3, 5):  # behind the boundary of a save: no hook is called
            model.weight.mul_(0.5)

    stage = Stage(tmp_path, best=BestMetric("score", "max", 1))
    stage.play(lambda life: train(life, device, [0.1, 0.2, 0.3, 0.0, 0.9, 0.0, 0.0], change))

    saved = {m.moment.step: set(m.moment.triggers) for m in stage.manifests()}
    assert saved[3] >= {"manual"}
    assert saved[5] == {"best"}


def test_a_save_that_was_passed_over_is_made_up_for(
    tmp_path: Path, device: LateInARun, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = SnapshotWriter.take

    def without_room(writer: SnapshotWriter, moment: Moment, *a: Any, **k: Any) -> bool:
        if moment.step == 3:
            raise SpoolFull("it is full")
        return take(writer, moment, *a, **k)

    monkeypatch.setattr(SnapshotWriter, "take", without_room)

    def change(i: int, run: Any, model: torch.nn.Linear) -> None:
        if i == 2:
            run.save()

    stage = Stage(tmp_path, best=BestMetric("score", "max", 1))
    stage.play(lambda life: train(life, device, [0.1, 0.2, 0.9, 0.8, 0.0, 0.0], change))

    saved = {m.moment.step: set(m.moment.triggers) for m in stage.manifests()}
    assert saved[4] == {"manual", "best"}, "the third step had both reasons, and no room"
