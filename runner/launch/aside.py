"""A trainer whose engine may be slow or silent: what is asked of that, a thread of its own asks.

So nobody waits for a container's start, or for the engine's word on how one has ended. Only the end
of an attempt is waited for, and no longer than a notice leaves time, also one that comes meanwhile:
once the trainer is dead, what the engine still has to do changes nothing of what is saved.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Protocol, TypeVar

from runner.errors import RunnerError
from runner.launch.base import Handle, Order
from runner.launch.process import UNKNOWN_EXIT
from runner.memory import Memory

log = logging.getLogger(__name__)
_T = TypeVar("_T")

_POLL_SECONDS = 0.01
_WORD_SECONDS = 1.0  # for the engine's word on an end that has been seen, when there is a deadline
_SHARE = 4  # of the time that is left, for what an engine has to tidy up


class Life(Handle, Protocol):
    """One life of a trainer, as an engine has it: its calls may last. Used from one thread."""

    def has_ended(self) -> bool | None:
        """Whether it is dead, by what can be seen without the engine; None: that cannot be told."""


class Aside:
    """The handle on a life that another thread begins, asks about, and ends.

    `begin` makes it, `alone` keeps one thread at a time at the engine. A start that comes too late,
    for one that is to end already, is removed as soon as it has come.
    """

    def __init__(
        self,
        begin: Callable[[Order], Life],
        order: Order,
        alone: threading.Lock,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._begin, self._order, self._alone, self._clock = begin, order, alone, clock
        self._life: Life | None = None
        self._failure: Exception | None = None
        self._heard: int | None = None
        self._told: int | None = None
        self._gone_since: float | None = None
        self._ending, self._over = threading.Event(), threading.Event()
        self._printing = threading.Lock()
        self._is_left = False
        self._signalling = threading.Lock()
        self._early: list[int] = []
        threading.Thread(target=self._serve, name="engine", daemon=True).start()

    # ------------------------------------------------------------------ the thread at the engine

    def _serve(self) -> None:
        try:
            with self._alone:
                if not self._ending.is_set() and self._starts() and self._life is not None:
                    self._live(self._life)
        finally:
            self._over.set()

    def _starts(self) -> bool:
        try:
            life = self._begin(replace(self._order, print_left=self._print))
        except (RunnerError, OSError) as error:
            self._failure = error
            return False
        with self._signalling:
            self._life, early = life, self._early
        for signum in early:
            life.send_signal(signum)
        return True

    def _live(self, life: Life) -> None:
        while not self._ending.wait(_POLL_SECONDS):
            if self._heard is None:
                with contextlib.suppress(OSError):  # no descriptor is free, for example
                    self._heard = life.poll()
        while self._is_left_over(life):
            time.sleep(_POLL_SECONDS)
        self._heard = life.poll()

    def _is_left_over(self, life: Life) -> bool:
        """Whether it is to be ended once more; what is not removed now is before the next start."""
        try:
            return bool(life.kill_tree())
        except OSError as error:
            log.warning("the end of the container: %s", error)
            return not self._is_dead()

    def _print(self, target: int, data: bytes) -> None:
        with self._printing:
            if not self._is_left:
                self._order.print_left(target, data)

    # ------------------------------------------------------------------ how it is

    @property
    def failure(self) -> Exception | None:
        """Why it could not be started, as soon as that is known."""
        return self._failure if self._over.is_set() else None

    @property
    def pid(self) -> int:
        """Of its first process; 0 before there is one, and where that cannot be told."""
        return 0 if self._life is None else self._life.pid

    @property
    def pids(self) -> list[int]:
        """None: the engine waits for it."""
        return []

    def follow(self, pid: int) -> None:
        """Nothing to do: the attempt lives as long as its first process."""

    def leaves_session(self) -> bool:
        """Never: with its first process it ends."""
        return False

    def poll(self) -> int | None:
        """The exit code. With a deadline, an engine that does not tell it is not waited for."""
        if self._told is None:
            self._told = self._heard
        if self._told is None and self._over.is_set():
            self._told = -signal.SIGKILL  # it was to end before it had begun
        if self._told is None and self._order.deadline() is not None and self._is_dead():
            now = self._clock()
            self._gone_since = now if self._gone_since is None else self._gone_since
            if now - self._gone_since >= _WORD_SECONDS:
                self._told = UNKNOWN_EXIT
        return self._told

    def _is_dead(self) -> bool:
        with contextlib.suppress(OSError):  # that cannot be told just now
            return self._life is not None and self._life.has_ended() is True
        return False

    def killed_for_memory(self) -> bool | None:
        return False if self._life is None else self._life.killed_for_memory()

    def memory(self) -> Memory | None:
        return None if self._life is None else self._life.memory()

    def cpu_seconds(self) -> float:
        return 0.0 if self._life is None else self._life.cpu_seconds()

    # ------------------------------------------------------------------ signals

    def send_signal(self, signum: int) -> None:
        """To what was started; it may run, and print, before the engine has said that it does."""
        with self._signalling:
            if self._life is None:
                self._early.append(signum)
                return
        self._life.send_signal(signum)

    def send_signal_to(self, pid: int, signum: int) -> bool:
        return self._life is not None and self._life.send_signal_to(pid, signum)

    def pid_here(self, pid: int) -> int | None:
        return None if self._life is None else self._life.pid_here(pid)

    # ------------------------------------------------------------------ the end of it

    def kill_tree(self, *, timeout_seconds: float = 10.0) -> list[int]:
        """End it, and wait until it is removed: for what a deadline leaves time, if there is one.

        Without one, a first process that does not die is waited for so long, and the engine for as
        long as its calls may last. Who is left then; nobody, if only the engine has not answered.
        """
        self._ending.set()
        began = self._clock()
        while not self._over.wait(_POLL_SECONDS):
            waited, deadline = self._clock() - began, self._order.deadline()
            if deadline is None:
                may_live = self._life is not None and not self._is_dead()
                if may_live and waited >= timeout_seconds:
                    return [self.pid]
            elif waited >= seconds_for_tidying(deadline - self._clock()):
                if self._life is not None and not self._is_dead():
                    return [self.pid]
                self._leave()
                return []
        return []

    def _leave(self) -> None:
        with self._printing:
            self._is_left = True
        if self._told is None:
            self._told = self._heard if self._heard is not None else -signal.SIGKILL
        log.warning(
            "the container engine is not waited for any longer: what it has of the trainer is "
            "removed when it answers, or before the next attempt on this machine"
        )

    def close(self) -> None:
        """Nothing is held: it is gone, or its thread removes it."""


def waited_for(call: Callable[[], _T], deadline: Callable[[], float | None]) -> _T | None:
    """What a call that may last returns, or raises. It is made in a thread, which outlasts this.

    None if a deadline, also one that becomes known meanwhile, leaves no time to wait for it.
    """
    called: Future[_T] = Future()

    def serve() -> None:
        try:
            called.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            called.set_exception(error)

    threading.Thread(target=serve, name="engine", daemon=True).start()
    began = time.monotonic()
    while not wait([called], _POLL_SECONDS).done:
        now, until = time.monotonic(), deadline()
        if until is not None and now - began >= seconds_for_tidying(until - now):
            return None
    return called.result()


def seconds_for_tidying(left_seconds: float) -> float:
    """How long something may take that nothing to be saved depends on, when so much is left."""
    return max(_WORD_SECONDS, left_seconds / _SHARE)
