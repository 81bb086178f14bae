"""Loader workers and SIGTERM: they die when the trainer ends them, and not before.

A cluster that ends a job may send SIGTERM to each of its processes. torch gives its workers a
handler that obeys this signal whoever sent it, so the workers die first, the trainer raises because
of it, and the last save is lost. Here a worker obeys only when the trainer is leaving.

The two share a page of memory, which workers inherit by fork. Workers that are spawned do not have
it, and are as torch makes them.
"""

from __future__ import annotations

import atexit
import mmap
import multiprocessing
import os
import signal
import threading
import time
from types import FrameType

_PATIENCE_SECONDS = 2.0

_page: memoryview | None = None
"""Words of 8 bytes: the first is 1 when the trainer is leaving, the others are workers' numbers."""
_guarded: int | None = None
"""The worker whose handler this is: one that it has forked makes its own."""


def share_the_end() -> None:
    """In the trainer, before it starts workers: let them know when it is leaving."""
    global _page
    if _page is None:
        _page = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        # Handlers run last in, first out: this one before those of multiprocessing and torch, which
        # end workers by SIGTERM and have been registered when they were imported.
        atexit.register(_leave, _page, os.getpid())


def outlive_the_save() -> None:
    """In a worker, as soon as code of ours runs there: replace the handler that torch has set."""
    global _guarded
    pid = os.getpid()
    if _guarded == pid or _page is None:
        return
    if threading.current_thread() is threading.main_thread():
        _guarded = pid
        _page[_place_of(pid)] = pid
        signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    if _page is None or _page[0]:
        os._exit(0)


def _leave(page: memoryview, owner: int) -> None:
    """The trainer's interpreter ends, and multiprocessing would wait for its workers without end.

    Unlike torch's, a handler in Python is not run by a worker that is stuck in foreign code.
    """
    if os.getpid() != owner:
        return
    page[0] = 1
    workers = [
        child
        for child in multiprocessing.active_children()
        if child.pid is not None and page[_place_of(child.pid)] == child.pid
    ]
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()


def _place_of(pid: int) -> int:
    """Two may share a place: then the earlier one is ended as torch does it."""
    return 1 + pid % (mmap.PAGESIZE // 8 - 1)
