"""The Kubernetes API, as far as runs need it: Jobs, their pods and logs, and ConfigMaps.

Objects go in and come out as plain JSON. What the API refuses is a ClusterError that says what to
do next. Nothing else in this package imports the library.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import ClusterDenied, ClusterError
from runner.launch.kubernetes.names import JOB_LABEL
from runner.launch.kubernetes.pod import CONTAINER

log = logging.getLogger(__name__)

_CONNECT_SECONDS, _READ_SECONDS = 5.0, 30.0
_WATCH_SECONDS = 240
_TRIES = 5
_LONGEST_RETRY_SECONDS = 30.0
_PAUSE_SECONDS = 1.0
_IN_POD = "KUBERNETES_SERVICE_HOST"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_MERGE = "application/merge-patch+json"

Json = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A resource as permissions name it."""

    group: str
    resource: str
    subresource: str = ""

    @property
    def words(self) -> str:
        name = "/".join(filter(None, (self.resource, self.subresource)))
        return f"{name}.{self.group}" if self.group else name


JOBS = Kind("batch", "jobs")
CONFIG_MAPS = Kind("", "configmaps")
PODS = Kind("", "pods")
LOGS = Kind("", "pods", "log")


class Absent(ClusterError):
    """There is no object of this name."""


class Taken(ClusterError):
    """There is an object of this name already, or it has changed meanwhile."""


class _Expired(Exception):
    """A watch is too far behind: everything has to be looked at again."""


