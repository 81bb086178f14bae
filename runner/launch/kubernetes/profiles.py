"""What spot nodes of the clouds look like to a pod, and how long they really leave it.

The grace of a platform is what a pod has between SIGTERM and the kill when its node is taken away,
whatever the pod asks for: a longer `terminationGracePeriodSeconds` buys nothing there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from runner.job import Job
from runner.units import format_duration


@dataclass(frozen=True)
class Profile:
    """Nodes of one kind. `gpu_tolerations` are for pods that ask for GPUs."""

    name: str
    platform: str
    grace_seconds: float
    source: str
    node_selector: Mapping[str, str]
    tolerations: tuple[Mapping[str, str], ...] = ()
    gpu_tolerations: tuple[Mapping[str, str], ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    longer: str = ""
    """How the platform can be made to give more, if it can."""


_NVIDIA = MappingProxyType({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})


def _tainted(key: str, value: str) -> Mapping[str, str]:
    return {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "gke-spot": Profile(
            name="gke-spot",
            platform="GKE gives pods on a spot node",
            grace_seconds=15.0,
            source="https://cloud.google.com/kubernetes-engine/docs/concepts/spot-vms",
            node_selector={"cloud.google.com/gke-spot": "true"},
            # Where node pools were tainted by hand, as that page recommends.
            tolerations=(_tainted("cloud.google.com/gke-spot", "true"),),
            gpu_tolerations=(_NVIDIA,),
            longer="a node pool of GKE Standard (control plane 1.35 or later) can be configured for"
            " up to 2m",
        ),
        "eks-spot": Profile(
            name="eks-spot",
            platform="EC2 gives a spot node",
            grace_seconds=120.0,
            source="https://karpenter.sh/docs/concepts/disruption/#interruption",
            node_selector={"karpenter.sh/capacity-type": "spot"},
            gpu_tolerations=(_NVIDIA,),
            # Of all disruptions, those that Karpenter chooses to make can be declined.
            annotations={"karpenter.sh/do-not-disrupt": "true"},
        ),
        "aks-spot": Profile(
            name="aks-spot",
            platform="Azure gives a spot node",
            grace_seconds=30.0,
            source="https://learn.microsoft.com/azure/aks/spot-node-pool",
            node_selector={"kubernetes.azure.com/scalesetpriority": "spot"},
            tolerations=(_tainted("kubernetes.azure.com/scalesetpriority", "spot"),),
            gpu_tolerations=(_NVIDIA, _tainted("sku", "gpu")),
        ),
    }
)


def profile_of(job: Job) -> Profile | None:
    """The profile that the job names, if any."""
    name = job.kubernetes.profile
    return None if name is None else PROFILES[name]


def platform_grace_seconds(job: Job) -> float | None:
    """What the nodes give, as the job says or its profile knows; None if nobody says."""
    given, profile = job.kubernetes.platform_grace_seconds, profile_of(job)
    if given is not None:
        return given
    return None if profile is None else profile.grace_seconds


def grace_seconds(job: Job) -> float:
    """What the supervisor in the pod plans with: the job's grace, or what there really is of it."""
    given = platform_grace_seconds(job)
    wanted = job.preemption.grace_seconds
    return wanted if given is None else min(wanted, given)


def grace_warning(job: Job) -> str | None:
    """What is to be said if the job counts on a longer grace than its nodes give."""
    profile, wanted, real = profile_of(job), job.preemption.grace_seconds, grace_seconds(job)
    if wanted <= real:
        return None
    text = f"preemption.grace is {format_duration(wanted)}, but "
    if job.kubernetes.platform_grace_seconds is not None or profile is None:
        return text + f"kubernetes.platform_grace is {format_duration(real)}: that is planned with"
    text += (
        f"{profile.platform} {format_duration(real)} ({profile.source}): that is planned with. "
        f"Say `grace: {format_duration(real)}`"
    )
    if profile.longer:
        text += f"; {profile.longer}: then say it as kubernetes.platform_grace, too"
    return text


def tolerations(job: Job) -> list[dict[str, Any]]:
    """Of the profile, then the job's own, each once."""
    profile = profile_of(job)
    found: list[dict[str, Any]] = []
    if profile is not None:
        found += map(dict, profile.tolerations)
        found += map(dict, profile.gpu_tolerations if job.resources.gpu_count else ())
    for one in job.kubernetes.tolerations:
        own = one.model_dump(exclude_none=True)
        if own not in found:
            found.append(own)
    return found


def node_selector(job: Job) -> dict[str, str]:
    """Of the profile, and over it the job's own."""
    profile = profile_of(job)
    return {**({} if profile is None else profile.node_selector), **job.kubernetes.node_selector}


def pod_annotations(job: Job) -> dict[str, str]:
    """Of the pod: the profile's, and over them the job's own."""
    profile = profile_of(job)
    return {**({} if profile is None else profile.annotations), **job.kubernetes.annotations}
