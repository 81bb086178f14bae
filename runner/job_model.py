"""What a job is: frozen models with the names, the defaults and the limits of the job file."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    WithJsonSchema,
    WrapSerializer,
    field_validator,
    model_validator,
)

from runner.job_container import Image, Mount, Network, User, each_target_once, needed
from runner.job_export import Export
from runner.job_kubernetes import Kubernetes
from runner.job_metrics import Cost, Metrics
from runner.job_provenance import Provenance
from runner.job_resources import Resources
from runner.job_store import S3, STORE_PATTERN, is_s3, store_location
from runner.job_tracking import Tracking
from runner.job_types import (
    LARGEST_COUNT,
    NAME_PATTERN,
    Count,
    Duration,
    Part,
    Size,
    Text,
    any_text,
    directory,
    dns_label,
)
from runner.job_validate import Validate
from runner.job_yaml import MAX_DEPTH, KeyPath, dotted, not_unicode
from runner.units import format_duration

LONGEST_MINUTES = 3650 * 24 * 60


def _words(value: object) -> object:
    return shlex.split(value) if isinstance(value, str) else value


def _command(words: tuple[str, ...]) -> tuple[str, ...]:
    if not words or not words[0]:
        raise ValueError("expected at least the program to start, such as [python, train.py]")
    return words


def _env(env: dict[str, str]) -> dict[str, str]:
    for name in env:
        if not name or "=" in name or "\0" in name or not_unicode(name):
            raise ValueError(f"expected names of environment variables, got {name!r}")
        if name.startswith("RUNNER_"):
            raise ValueError(f"{name}: names that begin with RUNNER_ are set by runner itself")
    return env


def _params(params: dict[str, Any]) -> dict[str, Any]:
    return {name: _plain(value, (name,)) for name, value in _checked_keys(params, ()).items()}


def _plain(value: Any, path: KeyPath) -> Any:
    """A copy of a value that JSON holds without loss; ValueError names what it does not."""
    problem = None
    if len(path) > MAX_DEPTH:
        problem = f"is nested deeper than {MAX_DEPTH} levels"
    elif type(value) is list:
        return [_plain(item, (*path, index)) for index, item in enumerate(value)]
    elif type(value) is dict and all(type(key) is str for key in value):
        return {k: _plain(item, (*path, k)) for k, item in _checked_keys(value, path).items()}
    elif type(value) is float and not math.isfinite(value):
        problem = "is not a finite number"
    elif type(value) is str:
        problem = not_unicode(value)
    elif value is not None and type(value) not in (bool, int, float):
        problem = f"is a {type(value).__name__}, which JSON does not have"
    if problem:
        raise ValueError(f"{dotted(path)} {problem}")
    return value


def _checked_keys(mapping: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    for key in mapping:
        if problem := not_unicode(key):
            raise ValueError(f"{dotted((*path, key))} {problem}")
    return mapping


class Every(Part):
    """When to make a checkpoint: whichever of these comes first."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    steps: Count | None = Field(default=None, description="After this many optimizer steps.")
    minutes: Annotated[float, Field(gt=0, le=LONGEST_MINUTES)] | None = Field(
        default=None, description="After this many minutes."
    )
    epochs: Count | None = Field(default=None, description="At the end of every n-th epoch.")

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if self.steps is None and self.minutes is None and self.epochs is None:
            raise ValueError("expected at least one of steps, minutes and epochs")
        return self


def _auto(value: object) -> object:
    """`auto` leaves the choice to the run: None, for the program."""
    return None if value == "auto" else value


def _or_auto(value: Every | EverySteps | None, handler: SerializerFunctionWrapHandler) -> Any:
    return "auto" if value is None else handler(value)


_AUTO = (BeforeValidator(_auto), WrapSerializer(_or_auto), Field(json_schema_extra={"auto": True}))


def _off(value: object) -> object:
    """No compression is None, for the program. `off` is false where YAML 1.1 was read."""
    if value is None or value is False or value == "off":
        return None
    if value != "zstd":
        raise ValueError("expected zstd or off")
    return value


_COMPRESSION = (
    BeforeValidator(_off),
    WithJsonSchema({"anyOf": [{"enum": ["zstd", "off"]}, {"const": False}]}),
)


class EverySteps(Part):
    """How often to copy the state into a slot."""

    steps: Count = Field(description="After this many optimizer steps.")


class EveryEpochs(Part):
    """Which epochs' checkpoints are kept for good."""

    epochs: Count = Field(description="Keep one checkpoint of every n-th epoch.")


class Best(Part):
    """Keep the checkpoints at which a metric was best."""

    metric: Text = Field(description="The metric's name, as logged.", examples=["val_rmse"])
    mode: Literal["min", "max"] = Field(
        default="min", description="Whether small or large is good."
    )
    count: Count = Field(default=1, description="How many to keep.")


