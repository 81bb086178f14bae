"""Processes that are forked off for a test, and gone after it."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable


class Children:
    """Processes that are forked off for a test, and gone after it."""

    def __init__(self) -> None:
        self._running: set[int] = set()

    def start(self, work: Callable[[], object]) -> int:
        """The id of a child that does `work` and exits with 0 if nothing was raised."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                os._exit(code)
        self._running.add(pid)
        return pid

    def exit_code(self, pid: int) -> int:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._running.discard(pid)
        return code

    def end(self) -> None:
        for pid in [*self._running]:
            os.kill(pid, signal.SIGKILL)
            self.exit_code(pid)
