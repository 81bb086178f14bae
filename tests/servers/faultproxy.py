"""A proxy before an S3 server that spoils requests and answers as told; signatures stay valid.

    with FaultProxy(upstream_port) as proxy:
        proxy.add("PUT .*model", Fault("status", 503, code="SlowDown"), times=2)

| action         | arg     | what becomes of a request                                            |
|----------------|---------|----------------------------------------------------------------------|
| status         | code    | answered at once with this status; the server never hears of it      |
| latency        | seconds | forwarded after a while                                              |
| hold           |         | forwarded when `release` is called                                   |
| slow_upload    | bytes/s | its body is forwarded as slowly as that                              |
| reset          |         | the connection is reset when the head has come                       |
| reset_upload   | n       | n bytes of its body are forwarded, then both connections are reset   |
| corrupt_upload | n       | bit 0 of byte n of its body is flipped on the way                    |
| drop_response  |         | done by the server, but the answer is lost: a reset comes instead    |
| reset_download | n       | a reset after n bytes of the answer's body                           |
| truncate       | n       | the connection is closed in order after n bytes of the body          |
| stall          | n       | silence after n bytes of the body, until the proxy ends              |
| trickle        | n       | after n bytes of the body, 64 KiB every 50 ms, until `hurry` is set  |
| stall_upload   |         | the request's body is never read, nor answered, until the proxy ends |
| corrupt        | n       | bit 0 of byte n of the answer's body is flipped                      |
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO

_PIECE = 64 * 1024
_TLS_BEGINS = b"\x16"
_TRICKLE_SECONDS = 0.05


@dataclass(frozen=True)
class Fault:
    action: str
    arg: float = 0
    code: str = "SlowDown"
    headers: tuple[str, ...] = ()


@dataclass
class _Rule:
    pattern: re.Pattern[str]
    fault: Fault
    times: int
    after: int


class _ResetNow(Exception):
    """Both connections end with a reset."""


class FaultProxy:
    """Listens on a port of this machine; with a certificate (`tls`), by https."""

    def __init__(self, upstream_port: int, tls: str | None = None) -> None:
        self._upstream_port = upstream_port
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._over, self.hurry = threading.Event(), threading.Event()
        self._released = threading.Event()
        self._tls: ssl.SSLContext | None = None
        if tls is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(tls)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[str] = []
        self.hits = 0

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self.hurry.set()
        self._released.set()
        self._stop_listening()

    def add(self, pattern: str, fault: Fault, times: int = 1, after: int = 0) -> None:
        """Spoil `times` requests whose first line matches, when `after` others have passed."""
        with self._lock:
            self._rules.append(_Rule(re.compile(pattern), fault, times, after))

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Nobody listens; connections that are there are reset at their next request."""
        address = self._listener.getsockname()
        self._stop_listening()
        self.add("", Fault("reset"), times=10**9)
        try:
            yield
        finally:
            self.clear()
            self._listener = socket.create_server(address, backlog=64)
            threading.Thread(target=self._accept, daemon=True).start()

    def _stop_listening(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def release(self) -> None:
        """What is held goes on, and nothing is held any more."""
        self._released.set()

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()
            self.requests.clear()
            self.hits = 0

    def _fault_for(self, line: str) -> Fault | None:
        with self._lock:
            self.requests.append(line)
            for rule in self._rules:
                if not rule.times or not rule.pattern.search(line):
                    continue
                if rule.after:
                    rule.after -= 1
                    continue
                rule.times -= 1
                self.hits += 1
                return rule.fault
        return None

    def _accept(self) -> None:
        listener = self._listener
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        ends = [client]
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                client = ends[0] = self._tls.wrap_socket(client, server_side=True)
            elif client.recv(1, socket.MSG_PEEK) == _TLS_BEGINS:
                return  # an engine tries https first; left waiting, it would do so for 10 s
            requests = client.makefile("rb")
            server: socket.socket | None = None
            answers: BinaryIO | None = None
            while head := _head(requests):
                line = head.split(b"\r\n", 1)[0].decode("latin-1")
                fault = self._fault_for(line) or Fault("none")
                if fault.action == "status":
                    _refuse(client, requests, head, fault)
                    return
                if fault.action == "reset":
                    raise _ResetNow
                if fault.action == "stall_upload":
                    self._over.wait()
                    return
                if fault.action == "latency":
                    self._over.wait(fault.arg)
                if fault.action == "hold":
                    self._released.wait()
                if server is None or answers is None:
                    server = socket.create_connection(("127.0.0.1", self._upstream_port))
                    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    ends.append(server)
                    answers = server.makefile("rb")
                if b"100-continue" in head.lower():
                    head = re.sub(rb"(?i)expect: *100-continue\r\n", b"", head)
                    client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                server.sendall(head)
                self._upload(requests, head, server, fault)
                answer = _head(answers)
                if not answer or fault.action == "drop_response":
                    raise _ResetNow
                client.sendall(answer)
                bodiless = line.startswith("HEAD ") or answer[9:12] in (b"204", b"304")
                if not bodiless and not self._download(answers, answer, client, fault):
                    return
                if (_field(answer, b"connection") or b"").lower() == b"close":
                    return
        except _ResetNow:
            for end in ends:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.close()
        except OSError:
            return  # one of the two has gone
        finally:
            for end in ends:
                with contextlib.suppress(OSError):
                    end.close()

    def _upload(self, requests: BinaryIO, head: bytes, server: socket.socket, fault: Fault) -> None:
        at = 0
        for piece in _body(requests, head, 0):
            if fault.action == "reset_upload" and at + len(piece) > fault.arg:
                server.sendall(piece[: int(fault.arg) - at])
                raise _ResetNow
            if fault.action == "corrupt_upload":
                piece = _flipped(piece, int(fault.arg) - at)
            if fault.action == "slow_upload":
                self._over.wait(len(piece) / fault.arg)
            server.sendall(piece)
            at += len(piece)

    def _download(
        self, answers: BinaryIO, head: bytes, client: socket.socket, fault: Fault
    ) -> bool:
        """Forward the answer's body; whether the connection may be used again."""
        at, cut = 0, fault.action in ("reset_download", "truncate", "stall")
        for piece in _body(answers, head, None):
            if cut and at + len(piece) > fault.arg:
                client.sendall(piece[: int(fault.arg) - at])
                if fault.action == "reset_download":
                    raise _ResetNow
                if fault.action == "stall":
                    self._over.wait()
                return False
            if fault.action == "corrupt":
                piece = _flipped(piece, int(fault.arg) - at)
            if fault.action == "trickle" and at > fault.arg:
                self.hurry.wait(_TRICKLE_SECONDS)
            client.sendall(piece)
            at += len(piece)
        return True


def _head(stream: BinaryIO) -> bytes:
    """Everything up to the empty line, with it; nothing if the connection ends before."""
    lines = []
    while (line := stream.readline()) not in (b"\r\n", b""):
        lines.append(line)
    return b"".join([*lines, b"\r\n"]) if lines and line else b""


def _field(head: bytes, name: bytes) -> bytes | None:
    found = re.search(rb"(?im)^" + name + rb":[ \t]*(.*?)[ \t]*\r$", head)
    return found and found.group(1)


def _body(stream: BinaryIO, head: bytes, length: int | None) -> Iterator[bytes]:
    """The bytes of a body as they are on the wire; `length` is for a head that names none."""
    if b"chunked" in (_field(head, b"transfer-encoding") or b"").lower():
        while True:
            line = stream.readline()
            yield line
            size = int(line.split(b";")[0], 16)
            if size == 0:
                while (line := stream.readline()) not in (b"\r\n", b""):
                    yield line
                yield line
                return
            yield stream.read(size)
            yield stream.readline()
    told = _field(head, b"content-length")
    left = int(told) if told else length or 0
    while left:
        piece = stream.read(min(_PIECE, left))
        if not piece:
            raise OSError("the other side has gone")
        left -= len(piece)
        yield piece


def _flipped(piece: bytes, at: int) -> bytes:
    if not 0 <= at < len(piece):
        return piece
    return piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]


def _refuse(client: socket.socket, requests: BinaryIO, head: bytes, fault: Fault) -> None:
    """Answer with an error; what the client still sends is read, so that no reset hides it."""
    content = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>".encode()
    status = f"HTTP/1.1 {int(fault.arg)} Injected"
    fields = ["Content-Type: application/xml", "Connection: close",
              f"Content-Length: {len(content)}", *fault.headers]  # fmt: skip
    start = "\r\n".join([status, *fields, "", ""]).encode()
    client.sendall(start + (b"" if head.startswith(b"HEAD ") else content))
    client.shutdown(socket.SHUT_WR)
    client.settimeout(5)
    with contextlib.suppress(OSError):
        while requests.read(_PIECE):
            pass
