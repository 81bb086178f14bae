"""Where a run's trainers will run on this node, made ready before anything of the run is written.

For a container that is the engine, the image and the user. What cannot work is a UsageError here,
while nothing has begun.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runner.errors import UsageError
from runner.job import Job
from runner.launch import shortlived
from runner.launch.base import Launcher, Places
from runner.launch.container import DockerLauncher, seat_of
from runner.launch.container_trial import ContainerTrial
from runner.launch.docker import Seat
from runner.launch.engine import Engine
from runner.launch.image import Image, find_image, look_into
from runner.launch.local import ProcessLauncher
from runner.launch.trial import ProcessTrial, Trial
from runner.launch.users import check_readable, container_user, owner_of, user_mode
from runner.spool import Owner

log = logging.getLogger(__name__)


class Site(Protocol):
    """What is ready for the trainers of a run."""

    @property
    def owner(self) -> Owner | None:
        """Whose the trainer's part of the spool is; None: ours."""

    @property
    def image(self) -> Mapping[str, Any] | None:
        """Which image it is, for the run's record."""

    def launcher(self, run_id: str, places: Places) -> Launcher:
        """Starts them; `places` are the run's folders on this node."""

    def trial(self, folder: Path, request: Mapping[str, Any]) -> Trial:
        """As the launcher's, before there is a run."""


@dataclass(frozen=True)
class ProcessSite:
    """This machine as it is."""

    job: Job

    @property
    def owner(self) -> None:
        """The trainer is who we are."""

    @property
    def image(self) -> None:
        """There is none."""

    def launcher(self, run_id: str, places: Places) -> Launcher:
        return ProcessLauncher(self.job, run_id, places)

    def trial(self, folder: Path, request: Mapping[str, Any]) -> Trial:
        return ProcessTrial(self.job, folder, request, "")


@dataclass(frozen=True)
class ContainerSite:
    """An engine of this machine that has an image in which the trainer can run."""

    job: Job
    engine: Engine
    found: Image
    user: str

    @property
    def owner(self) -> Owner | None:
        return owner_of(self.user)

    @property
    def image(self) -> Mapping[str, Any]:
        return self.found.reference

    def launcher(self, run_id: str, places: Places) -> Launcher:
        return DockerLauncher(self.engine, self.job, self.found, self._seat(run_id, places))

    def trial(self, folder: Path, request: Mapping[str, Any]) -> Trial:
        seat = self._seat("", Places(folder, folder, folder))
        return ContainerTrial(self.job, seat, folder, request)

    def _seat(self, run_id: str, places: Places) -> Seat:
        return seat_of(self.engine, self.job, self.found, places, run_id, self.user)


def site_for(
    job: Job,
    pinned: Mapping[str, Any] | None,
    state_bytes: int | None,
    cache: Path,
    *,
    newest: bool = False,
) -> Site:
    """The site that the job asks for. UsageError if it cannot be had.

    `pinned` is the image that the run began with; `state_bytes` the size of its state, if known;
    `cache` a folder where it is remembered what is in an image; `newest` asks the registry for what
    the image's name stands for now.
    """
    if job.launcher != "docker":
        return ProcessSite(job)
    check_memory(job, state_bytes)
    engine = Engine.connect()
    assert job.image is not None, "a job without an image is refused when it is read"
    _tell_of_limits(engine, job)
    shortlived.remove_left(engine)
    mode = user_mode(engine, job)
    image = find_image(engine, job.image, pinned, newest=newest)
    found = look_into(engine, job, image, mode, cache)
    user = container_user(engine, job, found, os.geteuid(), os.getegid())
    check_readable(job.workdir, user)
    return ContainerSite(job, engine, found, user)


def _tell_of_limits(engine: Engine, job: Job) -> None:
    asked = {"cpus": job.resources.cpus, "memory": job.resources.memory}
    names = [f"resources.{name}" for name, limit in asked.items() if limit is not None]
    if names and engine.has_no_limits:
        log.warning(
            "%s: not kept to, because the engine runs without root, and may set no limits here; "
            "it may with cgroups of version 2 and systemd",
            " and ".join(names),
        )


def check_memory(job: Job, state_bytes: int | None) -> None:
    """UsageError if the slots alone take all the memory that the container may have.

    Before there is a checkpoint, the state is as large as the job says it may become.
    """
    limit, slots = job.resources.memory, job.checkpoint.slots
    if state_bytes is None:
        state_bytes = job.checkpoint.max_state_bytes
    if limit is None or state_bytes is None or slots * state_bytes < limit:
        return
    raise UsageError(
        f"resources.memory: {limit / 1e6:.0f} MB are not enough for {slots} slots of "
        f"{state_bytes / 1e6:.0f} MB, which count as the container's; raise it, or lower "
        "checkpoint.slots (0: one, on the disk)"
    )
