"""Requests that are asked again until they succeed, and that can be hurried while they run.

Each try runs on a thread of its own, and the caller waits for the first that succeeds. So a caller
never hangs longer than it may, whatever a socket or a name server does, and a try that stalls can
be overtaken by another on a second connection. A thread inherits the niceness of the one that
starts it: a save in the background stays courteous, an emergency is not.

botocore's own retries are off (`s3_client`): two loops would multiply. What one try says of another
does no harm, because all of them carry the same bytes.
"""

from __future__ import annotations

import logging
import random
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from runner.errors import StoreError
from runner.store.s3_errors import Again, Call, Verdict, code_of

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_SECONDS = 120.0
SHORT_PATIENCE_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 15.0
_LONGEST_PAUSE_IN_HASTE_SECONDS = 0.5
_OVERDUE = 3  # times the median
_SHORTEST_WAIT_SECONDS = 0.1
_MOST_TRIES_AT_ONCE = 3
_SAMPLES = 64


class Try:
    """One try of a request. What it holds open is closed when it is no longer wanted."""

    def __init__(self) -> None:
        self.unwanted = False
        self._closers: list[Callable[[], None]] = []

    def when_unwanted(self, close: Callable[[], None]) -> None:
        """Call this if the try is given up. It must be quick, and may be called in any thread."""
        self._closers.append(close)
        if self.unwanted:
            close()

    def give_up(self) -> None:
        self.unwanted = True
        for close in list(self._closers):
            close()


class Errand:
    """Several requests that stand or fall together: cancelling it ends them all at once.

    One that is a part of another ends with that, but not the other way round.
    """

    def __init__(self, whole: Errand | None = None) -> None:
        self._whole, self._cancelled = whole, False

    @property
    def cancelled(self) -> bool:
        return self._cancelled or (self._whole is not None and self._whole.cancelled)

    def cancel(self) -> None:
        self._cancelled = True


@dataclass
class _Race(Generic[T]):
    """The tries of one request that are under way, and what has come of them."""

    tries: list[Try] = field(default_factory=list)
    running: int = 0
    results: list[T] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)
    begun: float = 0.0


