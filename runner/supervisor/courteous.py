"""A thread for work that may stand still, and by default gives way to the trainer."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")

_NICENESS = 10


class Courteous(Generic[T]):
    """Does one thing after another.

    Unlike an executor's threads, which the interpreter waits for when it ends, this one does not
    keep a process alive in which a call of a file system stands still.
    """

    def __init__(self, name: str, niceness: int = _NICENESS) -> None:
        self._niceness = niceness
        self._work: queue.SimpleQueue[tuple[Callable[[], T], Future[T]] | None]
        self._work = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """What comes of it, or what it raises, when its turn was."""
        future: Future[T] = Future()
        self._work.put((work, future))
        return future

    def finish(self) -> None:
        """Wait for all that was submitted, and end the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        # On Linux niceness is a thread's, and the threads that it starts inherit it. With
        # autogroups it counts within the session only, and a trainer has its own: then what saves
        # has half of the processor at most. More is not given away: see the bench's results.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        while (item := self._work.get()) is not None:
            work, future = item
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked
                future.set_exception(error)
            else:
                future.set_result(result)