class Keep(Part):
    """Which checkpoints are kept. The newest valid one always is."""

    last: Count = Field(default=3, description="The newest n.")
    best: Best | None = None
    every: EveryEpochs | None = None


class Checkpoint(Part):
    """When to save, and what to keep."""

    every: Annotated[Every | None, *_AUTO] = Field(
        default=None,
        description="When to make a checkpoint; `auto`: as often as costs the least in all.",
    )
    snapshot_every: Annotated[EverySteps | None, *_AUTO] = Field(
        default=None,
        description="When to copy the state into a slot; `auto`: with a stall under 1 %.",
    )
    weights_every: Every | None = Field(
        default=None,
        description="When to save the weights alone, of the model and the ema: to load from, never"
        " to resume from.",
    )
    compression: Annotated[Literal["zstd"] | None, *_COMPRESSION] = Field(
        default=None, description="Lossless compression of the files that hold tensors."
    )
    slots: int = Field(
        default=2, ge=0, le=8, description="Snapshots held in memory at once; 0: one, on disk."
    )
    overlap: bool = Field(
        default=True, description="Copy out of a GPU beside the next step, where that is safe."
    )
    keep: Keep = Keep()
    validation: Validate | None = Field(default=None, alias="validate")
    max_state_bytes: Size | None = Field(
        default=None,
        alias="max_state",
        description="The largest that the state may be, where its size has to be known before the"
        " run: in Kubernetes, and in a container whose memory is limited.",
        examples=["12Gi"],
    )


def _each_once(clouds: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(clouds)) < len(clouds):
        raise ValueError("expected each cloud once")
    return clouds


class Preemption(Part):
    """What a preemption looks like here."""

    grace_seconds: Duration = Field(
        default=30.0, alias="grace", description="Time between the first notice and the kill."
    )
    notices: Annotated[
        tuple[Literal["aws", "gcp", "azure"], ...], Field(strict=False), AfterValidator(_each_once)
    ] = Field(
        default=(),
        description="The clouds whose metadata service is asked for notices, beside SIGTERM.",
        json_schema_extra={"uniqueItems": True},
        examples=[["aws"]],
    )


