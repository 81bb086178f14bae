"""A small HTTP server that speaks the Kubernetes API as far as runs use it. For tests only.

Answers have the shapes that a real API server gives (`Status` objects with reason and details, 201,
409, 403 of a missing right and of a quota, 404 of an object and of a namespace, 410 within a watch,
429 with Retry-After). What a controller would do to the objects is for the tests to do.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]

_PATH = re.compile(
    r"/(?:api/v1|apis/batch/v1)/namespaces/(?P<namespace>[^/]+)/(?P<resource>[^/]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<subresource>log))?"
)
_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_KINDS = {"jobs": "Job", "configmaps": "ConfigMap", "pods": "Pod"}
_GROUPS = {"jobs": "batch"}
_WORDS = {"Job": 'jobs.batch "{}"', "ConfigMap": 'configmaps "{}"', "Pod": 'pods "{}"'}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def status(code: int, reason: str, message: str, **details: Any) -> Json:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "details": details,
        "code": code,
    }


@dataclass
class Fault:
    """An answer in place of the true one, so many times. `when` is "METHOD resource"."""

    when: str
    code: int
    body: Json
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


class Objects:
    """What there is, by kind and name, in one namespace, with versions and those who watch."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self._objects: dict[tuple[str, str], Json] = {}
        self._events: list[tuple[int, str, str, Json]] = []
        self._version = 100

    def get(self, kind: str, name: str) -> Json | None:
        with self.changed:
            return copy.deepcopy(self._objects.get((kind, name)))

    def all(self, kind: str) -> list[Json]:
        with self.changed:
            return [copy.deepcopy(o) for (k, _), o in self._objects.items() if k == kind]

    @property
    def version(self) -> str:
        return str(self._version)

    def put(self, kind: str, body: Json) -> Json:
        """Create or replace."""
        with self.changed:
            body = copy.deepcopy(body)
            name = body["metadata"]["name"]
            existed = (kind, name) in self._objects
            self._version += 1
            body["metadata"]["resourceVersion"] = str(self._version)
            self._objects[kind, name] = body
            self._tell(kind, "MODIFIED" if existed else "ADDED", body)
            return copy.deepcopy(body)

    def remove(self, kind: str, name: str) -> Json | None:
        with self.changed:
            gone = self._objects.pop((kind, name), None)
            if gone is not None:
                self._version += 1
                gone["metadata"]["resourceVersion"] = str(self._version)
                self._tell(kind, "DELETED", gone)
            return gone

    def change(self, kind: str, name: str, change: Callable[[Json], None]) -> Json | None:
        """Change an object in place; None if there is none."""
        with self.changed:
            body = self.get(kind, name)
            if body is None:
                return None
            change(body)
            return self.put(kind, body)

    def events_after(self, version: int, kind: str) -> list[tuple[int, str, Json]]:
        return [(v, what, body) for v, k, what, body in self._events if v > version and k == kind]

    def _tell(self, kind: str, what: str, body: Json) -> None:
        self._events.append((self._version, kind, what, copy.deepcopy(body)))
        self.changed.notify_all()


