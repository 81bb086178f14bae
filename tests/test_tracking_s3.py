"""A run whose store is a bucket, shown to trackers, exported and promoted, against a real server.

Its first node is lost with its disk, so what was sent is known from the bucket alone. The same run
on a directory, undisturbed, is what it is compared with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from buckets import Bucket, new_bucket
from nodes import Called, Node, nodes_in
from offline_files import points_of_wandb
from servers.ceph import Gateway

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
tracking = pytest.importorskip("runner.tracking.mlflow", reason="needs runner[mlflow]")

pytestmark = pytest.mark.ceph

CHECKPOINT = {
    "every": {"epochs": 1},
    "snapshot_every": {"steps": 1},
    "keep": {"last": 9, "best": {"metric": "val_loss"}},
}


@dataclass(frozen=True)
class Pair:
    """The run `there`, in a bucket, and the run `here`, in the node's directory."""

    node: Node
    bucket: Bucket
    client: Any

    @property
    def named(self) -> tuple[str, ...]:
        """How a command finds a run in the bucket."""
        return ("there", "--store", self.bucket.url, "--s3-endpoint", self.bucket.endpoint)

    def mlflow_id(self, run_id: str) -> str:
        found = self.client.search_runs(
            [self.client.get_experiment_by_name("steps").experiment_id],
            f"tags.`runner.run_id` = '{run_id}'",
        )
        assert len(found) == 1, "one for each run"
        return str(found[0].info.run_id)

    def history(self, run_id: str) -> dict[str, list[tuple[int, float]]]:
        found = self.mlflow_id(run_id)
        return {
            name: [(p.step, p.value) for p in self.client.get_metric_history(found, name)]
            for name in self.client.get_run(found).data.metrics
        }