class Backoff(Part):
    """The wait before a restart; it grows from `initial` up to `max`."""

    initial_seconds: Duration = Field(default=1.0, alias="initial", description="The first wait.")
    max_seconds: Duration = Field(default=60.0, alias="max", description="The longest wait.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.initial_seconds > self.max_seconds:
            initial, longest = map(format_duration, (self.initial_seconds, self.max_seconds))
            raise ValueError(f"expected initial ({initial}) to be at most max ({longest})")
        return self


class Restart(Part):
    """What to do when the trainer fails. Preemptions are not failures."""

    failures: int = Field(
        default=5,
        ge=0,
        le=LARGEST_COUNT,
        description="Consecutive failures without a new durable step before giving up.",
    )
    backoff: Backoff = Backoff()
    hang_timeout_seconds: Duration = Field(
        default=600.0, alias="hang_timeout", description="No progress for this long is a failure."
    )
    store_timeout_seconds: Duration = Field(
        default=1800.0,
        alias="store_timeout",
        description="A start waits so long for a store that is out of reach, then leaves with 75.",
    )
    never: tuple[Annotated[int, Field(ge=1, le=255)], ...] = Field(
        default=(2,),
        strict=False,
        description="Exit codes of the trainer that end the run at once.",
    )


class Health(Part):
    """Which checkpoints are healthy: those whose metrics are finite."""

    metrics: tuple[Text, ...] = Field(
        default=(),
        strict=False,
        description="The metrics to look at; by default those named like losses.",
    )
    restore: Literal["warn", "healthy"] = Field(
        default="warn",
        description="Restore the newest checkpoint and warn if it is unhealthy, or prefer the"
        " newest healthy one.",
    )
    patience: Count = Field(
        default=10,
        description="Metrics that are not finite for so many steps are worth a warning; or, with"
        " `restore: healthy`, a restart from the newest healthy checkpoint.",
    )


class Outputs(Part):
    """What becomes of the files that the script writes into its output folder."""

    max_size_bytes: Size = Field(
        default=2**30,
        alias="max_size",
        description="Stored at the end of each attempt, up to this size in all; 0: nothing is.",
    )


class Logs(Part):
    """How much is kept of what the trainer prints."""

    max_size_bytes: Size = Field(
        default=64 * 2**20,
        alias="max_size",
        description="In all, on this machine and in the store; the oldest goes first. 0: nothing.",
    )
    files: Annotated[int, Field(ge=2, le=1000)] = Field(
        default=8, description="In how many files, if each is full; the oldest is removed whole."
    )


class Job(Part):
    """A job of `runner`: what to run, where its checkpoints live, how it may fail."""

    name: Annotated[str, AfterValidator(dns_label)] = Field(
        description="A DNS label; the run's id unless another is given.",
        json_schema_extra={"pattern": NAME_PATTERN},
        examples=["rul-fd001"],
    )
    command: Annotated[
        tuple[Annotated[str, AfterValidator(any_text)], ...],
        Field(strict=False),
        BeforeValidator(_words),
        AfterValidator(_command),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "array", "items": {"type": "string"}, "minItems": 1},
                    {"type": "string", "minLength": 1},
                ]
            }
        ),
    ] = Field(
        description="The trainer: a list of words, or one text split like a shell does (there is"
        " no shell). `python` is the one that runs `runner`.",
        examples=[["python", "-m", "jobs.rul.train"], "python train.py"],
    )
    workdir: Annotated[
        Path, BeforeValidator(directory), WithJsonSchema({"type": "string", "minLength": 1})
    ] = Field(
        default_factory=Path.cwd,
        description="The trainer's working directory; relative to where `runner` was called,"
        " which is the default.",
    )
    params: Annotated[dict[str, Any], AfterValidator(_params)] = Field(
        default={},
        description="Hyperparameters: `run.params` in the script.",
        examples=[{"epochs": 30}],
    )
    env: Annotated[dict[str, Annotated[str, AfterValidator(any_text)]], AfterValidator(_env)] = (
        Field(
            default={},
            description="Environment variables for the trainer. Numbers have to be quoted.",
            json_schema_extra={"propertyNames": {"pattern": "^(?!RUNNER_)[^=]+$"}},
            examples=[{"OMP_NUM_THREADS": "2"}],
        )
    )
    launcher: Literal["process", "docker", "kubernetes"] = Field(
        default="process", description="What the trainer runs in."
    )
    image: Image | None = Field(
        default=None,
        validate_default=True,
        description="The container's image; docker and kubernetes need one.",
        examples=["registry.example/rul:1.0"],
    )
    network: Network = Field(
        default="none",
        description="With docker, the container's network: none, bridge, host, or one by name.",
    )
    user: User | None = Field(
        default=None,
        description="With docker, who the trainer is in the container, by numbers; default: who"
        " `runner` is, or, if that is root, the image's user, and 65532 if that is root too.",
        examples=["1000:1000"],
    )
    mounts: Annotated[tuple[Mount, ...], Field(strict=False), AfterValidator(each_target_once)] = (
        Field(
            default=(),
            description="With docker, what else the trainer sees of this machine.",
            examples=[["/data"], [{"source": "/mnt/data", "target": "/data"}]],
        )
    )
    credentials: Literal["withhold", "pass"] = Field(
        default="withhold",
        description="Whether the trainer is given the cloud credentials that `runner` has in its"
        " environment.",
    )
    store: Annotated[str, AfterValidator(store_location)] = Field(
        default="runs",
        description="Where checkpoints live: s3://bucket/prefix, or a directory, relative to the"
        " workdir.",
        json_schema_extra={"minLength": 1, "pattern": STORE_PATTERN},
        examples=["runs", "/mnt/checkpoints", "s3://bucket/prefix"],
    )
    s3: S3 | None = None
    checkpoint: Checkpoint = Checkpoint()
    preemption: Preemption = Preemption()
    restart: Restart = Restart()
    health: Health = Health()
    outputs: Outputs = Outputs()
    provenance: Provenance = Provenance()
    resources: Resources = Resources()
    logs: Logs = Logs()
    metrics: Metrics = Metrics()
    tracking: Tracking | None = None
    export: Export = Export()
    cost: Cost | None = None
    kubernetes: Kubernetes = Kubernetes()

    @field_validator("image")
    @classmethod
    def _is_there_where_needed(cls, value: str | None, info: ValidationInfo) -> str | None:
        launcher = info.data.get("launcher", "process")
        if value is None and launcher != "process":
            raise needed(f"launcher: {launcher}")
        return value

    @field_validator("s3")
    @classmethod
    def _belongs_to_the_store(cls, value: S3 | None, info: ValidationInfo) -> S3 | None:
        if value is not None and not is_s3(info.data.get("store", "s3://")):
            raise ValueError("expected only with a store that is s3://bucket/prefix")
        return value

    @property
    def store_path(self) -> Path:
        """The store as an absolute path, where it is a directory."""
        if is_s3(self.store):
            raise ValueError(f"{self.store} is no directory")
        return self.workdir / Path(self.store).expanduser()
