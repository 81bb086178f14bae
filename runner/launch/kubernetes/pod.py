"""The pod of a run: `runner run` as PID 1, its spool in memory, and as few rights as possible.

    /etc/runner/job.yaml   the job file, from the run's ConfigMap
    /run/runner            the spool: in memory, and counted as the container's memory
    /dev/shm               for loader workers: in memory, too
    /var/lib/runner        RUNNER_HOME, HOME and, where nothing else lasts, the store: goes with the
                           pod
    /tmp                   the same

The root file system is read-only. Whoever wants to write elsewhere mounts a claim there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from runner.job import Job
from runner.launch.kubernetes import profiles
from runner.launch.kubernetes.names import labels

CONTAINER = "runner"
JOB_FOLDER, JOB_FILE = "/etc/runner", "job.yaml"
SPOOL_ROOT = "/run/runner"
STATE_FOLDER = "/var/lib/runner"

_ZONE = "topology.kubernetes.io/zone"
_DEFAULT_USER = "65532:65532"  # nobody's in particular, as in images without root
_MEBIBYTE = 2**20
_SPOOL_EXTRA_BYTES = 64 * _MEBIBYTE  # board, markers, plan
_SHARE_FOR_SLOTS = 0.9  # of what is free, see `memory.slots_that_fit`
_OWN_MEMORY_BYTES = 512 * _MEBIBYTE  # supervisor and an idle trainer, where nobody says more


def spool_bytes(job: Job) -> int:
    """What the spool has to hold: every slot of the plan at its largest."""
    largest = job.checkpoint.max_state_bytes or 0
    return _SPOOL_EXTRA_BYTES + math.ceil(job.checkpoint.slots * largest / _SHARE_FOR_SLOTS)


def memory_bytes(job: Job) -> int:
    """What the container may use: its own, and all that it holds in memory-backed volumes."""
    own = job.resources.memory or _OWN_MEMORY_BYTES
    return own + spool_bytes(job) + (job.resources.shm or 0)


def pod_template(job: Job, name: str, run_id: str, config_map: str, options: Sequence[str]) -> Any:
    """The template of the run's pods. `options` go to `runner run`."""
    own = job.kubernetes
    user, _, group = (job.user or _DEFAULT_USER).partition(":")
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(
            profiles.grace_seconds(job) + own.margin_seconds
        ),
        "automountServiceAccountToken": False,  # cloud identities do not come by it
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": int(user),
            "runAsGroup": int(group or user),
            "fsGroup": int(group or user),
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(job, run_id, options)],
        "volumes": _volumes(job, config_map),
        "topologySpreadConstraints": [
            {  # runs that share a zone lose their nodes together
                "maxSkew": 1,
                "topologyKey": _ZONE,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {"app.kubernetes.io/part-of": "runner"}},
            }
        ],
    }
    optional: dict[str, Any] = {
        "serviceAccountName": own.service_account,
        "imagePullSecrets": [{"name": each} for each in own.image_pull_secrets],
        "priorityClassName": own.priority_class,
        "nodeSelector": profiles.node_selector(job),
        "tolerations": profiles.tolerations(job),
        "affinity": _affinity(own.zones),
    }
    metadata: dict[str, Any] = {"labels": labels(job, name)}
    if annotations := profiles.pod_annotations(job):
        metadata["annotations"] = annotations
    return {"metadata": metadata, "spec": spec | {k: v for k, v in optional.items() if v}}


def _container(job: Job, run_id: str, options: Sequence[str]) -> dict[str, Any]:
    own = job.kubernetes
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": job.image,
        # All in `command`: the image's entry point could be a shell, which signals never pass.
        "command": ["runner", "run", f"{JOB_FOLDER}/{JOB_FILE}", "--run-id", run_id, *options],
        "env": [
            # First, where kustomize puts what it patches.
            {"name": "RUNNER_GRACE_SECONDS", "value": f"{profiles.grace_seconds(job):g}"},
            {"name": "HOME", "value": STATE_FOLDER},
            {"name": "RUNNER_HOME", "value": STATE_FOLDER},
            {"name": "RUNNER_SPOOL_ROOT", "value": SPOOL_ROOT},
        ],
        "resources": _resources(job),
        "volumeMounts": [
            {"name": "job", "mountPath": JOB_FOLDER, "readOnly": True},
            {"name": "spool", "mountPath": SPOOL_ROOT},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "state", "mountPath": STATE_FOLDER},
            {"name": "tmp", "mountPath": "/tmp"},
            *(
                {"name": f"claim-{number}", "mountPath": path}
                for number, path in enumerate(own.claims.values())
            ),
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if job.metrics.is_served:
        container |= _probes(job.metrics.port)
    optional = {
        "workingDir": own.workdir,
        "imagePullPolicy": own.image_pull_policy,
        "envFrom": [{"secretRef": {"name": secret}} for secret in own.secrets],
    }
    return container | {key: value for key, value in optional.items() if value}


def _probes(port: int) -> dict[str, Any]:
    """The supervisor's own health: how long a step, a restore or an epoch takes is not judged."""
    check = {"httpGet": {"path": "/healthz", "port": "metrics"}, "timeoutSeconds": 5}
    return {
        "ports": [{"name": "metrics", "containerPort": port, "protocol": "TCP"}],
        # It listens before it restores: what takes long here is a cold start of Python.
        "startupProbe": {**check, "periodSeconds": 5, "failureThreshold": 60},
        "livenessProbe": {**check, "periodSeconds": 20, "failureThreshold": 6},
    }


def _resources(job: Job) -> dict[str, Any]:
    wanted = job.resources
    requests: dict[str, Any] = {"memory": _mebibytes(memory_bytes(job))}
    if wanted.cpus is not None:
        requests["cpu"] = f"{wanted.cpus:g}"  # no limit: a throttled trainer helps nobody
    limits: dict[str, Any] = {}
    if wanted.memory is not None:
        limits["memory"] = requests["memory"]
    if wanted.gpu_count:
        requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = wanted.gpu_count
    return {"requests": requests, **({"limits": limits} if limits else {})}


def _volumes(job: Job, config_map: str) -> list[dict[str, Any]]:
    shm = job.resources.shm
    return [
        {"name": "job", "configMap": {"name": config_map}},
        {
            "name": "spool",
            "emptyDir": {"medium": "Memory", "sizeLimit": _mebibytes(spool_bytes(job))},
        },
        {  # without a limit of its own, the container's is what it comes up against
            "name": "shm",
            "emptyDir": {"medium": "Memory", **({"sizeLimit": _mebibytes(shm)} if shm else {})},
        },
        {"name": "state", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        *(
            {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}}
            for number, claim in enumerate(job.kubernetes.claims)
        ),
    ]


def _affinity(zones: Sequence[str]) -> dict[str, Any]:
    """These zones if there is room, any other if not."""
    if not zones:
        return {}
    expression = {"key": _ZONE, "operator": "In", "values": list(zones)}
    preference = {"weight": 100, "preference": {"matchExpressions": [expression]}}
    return {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preference]}}


def _mebibytes(nbytes: int) -> str:
    return f"{math.ceil(nbytes / _MEBIBYTE)}Mi"