@pytest.fixture(scope="module")
def pair(gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with new_bucket(gateway) as bucket, nodes_in(tmp_path_factory.mktemp("nodes")) as new:
        node = new("node")
        node.gate.touch()
        here = node.run("run", tracked(node, "here"))
        assert here.code == 0, here.err
        there = node.run(
            *("simulate", tracked(node, "there", **bucket.keys), "--run-id", "there"),
            *("--preempt", "step=10", "--lose-disk", "--grace", "60s"),
        )
        assert there.code == 0, there.err
        yield Pair(node, bucket, tracking.client_for("sqlite:///mlflow.db", node.folder))


def tracked(node: Node, name: str, **keys: Any) -> str:
    section = {"uri": "sqlite:///mlflow.db", "experiment": "steps", "upload": "best"}
    trackers = {"mlflow": section}
    if find_spec("wandb") is not None:
        trackers["wandb"] = {"mode": "offline"}
    return node.training(name, checkpoint=CHECKPOINT, tracking=trackers, **keys)


@pytest.fixture
def damaged(pair: Pair) -> Iterator[None]:
    """One bit of the best checkpoint's weights is another one."""
    best = pair.bucket.archive("there").find("best", "val_loss")
    key = f"some/prefix/there/checkpoints/{best.name}/model.safetensors"
    content = pair.bucket.objects()[key]
    pair.bucket.put(key, content[:-1] + bytes([content[-1] ^ 1]))
    yield
    pair.bucket.put(key, content)


# ---------------------------------------------------------------- shown


def test_a_run_whose_node_was_lost_has_the_history_of_an_undisturbed_one(pair: Pair) -> None:
    points, newest = pair.history("there"), pair.bucket.archive("there").find("latest")

    assert points == pair.history("here")
    assert [step for step, _ in points["train_loss"]] == list(range(1, 25))
    assert newest.moment.attempt == 2
    assert newest.provenance["tracker"]["mlflow"] == pair.mlflow_id("there")


def test_offline_files_of_both_nodes_are_in_the_bucket_whole(pair: Pair, tmp_path: Path) -> None:
    if find_spec("wandb") is None:
        pytest.skip("needs runner[wandb]")
    objects = pair.bucket.objects()
    parts = [content for key, content in objects.items() if key.endswith(".wandb")]
    for number, content in enumerate(parts):
        (tmp_path / str(number)).write_bytes(content)
    shown = [point for path in tmp_path.iterdir() for point in points_of_wandb(path)]
    history = pair.history("here").items()

    assert len(parts) == 2, "one of each supervisor"
    assert sorted(shown) == sorted((at, name, v) for name, points in history for at, v in points)
    assert "some/prefix/there/outputs/metrics.json" in objects


def test_the_best_checkpoints_are_uploaded_from_the_bucket(pair: Pair, tmp_path: Path) -> None:
    found, manifests = pair.mlflow_id("there"), list(pair.bucket.archive("there").manifests())
    listed = {
        Path(item.path).name: {Path(file.path).name for file in files}
        for item in pair.client.list_artifacts(found, "checkpoints")
        for files in [pair.client.list_artifacts(found, item.path)]
    }
    best = next(manifest for manifest in manifests if "best" in manifest.moment.triggers)
    folder = f"checkpoints/{best.name}"
    path = Path(pair.client.download_artifacts(found, folder, str(tmp_path)))
    shown = json.loads((path / "checkpoint.json").read_text())
    key = f"some/prefix/there/{folder}"

    assert listed == {
        manifest.name: {"checkpoint.json"}
        | ({"manifest.json", *(f.name for f in manifest.files)} if "best" in triggers else set())
        for manifest in manifests
        for triggers in [manifest.moment.triggers]
    }
    assert shown["uri"] == f"{pair.bucket.url}/there/{folder}"
    objects = pair.bucket.objects()
    for name in listed[best.name] - {"checkpoint.json", "manifest.json"}:
        assert (path / name).read_bytes() == objects[f"{key}/{name}"]


# ---------------------------------------------------------------- exported, promoted


def test_an_export_is_the_same_from_a_bucket_and_from_a_directory(
    pair: Pair, tmp_path: Path
) -> None:
    for key, content in pair.bucket.objects().items():
        path = tmp_path / "store" / key.removeprefix("some/prefix/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    places = {"bucket": pair.named, "copy": ("there", "--store", str(tmp_path / "store"))}

    for name, named in places.items():
        called = pair.node.call(
            "checkpoints", "export", *named, "--best", "--to", f"{tmp_path}/{name}"
        )
        assert called.code == 0, called.err

    assert files_in(tmp_path / "bucket") == files_in(tmp_path / "copy")
    assert files_in(tmp_path / "bucket").keys() == {
        *("README.md", "config.json", "metrics.json", "model.safetensors")
    }


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_checkpoint_in_a_bucket_is_promoted(pair: Pair, tmp_path: Path) -> None:
    called = pair.node.run("promote", *pair.named, "--best", "--name", "steps")
    assert (called.code, called.out) == (0, "steps, version 1\n"), called.err
    best = pair.bucket.archive("there").find("best", "val_loss")
    (version,) = pair.client.search_model_versions("name='steps'")
    place = f"models/{best.name}/data"
    registered = pair.client.download_artifacts(version.run_id, place, str(tmp_path))
    pair.node.call("checkpoints", "export", *pair.named, "--best", "--to", f"{tmp_path}/export")

    assert version.run_id == pair.mlflow_id("there")
    place = f"{pair.bucket.url}/there/checkpoints/{best.name}"
    assert version.tags["runner.checkpoint"] == place
    assert files_in(Path(registered)) == files_in(tmp_path / "export")


@pytest.mark.usefixtures("damaged")
def test_what_fails_in_the_middle_leaves_nothing(pair: Pair, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    def run(*words: str) -> Called:
        return pair.node.run(*words, env={"TMPDIR": str(temporary)})

    exported = run("checkpoints", "export", *pair.named, "--best", "--to", f"{tmp_path}/out")
    promoted = run("promote", *pair.named, "--best", "--name", "damaged")

    for called in (exported, promoted):
        assert called.code not in (0, 2)
        assert "model.safetensors is not the one saved" in called.err
    assert list(tmp_path.rglob("*")) == [temporary]
    assert pair.client.search_model_versions("name='damaged'") == []
    assert pair.client.search_registered_models("name='damaged'") == []