class KubeApi:
    """The server: `objects` is what there is; the rest is what befalls whoever asks."""

    def __init__(self) -> None:
        self.objects = Objects()
        self.namespaces = {"default", "team"}
        self.denied: set[tuple[str, str]] = set()
        """Verbs on resources (`pods/log`) that whoever asks may not do."""
        self.full: set[str] = set()
        """Resources of which a quota lets nobody create another one."""
        self.faults: list[Fault] = []
        self.log_of: Callable[[str], Path | None] = lambda pod: None
        self.has_controller = False
        """With one, a Job that is deleted in the foreground is there until that has removed it."""
        self.watch_seconds = 30.0
        self.requests: list[str] = []
        api = self

        class Handler(_Handler):
            server_api = api

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.closing = False
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def kubeconfig(self, folder: Path, *, namespace: str = "default", url: str = "") -> Path:
        """A kubeconfig that leads here, in the context `test`."""
        path = folder / "kubeconfig"
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": url or self.url}}],
            "users": [{"name": "me", "user": {"token": "t"}}],
            "contexts": [
                {
                    "name": "test",
                    "context": {"cluster": "test", "user": "me", "namespace": namespace},
                }
            ],
            "current-context": "test",
        }
        path.write_text(json.dumps(document))
        return path

    def fault_for(self, when: str) -> Fault | None:
        for fault in self.faults:
            if fault.when == when:
                fault.times -= 1
                if not fault.times:
                    self.faults.remove(fault)
                return fault
        return None

    def close(self) -> None:
        self.closing = True
        with self.objects.changed:
            self.objects.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def kube_api() -> Iterator[KubeApi]:
    api = KubeApi()
    try:
        yield api
    finally:
        api.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_api: KubeApi

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PATCH(self) -> None:
        self._serve("PATCH")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self, method: str) -> None:
        try:
            self._answer(method)
        except (BrokenPipeError, ConnectionResetError):  # whoever watched has seen enough
            self.close_connection = True

    def _answer(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == _REVIEWS:
            return self._review(body)
        match = _PATH.fullmatch(url.path)
        assert match is not None, f"{method} {self.path} is not spoken here"
        parts = match.groupdict()
        resource = "/".join(filter(None, (parts["resource"], parts["subresource"])))
        verb = _verb(method, parts["name"], query)
        api = self.server_api
        api.requests.append(f"{verb} {resource}")
        if (fault := api.fault_for(f"{method} {resource}")) is not None:
            return self._send(fault.code, fault.body, fault.headers)
        if (verb, resource) in api.denied:
            return self._send(403, _forbidden(verb, resource, parts["namespace"]))
        if method == "POST" and parts["namespace"] not in api.namespaces:
            name = parts["namespace"]
            gone = status(404, "NotFound", f'namespaces "{name}" not found',
                          name=name, kind="namespaces")  # fmt: skip
            return self._send(404, gone)
        kind = _KINDS[parts["resource"]]
        if verb == "watch":
            return self._watch(kind, query)
        if verb == "list":
            return self._list(kind, query)
        if method == "POST":
            return self._create(kind, parts["resource"], body)
        name = str(parts["name"])
        if parts["subresource"]:
            return self._log(name, follow=query.get("follow") == "true")
        found = api.objects.get(kind, name)
        if found is None:
            missing = f"{_WORDS[kind].format(name)} not found"
            details = {"name": name, "group": _GROUPS.get(parts["resource"]), "kind": resource}
            return self._send(404, status(404, "NotFound", missing, **details))
        if method == "PATCH":
            assert self.headers["Content-Type"] == "application/merge-patch+json"
            changed = api.objects.change(kind, name, lambda old: _merge(old, body))
            return self._send(200, changed or {})
        if method == "DELETE":
            return self._delete(kind, name, query)
        return self._send(200, found)

    def _create(self, kind: str, resource: str, body: Json) -> None:
        api, name = self.server_api, body["metadata"]["name"]
        if resource in api.full:
            words = _WORDS[kind].format(name)
            text = (
                f"{words} is forbidden: exceeded quota: team, requested: count/{resource}=1, "
                f"used: count/{resource}=5, limited: count/{resource}=5"
            )
            return self._send(403, status(403, "Forbidden", text, name=name, kind=resource))
        if api.objects.get(kind, name) is not None:
            text = f"{_WORDS[kind].format(name)} already exists"
            return self._send(409, status(409, "AlreadyExists", text, name=name, kind=resource))
        body["metadata"] |= {
            "uid": secrets.token_hex(16),
            "namespace": self.path.split("/namespaces/")[1].split("/")[0],
            "creationTimestamp": now(),
        }
        if kind == "Job":
            _fill_in(body)
        return self._send(201, api.objects.put(kind, body))

    def _delete(self, kind: str, name: str, query: dict[str, str]) -> None:
        api = self.server_api
        if kind == "Job" and api.has_controller:
            assert query["propagationPolicy"] == "Foreground", "or its pods would outlive it"
            marked = {"metadata": {"deletionTimestamp": now()}}
            return self._send(
                200, api.objects.change(kind, name, lambda o: _merge(o, marked)) or {}
            )
        api.objects.remove(kind, name)
        return self._send(200, status(200, "", ""))

    def _list(self, kind: str, query: dict[str, str]) -> None:
        objects = self.server_api.objects
        items = [each for each in objects.all(kind) if _selected(each, query)]
        listing = {
            "kind": f"{kind}List",
            "metadata": {"resourceVersion": objects.version},
            "items": items,
        }
        self._send(200, listing)

    def _watch(self, kind: str, query: dict[str, str]) -> None:
        api = self.server_api
        since = int(query["resourceVersion"])
        self._begin_stream()
        with api.objects.changed:
            while not api.closing:
                found = api.objects.events_after(since, kind)
                for version, what, body in found:
                    since = version
                    if _selected(body, query):
                        self._write(json.dumps({"type": what, "object": body}).encode() + b"\n")
                if (fault := api.fault_for("WATCH events")) is not None:
                    event = {"type": "ERROR", "object": fault.body}
                    self._write(json.dumps(event).encode() + b"\n")
                    break
                if not api.objects.changed.wait(api.watch_seconds):
                    break
        self._end_stream()

    def _log(self, pod: str, *, follow: bool) -> None:
        api = self.server_api
        path = api.log_of(pod)
        if path is None:
            text = f'pods "{pod}" not found'
            return self._send(404, status(404, "NotFound", text, name=pod, kind="pods"))
        self._begin_stream()
        number = 0  # each line's time, in nanoseconds
        with path.open("rb") as file:
            while not api.closing:
                over = not follow or _has_ended(api.objects.get("Pod", pod))
                for line in file:
                    number += 1
                    self._write(f"2026-01-01T00:00:00.{number:09d}Z ".encode() + line)
                if over:
                    break
                with api.objects.changed:
                    api.objects.changed.wait(0.05)
        return self._end_stream()

    def _review(self, body: Json) -> None:
        asked = body["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        allowed = (asked["verb"], resource) not in self.server_api.denied
        self._send(201, {**body, "status": {"allowed": allowed}})

    # ------------------------------------------------------------------ the wire

    def _send(self, code: int, body: Json, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _write(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")


def _verb(method: str, name: str | None, query: dict[str, str]) -> str:
    if method == "GET":
        if name is not None:
            return "get"
        return "watch" if query.get("watch") == "true" else "list"
    return {"POST": "create", "PATCH": "patch", "DELETE": "delete"}[method]


def _forbidden(verb: str, resource: str, namespace: str) -> Json:
    text = (
        f'{resource} is forbidden: User "me" cannot {verb} resource "{resource}" '
        f'in API group "" in the namespace "{namespace}"'
    )
    return status(403, "Forbidden", text, kind=resource)


def _selected(body: Json, query: dict[str, str]) -> bool:
    name = query.get("fieldSelector", "").removeprefix("metadata.name=")
    if name and body["metadata"]["name"] != name:
        return False
    key, _, value = query.get("labelSelector", "").partition("=")
    return not key or body["metadata"].get("labels", {}).get(key) == value


def _merge(old: Json, changes: Json) -> None:
    """RFC 7386."""
    for key, value in changes.items():
        if value is None:
            old.pop(key, None)
        elif isinstance(value, dict):
            _merge(old.setdefault(key, {}), value)
        else:
            old[key] = value


def _fill_in(job: Json) -> None:
    """Defaults, and what the Job controller puts on the pods."""
    spec, uid = job["spec"], job["metadata"]["uid"]
    spec.setdefault("suspend", False)
    spec |= {"completionMode": "NonIndexed", "manualSelector": False}
    spec["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
    spec["template"]["metadata"]["labels"] |= {
        "batch.kubernetes.io/controller-uid": uid,
        "batch.kubernetes.io/job-name": job["metadata"]["name"],
    }
    spec["template"]["spec"] |= {"dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler"}
    job["status"] = {}


def _has_ended(pod: Json | None) -> bool:
    return pod is None or pod["status"]["phase"] in ("Succeeded", "Failed")
