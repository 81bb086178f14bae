"""Train the network of jobs/rul/model.py on a subset of C-MAPSS; the example of the API.

`main` is all there is to a script that can be preempted: attach, two loops, one call to log.
Validation is on engines held out of the training file; the test engines are looked at once, at the
very end, with the average of the weights that validated best.

Exit code 2: the parameters or the data are wrong, and retrying cannot help.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, default_collate

import runner
from jobs.rul import data as cmapss
from jobs.rul import metrics
from jobs.rul.data import DataError, DataOutOfReach, Statistics, Windows
from jobs.rul.model import Config, RulNet, averaged, predict, save_bundle, two_task_loss
from runner.errors import RestoreError, UnknownName, UsageError

DEFAULTS: dict[str, Any] = {
    "subset": "FD001",
    "profile": "full",
    "data": None,  # a folder, or `synthetic`; see jobs/rul/data.py for what happens without
    "engines": None,  # how many the generator makes; None: as many as NASA's files have
    "epochs": 300,
    "hidden": 256,
    "batch_size": 128,
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "window": 30,
    "cap": 125.0,
    "dropout": 0.1,
    "noise": 0.1,
    "seed": 0,
    "workers": 0,
    "val_fraction": 0.2,
    "ema_decay": 0.999,
    "warmup_epochs": 10,
    "patience_stop": 80,
}
PROFILES: dict[str, dict[str, Any]] = {
    "full": {},
    "quick": {"epochs": 8, "hidden": 64, "batch_size": 64},
}
MOST_GRADIENT_NORM = 1.0
IN_EXPORTS = ("subset", "engines", "window", "cap", "hidden", "dropout")


def main() -> None:
    p = parameters()
    device = set_up(p["seed"])
    config = Config(p["window"], p["cap"], p["hidden"], p["dropout"])
    net = RulNet(config).to(device)
    ema = averaged(net, p["ema_decay"])
    optimizer = torch.optim.AdamW(net.parameters(), p["lr"], weight_decay=p["weight_decay"])
    warmup, plateau = schedules(optimizer, p["warmup_epochs"])
    run = runner.attach(model=net, ema=ema, optimizer=optimizer, warmup=warmup, plateau=plateau)

    data = prepare(p, run.state)
    run.note(network=asdict(config))
    run.fingerprint({"files": run.state["data"]["sha256"]}, name=p["subset"])
    for epoch in run.epochs(p["epochs"]):
        for batch in run.batches(data.loader):
            run.log(train_loss=train_step(net, ema, optimizer, batch))

        with run.phase("validation"):
            scores = validate(ema.module, data.validation, config.cap)
        run.log(**scores)
        print(epoch_line(epoch, p["epochs"], optimizer, scores), flush=True)

        if epoch + 1 < p["warmup_epochs"]:
            warmup.step()
        else:
            plateau.step(scores["val_rmse"])
        if epochs_without_gain(run.state, epoch, scores["val_rmse"]) >= p["patience_stop"]:
            run.stop(f"val_rmse has not improved for {p['patience_stop']} epochs")

    epochs = load_best(run)
    with run.phase("test"):
        result = {"epochs": epochs, **final_test(ema.module, data, config.cap)}
    save_bundle(run.output_dir, ema.module, config, data.statistics, run.state["data"], result)
    print(final_report(p, result, run.output_dir), flush=True)


@dataclass(frozen=True)
class Data:
    """What the loops need. Windows have shape (n, window, 21); targets are capped cycles (n,)."""

    loader: DataLoader[Any]
    validation: tuple[Tensor, Tensor, Tensor]  # windows, targets, states
    test: Tensor  # the last window of each engine
    truth: np.ndarray  # uncapped
    statistics: Statistics


def parameters() -> dict[str, Any]:
    """The parameters of the job over those of its profile. Raises UsageError for what is wrong."""
    given = runner.params()
    for name in given:
        if name not in DEFAULTS:
            raise UnknownName("parameter", name, list(DEFAULTS))
    profile = str(given.get("profile", DEFAULTS["profile"]))
    if profile not in PROFILES:
        raise UnknownName("profile", profile, list(PROFILES))
    p = runner.params(**(DEFAULTS | PROFILES[profile]))
    for name, value in p.items():
        check_parameter(name, value)
    return p


# The smallest value that makes sense.
LEAST: dict[str, float] = {
    "engines": 2,
    "epochs": 1,
    "hidden": 1,
    "batch_size": 1,
    "lr": 0,
    "weight_decay": 0,
    "window": 1,
    "cap": 1,
    "noise": 0,
    "seed": 0,
    "workers": 0,
    "warmup_epochs": 0,
    "patience_stop": 1,
}
BELOW_ONE = ("dropout", "val_fraction", "ema_decay")


def check_parameter(name: str, value: Any) -> None:
    """Raise UsageError where a parameter is not of its default's type, or out of range."""
    check_type(name, value)
    if value is None:
        return
    if name in LEAST and not LEAST[name] <= value < float("inf"):
        raise UsageError(f"params.{name}: expected at least {LEAST[name]}, found {value}")
    if name in BELOW_ONE and not 0 <= value < 1:
        raise UsageError(f"params.{name}: expected 0 <= {name} < 1, found {value}")


def check_type(name: str, value: object) -> None:
    """Raise UsageError where a parameter is not of its default's type."""
    default = DEFAULTS[name]
    if default is None:
        kind: tuple[type, ...] = (int, type(None)) if name == "engines" else (str, type(None))
    else:
        kind = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, kind) or isinstance(value, bool):
        names = " or ".join("null" if k is type(None) else k.__name__ for k in kind)
        raise UsageError(f"params.{name}: expected {names}, found {value!r}")


