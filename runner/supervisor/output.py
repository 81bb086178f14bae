"""What the trainer prints: taken from its two pipes, passed through as it is, and kept as records.

One thread reads both pipes, so that the order of what comes is that of the file. It hands on to
buffers with a limit (`runner.logs.sink`): the trainer waits neither for a terminal that stands
still nor for a disk that does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from runner.logs import lines
from runner.logs.sink import Patience, Sink

_PIPE_BYTES = 1 << 20  # what a pipe may hold on Linux without a privilege
_CHUNK_BYTES = 1 << 16
_SMALL_BYTES = 1 << 12
_LINGER_SECONDS = 0.002  # so that a thousand short lines are not a thousand rounds
_LOOK_SECONDS = 0.5  # at lines that are held back
_BUFFER_BYTES = 4 << 20
_PATIENCE = Patience(seconds=2.0, share=0.1)
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET)

STDOUT, STDERR = 1, 2
_VIEW, _LEAVE = -1, -2  # beside them: what is shown below all else, and that it is over
_VIEW_SECONDS = 5.0  # after which a view that was to be drawn counts as dropped


class Screen(Protocol):
    """What a terminal shows where a view stands below all that is printed: bytes in, bytes out."""

    def printed(self, source: int, data: bytes) -> bytes:
        """What to send to the terminal when this was printed."""

    def shown(self, view: Sequence[str]) -> bytes:
        """What to send when the view has changed."""

    def left(self) -> bytes:
        """What to send in the end."""


class PassThrough:
    """The supervisor's own stdout and stderr. `write` takes bytes for one of the two descriptors.

    Where both are the same file, one buffer serves both, so that their order is kept. With a
    `screen`, stderr is a terminal, and what goes there goes through it: in the buffer's thread, so
    that a terminal that stands still holds up nobody.
    """

    def __init__(self, screen: Screen | None = None) -> None:
        self._screen = screen
        self._view_waits_until = 0.0
        self._closed: set[int] = set()
        self._sinks: dict[int, Sink] = {}
        same: dict[tuple[int, int], Sink] = {}
        # One that was closed when this process began may be any other file by now.
        for target, stream in ((STDOUT, sys.__stdout__), (STDERR, sys.__stderr__)):
            with contextlib.suppress(OSError):
                place = os.fstat(target)
                if stream is not None:
                    key = place.st_dev, place.st_ino
                    same[key] = self._sinks[target] = same.get(key) or self._sink(target)

        if self._screen is not None and STDERR in self._sinks:
            self._sinks |= dict.fromkeys((_VIEW, _LEAVE), self._sinks[STDERR])

    def write(self, target: int, data: bytes, *, urgent: bool = False) -> None:
        if target in self._sinks:
            self._sinks[target].offer(target, data, urgent=urgent)

    def show(self, view: Sequence[str]) -> None:
        """Let the lines of a view stand below all else. One that nobody has drawn yet is enough."""
        now = time.monotonic()
        if self._screen is not None and now >= self._view_waits_until:
            self._view_waits_until = now + _VIEW_SECONDS
            self.write(_VIEW, "\n".join(view).encode(), urgent=True)

    def leave(self) -> None:
        """The view stays as it is from now on."""
        if self._screen is not None:
            self.write(_LEAVE, b"\n", urgent=True)

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until all of it is written; whether that is so."""
        deadline = time.monotonic() + timeout_seconds
        flushed = True
        for sink in self._sinks.values():
            flushed = sink.flush(max(0.0, deadline - time.monotonic())) and flushed
        return flushed

    def close(self) -> None:
        """End where nothing is left to be written; what hangs there is left behind."""
        for sink in self._sinks.values():
            sink.close(0.1)

    def _sink(self, target: int) -> Sink:
        return Sink(
            f"pass-through-{target}",
            self._write,
            lambda n: f"\n… {n} bytes dropped: the reader is too slow\n".encode(),
            capacity_bytes=_BUFFER_BYTES,
            patience=_PATIENCE,
        )

    def _write(self, target: int, data: bytes) -> None:
        screen, terminal = self._screen, self._sinks.get(STDERR)
        if screen is not None and self._sinks[target] is terminal:
            if target == _VIEW:
                self._view_waits_until = 0.0
                data = screen.shown(data.decode().split("\n"))
            elif target == _LEAVE:
                data, self._screen = screen.left(), None
            else:
                data = screen.printed(target, data)
        target = STDERR if target < 0 else target
        view = memoryview(data)
        while view and target not in self._closed:
            try:
                view = view[os.write(target, view) :]
            except BlockingIOError:  # somebody who shares it made it so
                poll = select.poll()
                poll.register(target, select.POLLOUT)
                poll.poll(1000)
            except OSError as error:
                if error.errno not in _GONE:
                    return  # a file on a full disk: the next may find room
                self._closed.add(target)


