"""The trainer, whichever attempt it is: started, watched, signalled, and ended for good.

Between two attempts there is none. What it runs in is its launcher's business; what an end or a
silence of it means is the machine's.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable

from runner.board import Board
from runner.errors import EngineGone, RunnerError, UsageError
from runner.launch.aside import seconds_for_tidying, waited_for
from runner.launch.base import Handle, Launcher, Order
from runner.memory import Memory
from runner.spool import RankSpool
from runner.supervisor import stacks
from runner.supervisor.events import EngineAway, Event, LaunchFailed, PreparationFailed
from runner.supervisor.memory_guard import MemoryGuard
from runner.supervisor.output import Output
from runner.supervisor.runlog import RunLog
from runner.supervisor.vitals import Vitals

log = logging.getLogger(__name__)

_KILL_SECONDS = 10.0
_HEIR_SECONDS = 30.0  # for the child of a script that has forked and ended, to attach


class Trainer:
    """One at a time. All of it belongs into the loop's thread."""

    def __init__(
        self, launcher: Launcher, logs: RunLog, vitals: Vitals, rank: RankSpool, guard: float
    ) -> None:
        self._launcher, self._logs, self._vitals = launcher, logs, vitals
        self._memory = MemoryGuard(rank.folder, guard, self._read_memory)
        self._owner = rank.owner
        self._handle: Handle | None = None
        self._output: Output | None = None
        self._told = False
        self._verdict: tuple[str, str] | None = None
        self._heir_until: float | None = None
        self._deadline: float | None = None

    @property
    def is_there(self) -> bool:
        """Whether one was started and has not been ended for good."""
        return self._handle is not None

    @property
    def pids(self) -> list[int]:
        """The processes that nobody else may wait for."""
        return [] if self._handle is None else self._handle.pids

    def pid_here(self, pid: int) -> int | None:
        """What this machine calls a process of the trainer; None where that cannot be told."""
        return None if self._handle is None else self._handle.pid_here(pid)

    def end_leftovers(self) -> list[str]:
        """End what a dead supervisor of this run has left here; what that was, in words."""
        return waited_for(self._launcher.end_leftovers, lambda: self._deadline) or []

    def start(self, attempt: int, own: dict[str, str]) -> None:
        """Start that of an attempt; `own` are the variables that it is told.

        Raises UsageError if that can never be, RunnerError or OSError if it cannot be now.
        """
        if self._handle is not None:
            raise RunnerError(f"process {self._handle.pid} of the attempt before is still there")
        self._told = False
        self._heir_until = None
        self._vitals.attempt_begins()
        self._memory.begin()
        output = self._logs.pipes(self._launcher.pipes_in, self._owner)
        try:
            order = Order(
                attempt, own, output.stdout, output.stderr, output.print, lambda: self._deadline
            )
            self._handle = self._launcher.start(order)
        except BaseException:
            output.launched()
            raise
        if self._launcher.pipes_in is None:
            output.launched()
        else:
            self._output = output  # the trainer opens its ends by name, when it gets to it

    def failure(self) -> Exception | None:
        """Why it could not be started, if that shows only now: once. Nothing of it is left then."""
        failure = None if self._handle is None else self._handle.failure
        if failure is not None:
            self._forget()
        return failure

    def hurry(self, deadline: float) -> None:
        """This node goes at that moment (`CLOCK_MONOTONIC` seconds). From any thread, also while
        another waits here: what takes long ends in time then."""
        self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)

    def exit_code(self, now: float, board: Board | None) -> int | None:
        """The code with which it has ended: once, None before and after."""
        handle = self._handle
        if handle is None:
            return None
        if board is not None:
            handle.follow(board.pid)
        code = handle.poll()
        if code is None or self._told or self._expects_heir(handle, code, now, board):
            return None
        self._tell(handle, code)
        return code

    def _tell(self, handle: Handle, code: int) -> None:
        self._told = True
        self._verdict = self._memory.verdict(code, handle.killed_for_memory())

    def _expects_heir(self, handle: Handle, code: int, now: float, board: Board | None) -> bool:
        """Whether what was started has forked and ended well, and its child has yet to attach."""
        if code != 0 or board is None or board.pid:
            return False
        if self._heir_until is None:
            self._heir_until = now + _HEIR_SECONDS
        return now < self._heir_until and handle.leaves_session()

    def look(self, now: float, board: Board | None) -> list[Event]:
        """What has changed since the last look, at its memory and its signs of life."""
        if self._handle is None:
            return []
        short = self._memory.look(now)
        seen = self._vitals.look(now, board, self._handle.cpu_seconds)
        return seen if short is None else [short, *seen]

    @property
    def verdict(self) -> tuple[str, str] | None:
        """Cause and explanation of its end, where more is known than the code that was told."""
        return self._verdict

    def _read_memory(self) -> Memory | None:
        return None if self._handle is None else self._handle.memory()

    def relay(self, signum: int, board: Board | None) -> None:
        """To the process that has attached: a shell before it would only die of most signals."""
        if self._handle is None:
            return
        if board is None or not self._handle.send_signal_to(board.pid, signum):
            self._handle.send_signal(signum)

    def show_stacks(self, board: Board | None, when_shown: Callable[[], None]) -> None:
        """Ask the process that has attached: to any other, this signal is the end."""
        handle = self._handle
        if handle is None:
            return
        pid = 0 if board is None else board.pid
        if handle.send_signal_to(pid, signal.SIGRTMIN):
            shown = handle.pid_here(pid)
        else:
            log.warning("the trainer has not attached yet, so it cannot show its stacks")
            shown = handle.pid
        if shown:
            stacks.show(shown, when_shown)

    def end(self) -> int | None:
        """Kill whatever is left of the attempt; it does not return before that is gone.

        Gives its exit code, if that has not been told yet. What does not die remains; call it
        again then.
        """
        handle = self._handle
        if handle is None:
            return None
        remaining = handle.kill_tree(timeout_seconds=self._kill_seconds())
        if remaining:
            log.error("processes %s of the trainer do not die", remaining)
            return None
        code = handle.poll()
        is_news = code is not None and not self._told
        if code is not None and is_news:
            self._tell(handle, code)
        self._forget()
        return code if is_news else None

    def _kill_seconds(self) -> float:
        if self._deadline is None:
            return _KILL_SECONDS
        return min(_KILL_SECONDS, seconds_for_tidying(self._deadline - time.monotonic()))

    def _forget(self) -> None:
        """It is dead, or was never alive: take what it has printed last."""
        if self._handle is not None:
            self._handle.close()
        self._handle = None
        if self._output is not None:
            self._output.launched()
            self._output = None
        self._logs.drain()


def not_started(error: Exception) -> Event:
    """What it means that the trainer cannot be started."""
    if isinstance(error, UsageError):
        return LaunchFailed(time.monotonic(), str(error))
    if isinstance(error, EngineGone):
        return EngineAway(time.monotonic(), str(error))
    return PreparationFailed(time.monotonic(), f"cannot start: {error}", final=False)
