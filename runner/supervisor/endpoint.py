"""Where a live run can be asked over HTTP: `/metrics`, `/healthz` and `/status.json`.

    /metrics       what Prometheus scrapes; OpenMetrics where it is asked for, with exemplars
    /healthz       200 as long as the supervisor's own loop comes round, else 503; says nothing of
                   the training, which may take as long as it likes
    /status.json   the same facts for people and scripts, as one JSON document

It only reads. Nothing that happens here can hold up or end a run: a port that is taken is a
warning, a client that stands still is dropped, and there are never more than a few at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

log = logging.getLogger(__name__)

STUCK_SECONDS = 60.0  # ending a trainer takes some seconds, and nothing in the loop takes longer
_CLIENT_SECONDS = 30.0  # for which a connection may be idle: longer than between two scrapes
_MOST_CLIENTS = 16
_PLAIN = "text/plain; charset=utf-8"
_JSON = "application/json"


@dataclass(frozen=True)
class Sources:
    """Where the answers come from; asked from threads of the endpoint's own.

    `metrics` takes the request's Accept header and gives the content and its type.
    """

    metrics: Callable[[str], tuple[bytes, str]]
    status: Callable[[], Mapping[str, Any]]


class Pulse:
    """When the supervisor's loop came round last. One that is ending has no loop any more."""

    def __init__(self) -> None:
        self._beaten_at = time.monotonic()
        self._is_over = False

    def beat(self) -> None:
        self._beaten_at = time.monotonic()

    def over(self) -> None:
        """The loop has ended as it should; what is left to save takes its time."""
        self._is_over = True

    @property
    def silent_seconds(self) -> float:
        """For how long it has not come round."""
        return 0.0 if self._is_over else time.monotonic() - self._beaten_at


class Endpoint:
    """Listens from `start` to `close`, on threads of its own."""

    def __init__(self, host: str, port: int, pulse: Pulse, sources: Sources) -> None:
        self._host, self._port = host, port
        self._pulse, self._sources = pulse, sources
        self._server: _Server | None = None

    @property
    def address(self) -> str | None:
        """`host:port` as it is, or None while nothing listens."""
        if self._server is None:
            return None
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def start(self) -> None:
        """Listen. Where that is not possible the run goes on without, and the log says so."""
        try:
            self._server = _Server(self._host, self._port, self._answer)
        except (OSError, OverflowError, UnicodeError) as error:
            log.warning(
                "no metrics are served: %s:%d cannot be listened on (%s); "
                "choose another metrics.port in the job file, or 0 for any that is free",
                self._host,
                self._port,
                getattr(error, "strerror", None) or error,
            )
            return
        threading.Thread(target=self._server.serve, name="endpoint", daemon=True).start()
        log.info("metrics are served on http://%s/metrics", self.address)

    def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def _answer(self, path: str, accept: str) -> tuple[HTTPStatus, str, bytes]:
        match path:
            case "/metrics":
                content, kind = self._sources.metrics(accept)
                return HTTPStatus.OK, kind, content
            case "/healthz":
                silent = self._pulse.silent_seconds
                if silent <= STUCK_SECONDS:
                    return HTTPStatus.OK, _PLAIN, b"ok\n"
                text = f"the supervisor's loop has not come round for {silent:.0f} s\n"
                return HTTPStatus.SERVICE_UNAVAILABLE, _PLAIN, text.encode()
            case "/status.json":
                document = json.dumps(self._sources.status(), indent=1, allow_nan=False)
                return HTTPStatus.OK, _JSON, document.encode() + b"\n"
        return HTTPStatus.NOT_FOUND, _PLAIN, b"see /metrics, /healthz and /status.json\n"


_Answer = Callable[[str, str], tuple[HTTPStatus, str, bytes]]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that stands still holds up nobody's end

    def __init__(self, host: str, port: int, answer: _Answer) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.answer = answer
        self._is_over = False
        self._clients = threading.BoundedSemaphore(_MOST_CLIENTS)
        super().__init__((host, port), _Handler)

    def serve(self) -> None:
        """Until `stop`. Nothing is polled, neither for a request nor for the end."""
        while not self._is_over:
            self.handle_request()
        self.server_close()

    def stop(self) -> None:
        self._is_over = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for a connection

    def server_bind(self) -> None:
        """Without asking a name server for this machine's name, as `HTTPServer` does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._clients.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._clients.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a client of the endpoint got no answer", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "runner"
    sys_version = ""
    timeout = _CLIENT_SECONDS

    def do_GET(self) -> None:
        self._reply(with_content=True)

    def do_HEAD(self) -> None:
        self._reply(with_content=False)

    def _reply(self, *, with_content: bool) -> None:
        path = self.path.split("?", 1)[0]
        status, kind, content = self.server.answer(path, self.headers.get("Accept", ""))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Being asked is nothing that happens to a run."""
