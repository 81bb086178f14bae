"""A socket before an engine's: it answers as told, holds requests back, or is away for a while.

    with EngineProxy(engine, folder / "engine.sock") as proxy:
        proxy.refuse("POST .*/start", 500, "no space left on device")
        node.use(proxy.docker)

A pattern is searched in the first line of a request, such as `POST /v1.41/containers/ID/start`.
All that is not named goes through.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from servers.engine import Docker

_PIECE = 65_536


class EngineProxy:
    """Threads of this process; the connections end with it."""

    def __init__(self, engine: Docker, path: Path) -> None:
        self._upstream = engine.host.removeprefix("unix://")
        self._path = path
        self.docker = Docker(f"unix://{path}")
        self.asked: list[str] = []
        """The first line of each request so far."""
        self._answers: list[tuple[re.Pattern[str], bytes]] = []
        self._hold: re.Pattern[str] | None = None
        self._passes_forsaken = False
        self._released = threading.Event()
        self.held: list[str] = []
        """The first lines of the requests that were held."""
        self._clients: list[socket.socket] = []

    def __enter__(self) -> EngineProxy:
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._stop()

    def _listen(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._path.unlink(missing_ok=True)
        self._socket.bind(str(self._path))
        self._socket.listen()
        threading.Thread(target=self._accept, args=(self._socket,), daemon=True).start()

    def _stop(self) -> None:
        for end in (self._socket, *self._clients):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._socket.close()  # its file stays: to connect to that is refused
        self._clients.clear()

    # ------------------------------------------------------------------ what is spoilt

    def refuse(self, pattern: str, status: int, message: str) -> None:
        """Answer such requests with an error of the engine's; the engine never hears of them."""
        body = json.dumps({"message": message}).encode()
        head = f"HTTP/1.1 {status} No\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.answer(pattern, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def answer(self, pattern: str, raw: bytes) -> None:
        """Answer such requests with these bytes, and close the connection."""
        self._answers.append((re.compile(pattern), raw))

    def hold(self, pattern: str, *, passes_forsaken: bool = False) -> None:
        """Hold such requests back until `release`.

        Those for whose answer nobody waits by then are dropped, or passed on as well.
        """
        self._released.clear()
        self._hold, self._passes_forsaken = re.compile(pattern), passes_forsaken

    def release(self) -> None:
        """What is held goes on, and nothing is held any more."""
        self._hold = None
        self._released.set()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Nobody listens, and what was connected is not any more."""
        self._stop()
        try:
            yield
        finally:
            self._listen()

    def be_true(self) -> None:
        """Let everything through from now on."""
        self._answers.clear()

    # ------------------------------------------------------------------ connections

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                self._clients.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as engine, contextlib.suppress(OSError):
            engine.connect(self._upstream)
            threading.Thread(target=_relay, args=(engine, client), daemon=True).start()
            while request := _request(client):
                line = request.partition(b"\r\n")[0].decode()
                self.asked.append(line)
                if self._hold is not None and self._hold.search(line):
                    self.held.append(line)
                    self._released.wait()
                    if not self._passes_forsaken and _has_left(client):
                        return
                raw = next((raw for pattern, raw in self._answers if pattern.search(line)), None)
                if raw is not None:
                    client.sendall(raw)
                    client.shutdown(socket.SHUT_RDWR)
                    return
                engine.sendall(request)


def _has_left(client: socket.socket) -> bool:
    """Whether the other side has closed its end: nothing is pipelined behind a request."""
    try:
        return client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False


def _request(client: socket.socket) -> bytes:
    """The next request, head and body; empty if there is none any more."""
    read = b""
    while b"\r\n\r\n" not in read:
        piece = client.recv(_PIECE)
        if not piece:
            return b""
        read += piece
    head = read.partition(b"\r\n\r\n")[0]
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    whole = len(head) + 4 + (int(length[1]) if length else 0)
    while len(read) < whole:
        read += client.recv(_PIECE)
    return read


def _relay(engine: socket.socket, client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := engine.recv(_PIECE):
            client.sendall(piece)
        client.shutdown(socket.SHUT_RDWR)