class Output:
    """Two pipes for one attempt. `stdout` and `stderr` are the ends that the trainer writes to.

    `pipe` makes one for each of the two descriptors.
    """

    def __init__(
        self,
        attempt: int,
        keep: Callable[[int, bytes], None],
        pass_on: Callable[[int, bytes], None],
        pipe: Callable[[int], tuple[int, int]] | None = None,
    ) -> None:
        self._attempt, self._keep, self._pass_on = attempt, keep, pass_on
        pipe = pipe or inherited_pipes()
        out, self.stdout = pipe(STDOUT)
        try:
            err, self.stderr = pipe(STDERR)
        except OSError:
            os.close(out)
            os.close(self.stdout)
            raise
        self._pipes = {
            out: (STDOUT, lines.Stream(attempt, lines.OUT)),
            err: (STDERR, lines.Stream(attempt, lines.ERR)),
        }
        self._thread = threading.Thread(target=self._pump, name="output", daemon=True)
        self._thread.start()

    def launched(self) -> None:
        """The trainer has its ends: close ours, so that the pipes end with it."""
        os.close(self.stdout)
        os.close(self.stderr)

    def print(self, target: int, data: bytes) -> None:
        """Take what comes another way than through the pipes, while our ends of them are open."""
        view = memoryview(data)
        end = self.stdout if target == STDOUT else self.stderr
        while view:
            view = view[os.write(end, view) :]

    def drain(self, timeout_seconds: float) -> bool:
        """Wait until all that was printed has been handed on; whether that is so."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _pump(self) -> None:
        poll = select.poll()
        for pipe in self._pipes:
            poll.register(pipe, select.POLLIN)
        last_read = 0.0
        while self._pipes:
            waits = any(stream.holds_back for _, stream in self._pipes.values())
            ready = poll.poll(1e3 * _LOOK_SECONDS if waits else None)
            time_of_day, now = lines.stamp(time.time()), time.monotonic()
            sizes = [self._read(poll, pipe, time_of_day, now) for pipe, _ in ready]
            for _, stream in self._pipes.values():
                self._keep(self._attempt, stream.idle(time_of_day, now))
            if sizes and max(sizes) < _SMALL_BYTES and now - last_read < _LINGER_SECONDS:
                time.sleep(_LINGER_SECONDS)
            last_read = time.monotonic()

    def _read(self, poll: select.poll, pipe: int, time_of_day: bytes, now: float) -> int:
        target, stream = self._pipes[pipe]
        chunk = os.read(pipe, _CHUNK_BYTES)
        if chunk:
            self._pass_on(target, chunk)
            self._keep(self._attempt, stream.feed(chunk, time_of_day, now))
        else:
            poll.unregister(pipe)
            os.close(pipe)
            del self._pipes[pipe]
            self._keep(self._attempt, stream.end(time_of_day))
        return len(chunk)


def inherited_pipes() -> Callable[[int], tuple[int, int]]:
    """Makes pipes whose writing ends a process of ours inherits: reading end and writing end."""
    return lambda target: _widened(*os.pipe())


def named_pipes(folder: Path, owner: tuple[int, int] | None) -> Callable[[int], tuple[int, int]]:
    """Makes pipes that their writer, `owner`, opens by name: `stdout` and `stderr` in a folder.

    Our own writing end is what holds them open until then.
    """

    def make(target: int) -> tuple[int, int]:
        path = folder / ("stdout" if target == STDOUT else "stderr")
        path.unlink(missing_ok=True)  # of the attempt before
        os.mkfifo(path, 0o600)
        if owner is not None:
            os.chown(path, *owner)
        reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(reading, True)
        return _widened(reading, os.open(path, os.O_WRONLY | os.O_CLOEXEC))

    return make


def _widened(reading: int, writing: int) -> tuple[int, int]:
    with contextlib.suppress(OSError):  # the user has many large pipes already
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return reading, writing
