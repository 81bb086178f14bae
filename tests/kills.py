"""Kills at the n-th call: of a process that changes a disk, and of one that asks an S3 server.

for at in kill_everywhere(work, prepare):    # a child for each call, killed in the middle of it
    ...                                      # what is left on the disk

with killed_at(3, after=True):               # in this process: the answer reaches nobody
    ...                                      # raises Killed, and nothing more is sent
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

FAILED = 99


def fork(work: Callable[[], int]) -> int:
    """Run `work` in a child; its result is the exit code, FAILED for an exception."""
    pid = os.fork()
    if pid == 0:
        code = FAILED
        try:
            code = work()
        finally:
            if code == FAILED:
                traceback.print_exc()
            os._exit(code)
    return pid


def wait_for(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def opening_with(new_file: Callable[[Path], io.FileIO]) -> Callable[..., Any]:
    """A `Path.open` that opens new files otherwise."""
    usual = Path.open

    def open_(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return new_file(path) if "x" in mode else usual(path, mode, *arguments, **options)

    return open_


KILLED = 137


class Killer:
    """Ends this process in the middle of its n-th call that changes the disk."""

    def __init__(self, at: int) -> None:
        self._left = at
        for name in ("rename", "replace", "link", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._strike_before(getattr(os, name)))
        os.fsync = self._strike_before(lambda descriptor: None)  # a kill, not a power cut
        Path.open = opening_with(self._new_file)  # type: ignore[method-assign]

    def _dies(self) -> bool:
        self._left -= 1
        return self._left == 0

    def _strike_before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*arguments: Any, **options: Any) -> Any:
            if self._dies():
                os._exit(KILLED)
            return call(*arguments, **options)

        return struck

    def _new_file(self, path: Path) -> io.FileIO:
        killer = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                if killer._dies():
                    super().write(data[: len(data) // 2])
                    os._exit(KILLED)
                return super().write(data)

        if self._dies():
            os._exit(KILLED)
        return File(str(path), "x")


def kill_everywhere(work: Callable[[], object], prepare: Callable[[], None]) -> Iterator[int]:
    """Run `work` in a child that is killed at its first, second, … call; yields after each."""

    def killed(at: int) -> int:
        Killer(at)
        work()
        return 0

    for at in itertools.count(1):
        prepare()
        code = wait_for(fork(partial(killed, at)))
        assert code in (0, KILLED)
        yield at
        if code == 0:
            return


class Killed(BaseException):
    """The supervisor is gone: no request of it is sent any more."""


@contextlib.contextmanager
def killed_at(request: int, *, after: bool, changes_only: bool = False) -> Iterator[list[int]]:
    """Dies at that request: before it is sent, or after it was done and nobody hears of it.

    With `changes_only`, those that only look are not counted: where requests come one by one, the
    server cannot tell a kill before or after them from one at the change before.
    """
    from botocore.httpsession import URLLib3Session

    count, is_dead, send, lock = [0], [False], URLLib3Session.send, threading.Lock()

    def mortal(session: Any, prepared: Any) -> Any:
        with lock:
            is_counted = not changes_only or prepared.method not in ("GET", "HEAD")
            if is_dead[0]:
                raise Killed
            count[0] += is_counted
            is_last = is_counted and count[0] == request
            is_dead[0] = is_last
        if is_last and not after:
            raise Killed
        answer = send(session, prepared)
        if is_last:
            raise Killed
        return answer

    URLLib3Session.send = mortal
    try:
        yield count
    finally:
        URLLib3Session.send = send
