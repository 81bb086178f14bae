"""The job's own function in a container of the run's image, where its libraries are.

It gets what the trainer's container gets, but no GPU, no network and none of the run's folders: of
this machine it may write the one folder that it is tried in, which is made for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from runner.errors import EngineError
from runner.job import Job
from runner.job_launch import import_folders
from runner.launch import shortlived
from runner.launch.docker import WORKDIR, Seat, trial_request
from runner.launch.engine import Engine, exit_code_of
from runner.launch.namespace import first_process, inhabitants
from runner.launch.trial import Answer, read_answer, too_late, waited_seconds
from runner.launch.users import owner_of
from runner.spool import give_to
from runner.trial_files import REQUEST

_ASK_SECONDS = 0.2


class ContainerTrial:
    """A call in a container, over a connection of its own: the trainer's is used beside it."""

    def __init__(self, job: Job, seat: Seat, folder: Path, request: Mapping[str, Any]) -> None:
        whole = {**request, "path": folders_inside(job), "params": job.params}
        (folder / REQUEST).write_text(json.dumps(whole))
        give_to(folder, owner_of(seat.user))
        self._folder, self._limit = folder, job.resources.memory
        self._engine = Engine.connect()
        try:
            container = trial_request(job, seat, folder, os.environ)
            self._container = shortlived.make(self._engine, "trial", container)
        except BaseException:
            self._engine.close()
            raise

    @property
    def pids(self) -> Collection[int]:
        """None: the engine waits for it."""
        return ()

    def begin(self) -> None:
        """Nothing: `wait` starts it, and removes it whatever comes of that."""

    def wait(self, limit_seconds: float, over: threading.Event) -> Answer | None:
        try:
            return self._run(limit_seconds, over)
        finally:
            with contextlib.suppress(EngineError):  # the next attempt removes it, by its label
                self._engine.remove(self._container)
            self._engine.close()

    def _run(self, limit_seconds: float, over: threading.Event) -> Answer | None:
        begun = time.monotonic()
        self._engine.start(self._container)
        while (state := self._engine.state(self._container)) and exit_code_of(state) is None:
            waited = self._waited_seconds(first_process(state))
            late = too_late(time.monotonic() - begun, waited, limit_seconds)
            if late is not None:
                return late
            if over.wait(_ASK_SECONDS):
                return None
        if over.is_set():
            return None
        if not state:
            return Answer(unusable="its container was removed")
        if state.get("OOMKilled"):
            limit = "" if self._limit is None else f" of {self._limit / 1e6:.0f} MB"
            return Answer(unusable=f"its memory{limit} was not enough (resources.memory)")
        code = exit_code_of(state)
        assert code is not None
        return read_answer(self._folder, code, self._printed())

    def _waited_seconds(self, first: int) -> float:
        """Of the process that the container's init has started."""
        found = inhabitants(first)[1:2] if first else []
        return waited_seconds(found[0].pid) if found else 0.0

    def _printed(self) -> bytes:
        with contextlib.suppress(EngineError):
            return self._engine.output(self._container, stdout=True, stderr=True)
        return b""


def folders_inside(job: Job) -> list[str]:
    """Where the trainer's imports look, as the container has it: the workdir lies elsewhere there,
    and what is outside of it is the image's own.
    """
    workdir, found = job.workdir.resolve(), map(Path, import_folders(job))
    return [
        str(WORKDIR / folder.relative_to(workdir) if folder.is_relative_to(workdir) else folder)
        for folder in found
    ]
