"""How many requests go at once: as many as make it faster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from runner.errors import StoreError

Job = Callable[[], int]

FEWEST = 4
MOST = 16
_STEP = 2
_WORTH_IT = 1.1
_WORSE = 0.6
_SHORTEST_WINDOW_SECONDS = 0.5
_TELLING_BYTES = 1024 * 1024  # what is smaller says more of latency than of throughput


class Pace:
    """Decides on a number of lanes from what went through them, window by window.

    It begins with four and adds two while the throughput grows by a tenth; when it does not, it
    goes back to the best and stays there, until the throughput falls by much: then it looks again.
    """

    def __init__(self, fewest: int = FEWEST, most: int = MOST) -> None:
        self._fewest, self._most = fewest, most
        self.width = fewest
        self._best_width, self._best_rate = fewest, 0.0
        self._settled = False

    def window(self, bytes_per_second: float) -> None:
        """Take note of one window of `width` lanes in full use."""
        if self._settled:
            if bytes_per_second < _WORSE * self._best_rate:
                self._settled = False
                self._best_width, self._best_rate = self.width, bytes_per_second
                self._widen()
            return
        if bytes_per_second > _WORTH_IT * self._best_rate:
            self._best_width, self._best_rate = self.width, bytes_per_second
            self._widen()
        else:
            self.width = self._best_width
            self._settled = True

    def _widen(self) -> None:
        self.width = min(self._most, self.width + _STEP)
        self._settled = self.width == self._best_width


class Lanes:
    """Runs jobs side by side, taking each from an iterator when a lane is free for it."""

    def __init__(self, pace: Pace | None = None) -> None:
        self._pace = pace or Pace()
        self._measuring = threading.Lock()

    @property
    def width(self) -> int:
        return self._pace.width

    def run(self, jobs: Iterator[Job], call_off: Callable[[], None]) -> None:
        """Run all jobs; each says how many bytes it has moved.

        If one fails, or the iterator does, no more are begun, `call_off` is called to end those
        under way, and the first error is raised when all have ended. `jobs` is advanced by one
        thread at a time, and never further than there are free lanes.
        """
        _Run(self._pace, self._measuring, jobs, call_off).drive()


class _Run:
    def __init__(
        self,
        pace: Pace,
        measuring: threading.Lock,
        jobs: Iterator[Job],
        call_off: Callable[[], None],
    ) -> None:
        self._pace, self._measuring = pace, measuring
        self._jobs, self._call_off = jobs, call_off
        self._taking = threading.Lock()
        self._changed = threading.Condition()
        self._lanes = 0
        self._exhausted = False
        self._error: BaseException | None = None
        self._window_begun = time.monotonic()
        self._window_jobs = self._window_bytes = 0

    def drive(self) -> None:
        with self._changed:
            self._open_lane()
            while self._lanes:
                self._changed.wait()
        if self._error is not None:
            raise self._error
        if not self._exhausted:
            raise StoreError("not all that was to be stored was taken in hand")

    def _open_lane(self) -> None:
        self._lanes += 1
        try:
            threading.Thread(target=self._lane, name="lane", daemon=True).start()
        except RuntimeError:  # the interpreter is shutting down and starts no more threads
            self._lane()

    def _lane(self) -> None:
        has_left = False
        try:
            while not (has_left := self._leaves()) and (job := self._next()) is not None:
                nbytes = job()
                del job  # and with it the part, which may have memory of its own
                self._note(nbytes)
        except BaseException as error:  # noqa: BLE001 - raised where the end of all is awaited
            with self._changed:
                first = self._error is None
                self._error = self._error or error
            if first:
                self._call_off()
        finally:
            if not has_left:
                with self._changed:
                    self._lanes -= 1
                    self._changed.notify_all()

    def _leaves(self) -> bool:
        """Whether this lane is one too many. It is counted out at once, so that others stay."""
        with self._changed:
            if self._lanes <= self._pace.width:
                return False
            self._lanes -= 1
            return True

    def _next(self) -> Job | None:
        """The next job, if there is any; another lane is opened while there is work for it."""
        with self._taking:
            if self._exhausted or self._error is not None:
                return None
            job = next(self._jobs, None)
            if job is None:
                self._exhausted = True
                return None
        with self._changed:
            if self._lanes < self._pace.width and self._error is None:
                self._open_lane()
        return job

    def _note(self, nbytes: int) -> None:
        if nbytes < _TELLING_BYTES:
            return
        with self._measuring:
            self._window_jobs += 1
            self._window_bytes += nbytes
            seconds = time.monotonic() - self._window_begun
            enough = self._window_jobs >= 2 * self._pace.width
            if enough and seconds >= _SHORTEST_WINDOW_SECONDS and not self._exhausted:
                self._pace.window(self._window_bytes / seconds)
                self._window_begun = time.monotonic()
                self._window_jobs = self._window_bytes = 0
