"""A terminal for a program of a test: a real one for it, and what a person would see of it.

    with Terminal(["runner", "submit", job], columns=80, rows=24) as terminal:
        terminal.wait_for("step 5/24")
        assert terminal.lines()[-1] == "…"

The other end of a pseudo-terminal is read by a thread into an emulator (pyte), unless it is told to
stand still, as a terminal does after Ctrl-S.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pyte
from waiting import wait_until

_PATIENCE_SECONDS = 60.0
_HISTORY_LINES = 2000


class Terminal:
    """Runs a program as the leader of a session whose terminal this is."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        columns: int = 80,
        rows: int = 24,
    ) -> None:
        self._lock = threading.Lock()
        self._screen = pyte.HistoryScreen(columns, rows, history=_HISTORY_LINES)
        self._stream = pyte.ByteStream(self._screen)
        self.received = bytearray()
        self._reads = threading.Event()
        self._reads.set()
        self._ours, theirs = pty.openpty()
        self.resize(columns, rows)
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=dict(env), cwd=cwd,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self._over = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stand_still(False)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._over = True
        self._thread.join(_PATIENCE_SECONDS)
        os.close(self._ours)

    def lines(self) -> list[str]:
        """What is on the screen now, empty lines at its end left out."""
        with self._lock:
            shown = [line.rstrip() for line in self._screen.display]
        while shown and not shown[-1]:
            shown.pop()
        return shown

    def everything(self) -> list[str]:
        """The same, with what has gone out at the top."""
        with self._lock:
            above = [
                "".join(row[column].data for column in range(self._screen.columns)).rstrip()
                for row in self._screen.history.top
            ]
        return above + self.lines()

    def wait_for(self, text: str) -> list[str]:
        """Until a line of the screen has it; the screen."""

        def found() -> list[str]:
            lines = self.lines()
            return lines if any(text in line for line in lines) else []

        try:
            return wait_until(found, _PATIENCE_SECONDS, repr(text))
        except AssertionError as error:
            raise AssertionError(f"{error}:\n" + "\n".join(self.everything())) from None

    def wait(self) -> int:
        """Until the program has ended and all of it was read; its exit code."""
        code = self.process.wait(_PATIENCE_SECONDS)
        self._thread.join(_PATIENCE_SECONDS)
        return code

    def resize(self, columns: int, rows: int) -> None:
        """As if somebody pulled at the window."""
        with self._lock:
            self._screen.resize(rows, columns)
            size = struct.pack("HHHH", rows, columns, 0, 0)
            fcntl.ioctl(self._ours, termios.TIOCSWINSZ, size)

    def stand_still(self, still: bool) -> None:
        """Read nothing any more, or go on."""
        if still:
            self._reads.clear()
        else:
            self._reads.set()

    def _read(self) -> None:
        while not self._over:
            self._reads.wait(0.1)
            if not self._reads.is_set() or not select.select([self._ours], [], [], 0.05)[0]:
                continue
            try:
                data = os.read(self._ours, 1 << 16)
            except OSError:  # EIO: the program has ended
                return
            with self._lock:
                self.received += data
                self._stream.feed(data)
