"""The validation of the flagship job: what it finds in a good checkpoint and in damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from jobs.rul import train
from jobs.rul import validate as validation
from jobs.rul.data import DataOutOfReach
from jobs.rul.model import Config, RulNet, averaged
from runner.checkpoint.validation import Tolerances, Verdict, judge
from runner.training.validate import find

PARAMS = {"profile": "quick", "data": "synthetic", "engines": 4, "hidden": 8}

Saved = tuple[dict[str, Any], dict[str, Any], dict[str, float]]


@pytest.fixture(scope="module", autouse=True)
def _as_a_job_would_have_it() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNNER_PARAMS", json.dumps(PARAMS))
        patch.delenv("RUL_DATA", raising=False)
        yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def saved(_as_a_job_would_have_it: None) -> Saved:
    """Components, state and metrics, as they are at the end of an epoch."""
    p = train.parameters()
    train.set_up(p["seed"])
    config = Config(p["window"], p["cap"], p["hidden"], p["dropout"])
    net = RulNet(config)
    ema = averaged(net, p["ema_decay"])
    state: dict[str, Any] = {}
    data = train.prepare(p, state)
    scores = train.validate(ema.module, data.validation, config.cap)
    components = {"model": net.state_dict(), "ema": ema.state_dict()}
    return components, state, scores


def tried(saved: Saved) -> Any:
    components, state, logged = saved
    returned = find("jobs.rul.validate:check")(components, params=PARAMS, state=state)
    return judge(returned, logged, Tolerances(0.01))


def test_what_was_logged_comes_out_again(saved: Saved) -> None:
    found = tried(saved)

    assert found.verdict is Verdict.VALID
    assert set(found.compared) == {"val_loss", "val_rmse", "val_state_accuracy"}
    assert set(found.metrics) == {*found.compared, "weights_loss"}


def swap(ema: Any, _: Any) -> None:
    names = ("module.lstm.weight_ih_l0", "module.lstm.weight_ih_l0_reverse")
    ema[names[0]], ema[names[1]] = ema[names[1]].clone(), ema[names[0]].clone()


def poison(_: Any, weights: Any) -> None:
    weights["rul_head.2.bias"].fill_(torch.nan)


DAMAGES = {
    "two tensors of equal shape are swapped": (swap, "val_"),
    "the weights are not finite": (poison, "weights_loss is nan"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_checkpoint_is_invalid(
    saved: Saved, damage: Callable[[Any, Any], None], reason: str
) -> None:
    components = {name: {k: v.clone() for k, v in part.items()} for name, part in saved[0].items()}
    damage(components["ema"], components["model"])

    found = tried((components, *saved[1:]))

    assert found.verdict is Verdict.INVALID
    assert found.reason.startswith(reason)


def test_a_missing_key_is_seen_at_the_load(saved: Saved) -> None:
    ema = {name: value for name, value in saved[0]["ema"].items() if name != "n_averaged"}

    with pytest.raises(RuntimeError, match="n_averaged"):
        tried(({**saved[0], "ema": ema}, *saved[1:]))


def test_without_its_data_nothing_is_said(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(*_: Any) -> Any:
        raise DataOutOfReach("NASA is away")

    monkeypatch.setattr(validation, "prepare", out_of_reach)

    assert validation.check(saved[0], params=PARAMS, state=saved[1]) is None
