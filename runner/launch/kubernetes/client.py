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
from pathlib import Path
from typing import Any

from runner.errors import ClusterError
from runner.launch.kubernetes.answers import (
    CONFIG_MAPS,
    JOBS,
    LOGS,
    PODS,
    REVIEWS,
    Absent,
    Answer,
    Kind,
    refusal,
)
from runner.launch.kubernetes.names import JOB_LABEL
from runner.launch.kubernetes.pod import CONTAINER

log = logging.getLogger(__name__)

_CONNECT_SECONDS, _READ_SECONDS = 5.0, 30.0
_WATCH_SECONDS = 240
_FOLLOW_SECONDS = 600.0  # of silence; then it is asked anew
_TRIES = 5
_PAUSE_SECONDS = 1.0
_IN_POD = "KUBERNETES_SERVICE_HOST"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_MERGE = "application/merge-patch+json"

Json = dict[str, Any]


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

    def may(self, verb: str, kind: Kind) -> bool:
        """Whether whoever asks is allowed to. Everybody may ask that about himself."""
        from kubernetes import client

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
        create = client.AuthorizationV1Api(self._api).create_self_subject_access_review
        answer = self._ask("create", REVIEWS, create, body=review)
        return bool(answer["status"]["allowed"])

    def log_lines(self, pod: str, *, follow: bool) -> Iterator[bytes]:
        """Lines with the time of each in front; until the container's end, with `follow`.

        Absent if there is no such pod, or its node is gone. A connection that breaks ends it.
        """
        response = self._open(
            "get",
            LOGS,
            self._core.read_namespaced_pod_log,
            timeout=(_CONNECT_SECONDS, _FOLLOW_SECONDS if follow else _READ_SECONDS),
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
                    **({} if kind is REVIEWS else {"namespace": self.namespace}),
                    _preload_content=False,
                    _request_timeout=timeout,
                    **arguments,
                )
            except ApiException as error:
                answer = Answer(
                    error.status or 0, verb, kind, self.namespace, error.body, error.headers or {}
                )
                pause = answer.retry_seconds
                if pause is None or not left:
                    raise refusal(answer, lambda: self._surely_may(verb, kind)) from error
                log.info("the cluster is busy: asked again in %g s", pause)
                self._sleep(pause)
            except (HTTPError, OSError) as error:
                # What may have been done already is not asked for twice.
                if verb not in ("get", "list", "watch") or not left:
                    raise self._out_of_reach(error) from error
                self._sleep(_PAUSE_SECONDS)
        raise AssertionError("the last try returns or raises")

    def _surely_may(self, verb: str, kind: Kind) -> bool:
        try:
            return self.may(verb, kind)
        except ClusterError:  # whoever gets no answer to that is not allowed to
            return False

    def _out_of_reach(self, error: Exception) -> ClusterError:
        return ClusterError(
            f"the cluster at {self._api.configuration.host} cannot be reached "
            f"({type(error).__name__}); is it running, and is the kubeconfig's context the right "
            "one? (--context, KUBECONFIG)"
        )


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
