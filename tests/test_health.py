"""Since when metrics are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from harness import Life, Stage
from slots import memory_folder

import runner
from runner.training.health import Health
from runner.training.metrics import Metrics

NAN, INF = math.nan, math.inf
Logged = list[tuple[str, float, int]]

HISTORIES: dict[str, tuple[Logged, int | None, int]] = {
    "nothing was logged": ([], None, 0),
    "all is well": ([("loss", 1.0, 1), ("loss", 2.0, 2)], None, 0),
    "one bad step": ([("loss", 1.0, 1), ("loss", NAN, 2)], 2, 1),
    "three bad steps": ([("loss", NAN, 2), ("loss", INF, 3), ("loss", -INF, 4)], 2, 3),
    "it has recovered": ([("loss", NAN, 2), ("loss", NAN, 3), ("loss", 1.0, 4)], None, 0),
    "bad again after that": ([("loss", NAN, 2), ("loss", 1.0, 4), ("loss", NAN, 5)], 5, 1),
    "another metric may be what it likes": ([("gradient", NAN, 2), ("gradient", NAN, 3)], None, 0),
    "twice in one step": ([("loss", NAN, 2), ("loss", NAN, 2)], 2, 1),
    "bad at two epochs' ends": ([("val_loss", NAN, 100), ("val_loss", NAN, 200)], 100, 101),
    "one is bad, and one has recovered": (
        [("loss", NAN, 2), ("val_loss", NAN, 4), ("loss", 1.0, 5), ("val_loss", NAN, 6)],
        4,
        3,
    ),
}


@pytest.mark.parametrize(("logged", "since", "steps"), HISTORIES.values(), ids=list(HISTORIES))
def test_bad_steps_are_counted_from_the_first_to_the_last(
    logged: Logged, since: int | None, steps: int
) -> None:
    health = Health(lambda name: "loss" in name)
    for name, value, step in logged:
        health.heard(name, value, step)

    assert (health.since, health.steps) == (since, steps)


def test_what_is_not_logged_any_more_is_forgotten_with_the_next_epoch() -> None:
    health = Health(lambda name: True)
    health.heard("warmup_loss", NAN, 5)

    health.end_epoch()
    assert health.since == 5
    health.heard("loss", 1.0, 6)
    health.end_epoch()
    assert health.since is None


def test_another_state_begins_without_a_past() -> None:
    health = Health(lambda name: True)
    health.heard("loss", NAN, 5)

    health.forget()

    assert (health.since, health.steps) == (None, 0)


# ---------------------------------------------------------------- in a training loop


def test_the_board_says_since_when_metrics_are_bad_and_checkpoints_that_they_are_ill() -> None:
    """Bad in steps 3 to 5, good again from step 6 on. The epoch's end logs nothing of its own."""
    seen: list[tuple[int, int]] = []

    def script(life: Life) -> None:
        model = torch.nn.Linear(1, 1)
        run = runner.attach(model=model)
        for _ in run.epochs(2):
            for number in run.steps(4 if run.epoch == 0 else 8):
                run.log(train_loss=torch.tensor(math.nan if 2 <= number < 5 else 1.0))
                run.save()
                seen.append((life.board.sick_since, life.board.sick_steps))

    with memory_folder() as folder:
        stage = Stage(folder)
        stage.play(script)
        healthy = {m.moment.step: m.moment.healthy for m in stage.manifests()}

    # A body sees what the boundary before it has left.
    assert seen == [(0, 0)] * 3 + [(4, 1), (4, 2), (4, 3)] + [(0, 0)] * 2
    assert healthy == {1: True, 2: True, 3: False, 4: False, 5: False, 6: True, 7: True, 8: True}


def test_bad_metrics_are_seen_without_any_snapshot() -> None:
    seen: list[int] = []

    def script(life: Life) -> None:
        run = runner.attach(model=torch.nn.Linear(1, 1))
        for _ in run.steps(5):
            run.log(train_loss=torch.tensor(math.nan))
            seen.append(life.board.sick_steps)

    with memory_folder() as folder:
        Stage(folder, snapshot_steps=1000).play(script)

    assert seen == [0, 1, 2, 3, 4]


def test_values_on_a_device_are_not_waited_for() -> None:
    """A tensor without content stands for one on a GPU: to ask for its number is an error."""
    metrics = Metrics(Health(lambda name: True))

    metrics.log({"loss": torch.ones((), device="meta")}, in_body=True, step=1)
    metrics.settle()

    with pytest.raises(Exception, match="meta"):
        metrics.state()
