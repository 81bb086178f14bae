"""Metadata services that answer byte for byte like those of AWS, Google Cloud and Azure.

    with AwsService() as aws:
        aws.interrupt("terminate", in_seconds=120)
        aws.spoil("instance-action", status(500), times=2)

What is sent was taken from transcripts of the real ones: status line, headers in their order, body.
Each request is kept. A `Fault` takes the connection instead of the service.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from types import TracebackType
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

_PIECE = 64 * 1024


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.target).query).items()}


Fault = Callable[[socket.socket, threading.Event], None]


@dataclass
class _Rule:
    part: str
    fault: Fault
    times: int


@dataclass
class Service:
    """Listens on a port of this machine. `clock_skew_seconds` is how far its clock is ahead."""

    clock_skew_seconds: float = 0.0
    says_date: bool = True
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self.over = threading.Event()
        self._rules: list[_Rule] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.over.set()
        with self.changed:
            self.changed.notify_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    # ------------------------------------------------------------------ for tests

    def spoil(self, part: str, fault: Fault, times: int = 1) -> None:
        """Let a fault have so many of the next requests with this in their target."""
        with self.changed:
            self._rules.append(_Rule(part, fault, times))

    def asked(self, part: str, method: str = "GET") -> list[Request]:
        return [r for r in list(self.requests) if part in r.target and r.method == method]

    def now(self) -> datetime:
        """By the service's clock."""
        return datetime.fromtimestamp(time.time() + self.clock_skew_seconds, UTC)

    def later(self, seconds: float) -> datetime:
        return datetime.fromtimestamp(self.now().timestamp() + seconds, UTC)

    def answer(self, request: Request) -> bytes:
        raise NotImplementedError

    # ------------------------------------------------------------------ the wire

    def message(self, start: str, body: str | bytes, *fields: str) -> bytes:
        """Status line, headers, body; `Date` and `Length` stand for the headers with these."""
        content = body.encode() if isinstance(body, str) else body
        known = {
            "Date": f"Date: {format_datetime(self.now(), usegmt=True)}",
            "Length": f"Content-Length: {len(content)}",
        }
        kept = (known.get(line, line) for line in fields if line != "Date" or self.says_date)
        return "\r\n".join([start, *kept, "", ""]).encode() + content

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            request = _read_request(connection.makefile("rb"))
            if request is None:
                return
            fault = self._fault_for(request)
            if fault is not None:
                fault(connection, self.over)
            else:
                connection.sendall(self.answer(request))

    def _fault_for(self, request: Request) -> Fault | None:
        with self.changed:
            self.requests.append(request)
            for rule in self._rules:
                if rule.times and rule.part in request.target:
                    rule.times -= 1
                    return rule.fault
        return None


