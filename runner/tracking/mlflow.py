"""MLflow: one MLflow run for each run. Checkpoints are artifacts, as JSON or with their files.

Written against MLflow's client API: https://mlflow.org/docs/latest/api_reference/python_api/
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.errors import TrackerError, TrackerRefused
from runner.tracking.base import About, Reading, Shown

# Retrying is done by whoever calls, who knows when there is no time left for it.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder is still what many have

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException as MlflowException
from mlflow.tracking import MlflowClient

KEY_TAG = "runner.key"
PLACE_TAG = "runner.place"
_STATUS = {
    "succeeded": "FINISHED",
    "failed": "FAILED",
    "preempted": "SCHEDULED",
    "interrupted": "KILLED",
    "stopped": "KILLED",
}
_NOT_IN_NAMES = re.compile(r"[^\w\-./: ]")
_FOR_GOOD = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
_LONGEST_PARAM, _LONGEST_TAG, _LONGEST_NAME = 6000, 5000, 250
_AT_ONCE = 100


def resolved_uri(uri: str | None, workdir: Path) -> str:
    """A tracking URI with its path, if it is one, absolute. TrackerError if there is none."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise TrackerError(
            "it is not known where MLflow is: say it in tracking.mlflow.uri, or set"
            " MLFLOW_TRACKING_URI"
        )
    scheme, separator, path = uri.partition(":///")
    if scheme == "sqlite" and separator:
        return f"sqlite:///{workdir / path}"
    if "://" not in uri and uri != "databricks":
        return (workdir / Path(uri).expanduser()).as_uri()
    return uri


def client_for(uri: str | None, workdir: Path) -> Any:
    """A client of the tracking server, or the database or folder, and of its registry."""
    found = resolved_uri(uri, workdir)
    return MlflowClient(tracking_uri=found, registry_uri=found)


def place_of_run(uri: str | None, workdir: Path, run_id: str) -> str:
    """Where the run of this MLflow id has its checkpoints. TrackerError if that is not known."""
    try:
        found = client_for(uri, workdir).get_run(run_id)
    except MlflowException as error:
        raise TrackerError(str(error)) from error
    place = found.data.tags.get(PLACE_TAG)
    if place is None:
        raise TrackerError(f"the MLflow run {run_id} is none of runner's: it has no {PLACE_TAG}")
    return str(place)


class MLflowTracker:
    """See `runner.tracking.base.Tracker`."""

    def __init__(self) -> None:
        self._client: Any = None
        self._id = ""

    def begin(self, about: About, known: str | None) -> str:
        uri = resolved_uri(about.settings.get("uri"), about.workdir)
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(about.settings.get("experiment") or about.job, uri)
        self._id = self._found(known, experiment, about.key) or self._created(experiment, about)
        self._client.update_run(self._id, status="RUNNING")
        self._log_params(about.params)
        self.note(about.tags)
        return self._id

    def sent(self) -> Mapping[str, int]:
        # What a run has of each metric is the value of its highest step, with that step; only the
        # protocol message tells it.
        metrics = self._client.get_run(self._id).to_proto().data.metrics
        return {metric.key: int(metric.step) for metric in metrics}

    def log(self, readings: Sequence[Reading]) -> None:
        metrics = [Metric(_name(r.name), r.value, int(1000 * r.time), r.step) for r in readings]
        with _refusals():
            self._client.log_batch(self._id, metrics=metrics)

    def note(self, tags: Mapping[str, str]) -> None:
        made = [RunTag(_name(name), value[:_LONGEST_TAG]) for name, value in tags.items()]
        if made:
            self._client.log_batch(self._id, tags=made)

    def show(self, checkpoint: Shown) -> None:
        place = f"checkpoints/{checkpoint.name}"
        if checkpoint.files is not None:
            self._client.log_artifacts(self._id, str(checkpoint.files), place)
        about = {"uri": checkpoint.uri, "manifest": dict(checkpoint.manifest)}
        self._client.log_dict(self._id, about, f"{place}/checkpoint.json")
        self.note({"runner.checkpoint": checkpoint.uri})

    def end(self, outcome: str | None) -> None:
        if outcome is not None:
            self.note({"runner.outcome": outcome})
            if outcome in ("succeeded", "failed", "stopped", "interrupted"):
                now = int(1000 * time.time())
                self._client.set_terminated(self._id, _STATUS[outcome], end_time=now)
            elif outcome in _STATUS:
                self._client.update_run(self._id, status=_STATUS[outcome])

    # ------------------------------------------------------------------

    def _experiment(self, name: str, uri: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            # A database's artifacts would lie where the process happens to have been started.
            artifacts = None
            if uri.startswith("sqlite:///"):
                database = Path(uri.removeprefix("sqlite:///"))
                artifacts = database.with_name(f"{database.stem}-artifacts").as_uri()
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts))
            except MlflowException:  # another run of the job was faster
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise TrackerError(
                f"the MLflow experiment {name!r} is deleted; restore it, or name one"
            )
        return str(found.experiment_id)

    def _found(self, known: str | None, experiment: str, key: str) -> str | None:
        """The run of that id; or the one whose creation was not answered in time."""
        if known is not None:
            with contextlib.suppress(MlflowException):
                if self._client.get_run(known).info.lifecycle_stage == "active":
                    return known
        runs = self._client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _created(self, experiment: str, about: About) -> str:
        run = self._client.create_run(
            experiment, run_name=about.run_id, tags={KEY_TAG: about.key, **about.tags}
        )
        return str(run.info.run_id)

    def _log_params(self, params: Mapping[str, str]) -> None:
        """MLflow's params never change: what a run goes on with instead is said in a tag."""
        there = self._client.get_run(self._id).data.params
        wanted = {_name(name): value[:_LONGEST_PARAM] for name, value in params.items()}
        new = [Param(name, value) for name, value in wanted.items() if name not in there]
        for begin in range(0, len(new), _AT_ONCE):
            self._client.log_batch(self._id, params=new[begin : begin + _AT_ONCE])
        changed = {n: v for n, v in wanted.items() if n in there and there[n] != v}
        self.note({f"runner.params.{name}": value for name, value in changed.items()})


def _name(text: str) -> str:
    return _NOT_IN_NAMES.sub("_", text)[:_LONGEST_NAME]


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.error_code in _FOR_GOOD:
            raise TrackerRefused(str(error)) from error
        raise