def set_up(seed: int) -> torch.device:
    """Seed everything and ask for deterministic kernels, before anything is built."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the LSTM on CUDA
    torch.use_deterministic_algorithms(True)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def schedules(
    optimizer: torch.optim.Optimizer, warmup_epochs: int
) -> tuple[LinearLR, ReduceLROnPlateau]:
    """The learning rate in equal steps up to the full one, which the plateau then halves."""
    first, steps = 1 / max(1, warmup_epochs), max(1, warmup_epochs - 1)
    warmup = LinearLR(optimizer, start_factor=first, total_iters=steps)
    return warmup, ReduceLROnPlateau(optimizer, factor=0.5, patience=30, min_lr=5e-6)


def prepare(p: dict[str, Any], state: dict[str, Any]) -> Data:
    """Read, split and normalize the data; the statistics are those in `state`, if there are some.

    Raises DataError where the data is wrong, or is not that with which the run began.
    """
    began = state.get("data", {})
    subset = cmapss.load(
        p["subset"], p["data"], began_with=began.get("source"), engines=p["engines"]
    )
    if began and began["sha256"] != subset.sha256:
        raise DataError(
            f"this is not the data with which the run began ({began['source']}, now "
            f"{subset.source}); set params.data to that one, or begin a new run"
        )
    train, held_out = cmapss.split(subset.train, p["val_fraction"], p["seed"])
    if "statistics" not in state:
        state["data"] = {
            "subset": p["subset"],
            "source": subset.source,
            "sha256": subset.sha256,
        }
        state["config"] = {name: p[name] for name in IN_EXPORTS}
        state["statistics"] = Statistics.fit(train).as_dict()
    statistics = Statistics(**state["statistics"])
    windows = Windows(train, statistics, p["window"], p["cap"], p["noise"])
    validation = Windows(held_out, statistics, p["window"], p["cap"])
    loader = DataLoader(windows, batch_size=p["batch_size"], shuffle=True, num_workers=p["workers"])
    return Data(
        loader,
        default_collate([validation[i] for i in range(len(validation))]),
        cmapss.last_windows(subset.test, statistics, p["window"]),
        subset.truth,
        statistics,
    )


def train_step(
    net: RulNet, ema: AveragedModel, optimizer: torch.optim.Optimizer, batch: list[Tensor]
) -> Tensor:
    """One optimizer step; the loss, detached, where the network is."""
    device = next(net.parameters()).device
    sensors, target, state = (tensor.to(device, non_blocking=True) for tensor in batch)
    rul, logits = net(sensors)
    loss = two_task_loss(rul, logits, target, state, net.cap)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), MOST_GRADIENT_NORM)
    optimizer.step()
    ema.update_parameters(net)
    return loss.detach()


def validate(
    net: nn.Module, held_out: tuple[Tensor, Tensor, Tensor], cap: float
) -> dict[str, float]:
    """Loss, RMSE in (capped) cycles and accuracy of the states, over all held-out windows."""
    windows, target, state = held_out
    rul, logits = predict(net, windows)
    return {
        "val_loss": float(two_task_loss(rul, logits, target, state, cap)),
        "val_rmse": metrics.rmse(rul, target),
        "val_state_accuracy": float((logits.argmax(dim=1) == state).double().mean()),
    }


def epochs_without_gain(state: dict[str, Any], epoch: int, val_rmse: float) -> int:
    """How long ago the best validation was; kept in the run's state, so a restart counts on."""
    if val_rmse < state.get("best_val_rmse", float("inf")):
        state.update(best_val_rmse=val_rmse, best_epoch=epoch)
    return epoch - int(state.get("best_epoch", -1))


def load_best(run: runner.Run) -> int:
    """Put the best average of the weights in place; give the number of epochs behind it.

    Without a supervisor nothing says which checkpoint is the best: then the last average stays.
    """
    try:
        return run.load("best", components=["ema"]).epoch
    except RestoreError as error:
        if "RUNNER_SPOOL" in os.environ:
            raise
        cmapss.say(f"the average of the last epoch is tested, not the best one: {error}")
        return run.epoch


def final_test(net: nn.Module, data: Data, cap: float) -> dict[str, Any]:
    """RMSE and NASA score on the last cycle of each test engine, and the validation once more."""
    rul, _ = predict(net, data.test)
    return {
        "test_engines": len(data.truth),
        **metrics.report(rul, data.truth, cap),
        **validate(net, data.validation, cap),
    }


def epoch_line(
    epoch: int, epochs: int, optimizer: torch.optim.Optimizer, scores: dict[str, float]
) -> str:
    values = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
    return f"epoch {epoch + 1}/{epochs}  lr {optimizer.param_groups[0]['lr']:.2e}  {values}"


def final_report(p: dict[str, Any], result: dict[str, Any], folder: Path) -> str:
    return (
        f"{p['subset']}, last cycle of {result['test_engines']} test engines, "
        f"average of the weights after epoch {result['epochs']}:\n"
        f"  truth capped at {p['cap']:g}: RMSE {result['rmse_capped']:.2f}, "
        f"NASA score {result['score_capped']:.0f}\n"
        f"  truth uncapped: RMSE {result['rmse_uncapped']:.2f}, "
        f"NASA score {result['score_uncapped']:.0f}\n"
        f"bundle: {folder}"
    )


if __name__ == "__main__":
    try:
        main()
    except DataOutOfReach as error:
        sys.exit(f"rul: {error}")  # code 1: worth another attempt
    except (DataError, UsageError) as error:
        print(f"rul: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
