"""Runs that are shown to a real MLflow: once, whole, and whatever befalls them or MLflow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from nodes import Node, nodes_in
from servers.mlflow import MLflowServer
from waiting import wait_until

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
tracking = pytest.importorskip("runner.tracking.mlflow", reason="needs runner[mlflow]")

from runner.errors import TrackerError, TrackerRefused  # noqa: E402
from runner.tracking.base import About, Reading, Shown  # noqa: E402

EPOCHS = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    server = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    server.up()
    yield server
    server.down()


def tracked(node: Node, url: str, name: str, **keys: Any) -> str:
    """A job whose steps are shown there."""
    node.gate.touch()
    keys["params"] = {"epochs": EPOCHS, **keys.get("params", {})}
    keys["checkpoint"] = {
        "every": {"epochs": 1},
        "snapshot_every": {"steps": 1},
        "keep": {"last": 9, "best": {"metric": "val_loss"}},
    }
    section = {"mlflow": {"uri": url, "experiment": "steps", "upload": "best"}}
    return node.training(name, tracking=section, **keys)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with nodes_in(tmp_path_factory.mktemp("nodes")) as new:
        node = new("node")
        node.keeps_spool = True  # of the run whose supervisor is killed
        yield node


@pytest.fixture(scope="module")
def undisturbed(node: Node, server: MLflowServer) -> Node:
    started = node.start("run", tracked(node, server.url, "undisturbed"))
    assert started.wait(timeout=150) == 0, started.err
    return node


def client(server: MLflowServer) -> Any:
    return tracking.client_for(server.url, Path())


def mlflow_id(node: Node, run_id: str) -> str:
    document = json.loads((node.store_folder / run_id / "tracking" / "mlflow.json").read_text())
    return str(document["id"])


def history(server: MLflowServer, run_id: str) -> dict[str, list[tuple[int, float]]]:
    asked = client(server)
    names = asked.get_run(run_id).data.metrics
    return {
        name: [(point.step, point.value) for point in asked.get_metric_history(run_id, name)]
        for name in names
    }


def test_a_run_is_shown_whole(undisturbed: Node, server: MLflowServer) -> None:
    found = client(server).get_run(mlflow_id(undisturbed, "undisturbed"))
    points = history(server, found.info.run_id)

    assert found.info.status == "FINISHED"
    assert found.info.run_name == "undisturbed"
    assert [step for step, _ in points["train_loss"]] == list(range(1, 12 * EPOCHS + 1))
    assert [step for step, _ in points["val_loss"]] == [12, 24, 36]
    assert found.data.params["epochs"] == str(EPOCHS)
    assert found.data.tags["runner.attempt"] == "1"
    assert found.data.tags["runner.host"] == undisturbed.records("undisturbed")[0].node
    assert found.data.tags["runner.outcome"] == "succeeded"


def test_checkpoints_are_artifacts_and_the_best_are_uploaded(
    undisturbed: Node, server: MLflowServer, tmp_path: Path
) -> None:
    asked, run_id = client(server), mlflow_id(undisturbed, "undisturbed")
    listed = asked.list_artifacts(run_id, "checkpoints")
    manifest = undisturbed.newest("undisturbed")
    path = asked.download_artifacts(run_id, f"checkpoints/{manifest.name}", str(tmp_path))
    shown = json.loads((Path(path) / "checkpoint.json").read_text())

    assert f"checkpoints/{manifest.name}" in [item.path for item in listed]
    assert shown["uri"] == str(undisturbed.checkpoint(manifest))
    assert shown["manifest"] == json.loads(manifest.to_json())
    assert "best" in manifest.moment.triggers
    stored = undisturbed.checkpoint(manifest) / "model.safetensors"
    assert (Path(path) / "model.safetensors").read_bytes() == stored.read_bytes()


def test_the_best_checkpoint_is_promoted_without_a_pickle(
    undisturbed: Node, server: MLflowServer, tmp_path: Path
) -> None:
    called = undisturbed.run(
        *("promote", "undisturbed", "--best", "--name", "steps", "--alias", "champion")
    )
    assert (called.code, called.out) == (0, "steps, version 1, champion\n"), called.err
    asked, best = client(server), undisturbed.archive("undisturbed").find("best", "val_loss")
    version = asked.get_model_version_by_alias("steps", "champion")
    place = f"models/{best.name}"
    folder = Path(asked.download_artifacts(version.run_id, place, str(tmp_path)))
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    assert version.run_id == mlflow_id(undisturbed, "undisturbed")
    assert version.source.endswith(place)
    assert version.tags["runner.checkpoint"] == str(undisturbed.checkpoint(best))
    assert float(version.tags["metric.val_loss"]) == pytest.approx(best.moment.metrics["val_loss"])
    assert [path.name for path in files] == [
        *("MLmodel", "README.md", "config.json", "metrics.json", "model.safetensors", "load.py")
    ]
    assert not any(path.read_bytes().startswith(b"\x80") for path in files), "a pickle"
    assert "python_function" not in (folder / "MLmodel").read_text()
    loader: dict[str, Any] = {"__file__": str(folder / "load.py"), "__name__": "load"}
    exec((folder / "load.py").read_text(), loader)
    _, weights = loader["load"](folder)
    saved = safetensors.numpy.load_file(undisturbed.checkpoint(best) / "model.safetensors")
    assert weights.keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert (weights["0.weight"].numpy() == saved["0.weight"]).all()


@pytest.mark.parametrize(
    ("name", "alias", "problem"),
    [
        ("a/b:c", "champion", "Invalid model name"),
        ("", "champion", "name"),
        ("refused", "latest", "alias name"),
        ("refused", "v3", "alias"),
    ],
)
def test_names_that_mlflow_refuses_leave_nothing_in_the_registry(
    undisturbed: Node, server: MLflowServer, name: str, alias: str, problem: str
) -> None:
    called = undisturbed.call(
        *("promote", "undisturbed", "--best", "--name", name, "--alias", alias)
    )

    assert called.code == 2, called.err
    assert "MLflow refuses that" in called.err
    assert problem in called.err
    assert "refused" not in [each.name for each in client(server).search_registered_models()]
    assert client(server).search_model_versions("name='refused'") == []


def test_an_alias_that_is_refused_takes_back_the_version_and_no_other(
    undisturbed: Node, server: MLflowServer
) -> None:
    promote = ("promote", "undisturbed", "--best", "--name", "kept")
    assert undisturbed.call(*promote).code == 0

    called = undisturbed.call(*promote, "--alias", "latest")

    assert called.code == 2
    versions = client(server).search_model_versions("name='kept'")
    assert [str(each.version) for each in versions] == ["1"]


def test_a_name_that_is_taken_is_not_touched(undisturbed: Node, server: MLflowServer) -> None:
    client(server).create_registered_model("somebody-elses")
    called = undisturbed.call("promote", "undisturbed", "--best", "--name", "somebody-elses")

    assert called.code == 2
    assert "'somebody-elses' is of something else" in called.err
    assert client(server).search_model_versions("name='somebody-elses'") == []


@pytest.mark.timeout(400)
def test_five_preemptions_leave_the_history_of_an_undisturbed_run(
    undisturbed: Node, server: MLflowServer
) -> None:
    job = tracked(undisturbed, server.url, "disturbed")
    notices = [word for step in (3, 10, 13, 24, 30) for word in ("--preempt", f"step={step}")]
    started = undisturbed.start("simulate", job, *notices, "--run-id", "disturbed")
    assert started.wait(timeout=300) == 0, started.err
    run_id = mlflow_id(undisturbed, "disturbed")

    assert [record.outcome for record in undisturbed.records("disturbed")] == [
        *["preempted"] * 5,
        "succeeded",
    ]
    assert history(server, run_id) == history(server, mlflow_id(undisturbed, "undisturbed"))
    in_experiment = client(server).search_runs([client(server).get_run(run_id).info.experiment_id])
    assert sorted(run.info.run_name for run in in_experiment) == ["disturbed", "undisturbed"]
    provenance = undisturbed.newest("disturbed").provenance
    assert provenance["tracker"] == {"mlflow": run_id}


def test_another_run_begins_from_the_run_of_an_mlflow_id(
    undisturbed: Node, server: MLflowServer
) -> None:
    job = tracked(undisturbed, server.url, "second", params={"epochs": EPOCHS + 1})
    source = f"mlflow:{mlflow_id(undisturbed, 'undisturbed')}"
    called = undisturbed.run("run", job, "--from", source)

    assert called.code == 0, called.err
    assert f"ready at {12 * EPOCHS} in attempt 1" in called.out
    second = history(server, mlflow_id(undisturbed, "second"))
    assert [step for step, _ in second["train_loss"]] == list(range(37, 49))


def test_an_mlflow_id_that_is_not_there_is_the_users_error(
    undisturbed: Node, server: MLflowServer
) -> None:
    job = tracked(undisturbed, server.url, "third")
    called = undisturbed.call("run", job, "--from", "mlflow:0123456789abcdef0123456789abcdef")

    assert called.code == 2
    assert "--from mlflow:0123456789abcdef0123456789abcdef" in called.err
    assert not (undisturbed.store_folder / "third").exists()


def test_a_server_that_is_down_delays_nothing_and_is_sent_everything_later(
    node: Node, tmp_path: Path
) -> None:
    late = MLflowServer(tmp_path)
    job = tracked(node, late.url, "unheard", params={"epochs": 1})
    started = node.start("run", job)
    assert started.wait(timeout=150) == 0, started.err
    assert "mlflow cannot be told anything for now" in started.err
    assert "mlflow has not got everything" in started.err
    assert node.newest("unheard").moment.step == 12

    late.up()
    try:
        caught_up = node.run("track", "unheard")
        assert caught_up.code == 0, caught_up.err
        again = node.run("track", "unheard")
        assert again.code == 0, again.err
        run_id = mlflow_id(node, "unheard")
        points = history(late, run_id)
        found = client(late).get_run(run_id)
    finally:
        late.down()

    assert [step for step, _ in points["train_loss"]] == list(range(1, 13))
    assert found.info.status == "FINISHED"


def test_a_supervisor_that_is_killed_takes_its_sender_with_it(
    node: Node, server: MLflowServer
) -> None:
    job = tracked(node, server.url, "killed", params={"befalls": {"1": {"5": "wait"}}})
    node.gate.unlink()
    supervisor = node.start("run", job)
    supervisor.wait_for("step 5")
    wait_until(
        lambda: (node.store_folder / "killed/tracking/mlflow.json").exists(), what="the MLflow run"
    )
    supervisor.process.kill()
    supervisor.wait()
    node.gate.touch()

    wait_until(lambda: not node.processes(), what="the end of the sender and the trainer")


ABOUT = About(
    "run", "the key", "job", {}, Path(), Path(), {"lr": "0.1"}, {"runner.place": "/x/run"}
)


@pytest.mark.parametrize("kind", ["folder", "sqlite"])
def test_a_folder_and_a_database_do_without_a_server(tmp_path: Path, kind: str) -> None:
    uri = "mlruns" if kind == "folder" else "sqlite:///mlflow.db"
    about = About(**{**vars(ABOUT), "settings": {"uri": uri}, "workdir": tmp_path})
    tracker = tracking.MLflowTracker()
    run_id = tracker.begin(about, None)
    tracker.log([Reading("loss", value, step, 0, 1e9) for step, value in ((1, 0.5), (2, 0.25))])
    tracker.log([Reading("val loss|%", float("nan"), 2, 0, 1e9)])
    tracker.show(Shown("step-1", 1, "/x/run/checkpoints/step-1", {"step": 1}))
    tracker.end("preempted")

    assert tracking.MLflowTracker().begin(about, run_id) == run_id
    assert tracking.MLflowTracker().begin(about, None) == run_id, "found by its key"
    assert tracker.sent() == {"loss": 2, "val loss__": 2}
    assert tracking.place_of_run(uri, tmp_path, run_id) == "/x/run"
    found = tracking.client_for(uri, tmp_path)
    assert [item.path for item in found.list_artifacts(run_id)] == ["checkpoints"]
    assert list(tmp_path.iterdir()), "all of it lies in the workdir"


def test_params_that_change_are_told_in_tags(tmp_path: Path) -> None:
    settings = {"settings": {"uri": "mlruns"}, "workdir": tmp_path}
    run_id = tracking.MLflowTracker().begin(About(**{**vars(ABOUT), **settings}), None)
    changed = About(**{**vars(ABOUT), **settings, "params": {"lr": "0.2", "new": "1"}})
    tracking.MLflowTracker().begin(changed, run_id)

    data = tracking.client_for("mlruns", tmp_path).get_run(run_id).data
    assert data.params == {"lr": "0.1", "new": "1"}
    assert data.tags["runner.params.lr"] == "0.2"


def test_what_mlflow_will_never_take_is_refused(tmp_path: Path) -> None:
    about = About(**{**vars(ABOUT), "settings": {"uri": "mlruns"}, "workdir": tmp_path})
    tracker = tracking.MLflowTracker()
    tracker.begin(about, None)
    with pytest.raises(TrackerRefused):
        tracker.log([Reading("/" + "x" * 300, 1.0, 1, 0, 1e9)])


def test_somebody_elses_run_has_no_place(tmp_path: Path) -> None:
    about = About(**{**vars(ABOUT), "settings": {"uri": "m"}, "workdir": tmp_path, "tags": {}})
    run_id = tracking.MLflowTracker().begin(about, None)
    with pytest.raises(TrackerError, match="none of runner's"):
        tracking.place_of_run("m", tmp_path, run_id)