class Calls:
    """Sends requests of one store. Its methods may be called from any thread."""

    def __init__(
        self,
        judge: Callable[[BaseException, Call], Verdict],
        renew_credentials: Callable[[], None],
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._judge, self._renew, self._patience = judge, renew_credentials, patience_seconds
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._haste = 0
        self._seconds: dict[tuple[str, int], deque[float]] = defaultdict(
            lambda: deque(maxlen=_SAMPLES)
        )

    def hurry(self, deadline: float | None) -> None:
        """No call lasts beyond this moment (`CLOCK_MONOTONIC` seconds), nor do those under way."""
        with self._changed:
            self._deadline = deadline
            self._haste += 1
            self._changed.notify_all()

    @property
    def in_haste(self) -> bool:
        """Whether there is a deadline."""
        return self._deadline is not None

    def cancel(self, errand: Errand) -> None:
        """End the requests of an errand, with StoreError where one is being waited for."""
        with self._changed:
            errand.cancel()
            self._changed.notify_all()

    def ask(
        self,
        call: Call,
        send: Callable[[Try], T],
        *,
        nbytes: int = 0,
        errand: Errand | None = None,
        patience_seconds: float | None = None,
    ) -> T:
        """What `send` returns, asked again while that may help.

        `send` may run on several threads at once. Raises what the last failure was judged to be:
        within the patience, or by the deadline if there is one. It never lasts longer than a
        patience that is given here, whatever is under way then.
        """
        patience = self._patience if patience_seconds is None else patience_seconds
        begun, failures, renewed = time.monotonic(), 0, False
        latest = None if patience_seconds is None else begun + patience_seconds
        verdict: Verdict | None = None
        while True:
            try:
                return self._race(call, send, nbytes, errand, latest)
            except _TooLate as late:
                # What went wrong before says more than that the time is over.
                raise (late if verdict is None else verdict.error) from None
            except _Failed as failed:
                verdict = failed.verdict
            failures += 1
            limit = self._limit(begun, patience, verdict, latest)
            if verdict.expired and not renewed:
                renewed = True
                self._renew()
                continue
            if limit is None or not self._pause(failures, limit, errand):
                raise verdict.error
            log.debug("%s: %s once more: %s", call.where, call.operation, verdict.error)

    def _limit(
        self, begun: float, patience: float, verdict: Verdict, latest: float | None
    ) -> float | None:
        """Until when a failed request may be asked again; None if that is of no use."""
        if verdict.again is Again.NEVER:
            return None
        shortly = verdict.again is Again.SHORTLY
        limit = begun + (min(patience, SHORT_PATIENCE_SECONDS) if shortly else patience)
        deadline = self._deadline
        if deadline is None:
            return limit
        return min(limit, deadline) if shortly or latest is not None else deadline

    def _end(self, latest: float | None) -> float | None:
        """When a call ends that may last until `latest`, as far as that is settled."""
        deadline = self._deadline
        if deadline is None or latest is None:
            return latest if deadline is None else deadline
        return min(deadline, latest)

    def _pause(self, failures: int, limit: float, errand: Errand | None) -> bool:
        """Wait before the next try: exponentially longer, with full jitter. False: no time left."""
        with self._changed:
            in_haste = self._deadline is not None
            longest = _LONGEST_PAUSE_IN_HASTE_SECONDS if in_haste else _LONGEST_PAUSE_SECONDS
            most = min(longest, _FIRST_PAUSE_SECONDS * 2 ** min(failures, 16))
            until = time.monotonic() + random.uniform(0, most)
            if until >= limit:
                return False
            haste = self._haste
            self._changed.wait_for(
                lambda: self._haste != haste or (errand is not None and errand.cancelled),
                until - time.monotonic(),
            )
        return True

    # ------------------------------------------------------------------ tries side by side

    def _race(
        self,
        call: Call,
        send: Callable[[Try], T],
        nbytes: int,
        errand: Errand | None,
        latest: float | None,
    ) -> T:
        """The first result of one try, or of several if it is overdue and time is short."""
        race: _Race[T] = _Race()
        kind = (call.operation, (nbytes >> 20).bit_length())
        end = self._end(latest)
        if end is not None and time.monotonic() >= end:
            raise _TooLate(f"{call.where}: there is no time left for {call.operation}")
        if errand is not None and errand.cancelled:
            raise _called_off(call)
        self._start(race, call, send, kind)
        verdict: Verdict | None = None
        with self._changed:
            try:
                while not race.results:
                    while race.failures and not _is_final(verdict):
                        verdict = self._judged(race.failures.pop(), call)
                    if _is_final(verdict) or not race.running:
                        break
                    if errand is not None and errand.cancelled:
                        raise _called_off(call)
                    wait = self._wait_seconds(race, call, kind, latest)
                    if wait is not None and wait <= 0:
                        self._start(race, call, send, kind)
                        continue
                    self._changed.wait(wait)
            finally:
                for one in race.tries:
                    one.give_up()
        if race.results:
            return race.results[0]
        if verdict is None:
            raise AssertionError("a try ended without a result or an error")
        raise _Failed(verdict)

    def _judged(self, failure: BaseException, call: Call) -> Verdict:
        if not isinstance(failure, Exception):
            raise failure
        log.debug("%s: %s failed: %s", call.where, call.operation, code_of(failure))
        return self._judge(failure, call)

    def _wait_seconds(
        self, race: _Race[T], call: Call, kind: tuple[str, int], latest: float | None
    ) -> float | None:
        """How long to wait for the tries under way before another; None: as long as they take."""
        end = self._end(latest)
        if end is None:
            return None
        now = time.monotonic()
        if now >= end:
            raise _TooLate(f"{call.where}: {call.operation} has not ended by its deadline")
        left = end - now
        if not self.in_haste or len(race.tries) >= _MOST_TRIES_AT_ONCE:
            return left
        return min(left, race.begun + self._overdue_seconds(kind) - now)

    def _overdue_seconds(self, kind: tuple[str, int]) -> float:
        known = self._seconds.get(kind)
        # Nothing measured yet: half a second, and what 16 MiB/s take.
        usual = statistics.median(known) if known else 0.5 + (1 << kind[1]) / 16
        return max(_SHORTEST_WAIT_SECONDS, _OVERDUE * usual)

    def _start(
        self, race: _Race[T], call: Call, send: Callable[[Try], T], kind: tuple[str, int]
    ) -> None:
        one = Try()
        race.tries.append(one)
        race.running += 1
        race.begun = time.monotonic()
        arguments = (race, one, send, call, kind)
        try:
            threading.Thread(target=self._run, args=arguments, name="s3", daemon=True).start()
        except RuntimeError:  # the interpreter is shutting down and starts no more threads
            self._run(*arguments)

    def _run(
        self,
        race: _Race[T],
        one: Try,
        send: Callable[[Try], T],
        call: Call,
        kind: tuple[str, int],
    ) -> None:
        begun = time.monotonic()
        try:
            result = send(one)
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
            with self._changed:
                race.running -= 1
                race.failures.append(error)
                self._changed.notify_all()
        else:
            with self._changed:
                race.running -= 1
                race.results.append(result)
                self._seconds[kind].append(time.monotonic() - begun)
                self._changed.notify_all()


def _is_final(verdict: Verdict | None) -> bool:
    return verdict is not None and verdict.again is Again.NEVER


def _called_off(call: Call) -> StoreError:
    return StoreError(f"{call.where}: {call.operation} was called off")


class _TooLate(StoreError):
    """The deadline has come."""


class _Failed(Exception):
    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        super().__init__(verdict.error)
