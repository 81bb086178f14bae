"""From a job file to the objects of its run: a Job, and the ConfigMap with the job file.

Pure. What the pod's own supervisor has no use for (the image, this section) is left out of the
file that it reads. The ConfigMap's name has a hash of its content, and it is immutable: a pod that
is started again later reads the file that the run began with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from runner.errors import JobError
from runner.exitcodes import FENCED, GIVEN_UP, PREEMPTED, USAGE
from runner.job import Job, is_s3
from runner.job_metrics import OFF
from runner.launch.kubernetes import names, pod, profiles

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
LOST_STORE = f"{pod.STATE_FOLDER}/store"

_MAX_CONFIG_MAP_BYTES = 1_000_000  # the API's own limit is 1 MiB, for all of the object
_LARGEST_VALUES = 255  # of onExitCodes
_STR = "tag:yaml.org,2002:str"
_OTHERWISE = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"}
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./:@-]*")
_NOT_FOR_PODS = {"launcher", "image", "network", "user", "mounts", "kubernetes", "workdir"}


@dataclass(frozen=True)
class Rendered:
    """The objects of a run, in the order in which they are created, and what is to be said."""

    run_id: str
    name: str
    config_map: dict[str, Any]
    job: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [self.config_map, self.job]

    def as_yaml(self) -> str:
        """What `kubectl apply -f -` takes."""
        dumped = (
            yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)
            for each in self.objects
        )
        return "---\n".join(dumped)


def render(job: Job, run_id: str, options: Sequence[str] = ()) -> Rendered:
    """The objects of a run of this job; `options` are more arguments of `runner run`.

    JobError if the job lacks what only a cluster needs.
    """
    _check(job)
    name = names.object_name(run_id)
    text = job_file(job)
    own = job.kubernetes
    metadata: dict[str, Any] = {
        **({} if own.namespace is None else {"namespace": own.namespace}),
        "labels": names.labels(job, name),
    }
    config_name = f"{name}-{names.short_hash(text)}"
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": config_name, **metadata},
        "immutable": True,
        "data": {pod.JOB_FILE: text},
    }
    queue = {} if own.queue is None else {QUEUE_LABEL: own.queue}
    manifest = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            **metadata,
            "labels": {**metadata["labels"], **queue},
            "annotations": {
                names.RUN_ID_ANNOTATION: run_id,
                names.STORE_ANNOTATION: job.store if lasting_store(job) else LOST_STORE,
                **own.annotations,
            },
        },
        "spec": _job_spec(job)
        | {"template": pod.pod_template(job, name, run_id, config_name, options)},
    }
    return Rendered(run_id, name, config_map, manifest, tuple(warnings(job, run_id)))


def _job_spec(job: Job) -> dict[str, Any]:
    """How the Job treats its pods.

    Source: https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy
    """
    own = job.kubernetes
    spec: dict[str, Any] = {
        "backoffLimit": job.restart.failures,
        "completions": 1,
        "parallelism": 1,
        "podFailurePolicy": {"rules": _failure_rules(job)},
        # A pod that ends takes its grace to save: the next one waits for it.
        "podReplacementPolicy": "Failed",
        "ttlSecondsAfterFinished": int(own.ttl_seconds),
    }
    if own.deadline_seconds is not None:
        spec["activeDeadlineSeconds"] = max(1, int(own.deadline_seconds))
    if own.queue is not None:
        spec["suspend"] = True  # Kueue starts it
    return spec


def _failure_rules(job: Job) -> list[dict[str, Any]]:
    """The first that matches holds; what no rule matches counts against the backoff limit."""
    final = ({USAGE, GIVEN_UP, FENCED} | set(job.restart.never)) - {PREEMPTED}

    def codes(values: Sequence[int]) -> dict[str, Any]:
        return {
            "containerName": pod.CONTAINER,
            "operator": "In",
            "values": list(values)[:_LARGEST_VALUES],
        }

    return [
        {"action": "FailJob", "onExitCodes": codes(sorted(final))},
        {
            "action": "Ignore",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
        # Saved after a SIGTERM that was no disruption: Kueue suspends, somebody deletes the pod.
        {"action": "Ignore", "onExitCodes": codes([PREEMPTED])},
    ]


def job_file(job: Job) -> str:
    """The job file that the supervisor in the pod reads: what was given, as it means it there."""
    document = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
    document = {key: value for key, value in document.items() if key not in _NOT_FOR_PODS}
    document["store"] = job.store if lasting_store(job) else LOST_STORE
    if job.metrics.port != OFF:
        document["metrics"] = {**document.get("metrics", {}), "host": "0.0.0.0"}
    guard = document.pop("resources", {}).get("memory_guard")
    if guard is not None:
        document["resources"] = {"memory_guard": guard}
    if "checkpoint" in document:
        document["checkpoint"].pop("max_state", None)
    return yaml.dump(
        {key: value for key, value in document.items() if value != {} or key == "params"},
        Dumper=_Dumper,
        sort_keys=False,
        width=100,
        allow_unicode=True,
    )


def lasting_store(job: Job) -> bool:
    """Whether what is saved outlives the pod: in a bucket, or on a claim's volume."""
    if is_s3(job.store):
        return True
    path = PurePosixPath(job.store)
    return any(path.is_relative_to(mounted) for mounted in job.kubernetes.claims.values())


