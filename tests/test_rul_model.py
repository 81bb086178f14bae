"""The flagship job: its network, losses, average, metrics and bundle, and the script as a whole."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F

from jobs.rul import metrics, model, synthetic, train
from jobs.rul.data import DataError, Statistics
from jobs.rul.model import Config, RulNet
from runner.errors import UsageError

REPOSITORY = Path(__file__).parents[1]


# --- Metrics ---


@pytest.mark.parametrize(
    ("predicted", "true", "score"),
    [
        ([50.0], [50.0], 0.0),
        ([37.0], [50.0], math.e - 1),  # 13 early
        ([60.0], [50.0], math.e - 1),  # 10 late
        ([24.0], [50.0], math.e**2 - 1),
        ([70.0], [50.0], math.e**2 - 1),
        ([37.0, 50.0, 60.0], [50.0, 50.0, 50.0], 2 * (math.e - 1)),
    ],
)
def test_the_nasa_score_is_that_of_the_paper(
    predicted: list[float], true: list[float], score: float
) -> None:
    assert metrics.nasa_score(predicted, true) == pytest.approx(score, rel=1e-12)


def test_rmse_is_the_root_of_the_mean_square() -> None:
    assert metrics.rmse([1.0, 2.0, 3.0], [1.0, 5.0, -1.0]) == pytest.approx(math.sqrt(25 / 3))


def test_the_report_caps_the_truth_and_never_the_prediction() -> None:
    report = metrics.report([130.0, 20.0], [145.0, 20.0], cap=125.0)

    assert report == pytest.approx(
        {
            "rmse_capped": math.sqrt(25 / 2),
            "rmse_uncapped": math.sqrt(225 / 2),
            "score_capped": math.exp(5 / 10) - 1,
            "score_uncapped": math.exp(15 / 13) - 1,
        }
    )


@pytest.mark.parametrize(("predicted", "true"), [([], []), ([1.0], [1.0, 2.0])])
def test_predictions_without_their_truth_are_refused(
    predicted: list[float], true: list[float]
) -> None:
    with pytest.raises(ValueError, match="predictions of shape"):
        metrics.rmse(predicted, true)


# --- Network and losses ---


@pytest.mark.parametrize(("hidden", "parameters"), [(64, 110_789), (256, 1_671_941)])
def test_the_network_has_the_shape_that_was_asked_for(hidden: int, parameters: int) -> None:
    net = RulNet(Config(hidden=hidden))

    rul, logits = net(torch.randn(5, 30, 21))

    assert (rul.shape, logits.shape) == ((5,), (5, 3))
    assert sum(p.numel() for p in net.parameters()) == parameters
    kinds = {type(module) for module in net.modules()}
    assert {torch.nn.Conv1d, torch.nn.LSTM} <= kinds
    assert net.lstm.bidirectional


def test_the_default_network_is_the_one_of_the_full_profile() -> None:
    full, quick = train.DEFAULTS, train.DEFAULTS | train.PROFILES["quick"]

    assert Config() == Config(full["window"], full["cap"], full["hidden"], full["dropout"])
    assert (full["hidden"], quick["hidden"]) == (256, 64)
    assert (full["window"], full["cap"]) == (30, 125.0)


def test_attention_weighs_every_cycle_of_the_window() -> None:
    net = RulNet(Config(hidden=8)).eval()
    windows = torch.randn(1, 30, 21, requires_grad=True)

    net(windows)[0].sum().backward()

    assert windows.grad is not None
    assert bool((windows.grad.abs().sum(dim=2) > 0).all())


def test_errors_close_to_failure_count_up_to_twice() -> None:
    target = torch.tensor([125.0, 62.5, 0.0])

    losses = [
        float(model.rul_loss(target[i : i + 1] + 2.0, target[i : i + 1], cap=125.0))
        for i in range(3)
    ]

    assert losses == pytest.approx([4.0, 6.0, 8.0])
    assert float(model.rul_loss(target + 2.0, target, cap=125.0)) == pytest.approx(6.0)


def test_both_tasks_have_half_the_weight() -> None:
    rul, target = torch.tensor([10.0, 90.0]), torch.tensor([15.0, 80.0])
    logits, state = torch.tensor([[0.1, 0.2, 0.9], [0.3, 0.4, 0.1]]), torch.tensor([2, 1])

    loss = model.two_task_loss(rul, logits, target, state, cap=125.0)

    expected = 0.5 * model.rul_loss(rul, target, 125.0) + 0.5 * F.cross_entropy(logits, state)
    assert float(loss) == pytest.approx(float(expected))


def test_the_average_begins_fast_and_ends_at_its_decay() -> None:
    net = RulNet(Config(hidden=2))
    ema = model.averaged(net, decay=0.5)
    weight, average = net.lstm.bias_hh_l0, ema.module.lstm.bias_hh_l0
    values = []
    with torch.no_grad():
        for value in (0.0, 1.0, 1.0, 1.0):
            weight.fill_(value)
            ema.update_parameters(net)
            values.append(float(average[0]))

    # Kept of the old: all of the first, then 2/11, 3/12, 4/13.
    expected = [0.0, 9 / 11, 1 - (2 / 11) * (3 / 12), 1 - (2 / 11) * (3 / 12) * (4 / 13)]
    assert values == pytest.approx(expected)

    ema.n_averaged.fill_(10_000)
    with torch.no_grad():
        average.fill_(0.0)
    ema.update_parameters(net)
    assert float(average[0].detach()) == pytest.approx(0.5)


def test_a_prediction_does_not_depend_on_the_size_of_its_parts() -> None:
    net, windows = RulNet(Config(hidden=8)), torch.randn(7, 30, 21)

    whole, parts = model.predict(net, windows), model.predict(net, windows, batch_size=3)

    assert not net.training
    torch.testing.assert_close(whole, parts)


# --- The bundle ---


def test_the_bundle_predicts_what_the_network_predicted(tmp_path: Path) -> None:
    config = Config(window=12, cap=100.0, hidden=8)
    net = RulNet(config)
    statistics = Statistics(np.zeros((1, 3)), np.full((1, 21), 1 / 3), np.full((1, 21), math.pi))

    model.save_bundle(tmp_path / "new", net, config, statistics, {"subset": "FD001"}, {"rmse": 1.5})
    again, config_again, statistics_again = model.load_bundle(tmp_path / "new")

    windows = torch.randn(4, 12, 21)
    assert torch.equal(model.predict(again, windows)[0], model.predict(net, windows)[0])
    assert config_again == config
    assert np.array_equal(statistics_again.mean, statistics.mean)
    assert np.array_equal(statistics_again.std, statistics.std)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "config.json",
        "metrics.json",
        "model.safetensors",
        "statistics.json",
    ]
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == {"rmse": 1.5}


# --- The parts of the script ---


def test_parameters_are_the_jobs_over_the_profiles_over_the_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RUNNER_PARAMS", '{"profile": "quick", "epochs": 3, "lr": 1}')

    p = train.parameters()

    assert (p["epochs"], p["lr"], p["hidden"], p["subset"]) == (3, 1, 64, "FD001")
    assert p.keys() == train.DEFAULTS.keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, "no parameter 'epoch'; did you mean epochs"),
        ({"profile": "quik"}, "no profile 'quik'; did you mean quick"),
        ({"profile": ["quick"]}, "no profile"),
        ({"epochs": "3"}, "params.epochs: expected int, found '3'"),
        ({"epochs": 0}, "params.epochs: expected at least 1, found 0"),
        ({"epochs": True}, "params.epochs: expected int, found True"),
        ({"lr": None}, "params.lr: expected int or float, found None"),
        ({"cap": float("nan")}, "params.cap: expected at least 1, found nan"),
        ({"dropout": 1.0}, "params.dropout: expected 0 <= dropout < 1, found 1.0"),
        ({"engines": 1}, "params.engines: expected at least 2, found 1"),
        ({"data": 3}, "params.data: expected str or null, found 3"),
    ],
)
def test_a_wrong_parameter_is_named(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("RUNNER_PARAMS", json.dumps(given))

    with pytest.raises(UsageError) as error:
        train.parameters()

    assert message in str(error.value)


def test_the_rate_warms_up_then_halves_on_a_plateau() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    warmup, plateau = train.schedules(optimizer, 10)
    optimizer.step()
    rates = []
    for epoch in range(43):
        rates.append(optimizer.param_groups[0]["lr"])
        if epoch + 1 < 10:
            warmup.step()
        else:
            plateau.step(15.0)

    assert rates[:10] == pytest.approx([1e-4 * i for i in range(1, 11)])
    assert rates[10:41] == pytest.approx([1e-3] * 31)  # the best, then 30 without gain
    assert rates[41:] == pytest.approx([5e-4] * 2)
    for _ in range(1000):
        plateau.step(15.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-6)


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_a_short_warm_up_ends_at_the_full_rate(epochs: int) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    warmup, _ = train.schedules(optimizer, epochs)
    optimizer.step()
    for epoch in range(5):
        if epoch + 1 < epochs:
            warmup.step()

    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_patience_is_counted_in_the_state_that_is_saved() -> None:
    state: dict[str, Any] = {}
    waited = [
        train.epochs_without_gain(state, epoch, rmse)
        for epoch, rmse in enumerate([20.0, 18.0, 19.0, 18.0, 17.0, float("nan"), 18.0])
    ]

    assert waited == [0, 0, 1, 2, 0, 1, 2]
    assert state == {"best_val_rmse": 17.0, "best_epoch": 4}


def parameters(**given: Any) -> dict[str, Any]:
    return train.DEFAULTS | train.PROFILES["quick"] | given


def test_statistics_come_from_the_training_engines_alone(tmp_path: Path) -> None:
    """The held-out engines and the test engines are changed out of all proportion."""
    synthetic.write(tmp_path, "FD001", engines=6)
    p = parameters(data=str(tmp_path))
    before: dict[str, Any] = {}
    train.prepare(p, before)
    held_out = {
        engine.unit
        for engine in train.cmapss.split(
            train.cmapss.load("FD001", str(tmp_path)).train, p["val_fraction"], p["seed"]
        )[1]
    }

    multiply_sensors(tmp_path / "train_FD001.txt", held_out)
    multiply_sensors(tmp_path / "test_FD001.txt", set(range(1, 7)))
    after: dict[str, Any] = {}
    train.prepare(p, after)

    assert held_out
    assert before["data"]["sha256"] != after["data"]["sha256"]
    for name in ("centers", "mean", "std"):
        assert np.array_equal(before["statistics"][name], after["statistics"][name])

    multiply_sensors(tmp_path / "train_FD001.txt", {1, 2, 3, 4, 5, 6} - held_out)
    train.prepare(p, changed := {})
    assert not np.array_equal(before["statistics"]["mean"], changed["statistics"]["mean"])


def multiply_sensors(path: Path, units: set[int]) -> None:
    rows = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    for row in rows:
        if int(row[0]) in units:
            row[5:] = [str(float(field) * 1000) for field in row[5:]]
    path.write_text("\n".join(" ".join(row) for row in rows) + "\n", encoding="ascii")


def test_the_statistics_of_the_checkpoint_are_used_again(tmp_path: Path) -> None:
    synthetic.write(tmp_path, "FD001", engines=4)
    state: dict[str, Any] = {}
    train.prepare(parameters(data=str(tmp_path)), state)
    state["statistics"]["mean"] = state["statistics"]["mean"] + 1.0

    data = train.prepare(parameters(data=str(tmp_path)), state)

    assert np.array_equal(data.statistics.mean, state["statistics"]["mean"])


def test_a_run_does_not_continue_with_other_data(tmp_path: Path) -> None:
    synthetic.write(tmp_path, "FD001", engines=4)
    state: dict[str, Any] = {}
    train.prepare(parameters(data=str(tmp_path)), state)
    multiply_sensors(tmp_path / "test_FD001.txt", {1})

    with pytest.raises(DataError, match="not the data with which the run began"):
        train.prepare(parameters(data=str(tmp_path)), state)


@pytest.fixture
def own_determinism(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `set_up` switches on for the process is switched back."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.set_num_threads(1)  # other tests may have the cores
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("own_determinism")
def test_the_script_learns_and_two_runs_with_one_seed_are_equal(tmp_path: Path) -> None:
    synthetic.write(tmp_path, "FD001", engines=3)
    p = parameters(data=str(tmp_path))

    first, losses = train_a_little(p, epochs=12)
    second, again = train_a_little(p, epochs=12)

    assert losses == again
    assert losses[-1] < losses[0] / 2
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def train_a_little(p: dict[str, Any], epochs: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The averaged weights, and the mean training loss of each epoch."""
    train.set_up(p["seed"])
    net = RulNet(Config(hidden=8))
    ema = model.averaged(net, p["ema_decay"])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    data = train.prepare(p, {})
    losses = [
        [float(train.train_step(net, ema, optimizer, batch)) for batch in data.loader]
        for _ in range(epochs)
    ]
    return ema.state_dict(), [float(np.mean(epoch)) for epoch in losses]


