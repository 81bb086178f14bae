"""What the trainer tells of where its checkpoints come from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from runner.spool import FACTS_FILE, RankSpool
from runner.training import fingerprint as module
from runner.training.facts import Facts, architecture, environment, plain, trainer_facts
from runner.training.fingerprint import fingerprint


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with two files, whose times lie in the past."""
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    for name, text in (("a.txt", "one"), ("inner/b.txt", "two")):
        (folder / name).write_text(text)
        os.utime(folder / name, (1e9, 1e9))
    return folder


# ---------------------------------------------------------------- facts


def test_facts_are_told_and_added_to(tmp_path: Path) -> None:
    rank = RankSpool(tmp_path)
    facts = Facts(rank)

    facts.tell(model={"model": {"parameters": 3}})
    facts.add("dataset", "train", {"digest": "x"})
    facts.add("dataset", "test", {"digest": "y"})

    told = rank.read(FACTS_FILE)
    assert told["model"]["model"]["parameters"] == 3
    assert list(told["dataset"]) == ["train", "test"]
    assert told["torch"] == torch.__version__
    assert "numpy" in told["packages"]


def test_a_spool_that_is_full_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Facts(RankSpool(tmp_path / "not-there")).tell()

    assert "where checkpoints come from is not told" in caplog.text


def test_of_the_environment_only_what_is_listed_is_told() -> None:
    told = environment(
        {
            "OMP_NUM_THREADS": "2",
            "AWS_SECRET_ACCESS_KEY": "x",
            "TORCH_TOKEN": "abcdef",
            "HOME": "/h",
        }
    )

    assert told == {"OMP_NUM_THREADS": "2", "TORCH_TOKEN": "***"}


def test_params_are_masked_and_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"lr": 0.1, "api_key": "abc", "nested": {"password": "x", "n": 3}}
    monkeypatch.setenv("RUNNER_PARAMS", json.dumps(given))

    facts = trainer_facts()

    assert facts["params"]["lr"] == 0.1
    assert facts["params"]["api_key"] == "***"
    assert facts["params"]["nested"] == {"password": "***", "n": 3}
    assert json.loads(json.dumps(facts)) == facts


def test_what_json_lacks_becomes_text() -> None:
    assert plain({"a": float("nan"), "b": torch.float32, "c": (1, 2)}) == {
        "a": "NaN", "b": "torch.float32", "c": [1, 2],
    }  # fmt: skip


def test_the_seed_of_torch_is_told() -> None:
    torch.manual_seed(1234)

    assert trainer_facts()["seeds"] == {"torch": 1234}


# ---------------------------------------------------------------- architecture


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.act = nn.ReLU()


def test_a_model_is_a_tree_that_people_can_read() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Block(), Block(), Block(), nn.Linear(4, 1, bias=False))
    model[0].requires_grad_(False)

    found = architecture(model)

    assert found["class"] == "torch.nn.modules.container.Sequential"
    assert (found["parameters"], found["trainable"]) == (80, 64)
    assert found["tree"] == [
        "Sequential  80",
        "  0: Linear(in_features=3, out_features=4, bias=True)  16",
        "  1 to 3, each: Block  20",
        "    linear: Linear(in_features=4, out_features=4, bias=True)  20",
        "    act: ReLU",
        "  4: Linear(in_features=4, out_features=1, bias=False)  4",
    ]


def test_a_long_tree_is_cut_and_a_model_that_cannot_describe_itself_is_no_error() -> None:
    class Shy(nn.Module):
        def extra_repr(self) -> str:
            raise RuntimeError("no")

    model = nn.Sequential(*(nn.Linear(1, n) for n in range(1, 400)), Shy(), nn.LazyLinear(3))

    tree = architecture(model)["tree"]

    assert len(tree) == 301
    assert tree[-1] == "… and 102 more lines"


# ---------------------------------------------------------------- fingerprints


def test_a_folder_is_known_by_its_content(data: Path, tmp_path: Path) -> None:
    first = fingerprint(data)
    moved = data.rename(tmp_path / "elsewhere")

    assert (first["kind"], first["files"], first["bytes"]) == ("folder", 2, 6)
    assert fingerprint(str(moved))["digest"] == first["digest"]


def write(path: Path, text: str) -> None:
    path.write_text(text)


CHANGES = {
    "a content": lambda folder: write(folder / "a.txt", "ONE"),
    "a name": lambda folder: (folder / "a.txt").rename(folder / "c.txt"),
    "one more": lambda folder: write(folder / "c.txt", ""),
    "one less": lambda folder: (folder / "a.txt").unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_what_changes_in_a_folder_changes_its_digest(data: Path, change: object) -> None:
    before = fingerprint(data)["digest"]

    change(data)  # type: ignore[operator]

    assert fingerprint(data)["digest"] != before


def test_a_file_is_read_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(data)
    file = fingerprint(data / "a.txt")

    def must_not_read(*_: object) -> str:
        raise AssertionError("it is read again")

    monkeypatch.setattr(module, "_sha256", must_not_read)

    assert fingerprint(data) == before
    assert fingerprint(data / "a.txt") == file


def test_a_file_that_was_changed_just_now_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "now.txt"
    path.write_text("one")
    status = path.stat()
    before = fingerprint(path)["digest"]
    path.write_text("two")
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))

    assert fingerprint(path)["digest"] != before


def test_a_cache_that_is_none_is_no_error(data: Path, cache: Path) -> None:
    before = fingerprint(data)
    for file in cache.rglob("*.json"):
        file.write_text('{"a.txt": 3, "inner/b.txt": [1')

    assert fingerprint(data) == before


def test_what_dvc_has_noted_is_taken(tmp_path: Path) -> None:
    (tmp_path / "data.dvc").write_text(
        "outs:\n- md5: 3863d0e317dee0a55c4e59d2ec0eef33.dir\n  size: 60\n  nfiles: 2\n"
        "  hash: md5\n  path: data\n"
    )

    assert fingerprint(tmp_path / "data") == {  # it need not even be there
        "digest": "md5:3863d0e317dee0a55c4e59d2ec0eef33.dir",
        "kind": "dvc",
        "path": str(tmp_path / "data"),
        "files": 2,
        "bytes": 60,
    }


def test_a_file_of_dvc_that_is_about_something_else_is_passed_over(data: Path) -> None:
    before = fingerprint(data)["digest"]
    data.with_name("data.dvc").write_text("outs:\n- md5: abc\n  path: other\n")

    assert fingerprint(data)["digest"] == before


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fingerprint(tmp_path / "nowhere")


def test_values_are_known_by_type_and_content() -> None:
    values = [
        {"x": torch.zeros(3)}, {"x": torch.zeros(3, dtype=torch.int32)}, {"x": np.zeros(3)},
        {"x": torch.zeros(1, 3)}, {"y": torch.zeros(3)}, [1, 2.0], [1, 2], (1, 2), b"12",
        np.zeros(100_000), torch.zeros(3, dtype=torch.bfloat16),
    ]  # fmt: skip

    digests = [fingerprint(value)["digest"] for value in values]

    assert len(set(digests)) == len(values)
    assert fingerprint({"x": torch.zeros(3)})["digest"] == digests[0]


def test_an_object_may_have_a_fingerprint_of_its_own() -> None:
    class Table:
        def fingerprint(self) -> str:
            return "abc"

    assert fingerprint(Table()) == {"digest": "abc", "kind": "Table"}


def test_other_objects_are_refused_with_what_to_do() -> None:
    with pytest.raises(TypeError, match="give the files it reads, or the values it holds"):
        fingerprint({"data": object()})