def warnings(job: Job, run_id: str) -> list[str]:
    """What works, and is probably not what is meant."""
    found = []
    name = names.object_name(run_id)
    if name != run_id:
        found.append(
            f"the Job's name is {name}: the run id {run_id!r} is no DNS label of at most 52"
            " characters"
        )
    if not lasting_store(job):
        found.append(
            f"the store is a directory ({job.store}): in a pod it is {LOST_STORE}, which is lost "
            "with the pod. Say --store s3://bucket/prefix, or mount a claim there with "
            "kubernetes.claims"
        )
    if (grace := profiles.grace_warning(job)) is not None:
        found.append(grace)
    if job.metrics.port == OFF:
        found.append(
            "metrics.port is off: the pod gets no probes, so a supervisor that hangs stays"
        )
    if job.mounts:
        sources = ", ".join(str(mount.source) for mount in job.mounts)
        found.append(
            f"mounts are left out ({sources}): a pod sees no folder of this machine. Have what is"
            " in them in the image, or on a volume that kubernetes.claims mounts"
        )
    if "network" in job.model_fields_set:
        found.append(
            f"network: {job.network} is left out: a pod has the cluster's network, which a"
            " NetworkPolicy restricts"
        )
    return found


def _check(job: Job) -> None:
    problems = []
    if job.image is None:
        problems.append("image: is missing: a pod needs one; give it, or say --image")
    if job.checkpoint.max_state_bytes is None and job.checkpoint.slots:
        problems.append(
            "checkpoint.max_state: is missing: the spool's size is part of the pod; give the size "
            "of a checkpoint (`runner checkpoints ls`) and some room, such as 2Gi"
        )
    if not isinstance(job.resources.gpus, int):
        problems.append("resources.gpus: in a cluster, expected how many, such as 2")
    if job.metrics.port == 0:
        problems.append("metrics.port: in a pod, expected a port from 1 to 65535, or off")
    paths = [*job.kubernetes.claims.values()]
    own = (pod.JOB_FOLDER, pod.SPOOL_ROOT, "/dev/shm", pod.STATE_FOLDER, "/tmp")
    for path in paths:
        if paths.count(path) > 1 or path in own:
            problems.append(f"kubernetes.claims: {path} is mounted twice")
    problems += _secrets_in(job)
    if not problems and len(job_file(job).encode()) > _MAX_CONFIG_MAP_BYTES:
        problems.append("the job file is larger than what fits into a ConfigMap (1 MiB)")
    if problems:
        raise JobError(*dict.fromkeys(problems))


def _secrets_in(job: Job) -> list[str]:
    """Variables that must not stand in a ConfigMap, which everybody in the namespace can read."""
    from runner.checkpoint.provenance import mask_secrets

    masked = mask_secrets(job.env)
    return [
        f"env.{name}: looks like a secret, and a ConfigMap is none; put it into a Secret, and name "
        "that in kubernetes.secrets"
        for name, value in job.env.items()
        if masked[name] != value
    ]


class _Dumper(yaml.SafeDumper):
    """YAML that 1.1 and 1.2 read alike, without anchors, texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> Any:
    style = None
    if "\n" in text:
        style = "|"
    elif not _PLAIN.fullmatch(text) or text.lower() in _OTHERWISE:
        # `1e-3` is a number in YAML 1.2 and text in 1.1; with `yes` it is the other way round.
        style = '"'
    return dumper.represent_scalar(_STR, text, style=style)


_Dumper.add_representer(str, _text)
