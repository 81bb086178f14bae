"""The section `tracking` of a job: what it takes, and what it refuses at once."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from runner.errors import JobError
from runner.job import check_launchable, load_job, parse_param


def job(folder: Path, tracking: Any = None, params: Any = None, **given: Any) -> Any:
    document: dict[str, Any] = {"name": "job", "command": ["python", "-c", "pass"]}
    if tracking is not None:
        document["tracking"] = tracking
    path = folder / "job.json"
    path.write_text(json.dumps({**document, "params": params or {}}))
    return load_job(path, workdir=folder, **given)


@pytest.mark.parametrize(
    "uri", ["http://mlflow.example:5000", "sqlite:///mlflow.db", "mlruns", "databricks"]
)
def test_mlflow_is_a_server_a_database_or_a_folder(tmp_path: Path, uri: str) -> None:
    tracking = job(tmp_path, {"mlflow": {"uri": uri}}).tracking

    assert tracking.chosen == ("mlflow",)
    assert tracking.mlflow.uri == uri


REFUSED = {
    "nothing": ({}, "expected at least one of mlflow, wandb, clearml"),
    "a tracker that is not known": ({"mlfow": {}}, "did you mean tracking.mlflow?"),
    "a password": (
        {"mlflow": {"uri": "https://me:secret@mlflow.example"}},
        "expected a URI without credentials",
    ),
    "another scheme": ({"mlflow": {"uri": "ftp://x/y"}}, "expected a server's URL"),
    "a mode that is not known": ({"wandb": {"mode": "dryrun"}}, "'online' or 'offline'"),
}


@pytest.mark.parametrize(("tracking", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_obeyed_is_refused(tmp_path: Path, tracking: Any, message: str) -> None:
    with pytest.raises(JobError) as raised:
        job(tmp_path, tracking)

    assert message in str(raised.value)
    assert "secret" not in str(raised.value)


def test_the_command_line_names_a_tracker(tmp_path: Path) -> None:
    given = dict([parse_param("tracking.mlflow.uri=sqlite:///m.db"), parse_param("lr=1")])
    loaded = job(tmp_path, params=given)

    assert job(tmp_path, params={}).tracking is None
    assert loaded.params == given, "the file's own spelling of a param stays one"

    path = tmp_path / "job.json"
    path.write_text(json.dumps({"name": "job", "command": ["python", "-c", "pass"]}))
    loaded = load_job(path, workdir=tmp_path, params=given)
    assert loaded.params == {"lr": 1}
    assert loaded.tracking is not None
    assert loaded.tracking.mlflow is not None
    assert loaded.tracking.mlflow.uri == "sqlite:///m.db"


def test_a_tracker_that_is_not_installed_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name == "wandb" else find(name, *more),
    )
    with pytest.raises(JobError, match=r"tracking.wandb: .* pip install 'runner\[wandb\]'"):
        check_launchable(job(tmp_path, {"wandb": {}}))
