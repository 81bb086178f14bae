"""What the API is asked for, and what its refusals mean. Pure: codes and `Status` objects in.

A refusal becomes a ClusterError that says what to do next; nothing depends on the text of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runner.errors import ClusterDenied, ClusterError

_PAUSE_SECONDS, _LONGEST_RETRY_SECONDS = 1.0, 30.0


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
REVIEWS = Kind("authorization.k8s.io", "selfsubjectaccessreviews")


RIGHTS: tuple[tuple[str, Kind], ...] = (
    *((verb, JOBS) for verb in ("get", "list", "watch", "create", "patch", "delete")),
    *((verb, CONFIG_MAPS) for verb in ("create", "patch", "delete")),
    ("list", PODS),
    ("get", LOGS),
)
"""All that is ever asked for here."""


class Absent(ClusterError):
    """There is no object of this name."""


class Taken(ClusterError):
    """There is an object of this name already, or it has changed meanwhile."""


@dataclass(frozen=True)
class Answer:
    """An answer that is no good one: its code, what it was an answer to, and what it says."""

    code: int
    verb: str
    kind: Kind
    namespace: str
    body: Any
    headers: Mapping[str, str]

    @property
    def status(self) -> dict[str, Any]:
        """The API's own account of it. Source: the API conventions, `Status`."""
        try:
            status = json.loads(self.body)
        except (TypeError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    @property
    def retry_seconds(self) -> float | None:
        """How long a busy server asks to be left alone; None if it is not that."""
        asked = self.headers.get("Retry-After")
        if self.code not in (429, 503) or (asked is None and self.code == 503):
            return None
        seconds = float(asked) if asked is not None and asked.isdigit() else _PAUSE_SECONDS
        return min(seconds, _LONGEST_RETRY_SECONDS)


def refusal(answer: Answer, may: Callable[[], bool]) -> ClusterError:
    """What to do about it. `may` tells whether whoever asked is allowed to do such things.

    That is asked for a 403, which a quota or a policy may have said as well.
    """
    status, namespace = answer.status, answer.namespace
    what = f"{answer.verb} {answer.kind.words}"
    message = str(status.get("message") or f"answer {answer.code}")
    if answer.code == 404 and (status.get("details") or {}).get("kind") == "namespaces":
        return ClusterError(
            f"there is no namespace {namespace}; create it, or name another one with "
            "--namespace or kubernetes.namespace"
        )
    if answer.code == 404:
        return Absent(f"{answer.kind.words}: {message}")
    if answer.code == 409:
        return Taken(f"{answer.kind.words}: {message}")
    if answer.code == 401:
        return ClusterError(
            "the cluster does not know who asks: the credentials in the kubeconfig are wrong, "
            "or have expired; log in again"
        )
    if answer.code == 403:
        if answer.kind is REVIEWS or not may():
            return ClusterDenied(answer.verb, answer.kind.words, namespace)
        return ClusterError(
            f"the cluster refuses to {what} in the namespace {namespace}: "
            f"{message}. Ask for less, free something, or have a quota or a policy changed"
        )
    return ClusterError(f"the cluster refuses to {what} ({answer.code}): {message}")
