"""MLflow's model registry: an export becomes a version of a registered model, without any pickle.

    MLmodel     what it is: the flavor `safetensors`, no `python_function`
    load.py     the loader: `load(folder)` gives config and weights
    data/       the export, see `runner.checkpoint.export`

The version is of the MLflow run to which the run was shown, so its metrics and params are there.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import TrackerError, UsageError
from runner.tracking.mlflow import MlflowException, client_for

JOB_TAG = "runner.job"
LOADER = '''"""Loads this model: `config, weights = load(folder)`, with safetensors and torch."""

import json
from pathlib import Path


def load(folder=Path(__file__).parent):
    from safetensors.torch import load_file

    data = Path(folder) / "data"
    return json.loads((data / "config.json").read_text()), load_file(data / "model.safetensors")
'''


@dataclass(frozen=True)
class Promotion:
    """What is registered: under which name and alias, of which job, run and checkpoint."""

    name: str
    alias: str | None
    job: str
    mlflow_id: str
    checkpoint: str
    tags: Mapping[str, str]


def register(export: Path, promotion: Promotion, uri: str | None, workdir: Path) -> str:
    """Register an export; the number of the version.

    UsageError if the name is somebody else's, or MLflow takes no such name or alias. TrackerError
    if MLflow does not do it. Nothing is registered if anything fails.
    """
    client = client_for(uri, workdir)
    with _as_our_error():
        is_new = _check_name(client, promotion)
        run = client.get_run(promotion.mlflow_id)
        place = f"models/{promotion.checkpoint}"
        client.log_artifacts(promotion.mlflow_id, str(_packed(export, promotion)), place)
        return _as_version(client, promotion, f"{run.info.artifact_uri}/{place}", is_new)


def _as_version(client: Any, promotion: Promotion, source: str, is_new: bool) -> str:
    """The version that `source` has become, with its alias; taken back if that fails."""
    name, version = promotion.name, None
    if is_new:
        client.create_registered_model(name, tags={JOB_TAG: promotion.job})
    try:
        tags = dict(promotion.tags)
        made = client.create_model_version(name, source, promotion.mlflow_id, tags=tags)
        version = str(made.version)
        if promotion.alias is not None:
            client.set_registered_model_alias(name, promotion.alias, version)
    except MlflowException:
        with contextlib.suppress(MlflowException):
            if version is not None:
                client.delete_model_version(name, version)
            if is_new:
                client.delete_registered_model(name)
        raise
    return version


def _check_name(client: Any, promotion: Promotion) -> bool:
    """Whether the name is new; UsageError if it is that of another job's model."""
    try:
        found = client.get_registered_model(promotion.name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return True
        raise
    owner = found.tags.get(JOB_TAG)
    if owner != promotion.job:
        whose = f"of the job {owner}" if owner else "of something else"
        raise UsageError(
            f"the registered model {promotion.name!r} is {whose}, not of the job {promotion.job};"
            f" take another name, or set its tag {JOB_TAG} to {promotion.job}"
        )
    return False


def _packed(export: Path, promotion: Promotion) -> Path:
    from mlflow.models import Model

    folder = export.parent / "packed"
    shutil.copytree(export, folder / "data")
    (folder / "load.py").write_text(LOADER)
    model = Model(run_id=promotion.mlflow_id)
    model.add_flavor("safetensors", data="data", loader="load.py")
    model.save(str(folder / "MLmodel"))
    return folder


@contextlib.contextmanager
def _as_our_error() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        words = " ".join(str(error).split())
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise UsageError(f"MLflow refuses that: {words}") from error
        raise TrackerError(f"MLflow does not do it: {words}") from error