def _read_request(stream: BinaryIO) -> Request | None:
    words = stream.readline().decode("latin-1").split()
    if len(words) != 3:
        return None
    headers: dict[str, str] = {}
    while (line := stream.readline()) not in (b"\r\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    body = stream.read(int(headers.get("content-length", 0)))
    return Request(words[0], words[1], headers, body)


# ---------------------------------------------------------------------------- AWS

_AWS_PAGE = """<?xml version="1.0" encoding="iso-8859-1"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN"
\t"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml" xml:lang="en" lang="en">
 <head>
  <title>{problem}</title>
 </head>
 <body>
  <h1>{problem}</h1>
 </body>
</html>
"""
_AWS_STATUS = {400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Not Allowed"}
TOKEN = "AQAAAPm_49V6IGWwyABYuQXrWfdP6yrb3-iy6UsOKg5zeol4pFOp_g=="


@dataclass
class AwsService(Service):
    """IMDSv2 with `HttpTokens: required`."""

    tokens: list[str] = field(default_factory=list)
    documents: dict[str, str] = field(default_factory=dict)

    def interrupt(self, action: str = "terminate", in_seconds: float = 120) -> None:
        at = self.later(in_seconds).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.say("spot/instance-action", json.dumps({"action": action, "time": at}))

    def recommend(self, at: str = "2026-01-01T08:22:00Z") -> None:
        self.say("events/recommendations/rebalance", json.dumps({"noticeTime": at}))

    def say(self, path: str, document: str) -> None:
        self.documents[f"/latest/meta-data/{path}"] = document

    def end_tokens(self) -> None:
        """Those that were given out are worth nothing any more."""
        self.tokens.clear()

    def answer(self, request: Request) -> bytes:
        if request.path == "/latest/api/token":
            return self._token(request)
        if request.headers.get("x-aws-ec2-metadata-token") not in self.tokens:
            return self._problem(401)
        document = self.documents.get(request.path)
        if request.method != "GET" or document is None:
            return self._problem(404)
        lines = ("Content-Type: text/plain", "Accept-Ranges: none", "Length", "Date")
        return self.message("HTTP/1.1 200 OK", document, *lines, "Server: EC2ws", _CLOSED)

    def _token(self, request: Request) -> bytes:
        ttl = request.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        if request.method != "PUT":
            return self._problem(405)
        if not ttl.isdigit() or not 1 <= int(ttl) <= 21600:
            return self._problem(400)
        token = f"{len(self.asked('token', 'PUT')):x}{TOKEN}"
        self.tokens.append(token)
        lines = (f"X-Aws-Ec2-Metadata-Token-Ttl-Seconds: {ttl}", "Content-Type: text/plain")
        return self.message(
            "HTTP/1.1 200 OK", token, *lines, "Length", "Date", "Server: EC2ws", _CLOSED
        )

    def _problem(self, code: int) -> bytes:
        text = f"{code} - {_AWS_STATUS[code]}"
        lines = ("Content-Type: text/html", "Length", "Date", "Server: EC2ws", _CLOSED)
        start = f"HTTP/1.1 {code} {_AWS_STATUS[code]}"
        return self.message(start, _AWS_PAGE.format(problem=text), *lines)


_CLOSED = "Connection: close"

# ---------------------------------------------------------------------------- Google Cloud


@dataclass
class GcpService(Service):
    """Its long poll ends with a change, with `timeout_sec`, or with the test."""

    value: str = "FALSE"
    etag: str = "411261ca6c9b4a14"
    longest_wait_seconds: float = 60.0

    def preempt(self) -> None:
        self.change("TRUE", "8f2ba27ff4a43f25")

    def change(self, value: str, etag: str) -> None:
        with self.changed:
            self.value, self.etag = value, etag
            self.changed.notify_all()

    def answer(self, request: Request) -> bytes:
        if request.headers.get("metadata-flavor") != "Google":
            return self._text("HTTP/1.1 403 Forbidden", "Missing Metadata-Flavor:Google header.")
        if request.path != "/computeMetadata/v1/instance/preempted":
            return self._text("HTTP/1.1 404 Not Found", "not found")
        if request.query.get("wait_for_change") == "true":
            self._wait(request.query)
        return self._text("HTTP/1.1 200 OK", self.value, f"ETag: {self.etag}")

    def _wait(self, query: dict[str, str]) -> None:
        seen = query.get("last_etag", self.etag)
        seconds = min(float(query.get("timeout_sec", "inf")), self.longest_wait_seconds)
        with self.changed:
            self.changed.wait_for(lambda: self.etag != seen or self.over.is_set(), seconds)

    def _text(self, start: str, text: str, *more: str) -> bytes:
        lines = ("Metadata-Flavor: Google", "Content-Type: application/text", *more, "Date")
        server = ("Server: Metadata Server for VM", "Length")
        last = ("X-XSS-Protection: 0", "X-Frame-Options: SAMEORIGIN")
        return self.message(start, text, *lines, *server, *last)


# ---------------------------------------------------------------------------- Azure


@dataclass
class AzureService(Service):
    """Scheduled events of a machine, and of others in its scale set."""

    machine: str = "trainers_4"
    events: list[dict[str, Any]] = field(default_factory=list)
    incarnation: int = 1
    on_start: Callable[[str], object] = lambda _: None

    def evict(self, event_id: str = "E-1", in_seconds: float = 30, **changes: Any) -> None:
        self.schedule(event_id, in_seconds, **changes)

    def schedule(self, event_id: str, in_seconds: float, **changes: Any) -> None:
        """An event as it stands in the document; one with the same id is replaced."""
        event = {
            "EventId": event_id,
            "EventStatus": "Scheduled",
            "EventType": "Preempt",
            "ResourceType": "VirtualMachine",
            "Resources": [self.machine],
            "NotBefore": format_datetime(self.later(in_seconds), usegmt=True),
            "Description": "",
            "EventSource": "Platform",
            "DurationInSeconds": -1,
            **changes,
        }
        self.events = [*(e for e in self.events if e["EventId"] != event_id), event]
        self.incarnation += 1

    def started(self) -> list[str]:
        """The ids of the events that were acknowledged."""
        return [
            each["EventId"]
            for request in self.asked("scheduledevents", "POST")
            for each in json.loads(request.body)["StartRequests"]
        ]

    def answer(self, request: Request) -> bytes:
        if request.headers.get("metadata") != "true":
            text = json.dumps({"error": "Bad request: 'Metadata: true' is missing"})
            return self._message("HTTP/1.1 400 Bad Request", text)
        version = request.query.get("api-version")
        if request.path == "/metadata/instance/compute/name" and version == "2021-02-01":
            kind = "Content-Type: text/plain; charset=utf-8"
            return self._message("HTTP/1.1 200 OK", self.machine, kind)
        if request.path != "/metadata/scheduledevents" or version != "2020-07-01":
            return self._message("HTTP/1.1 404 Not Found", json.dumps({"error": "Not found"}))
        if request.method == "POST":
            return self._start(json.loads(request.body))
        document = {"DocumentIncarnation": self.incarnation, "Events": self.events}
        return self._message("HTTP/1.1 200 OK", json.dumps(document, separators=(",", ":")))

    def _start(self, wanted: dict[str, Any]) -> bytes:
        """What is acknowledged has begun, and no time stands there any more."""
        ids = [each["EventId"] for each in wanted["StartRequests"]]
        known = [event for event in self.events if event["EventId"] in ids]
        if not known:
            text = json.dumps({"error": "Bad request: no such event"})
            return self._message("HTTP/1.1 400 Bad Request", text)
        for event in known:
            self.on_start(event["EventId"])
            event.update(EventStatus="Started", NotBefore="")
        return self._message("HTTP/1.1 200 OK", "")

    def _message(self, start: str, text: str, kind: str = "") -> bytes:
        kind = kind or "Content-Type: application/json; charset=utf-8"
        request_id = "x-ms-request-id: b41646f2-40fc-44bf-ac9a-8a3b5c23a41b"
        return self.message(
            start, text, kind, "Server: IMDS/150.870.65.1854", request_id, "Date", "Length"
        )


# ---------------------------------------------------------------------------- faults


def sends(content: bytes) -> Fault:
    """These bytes, and the end of the connection."""

    def fault(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(content)

    return fault


def status(code: int, body: str = "") -> Fault:
    return sends(f"HTTP/1.1 {code} Injected\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())


def says(body: str | bytes, *fields: str) -> Fault:
    """A complete answer that is not what was asked for."""
    content = body.encode() if isinstance(body, str) else body
    head = "\r\n".join(["HTTP/1.1 200 OK", *fields, f"Content-Length: {len(content)}", "", ""])
    return sends(head.encode() + content)


def hangs(connection: socket.socket, over: threading.Event) -> None:
    """The request is taken, and nothing comes."""
    over.wait()


def drips(connection: socket.socket, over: threading.Event) -> None:
    """A header without end, one byte after another: each read of it succeeds."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Never-Ends: ")
    with contextlib.suppress(OSError):
        while not over.wait(0.01):
            connection.sendall(b"x")


def resets(connection: socket.socket, over: threading.Event) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def floods(nbytes: int, *, chunked: bool = False) -> Fault:
    """An answer of so many bytes."""

    def pieces() -> Iterator[bytes]:
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {nbytes}"
        yield f"HTTP/1.1 200 OK\r\n{length}\r\n\r\n".encode()
        for _ in range(nbytes // _PIECE):
            piece = b" " * _PIECE
            yield b"%x\r\n%s\r\n" % (_PIECE, piece) if chunked else piece
        if chunked:
            yield b"0\r\n\r\n"

    def fault(connection: socket.socket, over: threading.Event) -> None:
        for piece in pieces():
            connection.sendall(piece)

    return fault
