"""Trials are runs, resumed and pruned like runs, and the study outlives its process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from nodes import Node, nodes_in
from waiting import wait_until

optuna = pytest.importorskip("optuna", reason="needs runner[optuna]")

from optuna.storages import JournalStorage  # noqa: E402
from optuna.storages.journal import JournalFileBackend  # noqa: E402

REPOSITORY = Path(__file__).parent.parent
PATIENCE_SECONDS = 150


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with nodes_in(tmp_path) as new:
        yield new("node")


def searching(node: Node, job: str, **keys: Any) -> subprocess.Popen[bytes]:
    document = {
        "study": "search",
        "job": job,
        "metric": "val_loss",
        "space": {"pace": {"low": 0.0, "high": 0.001}},
        "seed": 1,
        **keys,
    }
    path = node.folder / "search.yaml"
    path.write_text(yaml.safe_dump(document))
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.search", str(path)],
        cwd=REPOSITORY,
        env={**os.environ, **node.environment},
        stdout=(node.folder / "search.out").open("ab"),
        stderr=subprocess.STDOUT,
    )


def trials(node: Node) -> list[Any]:
    journal = JournalFileBackend(str(node.store_folder / "search.journal"))
    study = optuna.load_study(study_name="search", storage=JournalStorage(journal))
    return list(study.trials)


def printed(node: Node) -> str:
    return (node.folder / "search.out").read_text()


@pytest.mark.timeout(400)
def test_a_search_that_is_preempted_goes_on_with_the_run_of_its_trial(node: Node) -> None:
    job = node.training(params={"befalls": {"1": {"14": "wait"}}})
    search = searching(node, job, trials=2)
    wait_until(lambda: "\nstep 14" in printed(node), PATIENCE_SECONDS, "step 14")
    search.send_signal(signal.SIGTERM)
    node.wait_until_asked("search-0000")
    node.gate.touch()
    assert search.wait(PATIENCE_SECONDS) == 75, printed(node)
    assert [trial.state.name for trial in trials(node)] == ["RUNNING"]

    assert searching(node, job, trials=2).wait(2 * PATIENCE_SECONDS) == 0, printed(node)
    records = node.records("search-0000")
    found = trials(node)
    ended = [trial for trial in found if trial.state.name == "COMPLETE"]
    assert [record.outcome for record in records] == ["preempted", "succeeded"]
    assert records[1].start_step >= 13
    assert ended[0].params == found[0].params
    assert [trial.user_attrs["run"] for trial in ended] == ["search-0000", "search-0002"]
    assert list(ended[0].intermediate_values) == [12, 24], "from both attempts"
    assert json.loads(printed(node).splitlines()[-1])["best"] == min(t.value for t in ended)


@pytest.mark.timeout(400)
def test_a_pruned_trial_keeps_its_checkpoints(node: Node) -> None:
    job = node.training(params={"epochs": 500, "pace": 0.01}, checkpoint={"every": {"epochs": 1}})
    node.gate.touch()
    space = {"workers": {"choices": [0]}}
    pruner = {"name": "ThresholdPruner", "upper": 0.0}
    search = searching(node, job, trials=1, space=space, pruner=pruner)
    search.wait(2 * PATIENCE_SECONDS)

    assert [trial.state.name for trial in trials(node)] == ["PRUNED"], printed(node)
    assert [record.outcome for record in node.records("search-0000")] == ["interrupted"]
    assert node.manifests("search-0000")


def test_a_file_that_says_too_little_is_the_users_error(node: Node) -> None:
    assert searching(node, "nowhere.yaml", trials=1).wait(PATIENCE_SECONDS) == 2
    assert "nowhere.yaml" in printed(node)
