"""The trainer's lifeline: whether its supervisor lives, and what is done once it does not.

The board says when the supervisor was last awake. If that is long ago, the lock of the spool says
whether it is dead: its process holds it to the end, also while it is frozen or starved, so neither
is taken for a death. Once it is dead there is nobody to save for the trainer, or to read what it
prints. It then takes a last snapshot at the next boundary and leaves; if no boundary comes within
`PATIENCE_SECONDS`, the newest slot has to do. The next supervisor on this node finds it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from runner.board import Board
from runner.exitcodes import PREEMPTED
from runner.spool import is_locked

PATIENCE_SECONDS = 10.0
_LOOK_SECONDS = 0.5
_AWAKE_SECONDS = 1.0  # a supervisor that wrote on the board since then is not asked about
_DRAIN_SECONDS = 0.02
_DRAIN_BYTES = 1 << 16


class Lifeline:
    """Watches the supervisor from a thread of its own. `leave` ends the process, with its code."""

    def __init__(
        self,
        spool: Path,
        board: Board,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._lock, self._board = spool / "lock", board
        self._patience_seconds, self._leave = patience_seconds, leave
        self._cut, self._closed = threading.Event(), threading.Event()
        self.saving = False
        """Set while a snapshot is being copied: that is waited for, within reason."""
        self._pipes = _pipes_to(board.supervisor_pid, spool)
        self._thread = threading.Thread(target=self._watch, name="runner-lifeline", daemon=True)
        self._thread.start()

    @property
    def is_cut(self) -> bool:
        """Whether the supervisor is dead."""
        return self._cut.is_set()

    @property
    def is_watching(self) -> bool:
        return self._thread.is_alive()

    def look(self) -> bool:
        """The same, by looking now instead of waiting for the next look."""
        if not self._supervisor_lives():
            self._cut.set()
        return self._cut.is_set()

    def close(self) -> None:
        """There is nothing to leave any more."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            if self.look():
                self._wait_for_the_end()
                break
        for reader in self._pipes.values():
            os.close(reader)

    def _supervisor_lives(self) -> bool:
        asleep = time.monotonic_ns() - self._board.supervisor_ns
        return asleep < _AWAKE_SECONDS * 1e9 or is_locked(self._lock)

    def _wait_for_the_end(self) -> None:
        _mute(self._pipes)
        deadline = time.monotonic() + self._patience_seconds
        latest = deadline + self._patience_seconds
        while (now := time.monotonic()) < deadline or (self.saving and now < latest):
            if self._closed.wait(_DRAIN_SECONDS):
                return
            _drain(self._pipes)
        self._leave(PREEMPTED)


def _pipes_to(supervisor: int, spool: Path) -> dict[int, int]:
    """Reading ends of those pipes of our output that this process reads, by our descriptor.

    In a container it cannot be seen what it reads: there they are those with a name in the spool.

    As long as we have them, what is printed after its death breaks no pipe: an exception from
    `print` would cost the last snapshot. Pipes to anybody else are left alone, since there a
    broken one means what it always does.
    """
    theirs = set()
    with contextlib.suppress(OSError):  # another namespace, or gone already
        for link in Path(f"/proc/{supervisor}/fd").iterdir():
            with contextlib.suppress(OSError):
                theirs.add(str(link.readlink()))
    readers = {}
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            path = Path(f"/proc/self/fd/{descriptor}")
            target = path.readlink()
            is_read = str(target) in theirs or target.parent == spool
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode) and is_read:
                readers[descriptor] = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return readers


def _mute(pipes: dict[int, int]) -> None:
    """Let what is printed from now on go nowhere."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        for descriptor in pipes:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _drain(pipes: dict[int, int]) -> None:
    """Free whoever is still waiting for room in a pipe that nobody reads."""
    for reader in pipes.values():
        with contextlib.suppress(OSError):
            while os.read(reader, _DRAIN_BYTES):
                pass
