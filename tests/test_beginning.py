"""What a run may begin from: which checkpoint is meant, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from slots import commit, snapshot

from runner.checkpoint.archive import Archive
from runner.checkpoint.manifest import Manifest
from runner.errors import UsageError
from runner.store import DirectoryStore, S3Options
from runner.supervisor.beginning import beginning_of, origin_at, real_place

OPTIONS = S3Options()


@pytest.fixture
def saved(tmp_path: Path) -> list[Manifest]:
    """A run `job` with two full checkpoints, the weights alone being newer."""
    store = DirectoryStore(tmp_path / "store")
    scopes = ("full", "full", "weights")
    return [
        commit(store, snapshot(1, save, scope=scope), "job")
        for save, scope in enumerate(scopes, start=1)
    ]


def archive(tmp_path: Path) -> Archive:
    return Archive(DirectoryStore(tmp_path / "store"), "job")


def test_the_newest_full_checkpoint_of_another_run_is_begun_from(
    tmp_path: Path, saved: list[Manifest]
) -> None:
    origin = origin_at(str(tmp_path / "store" / "job"), (), OPTIONS)

    assert (origin.archive.run_id, origin.which) == ("job", saved[1].name)


def test_a_checkpoint_is_meant_by_its_own_place(tmp_path: Path, saved: list[Manifest]) -> None:
    place = tmp_path / "store" / "job" / "checkpoints" / saved[0].name

    assert origin_at(str(place), (), OPTIONS).which == saved[0].name


@pytest.mark.parametrize("which", ["place", "step", "name"])
def test_nothing_is_resumed_from_the_weights_alone(
    tmp_path: Path, saved: list[Manifest], which: str
) -> None:
    place = str(tmp_path / "store" / "job" / "checkpoints" / saved[2].name)
    given = {"place": place, "step": "300", "name": saved[2].name}[which]
    known: dict[str, Any] | None = None if which == "place" else {"run_id": "job"}

    with pytest.raises(UsageError, match="holds the weights alone") as refused:
        beginning_of(archive(tmp_path), known, given, (), (None, "min"), OPTIONS)

    assert "--components model" in str(refused.value)


def test_a_step_is_refused_only_if_it_is_of_weights_alone(
    tmp_path: Path, saved: list[Manifest]
) -> None:
    beginning = beginning_of(
        archive(tmp_path), {"run_id": "job"}, "200", (), (None, "min"), OPTIONS
    )

    assert beginning == ("200", None)


def test_a_damaged_checkpoint_is_not_begun_from(tmp_path: Path, saved: list[Manifest]) -> None:
    folder = tmp_path / "store" / "job" / "checkpoints" / saved[0].name
    (folder / "model.safetensors").write_bytes(b"x")

    with pytest.raises(UsageError, match=r"model\.safetensors of step-.* has 1 bytes instead of"):
        origin_at(str(folder), (), OPTIONS)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="choose another one"):
        origin_at(str(folder), (), OPTIONS)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("./nothing", "neither a checkpoint nor a run"),
        ("/", "neither a checkpoint nor a run"),
        ("s3://bucket", "expected s3://bucket/prefix/run, not a bucket"),
        ("s3://Bucket/run", "'Bucket' cannot be a bucket"),
        ("https://host/run", "expected a path, or s3://bucket/prefix/run"),
    ],
)
def test_a_place_that_is_none_is_refused(place: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        origin_at(place, (), OPTIONS)


def test_a_place_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    assert real_place("link/../link") == str(tmp_path / "real")
    assert real_place("s3://bucket/a/run/") == "s3://bucket/a/run"
