"""The launcher for trainers that are processes of this machine, as the supervisor itself is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.job import Job, resolved_command
from runner.launch.base import Order, Places
from runner.launch.cgroup import own_group, remove_empty
from runner.launch.leftovers import end_leftovers
from runner.launch.process import TrainerProcess, build_environment
from runner.launch.process_tree import mark_prefix, read_entry
from runner.launch.trial import ProcessTrial


class ProcessLauncher:
    """Starts a job's command in a process and a session of its own."""

    def __init__(
        self, job: Job, run_id: str, places: Places, parent: Mapping[str, str] = os.environ
    ) -> None:
        self._job, self._run_id, self._parent = job, run_id, parent
        self._groups: Path | None = own_group()
        self.places = places

    @property
    def pipes_in(self) -> None:
        """It inherits its pipes."""

    def provenance(self) -> dict[str, Any]:
        return {}

    def end_leftovers(self) -> list[str]:
        left = end_leftovers(self.places.spool)
        remove_empty(self._groups, spare=_has_a_supervisor)
        return [f"process {pid}" for pid in left]

    def leave(self, seconds_left: float) -> None:
        """Nothing to do: processes can always be ended."""

    def trial(self, folder: Path, request: Mapping[str, Any]) -> ProcessTrial:
        return ProcessTrial(self._job, folder, request, self._run_id)

    def start(self, order: Order) -> TrainerProcess:
        environment = build_environment(
            self._parent,
            order.own,
            self._job.env,
            pass_credentials=self._job.credentials == "pass",
        )
        environment.setdefault("PYTHONUNBUFFERED", "1")
        return TrainerProcess.start(
            resolved_command(self._job),
            cwd=self._job.workdir,
            env=environment,
            stdout=order.stdout,
            stderr=order.stderr,
            groups=self._groups,
        )


def _has_a_supervisor(mark: str) -> bool:
    """Whether the supervisor that made this mark, `PID-START.N`, lives."""
    pid = mark.partition("-")[0]
    entry = read_entry(int(pid)) if pid.isdecimal() else None
    return entry is not None and entry.alive and mark.startswith(f"{mark_prefix(entry)}.")
