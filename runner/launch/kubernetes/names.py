"""What a run's objects are called, and the labels by which they are found.

A run id that is a DNS label is the Job's name. Any other is made one, with a hash so that two runs
never share it; the annotation `runner/run-id` has the id itself.
"""

from __future__ import annotations

import hashlib
import re

from runner.job import Job

RUN_ID_ANNOTATION = "runner/run-id"
STORE_ANNOTATION = "runner/store"
STOPPED_ANNOTATION = "runner/stopped"
JOB_LABEL = "batch.kubernetes.io/job-name"
"""Put on the pods by the Job controller."""

_MAX_NAME = 52  # leaves room for a hash behind it, within the 63 characters of a label
_HASH_LENGTH = 8
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_MAX_LABEL = 63


def object_name(run_id: str) -> str:
    """The name of a run's Job."""
    if len(run_id) <= _MAX_NAME and _NAME.fullmatch(run_id):
        return run_id
    readable = re.sub(r"[^a-z0-9]+", "-", run_id.lower())[: _MAX_NAME - _HASH_LENGTH - 1].strip("-")
    return f"{readable}-{short_hash(run_id)}"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_LENGTH]


def labels(job: Job, name: str) -> dict[str, str]:
    """The recommended labels of all objects of a run, and the job's own.

    Source: https://kubernetes.io/docs/concepts/overview/working-with-objects/common-labels/
    """
    return {
        "app.kubernetes.io/name": job.name,
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/version": _version(job.image or ""),
        "app.kubernetes.io/component": "training",
        "app.kubernetes.io/part-of": "runner",
        "app.kubernetes.io/managed-by": "runner",
        **job.kubernetes.labels,
    }


def _version(image: str) -> str:
    """The image's tag, or the beginning of its digest."""
    before, _, digest = image.partition("@")
    tag = before.rpartition("/")[2].partition(":")[2]
    text = tag or digest.removeprefix("sha256:")[:12] or "latest"
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9]+$", "", text[:_MAX_LABEL]) or "unknown"
