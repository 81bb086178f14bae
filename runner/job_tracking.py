"""Where a job's metrics, parameters and checkpoints are shown: the trackers of its section
`tracking`, and what each of them needs to be installed.

How a tracker's server is reached is said here; with which credentials, its own library finds out.
"""

from __future__ import annotations

import importlib.util
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from runner.job_types import Part, Text

EXTRAS = {"mlflow": "MLflow", "wandb": "Weights & Biases", "clearml": "ClearML"}
"""The trackers; each is an extra of this package, and a library, of the same name."""


_SCHEMES = (
    "file", "http", "https", "databricks", "sqlite", "postgresql", "mysql", "mssql",
)  # fmt: skip


def _uri(text: str) -> str:
    """Nothing of a URI that holds a password is repeated."""
    scheme, separator, rest = text.partition("://")
    if separator and scheme.partition("+")[0] not in _SCHEMES:
        raise ValueError("expected a server's URL, a database such as sqlite:///m.db, or a folder")
    if separator and "@" in rest.partition("/")[0]:
        raise ValueError(
            "expected a URI without credentials: MLflow finds a server's in"
            " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; for"
            " a database's, set MLFLOW_TRACKING_URI"
        )
    return text


class MLflow(Part):
    """One MLflow run for each run, however many attempts it takes."""

    uri: Annotated[Text, AfterValidator(_uri)] | None = Field(
        default=None,
        description="The tracking server, a database or a folder, relative to the workdir;"
        " default: MLFLOW_TRACKING_URI.",
        examples=["http://mlflow.example:5000", "sqlite:///mlflow.db", "mlruns"],
    )
    experiment: Text | None = Field(default=None, description="Default: the job's name.")
    upload: Literal["none", "best", "all"] = Field(
        default="none",
        description="Which checkpoints' files are uploaded; of all others the manifest and the"
        " place in the store.",
    )


class WandB(Part):
    """One run of Weights & Biases."""

    project: Text | None = Field(default=None, description="Default: the job's name.")
    entity: Text | None = Field(default=None, description="The user or team; default: your own.")
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline: files in the run's outputs, for `wandb sync`."
    )


class ClearML(Part):
    """One task of ClearML."""

    project: Text | None = Field(default=None, description="Default: the job's name.")
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline: a session for each supervisor, to be imported."
    )


class Tracking(Part):
    """Trackers that are shown what a run logs. One that is down delays nothing."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    mlflow: MLflow | None = None
    wandb: WandB | None = None
    clearml: ClearML | None = None

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if not self.chosen:
            raise ValueError(f"expected at least one of {', '.join(EXTRAS)}")
        return self

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names of the trackers that are wanted."""
        return tuple(name for name in EXTRAS if getattr(self, name) is not None)


def missing_tracker(tracking: Tracking | None) -> str | None:
    """What is wrong if a tracker is not installed, and the command that installs it."""
    for name in () if tracking is None else tracking.chosen:
        if importlib.util.find_spec(name) is None:
            return f"tracking.{name}: {not_installed(name)}"
    return None


def not_installed(extra: str) -> str:
    """What to say of a library that is not here."""
    return (
        f"{EXTRAS.get(extra, extra)} is not installed where runner is;"
        f" install it with: pip install 'runner[{extra}]'"
    )