class Cluster:
    """One namespace of a cluster, and whoever asks there."""

    def __init__(
        self, api: Any, namespace: str, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        from kubernetes import client

        self.namespace, self._api, self._sleep = namespace, api, sleep
        self._batch, self._core = client.BatchV1Api(api), client.CoreV1Api(api)

    # ------------------------------------------------------------------ changing

    def create_config_map(self, body: Json) -> None:
        """Taken if there is one."""
        self._ask("create", CONFIG_MAPS, self._core.create_namespaced_config_map, body=body)

    def delete_config_map(self, name: str) -> None:
        """Nothing is said if there is none."""
        with contextlib.suppress(Absent):
            self._ask("delete", CONFIG_MAPS, self._core.delete_namespaced_config_map, name=name)

    def give_to(self, config_map: str, job: Mapping[str, Any]) -> None:
        """Make a ConfigMap go when its Job goes."""
        owner = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": job["metadata"]["name"],
            "uid": job["metadata"]["uid"],
        }
        body = {"metadata": {"ownerReferences": [owner]}}
        patch = self._core.patch_namespaced_config_map
        self._ask("patch", CONFIG_MAPS, patch, name=config_map, body=body, _content_type=_MERGE)

    def create_job(self, body: Json) -> Json:
        """The Job as it is then. Taken if there is one of this name."""
        created: Json = self._ask("create", JOBS, self._batch.create_namespaced_job, body=body)
        return created

    def change_job(self, name: str, changes: Json) -> None:
        """Merge these changes into a Job; null removes a key."""
        patch = self._batch.patch_namespaced_job
        self._ask("patch", JOBS, patch, name=name, body=changes, _content_type=_MERGE)

    def delete_job(self, name: str) -> None:
        """Begin to delete it: it is gone when its pods have saved and ended."""
        delete = self._batch.delete_namespaced_job
        with contextlib.suppress(Absent):
            self._ask("delete", JOBS, delete, name=name, propagation_policy="Foreground")

    # ------------------------------------------------------------------ looking

    def job(self, name: str) -> Json | None:
        """The Job, or None."""
        try:
            found: Json = self._ask("get", JOBS, self._batch.read_namespaced_job, name=name)
        except Absent:
            return None
        return found

    def pods(self, job: str) -> list[Json]:
        """The pods of a Job that are still known, oldest first."""
        selector = f"{JOB_LABEL}={job}"
        listing = self._ask("list", PODS, self._core.list_namespaced_pod, label_selector=selector)
        return sorted(listing["items"], key=lambda pod: str(_meta(pod, "creationTimestamp")))

    def follow_job(self, name: str) -> Iterator[Json | None]:
        """The Job now, and after each change; None while there is none. It never ends."""
        select = {"field_selector": f"metadata.name={name}"}
        while True:
            listing = self._ask("list", JOBS, self._batch.list_namespaced_job, **select)
            yield next(iter(listing["items"]), None)
            version = listing["metadata"]["resourceVersion"]
            try:
                while True:
                    for event in self._watch(version, select):
                        version = event["object"]["metadata"]["resourceVersion"]
                        if event["type"] != "BOOKMARK":
                            yield None if event["type"] == "DELETED" else event["object"]
            except _Expired:
                log.debug("the watch of job %s has expired", name)

    def log_lines(self, pod: str, *, follow: bool) -> Iterator[bytes]:
        """Lines with the time of each in front; until the container's end, with `follow`.

        Absent if there is no such pod, or its node is gone. A connection that breaks ends it.
        """
        response = self._open(
            "get",
            LOGS,
            self._core.read_namespaced_pod_log,
            timeout=(_CONNECT_SECONDS, None if follow else _READ_SECONDS),
            name=pod,
            container=CONTAINER,
            follow=follow,
            timestamps=True,
        )
        yield from _lines_of(response)

    def _watch(self, version: str, select: Json) -> Iterator[Json]:
        """Events from there on, until the server ends the watch, which is nothing unusual."""
        response = self._open(
            "watch",
            JOBS,
            self._batch.list_namespaced_job,
            timeout=(_CONNECT_SECONDS, _WATCH_SECONDS + _READ_SECONDS),
            watch=True,
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=_WATCH_SECONDS,
            **select,
        )
        any_came = False
        for line in _lines_of(response):
            event = json.loads(line)
            if event["type"] == "ERROR":
                if event["object"].get("code") == 410:
                    raise _Expired
                raise ClusterError(f"the watch was ended: {event['object'].get('message')}")
            any_came = True
            yield event
        if not any_came:
            self._sleep(_PAUSE_SECONDS)

    # ------------------------------------------------------------------ asking

    def _ask(self, verb: str, kind: Kind, method: Callable[..., Any], **arguments: Any) -> Any:
        """The answer as plain JSON."""
        timeout = (_CONNECT_SECONDS, _READ_SECONDS)
        return json.loads(self._open(verb, kind, method, timeout=timeout, **arguments).data)

    def _open(
        self, verb: str, kind: Kind, method: Callable[..., Any], timeout: Any, **arguments: Any
    ) -> Any:
        """The answer, unread. A server that is busy is asked again when it says so."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        for left in reversed(range(_TRIES)):
            try:
                return method(
                    namespace=self.namespace,
                    _preload_content=False,
                    _request_timeout=timeout,
                    **arguments,
                )
            except ApiException as error:
                pause = _retry_seconds(error)
                if pause is None or not left:
                    raise self._refusal(verb, kind, error) from error
                log.info("the cluster is busy: asked again in %g s", pause)
                self._sleep(pause)
            except (HTTPError, OSError) as error:
                # What may have been done already is not asked for twice.
                if verb not in ("get", "list", "watch") or not left:
                    raise self._out_of_reach(error) from error
                self._sleep(_PAUSE_SECONDS)
        raise AssertionError("the last try returns or raises")

    def _out_of_reach(self, error: Exception) -> ClusterError:
        return ClusterError(
            f"the cluster at {self._api.configuration.host} cannot be reached "
            f"({type(error).__name__}); is it running, and is the kubeconfig's context the right "
            "one? (--context, KUBECONFIG)"
        )

    def _refusal(self, verb: str, kind: Kind, error: Any) -> ClusterError:
        """What to do about an answer that is none of the good ones."""
        status = _status_of(error)
        message = str(status.get("message") or error.reason or "")
        details = status.get("details") or {}
        if error.status == 404 and details.get("kind") == "namespaces":
            return ClusterError(
                f"there is no namespace {self.namespace}; create it, or name another one with "
                "--namespace or kubernetes.namespace"
            )
        if error.status == 404:
            return Absent(f"{kind.words}: {message}")
        if error.status == 409:
            return Taken(f"{kind.words}: {message}")
        if error.status == 401:
            return ClusterError(
                "the cluster does not know who asks: the credentials in the kubeconfig are wrong, "
                "or have expired; log in again"
            )
        if error.status == 403:
            if self._may(verb, kind) is False:
                return ClusterDenied(verb, kind.words, self.namespace)
            return ClusterError(
                f"the cluster refuses to {verb} {kind.words} in the namespace {self.namespace}: "
                f"{message}. Ask for less, free something, or have a quota or a policy changed"
            )
        return ClusterError(
            f"the cluster refuses to {verb} {kind.words} ({error.status}): {message}"
        )

    def _may(self, verb: str, kind: Kind) -> bool:
        """Whether whoever asks is allowed to: a refusal may be a quota's or a policy's as well.

        Everybody may ask that about himself; whoever gets no answer is taken not to be.
        """
        from kubernetes import client
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        attributes = {
            "namespace": self.namespace,
            "verb": verb,
            "group": kind.group,
            "resource": kind.resource,
            "subresource": kind.subresource,
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {k: v for k, v in attributes.items() if v}},
        }
        ask = client.AuthorizationV1Api(self._api).create_self_subject_access_review
        try:
            answer = ask(body=review, _preload_content=False, _request_timeout=_READ_SECONDS)
            return bool(json.loads(answer.data)["status"]["allowed"])
        except (ApiException, HTTPError, OSError, ValueError, KeyError, TypeError):
            return False


def connect(context: str | None = None, namespace: str | None = None) -> Cluster:
    """The cluster of the kubeconfig, or the one that this process is in a pod of.

    ClusterError if there is neither, or the library is missing. No request is made.
    """
    try:
        from kubernetes import client, config
    except ModuleNotFoundError as error:
        raise ClusterError(
            "the launcher kubernetes needs a library: pip install 'runner[kubernetes]'"
        ) from error
    settings = client.Configuration()
    path = os.environ.get("KUBECONFIG") or "~/.kube/config"
    try:
        if context is None and "KUBECONFIG" not in os.environ and os.environ.get(_IN_POD):
            config.load_incluster_config(client_configuration=settings)
            own = _own_namespace()
        else:
            contexts, active = config.list_kube_config_contexts(config_file=path)
            if context is not None:
                active = next((c for c in contexts if c["name"] == context), None)
                if active is None:
                    known = ", ".join(str(c["name"]) for c in contexts)
                    raise ClusterError(f"--context {context}: {path} has none such, but {known}")
            config.load_kube_config(path, context=context, client_configuration=settings)
            own = active["context"].get("namespace")
    except config.ConfigException as error:
        raise ClusterError(
            f"no cluster is known: {error}; name a kubeconfig in KUBECONFIG, or a context in it "
            "with --context"
        ) from error
    settings.retries = False  # it is decided here what is asked again
    return Cluster(client.ApiClient(settings), namespace or own or "default")


def _own_namespace() -> str | None:
    try:
        return _NAMESPACE_FILE.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _retry_seconds(error: Any) -> float | None:
    """How long a busy server asks to be left alone; None if it is not that."""
    if error.status not in (429, 503):
        return None
    asked = (error.headers or {}).get("Retry-After")
    if asked is None and error.status == 503:
        return None
    seconds = float(asked) if asked is not None and asked.isdigit() else _PAUSE_SECONDS
    return min(seconds, _LONGEST_RETRY_SECONDS)


def _status_of(error: Any) -> Json:
    """The API's own account of an error. Source: the API conventions, `Status`."""
    try:
        status = json.loads(error.body)
    except (TypeError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _lines_of(response: Any) -> Iterator[bytes]:
    """Whole lines of an answer that comes bit by bit."""
    from urllib3.exceptions import HTTPError

    pending = b""
    try:
        while block := response.read1(1 << 16):
            *lines, pending = (pending + block).split(b"\n")
            yield from (line for line in lines if line)
    except (HTTPError, OSError) as error:
        log.debug("the connection has ended: %s", error)
    finally:
        response.close()
    if pending:
        yield pending


def _meta(document: Mapping[str, Any], key: str) -> Any:
    return document["metadata"].get(key)
