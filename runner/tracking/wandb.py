"""Weights & Biases: one run, resumed by each supervisor. Checkpoints are told, not uploaded.

Offline it leaves a folder for each supervisor, all of one run: `wandb sync` puts them together.
Source: https://docs.wandb.ai/ref/python/sdk/functions/init
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import wandb

from runner.tracking.base import About, Reading, Shown, by_step

_EXIT_CODES = {"succeeded": 0, "failed": 1}


class WandBTracker:
    """See `runner.tracking.base.Tracker`."""

    def __init__(self) -> None:
        self._run: Any = None

    def begin(self, about: About, known: str | None) -> str:
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        self._run = wandb.init(
            id=known or hashlib.sha256(about.key.encode()).hexdigest()[:16],
            name=about.run_id,
            project=about.settings.get("project") or about.job,
            entity=about.settings.get("entity"),
            mode=about.settings.get("mode", "online"),
            dir=str(about.folder),
            config={**about.params, "runner": dict(about.tags)},
            resume="allow",
            settings=settings,
        )
        return str(self._run.id)

    def sent(self) -> Mapping[str, int]:
        return {}  # its library writes, and asks nothing

    def log(self, readings: Sequence[Reading]) -> None:
        for step, values in by_step(readings):
            self._run.log(values, step=step)

    def note(self, tags: Mapping[str, str]) -> None:
        self._run.config.update({"runner": dict(tags)}, allow_val_change=True)

    def show(self, checkpoint: Shown) -> None:
        self._run.summary["checkpoint"] = {"name": checkpoint.name, "uri": checkpoint.uri}

    def end(self, outcome: str | None) -> None:
        self._run.finish(exit_code=_EXIT_CODES.get(outcome or ""))
