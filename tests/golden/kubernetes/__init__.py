"""Jobs and the objects that they become: `<name>.yaml` for each, and `k8s/base/run.yaml`.

make golden        writes all of them anew; look at the difference before it is committed
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.job import Job, load_job
from runner.launch.kubernetes.objects import render

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
REFERENCE = ROOT / "k8s" / "base" / "run.yaml"

SMALL: dict[str, Any] = {
    "name": "small",
    "command": ["python", "train.py"],
    "image": "registry.example/team/small:1.0",
    "store": "s3://bucket/prefix",
    "checkpoint": {"max_state": "1Gi"},
}
FULL: dict[str, Any] = {
    "name": "full",
    "command": ["torchrun", "train.py", "--lr", "1e-3"],
    "image": "registry.example:5000/full@sha256:" + "5e" * 32,
    "user": "1000:2000",
    "params": {"text": "yes", "lines": "one\ntwo\n", "odd": [1e-5, "010", None, "1:30"]},
    "env": {"OMP_NUM_THREADS": "4"},
    "credentials": "pass",
    "store": "/mnt/checkpoints/full",
    "checkpoint": {"max_state": "12Gi", "slots": 3, "every": {"minutes": 5}},
    "preemption": {"grace": "100s", "notices": ["aws"]},
    "restart": {"failures": 3, "never": [2, 3, 75]},
    "resources": {
        "gpus": 8, "cpus": 95.5, "memory": "600Gi", "shm": "64Gi", "memory_guard": "90%",
    },
    "metrics": {"port": 9500},
    "kubernetes": {
        "namespace": "team-a",
        "profile": "eks-spot",
        "margin": "20s",
        "service_account": "full",
        "secrets": ["store-keys", "tracker"],
        "image_pull_policy": "Always",
        "image_pull_secrets": ["registry"],
        "workdir": "/app",
        "claims": {"checkpoints": "/mnt/checkpoints"},
        "queue": "spot-queue",
        "priority_class": "research",
        "zones": ["eu-west-1a"],
        "node_selector": {"node.kubernetes.io/instance-type": "p5.48xlarge"},
        "tolerations": [{"key": "team", "operator": "Equal", "value": "a"}],
        "labels": {"team": "a"},
        "annotations": {"example.com/owner": "team a"},
        "ttl": "7d",
        "deadline": "30d",
    },
}  # fmt: skip


def _job(document: dict[str, Any], **kubernetes: Any) -> Job:
    own = {**document.get("kubernetes", {}), **kubernetes}
    return Job.model_validate({**document, "kubernetes": own})


def jobs() -> dict[str, tuple[Job, str, tuple[str, ...]]]:
    """By name: a job, its run id, and further options of `runner run`."""
    gpu = {**SMALL, "resources": {"gpus": 1, "memory": "16Gi"}}
    return {
        "small": (_job(SMALL), "small", ()),
        "full": (_job(FULL), "Full.Run_7", ("--update",)),
        "directory": (_job({**SMALL, "store": "runs", "metrics": {"port": "off"}}), "small", ()),
        "no-slots": (_job({**SMALL, "checkpoint": {"slots": 0}}), "small", ()),
        "gke-spot": (_job(gpu, profile="gke-spot", platform_grace="2m"), "small", ()),
        "aks-spot": (_job(gpu, profile="aks-spot"), "small", ()),
    }


def reference() -> str:
    """What `runner render jobs/rul.yaml` prints."""
    job = load_job(ROOT / "jobs" / "rul.yaml")
    return render(job, job.name).as_yaml()


def all_files() -> Iterator[tuple[Path, str]]:
    """Every golden file, and what it should be: the objects, and the warnings as comments."""
    for name, (job, run_id, options) in jobs().items():
        rendered = render(job, run_id, options)
        warnings = "".join(f"# {warning}\n" for warning in rendered.warnings)
        yield FOLDER / f"{name}.yaml", warnings + rendered.as_yaml()
    yield REFERENCE, reference()
