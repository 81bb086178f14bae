"""The launcher for trainers in containers, and the handle on one of them.

The engine starts and removes containers, which nobody waits for (`aside`); everything else goes
past it, so that it may be slow, or die and come back, without harm to the run. Output comes through
pipes in the spool. All processes of a container descend from its first one and end with it, and the
process table shows them: by it they are signalled, watched and killed, where it can be seen. Where
it cannot, as behind a virtual machine, the engine is asked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.errors import EngineError, EngineGone, UsageError
from runner.job import Job
from runner.launch import inside
from runner.launch.aside import Aside
from runner.launch.base import Order, Places
from runner.launch.container_trial import ContainerTrial
from runner.launch.cpu import seconds_of
from runner.launch.docker import INSIDE, SPOOL_LABEL, Seat, trainer_request
from runner.launch.engine import Engine, exit_code_of
from runner.launch.image import Image
from runner.launch.namespace import first_process, inhabitants, number_of
from runner.launch.process import UNKNOWN_EXIT
from runner.launch.process_tree import ProcessEntry, read_entry
from runner.launch.refusal import is_of_gpus
from runner.launch.users import owner_of, user_mode
from runner.memory import Memory, limited_memory, physical_memory
from runner.spool import give_to

log = logging.getLogger(__name__)

FIRST_PROGRAM = Path(inside.__file__)
_ASK_AGAIN_SECONDS = 0.25
_ENGINE_BACK_SECONDS = 120.0  # for an engine that died, to say how a container has ended
_LEAVING_SECONDS = 10.0  # for an engine that was just away; as long as one question may take
_POLL_SECONDS = 0.005


class ContainerTrainer:
    """One life of the trainer in a container. `limit` is its memory in bytes, None without one."""

    def __init__(
        self,
        engine: Engine,
        container: str,
        first: int,
        limit: int | None,
        print_left: Callable[[int, bytes], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._container, self._limit = engine, container, limit
        self._print_left, self._clock = print_left, clock
        self.pid = first
        self._first: ProcessEntry | None = read_entry(first) if first else None
        self._code: int | None = None
        self._out_of_memory = False
        self._ask_at = 0.0
        self._gone_since: float | None = None
        self._memory: Memory | None = None

    @property
    def failure(self) -> None:
        """It has been started."""

    @property
    def pids(self) -> list[int]:
        """None: the engine waits for a container's first process."""
        return []

    def follow(self, pid: int) -> None:
        """Nothing to do: the attempt lives as long as the container's first process."""

    def leaves_session(self) -> bool:
        """Never: with its first process a container ends."""
        return False

    # ------------------------------------------------------------------ its end

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs.

        If the engine dies before it tells, it is waited for; if that takes too long or it has
        forgotten the container, the code is `UNKNOWN_EXIT`.
        """
        now = self._clock()
        if self._code is not None or now < self._ask_at or self._lives():
            return self._code
        self._ask_at = now + (_POLL_SECONDS if self._first else _ASK_AGAIN_SECONDS)
        try:
            self._code = self._ended(self._engine.state(self._container))
            self._gone_since = None
        except EngineError as error:
            self._ask_at = now + _ASK_AGAIN_SECONDS
            if self._first is None:
                return None  # nobody knows, so it may well live
            if self._gone_since is None:
                log.warning("the trainer has ended, and %s", error)
                self._gone_since = now
            if now - self._gone_since > _ENGINE_BACK_SECONDS:
                self._code = UNKNOWN_EXIT
        return self._code

    def _ended(self, state: Mapping[str, Any]) -> int | None:
        if not state:
            return UNKNOWN_EXIT
        self._out_of_memory = bool(state.get("OOMKilled"))
        return exit_code_of(state)

    def has_ended(self) -> bool | None:
        """Whether its first process is dead; None where only the engine sees that, and has not."""
        if self._first is None:
            return None if self._code is None else True
        return not self._lives()

    def _lives(self) -> bool:
        """Whether the process table still has the container's first process."""
        if self._first is None:
            return False
        now = read_entry(self.pid)
        return now is not None and now.identity == self._first.identity and now.alive

    def killed_for_memory(self) -> bool | None:
        return self._out_of_memory

    def memory(self) -> Memory | None:
        """What its cgroup uses; after its end, what was seen last."""
        if self._lives():
            membership = Path(f"/proc/{self.pid}/cgroup")
            self._memory = limited_memory(membership=membership) or self._memory
        if self._memory is None and self._limit is not None:
            return Memory(self._limit, 0, 0)
        return self._memory

    def cpu_seconds(self) -> float:
        return seconds_of([entry.pid for entry in self._inhabitants()])

    # ------------------------------------------------------------------ signals

    def send_signal(self, signum: int) -> None:
        """To the first process, the engine's init, which passes it on to what was started."""
        if not (self._lives() and _send(self.pid, signum)):
            with contextlib.suppress(EngineError):
                self._engine.kill(self._container, signum)

    def send_signal_to(self, pid: int, signum: int) -> bool:
        here = self.pid_here(pid)
        if here is not None:
            return _send(here, signum)
        if self._first is None and pid:
            with contextlib.suppress(EngineError):
                self._engine.kill(self._container, signum)
                return True
        return False

    def pid_here(self, pid: int) -> int | None:
        return number_of(pid, self._inhabitants()) if pid else None

    def _inhabitants(self) -> list[ProcessEntry]:
        return inhabitants(self.pid) if self._lives() else []

    # ------------------------------------------------------------------ the end of it

    def kill_tree(self, *, timeout_seconds: float = 10.0) -> list[int]:
        """Kill the first process, and by that all others; then take what it has printed last."""
        deadline = self._clock() + timeout_seconds
        while self.poll() is None:
            if self._lives():
                _send(self.pid, signal.SIGKILL)
            elif self._first is None:
                with contextlib.suppress(EngineError):
                    self._engine.kill(self._container, signal.SIGKILL)
            if self._clock() >= deadline:
                if self._lives() or self._first is None:
                    return [self.pid]
                self._code = -signal.SIGKILL  # it is dead, and only the engine does not say so
            time.sleep(_POLL_SECONDS)
        self._remove()
        return []

    def _remove(self) -> None:
        """Remove the container, also if its log cannot be read.

        What cannot be removed now is before the next attempt begins, or in the end of the run.
        """
        with _told():  # both are the same file, so if one fails, the other is not waited for
            for target in (1, 2):
                left = self._engine.output(self._container, stdout=target == 1, stderr=target == 2)
                if left:
                    self._print_left(target, left)
        with _told():
            self._engine.remove(self._container)

    def close(self) -> None:
        """Nothing is held: the container is gone."""


