"""A proxy before a container engine's socket: it holds requests, or nobody is there for a while.

with EngineProxy(folder / "docker.sock", engine.host) as proxy:
    proxy.hold("POST .*/start")
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

_PIECE = 64 * 1024


class EngineProxy:
    """Listens at `path`; `upstream` is the engine's own address, unix://..."""

    def __init__(self, path: Path, upstream: str) -> None:
        self._path, self._upstream = path, upstream.removeprefix("unix://")
        self.host = f"unix://{path}"
        self._held: re.Pattern[str] | None = None
        self._released = threading.Event()
        self._ends: list[socket.socket] = []
        self.held: list[str] = []
        """The first lines of the requests that were held."""

    def __enter__(self) -> EngineProxy:
        self._listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
        self._stop()

    def hold(self, pattern: str) -> None:
        """From now on requests whose first line matches are not passed on, until `release`."""
        self._released.clear()
        self._held = re.compile(pattern)

    def release(self) -> None:
        """What is held goes on, unless whoever asked is gone; and nothing is held any more."""
        self._held = None
        self._released.set()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Nobody listens, and what was connected is not any more."""
        self._stop()
        try:
            yield
        finally:
            self._listen()

    def _listen(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._path.unlink(missing_ok=True)
        self._listener.bind(str(self._path))
        self._listener.listen(16)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _stop(self) -> None:
        for end in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._listener.close()  # its file stays: to connect to that is refused
        self._ends.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._upstream)
            self._ends += [client, server]
            for ends, asks in (((client, server), True), ((server, client), False)):
                threading.Thread(target=self._pump, args=(*ends, asks), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, asks: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                if asks and self._is_held(piece):
                    self._released.wait()
                    if _has_left(source):
                        break
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _is_held(self, piece: bytes) -> bool:
        line = piece.split(b"\r\n", 1)[0].decode("latin-1")
        if self._held is None or not self._held.search(line):
            return False
        self.held.append(line)
        return True


def _has_left(end: socket.socket) -> bool:
    """Whether the other side has closed its end: nothing is pipelined behind a request."""
    try:
        return end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
