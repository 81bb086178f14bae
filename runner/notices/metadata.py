"""One request to a metadata service: plain HTTP, bounded in time and in size, by no proxy.

Nothing that answers is trusted. A request ends at its deadline, however slowly its answer drips; an
answer that is too long or breaks off is an error. Proxies of the environment are not asked: the
address is link-local, and what a proxy finds there is the proxy's own machine.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, cast
from urllib.parse import urlsplit

from runner.errors import MetadataError

LINK_LOCAL_URL = "http://169.254.169.254"
"""Where AWS, Google Cloud and Azure have it. An address, because looking up a name may hang."""

URL_VARIABLE = "RUNNER_METADATA_URL"
"""Another place for it, as http://HOST[:PORT]: for tests, and for a proxy on the node."""

MOST_BYTES = 256 * 1024
_CONNECT_SECONDS = 2.0
_ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Answer:
    """A complete answer. `at` is when it came, on the monotonic clock, in seconds.

    `time_of_day` is the same moment in seconds since 1970: by the server's own clock, if it says,
    because the times in its answers are by that.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    at: float
    time_of_day: float

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace").strip()

    def json_object(self) -> dict[str, Any]:
        """The body as a JSON object; MetadataError if it is something else."""
        try:
            document = json.loads(self.body)
        except (ValueError, RecursionError):
            raise MetadataError(f"its answer ({len(self.body)} bytes) is not JSON") from None
        if not isinstance(document, dict):
            raise MetadataError("its answer is JSON, but not an object")
        return document


class MetadataServer:
    """The metadata service at `url`; by default where the environment or the clouds have it.

    Requests may come from several threads. Each is to be answered within `answer_seconds`.
    """

    def __init__(self, url: str | None = None, answer_seconds: float = _ANSWER_SECONDS) -> None:
        self.url = url or os.environ.get(URL_VARIABLE) or LINK_LOCAL_URL
        self._answer_seconds = answer_seconds
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._over = False

    @property
    def place(self) -> str:
        """Where it is, for people; nothing but the host and the port of what was given."""
        try:
            host, port = self._address()
        except MetadataError:
            return f"the URL in {URL_VARIABLE}"
        host = f"[{host}]" if ":" in host else host
        return host if port == 80 else f"{host}:{port}"

    def ask(
        self,
        path: str,
        headers: Mapping[str, str],
        *,
        method: str = "GET",
        body: bytes = b"",
        extra_seconds: float = 0.0,
    ) -> Answer:
        """Send one request, and wait for the whole answer, `extra_seconds` longer than for others.

        MetadataError if none comes; its text has nothing of the request's or the answer's content.
        """
        seconds = self._answer_seconds + extra_seconds
        host, port = self._address()
        request = _request(method, path, self.place, headers, body)
        try:
            connection = socket.create_connection((host, port), _CONNECT_SECONDS)
        except (OSError, UnicodeError) as error:  # the latter for what can be no host's name
            raise MetadataError(f"nothing can be reached there ({_reason(error)})") from None
        try:
            self._note(connection)
            return _exchange(connection, request, method, time.monotonic() + seconds)
        except TimeoutError:
            raise MetadataError(f"no answer came within {seconds:g} s") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise MetadataError(f"its answer cannot be read ({_reason(error)})") from None
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def close(self) -> None:
        """End the requests that wait for an answer, in whatever thread. There are no more."""
        with self._lock:
            self._over = True
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _note(self, connection: socket.socket) -> None:
        with self._lock:
            if self._over:
                raise MetadataError("it is asked no more")
            self._open.add(connection)

    def _address(self) -> tuple[str, int]:
        try:
            url = urlsplit(self.url)
            host, port = url.hostname, url.port or 80
        except ValueError:
            host, port, url = None, 0, urlsplit("")
        is_complete = bool(host and host.isascii() and url.scheme == "http")
        if not host or not is_complete or url.path not in ("", "/") or url.username:
            raise MetadataError(f"it is not http://HOST[:PORT]; correct {URL_VARIABLE}")
        return host, port


class _Bounded(io.RawIOBase):
    """Reads from a socket until a moment: each piece gets the time that is left for all."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self._connection, self._until = connection, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_left(self._until))
        return self._connection.recv_into(buffer)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What HTTPResponse asks a socket for."""
        return io.BufferedReader(self)


def _exchange(connection: socket.socket, request: bytes, method: str, until: float) -> Answer:
    connection.settimeout(_left(until))
    connection.sendall(request)
    response = http.client.HTTPResponse(
        cast("socket.socket", _Bounded(connection, until)), method=method
    )
    with response:
        response.begin()
        body = response.read(MOST_BYTES + 1)
    if len(body) > MOST_BYTES:
        raise MetadataError(f"its answer is longer than {MOST_BYTES // 1024} KiB")
    if response.length:
        raise MetadataError(f"its answer breaks off, {response.length} bytes before its end")
    headers = {name.lower(): value for name, value in response.getheaders()}
    at, time_of_day = time.monotonic(), time.time()
    said = seconds_since_1970(headers.get("date"))
    if said is not None:  # cut to whole seconds: by now it may be almost one later
        time_of_day = said + 1.0
    return Answer(response.status, headers, body, at, time_of_day)


def seconds_since_1970(text: object) -> float | None:
    """A date of HTTP, such as `Mon, 19 Sep 2016 18:29:47 GMT`; None for anything else."""
    if not isinstance(text, str):
        return None
    try:
        moment = parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, LookupError, OverflowError):  # all of them have been seen
        return None


def _request(method: str, path: str, host: str, headers: Mapping[str, str], body: bytes) -> bytes:
    fields = {"Host": host, "Connection": "close", **headers}
    if method != "GET":
        fields["Content-Length"] = str(len(body))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _reason(error: Exception) -> str:
    """The kind of error, or the system's words for it: never what the other side has sent."""
    if isinstance(error, TimeoutError):
        return "timed out"
    number = getattr(error, "errno", None)
    return os.strerror(number) if number and number > 0 else type(error).__name__
