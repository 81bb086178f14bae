"""What a Job and its pods say of a run. Pure: objects of the API in, facts out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from runner import exitcodes
from runner.launch.kubernetes.names import STOPPED_ANNOTATION
from runner.launch.kubernetes.objects import QUEUE_LABEL

Json = Mapping[str, Any]


class Phase(Enum):
    """Where a run is in its cluster."""

    NONE = "none"  # there is no Job
    QUEUED = "queued"  # suspended, by Kueue or by somebody
    STOPPED = "stopped"  # suspended by `runner stop`
    PENDING = "pending"  # no pod runs yet
    RUNNING = "running"
    ENDING = "ending"  # it is being deleted, or its pods are
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens unless somebody submits it again."""
        return self in (Phase.NONE, Phase.STOPPED, Phase.SUCCEEDED, Phase.FAILED)


_OVER = {"Complete": Phase.SUCCEEDED, "Failed": Phase.FAILED}


def phase_of(job: Json | None) -> Phase:
    """Source: https://kubernetes.io/docs/concepts/workloads/controllers/job/"""
    if job is None:
        return Phase.NONE
    if (condition := _final_condition(job)) is not None:
        return _OVER[condition["type"]]
    status = job.get("status", {})
    if job["metadata"].get("deletionTimestamp"):
        return Phase.ENDING
    if job["spec"].get("suspend"):
        if status.get("active") or status.get("terminating"):
            return Phase.ENDING
        stopped = STOPPED_ANNOTATION in job["metadata"].get("annotations", {})
        return Phase.STOPPED if stopped else Phase.QUEUED
    return Phase.RUNNING if status.get("ready") or status.get("active") else Phase.PENDING


def is_queued_by_kueue(job: Json) -> bool:
    return QUEUE_LABEL in job["metadata"].get("labels", {})


def why_failed(job: Json) -> str | None:
    """The Job controller's own words, if it has failed."""
    condition = _final_condition(job)
    if condition is None or condition["type"] != "Failed":
        return None
    return ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))


def exit_code_of(job: Json | None, pods: Sequence[Json]) -> int:
    """As `runner run` would have ended: the newest pod's code where a rule of it ended the Job."""
    phase = phase_of(job)
    if phase is Phase.SUCCEEDED:
        return exitcodes.FINISHED
    if phase is Phase.STOPPED:
        return exitcodes.INTERRUPTED
    condition = None if job is None else _final_condition(job)
    if condition is not None and condition.get("reason") == "PodFailurePolicy":
        codes = [code for pod in pods if (code := exit_code_of_pod(pod))]
        return codes[-1] if codes else exitcodes.GIVEN_UP
    return exitcodes.GIVEN_UP


def exit_code_of_pod(pod: Json) -> int | None:
    """Of its container, if that has ended."""
    for container in pod.get("status", {}).get("containerStatuses", ()):
        ended = container.get("state", {}).get("terminated")
        if ended is not None:
            return int(ended["exitCode"])
    return None


def pod_row(pod: Json) -> dict[str, Any]:
    """What `runner status` shows of a pod."""
    status = pod.get("status", {})
    disrupted = (c for c in status.get("conditions", ()) if c["type"] == "DisruptionTarget")
    disruption = next((c.get("reason") for c in disrupted if c["status"] == "True"), None)
    return {
        "name": pod["metadata"]["name"],
        "phase": status.get("phase"),
        "node": pod.get("spec", {}).get("nodeName"),
        "exit_code": exit_code_of_pod(pod),
        "reason": disruption or status.get("reason") or _waiting_for(status),
        "created_at": pod["metadata"].get("creationTimestamp"),
    }


def _waiting_for(status: Json) -> str | None:
    for container in status.get("containerStatuses", ()):
        waiting = container.get("state", {}).get("waiting")
        if waiting is not None:
            return str(waiting.get("reason"))
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("reason"))
    return None


def differences(wanted: Json, live: Json) -> list[str]:
    """What a live Job has otherwise than the one that is wanted; one line each.

    Defaults that the API has filled in, and what Kueue and the Job controller add, are no
    difference. Whether it is suspended at the moment is none either.
    """
    wanted_spec = {k: v for k, v in wanted["spec"].items() if k != "suspend"}
    labels = wanted["metadata"].get("labels", {})
    return [
        *_differences("metadata.labels", labels, live["metadata"].get("labels", {})),
        *_differences("spec", wanted_spec, live["spec"]),
    ]


def _differences(path: str, wanted: Any, live: Any) -> Iterator[str]:
    if isinstance(wanted, dict) and isinstance(live, dict):
        for key, value in wanted.items():
            yield from _differences(f"{path}.{key}", value, live.get(key))
    elif isinstance(wanted, list) and isinstance(live, list) and len(wanted) == len(live):
        for index, (one, other) in enumerate(zip(wanted, live, strict=True)):
            yield from _differences(f"{path}[{index}]", one, other)
    elif wanted != live and not (wanted in ({}, [], None) and live in ({}, [], None)):
        yield f"{path}: {_short(live)} -> {_short(wanted)}"


def _short(value: Any) -> str:
    text = "(not set)" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _final_condition(job: Json) -> Json | None:
    for condition in job.get("status", {}).get("conditions", ()):
        if condition["type"] in _OVER and condition["status"] == "True":
            found: Json = condition
            return found
    return None
