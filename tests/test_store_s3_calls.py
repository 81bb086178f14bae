"""Asking again: with patience, in haste, side by side. No server is needed for that."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable

import pytest
from waiting import wait_until

from runner.errors import NotFound, StoreError, StoreUnfit
from runner.store import s3_calls
from runner.store.s3_calls import Calls, Errand, Try
from runner.store.s3_errors import Again, Call, Verdict

CALL = Call("PutObject", "bucket", "key")


class Trouble(Exception):
    """A failure that brings its own verdict."""

    def __init__(self, again: Again, error: StoreError, expired: bool = False) -> None:
        self.verdict = Verdict(again, error, expired)
        super().__init__(str(error))


LATER = Trouble(Again.LATER, StoreError("busy"))
SHORTLY = Trouble(Again.SHORTLY, StoreError("full"))
NEVER = Trouble(Again.NEVER, NotFound("key"))


def judge(error: BaseException, call: Call) -> Verdict:
    assert isinstance(error, Trouble), error
    return error.verdict


def calls_with(patience_seconds: float = 30.0) -> Calls:
    return Calls(judge, lambda: None, patience_seconds)


def failing(*failures: Exception | None) -> tuple[Callable[[Try], str], list[Try]]:
    """Something to send that fails so often, then succeeds; and the tries that were made."""
    tries: list[Try] = []
    coming = iter(failures)

    def send(one: Try) -> str:
        tries.append(one)
        failure = next(coming, None)
        if failure is not None:
            raise failure
        return f"result {len(tries)}"

    return send, tries


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The longest that each pause might have been; none of them is waited for."""
    longest: list[float] = []

    def uniform(least: float, most: float) -> float:
        assert least == 0
        longest.append(most)
        return 0.0

    monkeypatch.setattr(s3_calls.random, "uniform", uniform)
    return longest


def test_what_fails_in_passing_is_asked_again(pauses: list[float]) -> None:
    send, tries = failing(LATER, LATER, LATER)

    assert calls_with().ask(CALL, send) == "result 4"
    assert len(tries) == 4


def test_pauses_grow_exponentially_up_to_a_limit(pauses: list[float]) -> None:
    send, _ = failing(*[LATER] * 12)

    calls_with().ask(CALL, send)

    assert pauses[:4] == [0.2, 0.4, 0.8, 1.6]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 15.0


def test_pauses_are_short_in_haste(pauses: list[float]) -> None:
    send, _ = failing(*[LATER] * 12)
    calls = calls_with()
    calls.hurry(time.monotonic() + 30)

    calls.ask(CALL, send)

    assert max(pauses) == 0.5


def test_what_cannot_succeed_is_not_asked_again() -> None:
    send, tries = failing(NEVER)

    with pytest.raises(NotFound):
        calls_with().ask(CALL, send)
    assert len(tries) == 1


@pytest.mark.parametrize(("trouble", "patience"), [(LATER, 0.3), (SHORTLY, 0.3)])
def test_patience_ends(trouble: Trouble, patience: float) -> None:
    begun = time.monotonic()

    with pytest.raises(StoreError) as caught:
        calls_with(patience).ask(CALL, failing(*[trouble] * 1000)[0])

    assert caught.value is trouble.verdict.error
    assert time.monotonic() - begun < patience + 1


def test_a_call_may_have_less_patience_than_others() -> None:
    begun = time.monotonic()

    with pytest.raises(StoreError, match="busy"):
        calls_with(60).ask(CALL, failing(*[LATER] * 1000)[0], patience_seconds=0.2)
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("haste_seconds", [None, 60])
@pytest.mark.parametrize("stalls", [False, True])
def test_a_patience_that_is_given_is_all_there_is(
    haste_seconds: float | None, stalls: bool
) -> None:
    calls, stalling = calls_with(60), Stalling(stalls=100)
    begun = time.monotonic()
    if haste_seconds is not None:
        calls.hurry(begun + haste_seconds)
    send = stalling if stalls else failing(*[LATER] * 1000)[0]

    with pytest.raises(StoreError):
        calls.ask(CALL, send, patience_seconds=0.3)

    assert time.monotonic() - begun < 15  # the other patience, and the deadline, are a minute
    stalling.let_go.set()


def test_new_credentials_are_looked_for_once(pauses: list[float]) -> None:
    renewals: list[int] = []
    expired = Trouble(Again.SHORTLY, StoreUnfit("s3://b", "expired", "renew"), expired=True)
    calls = Calls(judge, lambda: renewals.append(1), 0.2)
    send, tries = failing(*itertools.repeat(expired, 5))

    assert calls.ask(CALL, send) == "result 6"
    assert renewals == [1]
    assert len(tries) == 6


# ---------------------------------------------------------------- haste


