"""A thread of its own begins and ends a trainer; whoever has the handle never waits for long."""

from __future__ import annotations

import errno
import signal
import threading
import time
from dataclasses import dataclass, field

import pytest
from waiting import wait_until

from runner.errors import EngineError
from runner.launch.aside import Aside, seconds_for_tidying, waited_for
from runner.launch.base import Order
from runner.launch.process import UNKNOWN_EXIT


@dataclass
class Life:
    """A life whose engine answers when it is let."""

    answers: threading.Event = field(default_factory=threading.Event)
    dead: bool = False
    removed: threading.Event = field(default_factory=threading.Event)
    pid: int = 7
    pids: tuple[int, ...] = ()
    failure: None = None
    refuses: int = 0
    """How often its end is disturbed."""
    heard: list[int] = field(default_factory=list)

    def send_signal(self, signum: int) -> None:
        self.heard.append(signum)

    def poll(self) -> int | None:
        if not self.dead:
            return None
        self.answers.wait()
        return 3

    def has_ended(self) -> bool:
        return self.dead

    def kill_tree(self, *, timeout_seconds: float = 10.0) -> list[int]:
        if self.refuses:
            self.refuses -= 1
            raise OSError(errno.EMFILE, "no descriptor is free")
        self.dead = True
        self.answers.wait()
        self.removed.set()
        return []


def order(deadline: list[float]) -> Order:
    given = lambda: deadline[0] if deadline else None  # noqa: E731
    return Order(1, {}, 1, 2, lambda target, data: None, given)


def begun(life: Life, deadline: list[float]) -> Aside:
    aside = Aside(lambda _: life, order(deadline), threading.Lock())  # type: ignore[arg-type,return-value]
    wait_until(lambda: aside.pid == 7, what="the start")
    return aside


def test_a_start_that_comes_after_its_end_is_taken_back() -> None:
    life, may_start = Life(), threading.Event()
    life.answers.set()

    def begin(_: Order) -> Life:
        may_start.wait()
        return life

    aside = Aside(begin, order([time.monotonic()]), threading.Lock())  # type: ignore[arg-type]
    assert aside.poll() is None
    assert aside.kill_tree() == []
    assert aside.poll() == -signal.SIGKILL
    assert not life.removed.is_set()

    may_start.set()

    assert life.removed.wait(60)


def test_a_signal_that_comes_before_the_engine_has_said_that_it_runs_is_not_lost() -> None:
    life, may_start = Life(), threading.Event()
    life.answers.set()

    def begin(_: Order) -> Life:
        may_start.wait()
        return life

    aside = Aside(begin, order([]), threading.Lock())  # type: ignore[arg-type]
    assert not aside.send_signal_to(12, signal.SIGHUP)
    aside.send_signal(signal.SIGHUP)
    may_start.set()
    wait_until(lambda: life.heard, what="the signal")
    aside.send_signal(signal.SIGUSR2)

    assert life.heard == [signal.SIGHUP, signal.SIGUSR2]
    assert aside.kill_tree() == []


def test_a_deadline_that_becomes_known_during_the_end_cuts_it_short() -> None:
    life, deadline = Life(), list[float]()
    aside = begun(life, deadline)
    ended = threading.Event()

    def end() -> None:
        assert aside.kill_tree() == []
        ended.set()

    threading.Thread(target=end, daemon=True).start()
    wait_until(lambda: life.dead, what="the kill")
    assert not ended.is_set()

    deadline.append(time.monotonic())

    assert ended.wait(60)
    assert not life.removed.is_set()
    life.answers.set()
    assert life.removed.wait(60), "it is removed all the same"


def test_without_a_deadline_the_engines_word_is_waited_for() -> None:
    life = Life()
    aside = begun(life, [])
    life.dead = True
    assert aside.poll() is None

    life.answers.set()

    wait_until(lambda: aside.poll() == 3, what="the exit code")
    assert aside.kill_tree() == []
    assert aside.poll() == 3


def test_with_a_deadline_it_is_not() -> None:
    life, deadline = Life(), [time.monotonic() + 30.0]
    aside = begun(life, deadline)
    life.dead = True

    wait_until(lambda: aside.poll() == UNKNOWN_EXIT, what="the end to be told")

    life.answers.set()
    assert life.removed.wait(0) is False
    assert aside.kill_tree() == []
    assert aside.poll() == UNKNOWN_EXIT, "what was told stays"


def test_an_end_that_is_disturbed_is_tried_again() -> None:
    life = Life(refuses=2)
    life.answers.set()
    aside = begun(life, [])

    assert aside.kill_tree() == []

    assert life.removed.is_set()
    assert (aside.poll(), aside.failure) == (3, None)


def test_a_start_that_fails_says_why_and_nothing_is_left() -> None:
    def begin(_: Order) -> Life:
        raise EngineError("start the container", "no")

    aside = Aside(begin, order([]), threading.Lock())  # type: ignore[arg-type]

    wait_until(lambda: aside.failure is not None, what="the failure")
    assert str(aside.failure) == "the container engine cannot start the container: no"
    assert aside.kill_tree() == []


def test_a_call_is_waited_for_until_a_deadline_becomes_known() -> None:
    answers, returned = threading.Event(), threading.Event()
    deadline = list[float]()

    def call() -> str:
        answers.wait()
        returned.set()
        return "late"

    threading.Timer(0.1, lambda: deadline.append(time.monotonic())).start()
    assert waited_for(call, lambda: deadline[0] if deadline else None) is None

    answers.set()
    assert returned.wait(60), "it goes on"
    assert waited_for(call, lambda: None) == "late"


def test_what_a_call_raises_comes_through() -> None:
    def call() -> str:
        raise EngineError("list containers", "no")

    with pytest.raises(EngineError, match="cannot list containers: no"):
        waited_for(call, lambda: None)


def test_what_nothing_depends_on_has_a_quarter_of_the_time_and_a_second() -> None:
    assert [seconds_for_tidying(left) for left in (40.0, 4.0, 1.0, -5.0)] == [10.0, 1.0, 1.0, 1.0]
