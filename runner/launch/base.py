"""How a supervisor has its trainer started, whatever that runs in: a launcher and its handles.

A launcher belongs to a run on one node. A handle is one life of the trainer with all that it
starts. Process ids that are handed in here are those that the trainer itself knows, by the board;
those that are handed out are this machine's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runner.launch.trial import Trial
from runner.memory import Memory


@dataclass(frozen=True)
class Places:
    """Where the trainer finds what it shares with its supervisor."""

    spool: Path
    outputs: Path
    slots: Path
    """Where a slot goes that memory is too short for."""


@dataclass(frozen=True)
class Order:
    """What is to be started: an attempt, the `RUNNER_*` variables that the trainer is told, and
    where it prints to, as descriptors of ours.

    `print_left` takes what comes another way than through those, by its descriptor (1 or 2).
    `deadline` is when this node will go (`CLOCK_MONOTONIC` seconds), None while nobody has said so.
    """

    attempt: int
    own: Mapping[str, str]
    stdout: int
    stderr: int
    print_left: Callable[[int, bytes], None]
    deadline: Callable[[], float | None] = lambda: None


class Handle(Protocol):
    """One life of the trainer, and everything that it starts. Used from one thread."""

    @property
    def pid(self) -> int:
        """Of what was started."""

    @property
    def pids(self) -> list[int]:
        """The children of this process whose exit codes are the handle's to take."""

    @property
    def failure(self) -> Exception | None:
        """Why it could not be started, where that shows only after `start`; nothing runs then."""

    def follow(self, pid: int) -> None:
        """This process has attached: it is the trainer."""

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs. Can be asked again."""

    def leaves_session(self) -> bool:
        """Whether something may still attach though what was started has ended."""

    def send_signal(self, signum: int) -> None:
        """To what was started; nothing happens once it has ended."""

    def send_signal_to(self, pid: int, signum: int) -> bool:
        """To one process of the trainer; False if there is none with this number."""

    def pid_here(self, pid: int) -> int | None:
        """What this machine calls a process of the trainer; None where that cannot be told."""

    def cpu_seconds(self) -> float:
        """What it has used of the CPU so far."""

    def memory(self) -> Memory | None:
        """What its cgroup uses; None where that has no limit."""

    def killed_for_memory(self) -> bool | None:
        """Whether it was killed for want of memory; None where the kernel's counts have to tell."""

    def kill_tree(self, *, timeout_seconds: float = 10.0) -> list[int]:
        """Kill all of it and wait for the end, for some seconds; who is left then."""

    def close(self) -> None:
        """Give back what the handle holds. Nothing is killed."""


class Launcher(Protocol):
    """Starts the trainer of one run on this node."""

    @property
    def places(self) -> Places:
        """The folders of the run, as the trainer sees them."""

    @property
    def pipes_in(self) -> Path | None:
        """Where the pipes that it prints into have names; None if it inherits them."""

    def provenance(self) -> dict[str, Any]:
        """What it adds to where a checkpoint comes from."""

    def end_leftovers(self) -> list[str]:
        """End what a dead supervisor of this run has left here; what that was, in words.

        The caller holds the spool's lock, so nobody else is using it.
        """

    def leave(self, seconds_left: float) -> None:
        """The run is over here: end what could not be ended before, as far as there is time."""

    def trial(self, folder: Path, request: Mapping[str, Any]) -> Trial:
        """Make ready a call of the job's own function, as `runner.training.validate` has it.

        It happens in `folder`, which is the caller's. RunnerError or OSError if it cannot be made.
        """

    def start(self, order: Order) -> Handle:
        """Start the trainer; return when it executes, or sooner where that may take long.

        Raises UsageError if it never can be started, another RunnerError or OSError if it cannot be
        just now; what returns sooner has the same as its `failure`. Nothing runs after an error.
        """