class Stalling:
    """Stalls in its first tries, until it is let go or given up."""

    def __init__(self, stalls: int = 1) -> None:
        self.stalls, self.tries = stalls, 0
        self.let_go = threading.Event()
        self.given_up: list[int] = []
        self.niceness: list[int] = []

    def __call__(self, one: Try) -> int:
        self.tries += 1
        number = self.tries
        self.niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        if number <= self.stalls:
            one.when_unwanted(lambda: self.given_up.append(number))
            assert self.let_go.wait(20)
        return number


def measured(calls: Calls, seconds: float = 0.02) -> None:
    """Let the calls know how long a request takes."""
    for _ in range(3):
        calls.ask(CALL, lambda one: threading.Event().wait(seconds))


def test_without_haste_a_stalled_try_is_waited_for() -> None:
    calls, send = calls_with(), Stalling()
    measured(calls)
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(calls.ask(CALL, send)))
    thread.start()

    thread.join(0.5)
    assert (send.tries, thread.is_alive()) == (1, True)
    send.let_go.set()
    thread.join(5)
    assert results == [1]


def test_in_haste_a_stalled_try_is_overtaken_after_three_times_the_median() -> None:
    calls, send = calls_with(), Stalling()
    measured(calls, 0.1)
    begun = time.monotonic()
    calls.hurry(begun + 10)

    assert calls.ask(CALL, send) == 2
    assert 0.25 < time.monotonic() - begun < 2
    assert send.given_up == [1]
    send.let_go.set()


def test_haste_overtakes_what_was_begun_before_it() -> None:
    calls, send = calls_with(), Stalling()
    measured(calls)
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(calls.ask(CALL, send)))
    thread.start()
    wait_until(lambda: send.tries, what="the first try")

    calls.hurry(time.monotonic() + 10)
    thread.join(5)

    assert results == [2]
    send.let_go.set()


def test_at_most_three_tries_go_at_once_and_the_deadline_ends_them() -> None:
    calls, send = calls_with(), Stalling(stalls=100)
    measured(calls)
    begun = time.monotonic()
    calls.hurry(begun + 1.0)

    with pytest.raises(StoreError, match="has not ended by its deadline"):
        calls.ask(CALL, send)

    assert 0.9 < time.monotonic() - begun < 2
    assert send.tries == 3
    assert sorted(send.given_up) == [1, 2, 3]
    send.let_go.set()


def test_the_one_that_fails_does_not_end_the_one_that_goes_on() -> None:
    calls, send = calls_with(), Stalling()
    measured(calls)
    calls.hurry(time.monotonic() + 10)

    def second_fails(one: Try) -> int:
        number = send(one)
        if number == 2:
            send.let_go.set()
            raise LATER
        return number

    assert calls.ask(CALL, second_fails) == 1


def test_a_pause_ends_when_haste_begins() -> None:
    calls = calls_with(600)
    send, tries = failing(*[LATER] * 6)
    s3_calls.random.seed(1)
    thread = threading.Thread(target=lambda: calls.ask(CALL, send), daemon=True)
    thread.start()
    wait_until(lambda: len(tries) >= 4, what="pauses that are long")

    calls.hurry(time.monotonic() + 20)

    thread.join(10)
    assert not thread.is_alive()
    assert len(tries) == 7


def test_an_errand_that_is_cancelled_ends_its_requests() -> None:
    calls, send, errand = calls_with(), Stalling(), Errand()
    raised: list[StoreError] = []

    def run() -> None:
        try:
            calls.ask(CALL, send, errand=errand)
        except StoreError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: send.tries, what="the first try")
    calls.cancel(errand)
    thread.join(5)

    assert "called off" in str(raised[0])
    assert send.given_up == [1]
    send.let_go.set()


def test_an_errand_that_was_cancelled_sends_nothing_more() -> None:
    calls, whole = calls_with(), Errand()
    part, other = Errand(whole), Errand(whole)
    send, tries = failing()

    calls.cancel(part)
    with pytest.raises(StoreError, match="called off"):
        calls.ask(CALL, send, errand=part)
    assert calls.ask(CALL, send, errand=other) == "result 1"
    calls.cancel(whole)
    with pytest.raises(StoreError, match="called off"):
        calls.ask(CALL, send, errand=other)

    assert len(tries) == 1


def test_a_try_is_as_courteous_as_the_thread_that_asks() -> None:
    send = Stalling(stalls=0)
    calls = calls_with()

    def courteous() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 7)
        calls.ask(CALL, send)

    thread = threading.Thread(target=courteous)
    thread.start()
    thread.join(5)
    calls.ask(CALL, send)

    assert send.niceness == [7, os.getpriority(os.PRIO_PROCESS, threading.get_native_id())]


def test_an_error_of_the_program_itself_comes_through() -> None:
    def send(one: Try) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calls_with().ask(CALL, send)
