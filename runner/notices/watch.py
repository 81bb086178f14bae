"""The threads that listen: one for each cloud, so that none waits for another.

They only tell what they hear. Errors are none of the run's business: one line in the log, and the
next question a little later, up to a minute; a service that has been there is asked more often,
because a notice may be half a minute long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from itertools import count
from typing import Protocol

from runner.errors import MetadataError
from runner.notices.aws import Aws
from runner.notices.azure import Azure
from runner.notices.gcp import Gcp
from runner.notices.metadata import MetadataServer
from runner.notices.news import Advice, Found, Memory, News, Preemption, Source

log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_LONGEST_PAUSE_WHERE_SEEN_SECONDS = 5.0
_MOST_DOUBLINGS = 10
_END_SECONDS = 0.5  # one that is connecting just now ends a little later


class _NewSource(Protocol):
    def __call__(self, server: MetadataServer) -> Source: ...


SOURCES: dict[str, _NewSource] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


class Watch:
    """Listens to the clouds that a job names; `tell` is called from other threads.

    `grace_seconds` is the time until the deadline where a cloud names none.
    """

    def __init__(
        self,
        clouds: Iterable[str],
        grace_seconds: float,
        tell: Callable[[News], None],
        server: MetadataServer | None = None,
    ) -> None:
        self._server = server or MetadataServer()
        self._watchers = [
            Watcher(SOURCES[cloud](self._server), self._server.place, grace_seconds, tell)
            for cloud in clouds
        ]

    def start(self) -> None:
        for watcher in self._watchers:
            watcher.start()

    def acknowledge(self) -> None:
        """The state is durable: the clouds that want to know need not wait any longer.

        To be called before `stop`. Takes seconds at most, whatever they answer.
        """
        for watcher in self._watchers:
            watcher.acknowledge()

    def stop(self) -> None:
        """End the threads, also those that wait for an answer."""
        for watcher in self._watchers:
            watcher.over.set()
        self._server.close()
        until = time.monotonic() + _END_SECONDS
        for watcher in self._watchers:
            if watcher.is_alive():
                watcher.join(max(0.0, until - time.monotonic()))


class Watcher(threading.Thread):
    """Asks one source for as long as the run lasts, whatever comes of it."""

    def __init__(
        self, source: Source, place: str, grace_seconds: float, tell: Callable[[News], None]
    ) -> None:
        super().__init__(name=f"notices-{source.name}", daemon=True)
        self.over = threading.Event()
        self._source, self._place, self._tell = source, place, tell
        self._grace_seconds = grace_seconds
        self._memory = Memory()
        self._was_there = self._is_missed = self._is_quiet = False

    def run(self) -> None:
        pause_seconds, failures = 0.0, count(1)
        while not self.over.wait(pause_seconds):
            try:
                for found in self._source.look():
                    self._report(found)
            except MetadataError as error:
                pause_seconds = self.pause_after(next(failures))
                self._complain(str(error))
            except Exception:  # a thread that ended here would never warn of anything again
                pause_seconds = self.pause_after(next(failures))
                log.debug("looking for notices of %s", self._source.name, exc_info=True)
                self._complain("its answer was not understood")
            else:
                pause_seconds, failures = self._source.pause_seconds, count(1)
                self._was_there = True
                self._rejoice()

    def acknowledge(self) -> None:
        try:
            self._source.acknowledge()
        except MetadataError as error:
            log.warning("%s was not told that all is saved: %s", self._source.name, error)

    def pause_after(self, failures: int) -> float:
        """Seconds to the next question after so many failures in a row."""
        longest = _LONGEST_PAUSE_WHERE_SEEN_SECONDS if self._was_there else _LONGEST_PAUSE_SECONDS
        doublings = min(failures - 1, _MOST_DOUBLINGS)
        return min(longest, _FIRST_PAUSE_SECONDS * 2.0**doublings)

    def _report(self, found: Found) -> None:
        if not self._memory.is_new(found):
            return
        name = self._source.name
        if found.is_advice:
            self._tell(Advice(name, found.at))
            return
        deadline = found.deadline
        if deadline is None:
            deadline = found.at + self._grace_seconds
        self._tell(Preemption(name, found.at, deadline))

    def _complain(self, problem: str) -> None:
        """Once: what is absent stays absent, and nobody wants to read of it every minute."""
        if self._is_missed or self._is_quiet or self.over.is_set():
            return
        self._is_missed = True
        log.warning(
            "no notices from %s at present: the metadata service at %s: %s. It is asked again from "
            "time to time; until then SIGTERM is the only notice",
            *(self._source.name, self._place, problem),
        )

    def _rejoice(self) -> None:
        if self._is_missed:
            log.info("the metadata service of %s answers now", self._source.name)
            self._is_missed, self._is_quiet = False, True


def problem_of(cloud: str, server: MetadataServer | None = None) -> str | None:
    """Ask a cloud once, and say what keeps its notices from being heard; None if nothing does."""
    server = server or MetadataServer()
    source: Source = Azure(server, 0.0) if cloud == "azure" else SOURCES[cloud](server)
    try:
        list(source.look())
    except MetadataError as error:
        return f"the metadata service at {server.place}: {error}"
    return None