# --- The script as a whole, without a supervisor ---


def command(tmp_path: Path, run_id: str, **params: Any) -> dict[str, Any]:
    """Arguments for subprocess: a small run of the script in its own store."""
    own = {
        "RUNNER_STORE": str(tmp_path / "runs"),
        "RUNNER_RUN_ID": f"{tmp_path.name}-{run_id}"[-60:].strip("-_."),
        "RUNNER_PARAMS": json.dumps(params),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",  # other tests may have the cores
        "PYTHONPATH": str(REPOSITORY),
    }
    return {
        "args": [sys.executable, "-m", "jobs.rul.train"],
        "env": {key: value for key, value in os.environ.items() if key != "RUL_DATA"} | own,
        "cwd": tmp_path,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


SMALL = {"profile": "quick", "data": "synthetic", "engines": 4, "hidden": 8}


def bundle_of(tmp_path: Path, run: dict[str, Any]) -> Path:
    (last_written,) = (tmp_path / "runs" / run["env"]["RUNNER_RUN_ID"]).rglob("metrics.json")
    return last_written.parent


def test_a_preempted_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    whole = command(tmp_path, "whole", **SMALL, epochs=3)
    broken = command(tmp_path, "broken", **SMALL, epochs=3)

    undisturbed = subprocess.run(**whole, timeout=100, check=False)
    with subprocess.Popen(**broken) as first:
        assert first.stdout is not None
        assert first.stdout.readline().startswith("epoch 1/3")
        first.send_signal(signal.SIGTERM)
        printed, _ = first.communicate(timeout=100)
    second = subprocess.run(**broken, timeout=100, check=False)

    assert (undisturbed.returncode, first.returncode, second.returncode) == (0, 75, 0), (
        undisturbed.stderr,
        second.stderr,
    )
    assert undisturbed.stdout.splitlines()[-4:-1] == second.stdout.splitlines()[-4:-1]
    assert "epoch 3/3" not in printed
    a, b = bundle_of(tmp_path, whole), bundle_of(tmp_path, broken)
    for name in ("model.safetensors", "statistics.json", "config.json", "metrics.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert model.load_bundle(a)[1].hidden == 8
    assert json.loads((a / "metrics.json").read_text())["test_engines"] == 4


@pytest.mark.parametrize(
    ("params", "line"),
    [
        ({"data": "/no/such/folder"}, "rul: params.data: /no/such/folder is not a folder"),
        ({"subset": "FD009"}, "rul: unknown subset 'FD009': there are FD001, FD002, FD003, FD004"),
        ({"workrs": 3}, "rul: there is no parameter 'workrs'; did you mean workers?"),
    ],
)
def test_what_cannot_be_repaired_by_retrying_exits_with_2_and_one_line(
    tmp_path: Path, params: dict[str, Any], line: str
) -> None:
    done = subprocess.run(**command(tmp_path, "bad", **params), timeout=100, check=False)

    assert done.returncode == 2
    assert [said for said in done.stderr.splitlines() if said.startswith("rul:")] == [line]
    assert "Traceback" not in done.stderr


@pytest.mark.real_data
@pytest.mark.timeout(600)
def test_the_quick_profile_is_below_20_cycles_on_nasas_fd001(tmp_path: Path) -> None:
    folder = os.environ.get("RUL_DATA", "")
    if not folder or folder == "synthetic":
        pytest.skip("RUL_DATA does not name a folder with NASA's files")
    run = command(tmp_path, "real", profile="quick", epochs=3, data=folder)
    run["env"]["OMP_NUM_THREADS"] = "2"

    done = subprocess.run(**run, timeout=580, check=False)

    assert done.returncode == 0, done.stderr
    result = json.loads((bundle_of(tmp_path, run) / "metrics.json").read_text())
    assert result["rmse_capped"] < 20.0
    assert result["rmse_uncapped"] < 22.0
    assert result["test_engines"] == 100
