"""Where and how a run lives in a Kubernetes cluster: what only the launcher `kubernetes` needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from runner.job_types import NAME_PATTERN, Duration, Part, Text, dns_label

# Source: https://kubernetes.io/docs/concepts/overview/working-with-objects/names/ and …/labels/
_SUBDOMAIN = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
_LABEL_NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
SUBDOMAIN_PATTERN = f"^{_SUBDOMAIN}$"
LABEL_VALUE_PATTERN = f"^({_LABEL_NAME})?$"
QUALIFIED_PATTERN = f"^({_SUBDOMAIN}/)?{_LABEL_NAME}$"

ProfileName = Literal["gke-spot", "eks-spot", "aks-spot"]
DEFAULT_TTL_SECONDS = 86_400.0


def _matching(pattern: str, expected: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(pattern.removesuffix("$"), text):
            raise ValueError(f"expected {expected}")
        return text

    return check


def _container_path(text: str) -> str:
    path = PurePosixPath(text)
    if not path.is_absolute() or ".." in path.parts or len(path.parts) < 2 or ":" in text:
        raise ValueError("expected an absolute path in the container")
    return str(path)


Label = Annotated[
    str, AfterValidator(dns_label), Field(json_schema_extra={"pattern": NAME_PATTERN})
]
ObjectName = Annotated[
    str,
    AfterValidator(_matching(SUBDOMAIN_PATTERN, "the name of an object, such as rul-store")),
    Field(json_schema_extra={"pattern": SUBDOMAIN_PATTERN}),
]
LabelKey = Annotated[
    str,
    AfterValidator(_matching(QUALIFIED_PATTERN, "a key such as team or example.com/team")),
    Field(json_schema_extra={"pattern": QUALIFIED_PATTERN}),
]
LabelValue = Annotated[
    str,
    AfterValidator(
        _matching(LABEL_VALUE_PATTERN, "at most 63 letters, digits, '.', '_' and '-', in quotes")
    ),
    Field(json_schema_extra={"pattern": LABEL_VALUE_PATTERN}),
]
ContainerPath = Annotated[
    Text, AfterValidator(_container_path), Field(json_schema_extra={"pattern": "^/"})
]


class Toleration(Part):
    """A taint of nodes that the pod may run on all the same."""

    key: LabelKey | None = Field(default=None, description="The taint's key; none: every taint.")
    operator: Literal["Exists", "Equal"] = Field(
        default="Exists", description="Whether the taint has to be there, or to have the value."
    )
    value: LabelValue | None = Field(default=None, description="With `Equal`, the taint's value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="The taint's effect; none: every effect."
    )

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if (self.value is not None) != (self.operator == "Equal"):
            raise ValueError("expected a value with operator Equal, and with no other")
        if self.key is None and self.operator == "Equal":
            raise ValueError("expected a key with operator Equal")
        return self


class Kubernetes(Part):
    """The Job that a run is in a cluster, beside what follows from the rest of the job file."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"profile": "gke-spot"}]})

    namespace: Label | None = Field(
        default=None, description="Default: that of the context in the kubeconfig, or `default`."
    )
    profile: ProfileName | None = Field(
        default=None, description="Spot nodes of a cloud: their selectors, taints and real grace."
    )
    platform_grace_seconds: Duration | None = Field(
        default=None,
        alias="platform_grace",
        description="Between SIGTERM and the kill on these nodes, where it is configured to be"
        " longer than the profile's.",
    )
    margin_seconds: Duration = Field(
        default=10.0,
        alias="margin",
        description="What terminationGracePeriodSeconds has beyond the grace.",
    )
    service_account: ObjectName | None = Field(
        default=None, description="Whose cloud identity the run has (IRSA, Workload Identity)."
    )
    secrets: tuple[ObjectName, ...] = Field(
        default=(), strict=False, description="Secrets whose keys become environment variables."
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        default=None, description="When the image is pulled; default: as Kubernetes has it."
    )
    image_pull_secrets: tuple[ObjectName, ...] = Field(
        default=(), strict=False, description="Secrets for the image's registry."
    )
    workdir: ContainerPath | None = Field(
        default=None, description="Of supervisor and trainer; default: the image's."
    )
    claims: dict[ObjectName, ContainerPath] = Field(
        default={},
        description="PersistentVolumeClaims by name, and where they are mounted.",
        examples=[{"checkpoints": "/mnt/checkpoints"}],
    )
    queue: ObjectName | None = Field(
        default=None, description="Kueue's LocalQueue; the Job is created suspended."
    )
    priority_class: ObjectName | None = Field(default=None, description="The pod's PriorityClass.")
    zones: tuple[LabelValue, ...] = Field(
        default=(), strict=False, description="Preferred zones, such as the bucket's."
    )
    node_selector: dict[LabelKey, LabelValue] = Field(
        default={}, description="Labels that the node must have, beside the profile's."
    )
    tolerations: tuple[Toleration, ...] = Field(
        default=(), strict=False, description="Taints to tolerate, beside the profile's."
    )
    labels: dict[LabelKey, LabelValue] = Field(
        default={}, description="Of the Job and its pods, beside app.kubernetes.io/*."
    )
    annotations: dict[LabelKey, str] = Field(default={}, description="Of the Job and its pods.")
    ttl_seconds: Duration = Field(
        default=DEFAULT_TTL_SECONDS,
        alias="ttl",
        description="So long after its end the Job is deleted; the store keeps what is saved.",
    )
    deadline_seconds: Duration | None = Field(
        default=None, alias="deadline", description="The Job fails when it has been active so long."
    )
