"""A socket before an engine's: it answers as told, or holds a request back; all else goes through.

    with EngineProxy(engine, folder / "engine.sock") as proxy:
        proxy.refuse("POST .*/start", 500, "no space left on device")
        node.use(proxy.docker)

A pattern is searched in the first line of a request, such as `POST /v1.41/containers/ID/start`.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
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
        self._held: list[tuple[re.Pattern[str], threading.Event]] = []

    def __enter__(self) -> EngineProxy:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self._path))
        self._socket.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for _pattern, release in self._held:
            release.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    # ------------------------------------------------------------------ what is spoilt

    def refuse(self, pattern: str, status: int, message: str) -> None:
        """Answer such requests with an error of the engine's; the engine never hears of them."""
        body = json.dumps({"message": message}).encode()
        head = f"HTTP/1.1 {status} No\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.answer(pattern, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def answer(self, pattern: str, raw: bytes) -> None:
        """Answer such requests with these bytes, and close the connection."""
        self._answers.append((re.compile(pattern), raw))

    def hold(self, pattern: str) -> threading.Event:
        """Hold such requests back until the event is set, also if nobody waits for them by then."""
        release = threading.Event()
        self._held.append((re.compile(pattern), release))
        return release

    def be_true(self) -> None:
        """Let everything through from now on."""
        self._answers.clear()

    # ------------------------------------------------------------------ connections

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as engine, contextlib.suppress(OSError):
            engine.connect(self._upstream)
            threading.Thread(target=_relay, args=(engine, client), daemon=True).start()
            while request := _request(client):
                line = request.partition(b"\r\n")[0].decode()
                self.asked.append(line)
                for pattern, release in self._held:
                    if pattern.search(line):
                        release.wait()
                raw = next((raw for pattern, raw in self._answers if pattern.search(line)), None)
                if raw is not None:
                    client.sendall(raw)
                    client.shutdown(socket.SHUT_RDWR)
                    return
                engine.sendall(request)


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
