"""`runner ui`: the pages of all runs of a store, live, for a browser on this machine.

It reads and never writes, and answers GET and HEAD alone. It listens on loopback, and whoever asks
must name it by a loopback name: otherwise a page from anywhere, whose host's name is made to point
here, could read along (DNS rebinding, https://en.wikipedia.org/wiki/DNS_rebinding).
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import logging
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from runner.errors import RunnerError, UnknownName, UsageError
from runner.job import check_run_id
from runner.supervisor.lookup import Where, find_run
from runner.supervisor.lookup import overview as all_statuses
from runner.views import page
from runner.views.html import Html, source_of
from runner.views.looking import Looker
from runner.views.runs import runs_body

log = logging.getLogger(__name__)

_FRESH_SECONDS = 1.0  # for which an answer is given again to whoever asks
_MOST_LOOKERS = 32
_SCRIPT = """
const main = document.querySelector("main");
let tag = null;
async function look() {
  try {
    const answer = await fetch(location.pathname + "?part", {
      headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store",
    });
    if (answer.status === 200) {
      const open = [...main.querySelectorAll("details")].map((each) => each.open);
      tag = answer.headers.get("ETag");
      main.innerHTML = await answer.text();
      main.querySelectorAll("details").forEach((each, n) => { each.open = open[n] === true; });
    }
    document.body.classList.toggle("stale", !answer.ok && answer.status !== 304);
  } catch {
    document.body.classList.add("stale");
  }
  setTimeout(look, document.hidden ? 15000 : 2000);
}
setTimeout(look, 2000);
"""
_POLICY = (
    "default-src 'none'; style-src '{style}'; script-src '{script}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Pages:
    """What is known of each run, and for how long it may be given again. For several threads."""

    def __init__(self, where: Where) -> None:
        self._where = where
        self._lock = threading.Lock()
        self._lookers: dict[str, tuple[Looker, threading.Lock]] = {}
        self._made: dict[str, tuple[float, dict[str, Any]]] = {}

    def runs(self) -> list[dict[str, Any]]:
        """The status of each run."""
        return list(self._fresh("", lambda: {"runs": list(all_statuses(self._where))})["runs"])

    def run(self, name: str) -> dict[str, Any]:
        """The document of one. UnknownName if there is none."""
        looker, busy = self._looker(name)
        with busy:
            return self._fresh(name, looker.overview)

    def _looker(self, name: str) -> tuple[Looker, threading.Lock]:
        with self._lock:
            found = self._lookers.get(name)
        if found is None:
            _check_name(name)
            found = Looker(find_run(name, self._where)), threading.Lock()
            with self._lock:
                while len(self._lookers) >= _MOST_LOOKERS:
                    del self._lookers[next(iter(self._lookers))]
                found = self._lookers.setdefault(name, found)
        return found

    def _fresh(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        at, document = self._made.get(key, (float("-inf"), {}))
        if time.monotonic() - at >= _FRESH_SECONDS:
            document = make()
            self._made[key] = time.monotonic(), document
        return document


def _check_name(name: str) -> None:
    """UnknownName for what cannot be the name of a run: it would be a path in the store."""
    try:
        check_run_id(name)
    except UsageError:
        raise UnknownName("run", name) from None


class Server(ThreadingHTTPServer):
    """Listens once it is made; `serve_forever` answers. `address` is a URL to open."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, pages: Pages) -> None:
        check_loopback(host)
        self.pages = pages
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise UsageError(
                f"{host}:{port} cannot be listened on: {error.strerror}; "
                "choose another --port, or 0 for any that is free"
            ) from error

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"


def check_loopback(host: str) -> None:
    """UsageError if others could ask. What is shown is nobody else's business."""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if not is_loopback:
        raise UsageError(
            f"--host {host}: the pages have no password, so they are for this machine alone; "
            "reach them from another one through ssh -L"
        )


def names_loopback(host_header: str | None, port: int) -> bool:
    """Whether whoever asks has called this server by a name that cannot be anybody else's."""
    if host_header is None:
        return False
    try:
        asked = urlsplit(f"//{host_header}")
        host, asked_port = asked.hostname, asked.port
    except ValueError:
        return False
    if (
        asked.username is not None
        or asked.path
        or (80 if asked_port is None else asked_port) != port
    ):
        return False
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "runner", ""
    protocol_version = "HTTP/1.1"
    timeout = 30.0

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if not names_loopback(self.headers.get("Host"), self.server.server_address[1]):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "ask for this machine by its own name\n")
            return
        try:
            self._route()
        except UnknownName as error:
            self._send_page(HTTPStatus.NOT_FOUND, "There is none", page.failure(str(error)))
        except (RunnerError, OSError) as error:
            log.warning("%s could not be answered: %s", self.path, error)
            text = page.failure(str(error))
            self._send_page(HTTPStatus.SERVICE_UNAVAILABLE, "Out of reach", text)

    def _route(self) -> None:
        url = urlsplit(self.path)
        part, path = url.query == "part", unquote(url.path)
        pages = self.server.pages
        if path == "/":
            rows = pages.runs()
            self._send_body("Runs", runs_body(rows), part=part)
        elif path == "/runs.json":
            self._send_json(pages.runs())
        elif path.startswith("/run/") and path.endswith(".json"):
            self._send_json(pages.run(path.removeprefix("/run/").removesuffix(".json")))
        elif path.startswith("/run/"):
            overview = pages.run(path.removeprefix("/run/"))
            content = page.body(overview, above=page.link("/", "All runs"))
            self._send_body(str(overview["run"]["run_id"]), content, part=part)
        else:
            raise UnknownName("page", path, ["/", "/runs.json"])

    # ------------------------------------------------------------------ answers

    def _send_body(self, title: str, content: Html, *, part: bool) -> None:
        if part:
            self._send(HTTPStatus.OK, "text/html", content)
        else:
            self._send_page(HTTPStatus.OK, title, content)

    def _send_page(self, status: HTTPStatus, title: str, content: Html) -> None:
        self._send(status, "text/html", page.live(title, content, _SCRIPT))

    def _send_json(self, document: Any) -> None:
        self._send(HTTPStatus.OK, "application/json", json.dumps(document, indent=2) + "\n")

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        content = text.encode()
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        if status is HTTPStatus.OK and self.headers.get("If-None-Match") == tag:
            status, content = HTTPStatus.NOT_MODIFIED, b""
        self.send_response(status)
        for name, value in self._headers(kind, tag).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _headers(self, kind: str, tag: str) -> dict[str, str]:
        return {
            "Content-Type": f"{kind}; charset=utf-8",
            "ETag": tag,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Content-Security-Policy": _POLICY.format(
                style=page.STYLE_SOURCE, script=source_of(_SCRIPT)
            ),
        }

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug(format, *arguments)
