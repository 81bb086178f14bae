"""Aim: one run in a repository, which is a folder, continued by each supervisor.

Source: https://aimstack.readthedocs.io/en/latest/refs/sdk.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aim.sdk.repo import Repo
from aim.sdk.run import Run

from runner.tracking.base import About, Reading, Shown


class AimTracker:
    """See `runner.tracking.base.Tracker`."""

    def __init__(self) -> None:
        self._run: Any = None

    def begin(self, about: About, known: str | None) -> str:
        folder = about.workdir / Path(about.settings["repo"]).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        repo = Repo.from_path(str(folder), init=True)
        if known is not None and known not in repo.list_all_runs():
            known = None
        self._run = Run(
            run_hash=known,
            repo=repo,
            experiment=about.settings.get("experiment") or about.job,
            system_tracking_interval=None,
            log_system_params=False,
            capture_terminal_logs=False,
        )
        self._run.name = about.run_id
        self._run["params"] = dict(about.params)
        self.note(about.tags)
        return str(self._run.hash)

    def sent(self) -> Mapping[str, int]:
        return {}  # a value that is sent for a step again takes the other's place

    def log(self, readings: Sequence[Reading]) -> None:
        for one in readings:
            self._run.track(one.value, name=one.name, step=one.step, epoch=one.epoch)

    def note(self, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self._run[name] = value

    def show(self, checkpoint: Shown) -> None:
        self._run["runner.checkpoint"] = checkpoint.uri

    def end(self, outcome: str | None) -> None:
        if outcome is not None:
            self._run["runner.outcome"] = outcome
        self._run.close()
