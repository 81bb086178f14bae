"""What deployment gets: the weights as they were saved, and all that is needed to use them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from nodes import Node, nodes_in

from runner.checkpoint.plain import to_plain
from runner.errors import UsageError
from runner.job_entrypoint import function_problem

REPOSITORY = Path(__file__).parent.parent
PARAMS = {"data": "synthetic", "engines": 6, "epochs": 2, "hidden": 8, "profile": "quick"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """With a finished run of the C-MAPSS job, a small one."""
    with nodes_in(tmp_path_factory.mktemp("nodes")) as new:
        node = new("node")
        job = node.job(
            *("python", "-m", "jobs.rul.train"),
            name="rul",
            workdir=str(REPOSITORY),
            params=PARAMS,
            env={"OMP_NUM_THREADS": "1"},
            checkpoint={"every": {"epochs": 1}, "keep": {"best": {"metric": "val_rmse"}}},
            export={"state": ["config", "statistics"], "onnx": "jobs.rul.onnx:network"},
        )
        started = node.start("run", job)
        assert started.wait(timeout=150) == 0, started.err
        yield node


def predictions(folder: Path) -> dict[int, float]:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.rul.predict", str(folder), "synthetic"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    words = [line.split() for line in done.stdout.splitlines()]
    return {int(unit): float(cycles) for unit, cycles, _ in words}


def test_predictions_from_an_export_are_those_of_the_training_script(
    node: Node, tmp_path: Path
) -> None:
    called = node.call("checkpoints", "export", "rul", "--best", "--ema", "--to", f"{tmp_path}/out")
    assert called.code == 0, called.err
    bundle, out = node.store_folder / "rul" / "outputs", tmp_path / "out"
    tested = json.loads((bundle / "metrics.json").read_text())
    ours = predictions(out)

    from jobs.rul import data
    from jobs.rul.model import load_bundle, predict

    net, config, statistics = load_bundle(bundle)
    subset = data.load("FD001", "synthetic", engines=6, announce=lambda line: None)
    theirs, _ = predict(net, data.last_windows(subset.test, statistics, config.window))
    assert list(ours.values()) == pytest.approx(theirs.tolist(), rel=1e-6, abs=1e-6)
    error = np.array(list(ours.values())) - np.minimum(subset.truth, config.cap)
    assert np.sqrt((error**2).mean()) == pytest.approx(tested["rmse_capped"], rel=1e-5)
    mine = safetensors.numpy.load_file(out / "model.safetensors")
    scripts = safetensors.numpy.load_file(bundle / "model.safetensors")
    assert mine.keys() == scripts.keys()
    assert all((mine[name] == scripts[name]).all() for name in mine)


def test_an_export_holds_what_deployment_needs_and_nothing_else(node: Node, tmp_path: Path) -> None:
    out, best = tmp_path / "out", node.archive("rul").find("best", "val_rmse")
    called = node.call("checkpoints", "export", "rul", "--best", "--to", str(out))
    assert called.code == 0, called.err
    weights = safetensors.numpy.load_file(out / "model.safetensors")
    saved = safetensors.numpy.load_file(node.checkpoint(best) / "model.safetensors")
    card = (out / "README.md").read_text()

    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "config.json", "metrics.json", "model.safetensors", "statistics.json")
    ]
    assert all((array == saved[name]).all() for name, array in weights.items())
    assert len(weights) == len(saved)
    assert json.loads((out / "config.json").read_text())["hidden"] == 8
    assert json.loads((out / "metrics.json").read_text()) == best.moment.metrics
    assert len(json.loads((out / "statistics.json").read_text())["mean"][0]) == 21
    assert best.name in card
    assert f'"host": "{best.provenance["host"]}"' in card


def test_onnx_gives_what_torch_gives(node: Node, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs runner[onnx]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs runner[onnx]")
    started = node.start(
        *("checkpoints", "export", "rul", "--best", "--ema", "--onnx", "--to", f"{tmp_path}/out")
    )
    assert started.wait(timeout=170) == 0, started.err
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    cycles, states = session.run(None, {"sensors": np.zeros((7, 30, 21), np.float32)})

    assert cycles.shape == (7,)
    assert states.shape == (7, 3)


WRONG = {
    "a checkpoint that is not there": (["999", "--to", "out"], "no checkpoint '999' of run rul"),
    "two checkpoints": (["latest", "--best", "--to", "out"], "give a checkpoint or --best"),
    "no folder": (["--best"], "give either a folder"),
    "a copy as ONNX": (["best", "out", "--onnx"], "--ema and --onnx are for --to DIR"),
    "a folder in use": (["--best", "--to", "."], "is there already"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_exported_is_the_users_error(
    node: Node, words: list[str], message: str
) -> None:
    before = sorted(path.name for path in node.folder.iterdir())
    called = node.call("checkpoints", "export", "rul", *words)

    assert called.code == 2
    assert message in called.err
    assert sorted(path.name for path in node.folder.iterdir()) == before


def test_a_library_that_is_not_installed_is_named(
    node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    missing = lambda name, *more: None if name == "onnx" else find(name, *more)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", missing)
    called = node.call("checkpoints", "export", "rul", "--best", "--onnx", "--to", f"{tmp_path}/x")

    assert called.code == 2
    assert "pip install 'runner[onnx]'" in called.err


PLAIN: dict[str, tuple[Any, Any]] = {
    "plain": ({"a": [1, 2.5, None, "x", True]}, {"a": [1, 2.5, None, "x", True]}),
    "tuple": ({"$": "tuple", "v": [1, {"$": "tuple", "v": [2]}]}, [1, [2]]),
    "array": (
        {"$": "ndarray", "dtype": "<i2", "shape": [2, 2], "order": "F", "v": "AQACAAMABAA="},
        [[1, 3], [2, 4]],
    ),
    "scalar": ({"$": "numpy", "dtype": "<i2", "v": "AQA="}, 1),
    "path": ({"$": "path", "type": "PosixPath", "v": "a/b"}, "a/b"),
    "large number": ({"$": "int", "v": hex(1 << 60)}, 1 << 60),
    "tensor": ({"$": "array", "v": {"$": "tensor", "file": "f", "name": "n"}}, "f/n"),
}


@pytest.mark.parametrize(("tree", "value"), PLAIN.values(), ids=PLAIN)
def test_values_become_plain(tree: Any, value: Any) -> None:
    assert to_plain(tree, "x", lambda ref: f"{ref['file']}/{ref['name']}") == value


def test_what_json_lacks_is_refused_by_its_path() -> None:
    with pytest.raises(UsageError, match=r"state\.a\[1\] is a complex"):
        to_plain({"a": [1, {"$": "complex", "v": []}]}, "state", str)


ENTRYPOINTS = {
    "good": ("entry:good", None),
    "more with defaults": ("entry:defaults", None),
    "imported": ("entry:Path", None),
    "installed": ("json:dumps", None),
    "no module": ("nowhere.entry:good", "there is no module 'nowhere.entry'"),
    "no function": ("entry:god", "module entry has no 'god'; did you mean 'good'?"),
    "too few": ("entry:none", "cannot be called with the folder"),
    "too many": ("entry:two", "cannot be called with the folder"),
}


@pytest.mark.parametrize(("entrypoint", "problem"), ENTRYPOINTS.values(), ids=ENTRYPOINTS)
def test_an_entry_point_is_judged_by_its_source(
    tmp_path: Path, entrypoint: str, problem: str | None
) -> None:
    (tmp_path / "entry.py").write_text(
        "from pathlib import Path\n"
        "raise RuntimeError('it is not imported')\n"
        "def good(folder): ...\n"
        "def defaults(folder, more=1, *, other=2): ...\n"
        "def none(): ...\n"
        "def two(folder, more): ...\n"
    )
    found = function_problem(entrypoint, [str(tmp_path)])

    assert found is None if problem is None else problem in str(found)


def test_an_entry_point_that_is_not_there_is_found_at_submit(node: Node) -> None:
    job = node.training("absent", export={"onnx": "jobs.rul.onnx:net"}, workdir=str(REPOSITORY))
    called = node.call("submit", job, "--dry-run")

    assert called.code == 2
    assert "export.onnx: module jobs.rul.onnx has no 'net'; did you mean 'network'?" in called.err