class DockerLauncher:
    """Starts a job's command in containers of one image, for one run on this node."""

    places = INSIDE

    def __init__(
        self,
        engine: Engine,
        job: Job,
        image: Image,
        seat: Seat,
        parent: Mapping[str, str] = os.environ,
    ) -> None:
        self._engine, self._job, self._image = engine, job, image
        self._seat, self._parent = seat, parent
        self._alone = threading.Lock()
        self._has_started = False  # then the job and the machine go together

    @property
    def pipes_in(self) -> Path:
        return self._seat.places.spool

    def provenance(self) -> dict[str, Any]:
        """The image, and the Python and the packages in it."""
        return {
            "image": self._image.reference,
            "python": {
                "version": ".".join(map(str, self._image.version)),
                "implementation": "CPython",
            },
            "packages": dict(sorted(self._image.packages.items())),
        }

    def end_leftovers(self) -> list[str]:
        found = self._engine.labelled(SPOOL_LABEL, str(self._seat.places.spool))
        for container in found:
            self._engine.remove(container)
        return [f"container {container[:12]}" for container in found]

    def leave(self, seconds_left: float) -> None:
        until = time.monotonic() + min(_LEAVING_SECONDS, seconds_left - _LEAVING_SECONDS)
        problem = None
        while time.monotonic() < until:
            try:
                self._end_leftovers_alone(until)
            except EngineError as error:
                problem = error
            else:
                return
            time.sleep(_ASK_AGAIN_SECONDS)
        if problem is not None:
            log.warning("a container may be left until this run is started here again: %s", problem)

    def _end_leftovers_alone(self, until: float) -> None:
        if not self._alone.acquire(timeout=max(0.0, until - time.monotonic())):
            raise EngineGone(
                "be asked what is left", "it has not answered what it was asked before"
            )
        try:
            self.end_leftovers()
        finally:
            self._alone.release()

    def trial(self, folder: Path, request: Mapping[str, Any]) -> ContainerTrial:
        return ContainerTrial(self._job, self._seat, folder, request)

    def start(self, order: Order) -> Aside:
        return Aside(self._start, order, self._alone)

    def _start(self, order: Order) -> ContainerTrainer:
        self.end_leftovers()
        for folder in (self._seat.places.outputs, self._seat.places.slots):
            folder.mkdir(exist_ok=True)
            give_to(folder, owner_of(self._seat.user))
        request = trainer_request(self._job, self._seat, order, self._parent)
        name = f"{self._seat.places.spool.name}-a{order.attempt:04d}"
        container = self._engine.create(name, request)
        try:
            self._engine.start(container)
            state = self._engine.state(container)
        except EngineError as error:
            with contextlib.suppress(EngineError):
                self._engine.remove(container)
            if self._job.resources.gpus and not self._has_started and is_of_gpus(error):
                raise UsageError(f"resources.gpus: {error}") from error
            raise
        self._has_started = True
        return ContainerTrainer(
            self._engine,
            container,
            first_process(state),
            self._job.resources.memory,
            order.print_left,
        )


def seat_of(engine: Engine, job: Job, image: Image, places: Places, run_id: str, user: str) -> Seat:
    """What the containers of a run are given here; `user` is `UID:GID`."""
    return Seat(
        image=image.id,
        python=image.python,
        user=user,
        places=places,
        first_program=FIRST_PROGRAM,
        run_id=run_id,
        host_memory=physical_memory(),
        user_mode=user_mode(engine, job),
    )


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Go on after a failure of the engine's; say it."""
    try:
        yield
    except EngineError as error:
        log.warning("%s", error)


def _send(pid: int, signum: int) -> bool:
    """Signal a process; whether we may. The number is looked up right before."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return False
    except PermissionError:
        return False
    return True
