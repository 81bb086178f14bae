"""What a job is: frozen models with the names, the defaults and the limits of the job file.

A duration in a file is text with a unit; the attribute is a float and carries the unit in its
name. Types are strict: "5" is not 5, and neither are 5.0 and true.
"""

from __future__ import annotations

import contextlib
import math
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    WrapSerializer,
    model_validator,
)

from runner.job_yaml import MAX_DEPTH, KeyPath, dotted, not_unicode
from runner.units import DURATION_PATTERN, format_duration, parse_duration

LARGEST_COUNT = 1_000_000_000
LONGEST_MINUTES = 3650 * 24 * 60

_NAME = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*:/"


def _name(text: str) -> str:
    if not re.fullmatch(_NAME.removesuffix("$"), text):
        raise ValueError(
            "expected a DNS label: at most 63 lower-case letters, digits and '-', with a letter or"
            " a digit at both ends"
        )
    return text


def _text(text: str) -> str:
    if problem := not_unicode(text):
        raise ValueError(problem)
    if "\0" in text:
        raise ValueError("expected text without NUL characters")
    return text


def _some_text(text: str) -> str:
    if not text.strip():
        raise ValueError("expected text, not nothing")
    return _text(text)


def _duration(value: object) -> object:
    seconds = 0.0
    with contextlib.suppress(ValueError):
        seconds = parse_duration(value) if isinstance(value, str) else 0.0
    if seconds <= 0:
        raise ValueError("expected a duration above zero, such as 250ms, 30s, 10m, 2h or 1d")
    return seconds


def _words(value: object) -> object:
    return shlex.split(value) if isinstance(value, str) else value


def _command(words: tuple[str, ...]) -> tuple[str, ...]:
    if not words or not words[0]:
        raise ValueError("expected at least the program to start, such as [python, train.py]")
    return words


def _directory(value: object) -> object:
    """Make a path absolute; the folder the process is in is the base of a relative one."""
    if not isinstance(value, str | Path):
        raise ValueError("expected a directory, as text")
    try:
        return Path(_some_text(str(value))).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a loop of links; no such user
        raise ValueError(f"expected a directory: {error}") from None


def _store(text: str) -> str:
    if scheme := re.match(_SCHEME, text):
        raise ValueError(
            f"expected a directory: this version has no store for {scheme[0]}/, only directories"
        )
    return _some_text(text)


def _launcher(value: object) -> object:
    if value != "process":
        raise ValueError("expected process, the only launcher in this version")
    return value


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


Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Text = Annotated[str, AfterValidator(_some_text), Field(json_schema_extra={"minLength": 1})]
_ABOVE_ZERO = DURATION_PATTERN.replace("^", "^(?=.*[1-9])", 1)
Duration = Annotated[
    float,
    BeforeValidator(_duration),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema({"type": "string", "pattern": _ABOVE_ZERO, "examples": ["30s", "10m"]}),
]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


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
    slots: int = Field(
        default=2, ge=0, le=8, description="Snapshots held in memory at once; 0: one, on disk."
    )
    overlap: bool = Field(
        default=True, description="Copy out of a GPU beside the next step, where that is safe."
    )
    keep: Keep = Keep()


class Preemption(Part):
    """What a preemption looks like here."""

    grace_seconds: Duration = Field(
        default=30.0, alias="grace", description="Time between the first notice and the kill."
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


class Job(Part):
    """A job of `runner`: what to run, where its checkpoints live, how it may fail."""

    name: Annotated[str, AfterValidator(_name)] = Field(
        description="A DNS label; the run's id unless another is given.",
        json_schema_extra={"pattern": _NAME},
        examples=["rul-fd001"],
    )
    command: Annotated[
        tuple[Annotated[str, AfterValidator(_text)], ...],
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
        Path, BeforeValidator(_directory), WithJsonSchema({"type": "string", "minLength": 1})
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
    env: Annotated[dict[str, Annotated[str, AfterValidator(_text)]], AfterValidator(_env)] = Field(
        default={},
        description="Environment variables for the trainer. Numbers have to be quoted.",
        json_schema_extra={"propertyNames": {"pattern": "^(?!RUNNER_)[^=]+$"}},
        examples=[{"OMP_NUM_THREADS": "2"}],
    )
    launcher: Annotated[Literal["process"], BeforeValidator(_launcher)] = Field(
        default="process", description="How the trainer is started."
    )
    store: Annotated[str, AfterValidator(_store)] = Field(
        default="runs",
        description="The directory for checkpoints, relative to the workdir.",
        json_schema_extra={"minLength": 1, "not": {"pattern": f"^{_SCHEME}"}},
        examples=["runs", "/mnt/checkpoints"],
    )
    checkpoint: Checkpoint = Checkpoint()
    preemption: Preemption = Preemption()
    restart: Restart = Restart()
    health: Health = Health()

    @property
    def store_path(self) -> Path:
        """The store as an absolute path."""
        return self.workdir / Path(self.store).expanduser()
