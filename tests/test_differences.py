"""What two checkpoints differ in: facts and tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from slots import RUN, Snapshot, checkpoint_folder, memory_folder, views

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.comparing import Side, TensorChange, changed_tensors
from runner.checkpoint.differences import Change, changed_facts
from runner.checkpoint.manifest import Manifest, Moment
from runner.checkpoint.persist import Persister
from runner.checkpoint.retention import Keep
from runner.cli.describing import compared, described
from runner.errors import CheckpointCorrupt
from runner.store import DirectoryStore

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture
def store() -> Iterator[DirectoryStore]:
    with memory_folder() as folder:
        yield DirectoryStore(folder)


def save(
    store: DirectoryStore,
    number: int,
    tensors: dict[str, torch.Tensor],
    *,
    compresses: bool = False,
    provenance: dict[str, Any] | None = None,
) -> Side:
    files = {
        "model.safetensors": safetensors.torch.save(tensors),
        "state.json": json.dumps({"version": 1}).encode(),
    }
    taken = Snapshot(Moment(1, number, 10 * number, epoch=0, batch=1), files)
    ledger = Ledger(store, RUN, "0123456789abcdef")
    persister = Persister(store, ledger, Keep(), compresses=compresses)
    manifest = persister.persist(taken.moment, views(files), provenance)
    return Side(Archive(store, RUN), manifest)


def differ(one: Side, other: Side) -> list[TensorChange]:
    return list(changed_tensors(one, other))


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize("dtype", [*FLOATS, *EIGHT_BITS], ids=str)
def test_the_norm_of_a_difference_is_that_of_torch(
    store: DirectoryStore, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    before, after = (torch.randn(50, 7).to(dtype) for _ in range(2))

    (change,) = differ(save(store, 1, {"w": before}), save(store, 2, {"w": after}))

    wide = before.to(torch.float64), after.to(torch.float64)
    apart = wide[1] - wide[0]
    assert change.norm == pytest.approx(float(apart.norm()))
    assert change.relative == pytest.approx(float(apart.norm() / wide[0].norm()))
    assert change.largest == pytest.approx(float(apart.abs().max()))


def test_all_patterns_of_the_eight_bit_floats_are_read_as_torch_reads_them(
    store: DirectoryStore,
) -> None:
    from runner.checkpoint import comparing

    patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    for name, dtype in zip(("F8_E4M3", "F8_E5M2"), EIGHT_BITS, strict=True):
        wanted = patterns.view(dtype).to(torch.float64).numpy()
        np.testing.assert_array_equal(comparing._EIGHT_BITS[name], wanted)


def test_whole_numbers_truth_values_and_complex_ones(store: DirectoryStore) -> None:
    before = {
        "count": torch.tensor(3), "mask": torch.tensor([True, False]),
        "wave": torch.tensor([1 + 1j]), "same": torch.ones(2),
    }  # fmt: skip
    after = {
        "count": torch.tensor(7), "mask": torch.tensor([True, True]),
        "wave": torch.tensor([4 + 5j]), "same": torch.ones(2),
    }  # fmt: skip

    found = {c.name: c.norm for c in differ(save(store, 1, before), save(store, 2, after))}

    assert found == {"count": 4.0, "mask": 1.0, "wave": 5.0}


def test_what_has_come_gone_or_changed_its_shape(store: DirectoryStore) -> None:
    before = {"gone": torch.ones(2), "shape": torch.ones(2, 3), "dtype": torch.ones(2)}
    after = {"new": torch.ones(1), "shape": torch.ones(3, 2), "dtype": torch.ones(2).half()}

    found = {c.name: c for c in differ(save(store, 1, before), save(store, 2, after))}

    assert (found["gone"].before, found["gone"].after) == (("F32", (2,)), None)
    assert (found["new"].before, found["new"].after) == (None, ("F32", (1,)))
    assert (found["shape"].before, found["shape"].norm) == (("F32", (2, 3)), None)
    assert (found["dtype"].after, found["dtype"].norm) == (("F16", (2,)), 0.0)


def test_values_that_are_not_finite_are_told(store: DirectoryStore) -> None:
    before, after = torch.ones(2), torch.tensor([1.0, torch.nan])

    (change,) = differ(save(store, 1, {"w": before}), save(store, 2, {"w": after}))

    assert change.norm is not None
    assert math.isnan(change.norm)
    assert change.largest is not None
    assert math.isnan(change.largest)


def test_a_large_tensor_is_compared_in_pieces(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.checkpoint import comparing

    monkeypatch.setattr(comparing, "_PIECE_ITEMS", 7)
    before, after = torch.randn(100), torch.randn(100)

    (change,) = differ(save(store, 1, {"w": before}), save(store, 2, {"w": after}))

    assert change.norm == pytest.approx(float((after - before).double().norm()), rel=1e-6)


def test_a_compressed_one_is_compared_with_a_plain_one(store: DirectoryStore) -> None:
    before, after = {"w": torch.zeros(200_000)}, {"w": torch.ones(200_000)}

    (change,) = differ(save(store, 1, before, compresses=True), save(store, 2, after))

    assert change.norm == pytest.approx(math.sqrt(200_000))


def test_files_that_are_the_same_are_not_read(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = [save(store, number, {"w": torch.ones(3)}) for number in (1, 2)]

    def must_not_read(*_: object) -> None:
        raise AssertionError("it is read")

    monkeypatch.setattr(store, "fetch", must_not_read)

    assert differ(*sides) == []


def test_a_damaged_one_is_not_compared(store: DirectoryStore) -> None:
    sides = [save(store, number, {"w": torch.full((3,), float(number))}) for number in (1, 2)]
    path: Path = checkpoint_folder(store, sides[1].manifest.name) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")

    with pytest.raises(CheckpointCorrupt):
        differ(*sides)


# ---------------------------------------------------------------- facts


def manifest(provenance: dict[str, Any], **moment: Any) -> Manifest:
    facts = {"attempt": 1, "save": 1, "step": 1, "epoch": 0, "batch": 1} | moment
    return Manifest(RUN, Moment(**facts), (), provenance)


def test_facts_that_differ_are_told_by_section() -> None:
    one = manifest(
        {"params": {"lr": 0.1, "epochs": 3}, "git": {"commit": "a", "dirty": False},
         "packages": {"torch": "2.6", "old": "1"}, "dataset": {"data": {"digest": "x"}}},
        metrics={"loss": 1.0, "gone": 2.0},
    )  # fmt: skip
    other = manifest(
        {"params": {"lr": 0.2, "epochs": 3}, "git": {"commit": "b", "dirty": False},
         "packages": {"torch": "2.7", "new": "2"}, "dataset": {"data": {"digest": "y"}},
         "something": 1},
        step=2,
        metrics={"loss": 0.5},
    )  # fmt: skip

    assert changed_facts(one, other) == [
        Change("config", "params.lr", 0.1, 0.2),
        Change("code", "git.commit", "a", "b"),
        Change("data", "dataset.data.digest", "x", "y"),
        Change("environment", "packages.torch", "2.6", "2.7"),
        Change("environment", "packages.old", "1", None),
        Change("environment", "packages.new", None, "2"),
        Change("other", "something", None, 1),
        Change("place", "step", 1, 2),
        Change("metrics", "gone", 2.0, None),
        Change("metrics", "loss", 1.0, 0.5),
    ]


def test_equal_numbers_of_another_type_differ() -> None:
    one, other = ({"params": {"x": value}} for value in (1, True))

    assert changed_facts(manifest(one), manifest(other)) == [Change("config", "params.x", 1, True)]


def test_nothing_differs_from_itself() -> None:
    one = manifest({"params": {"x": math.inf}}, metrics={"loss": math.nan})

    assert changed_facts(one, one) == []
    assert list(compared(("a", "b"), [], [])) == ["a -> b", "no difference"]


# ---------------------------------------------------------------- in words


def test_a_difference_reads_well() -> None:
    facts = [
        {"section": "config", "key": "params.lr", "before": 0.1, "after": None},
        {"section": "model", "key": "model.net.tree", "before": ["Net  3"], "after": ["Net  4"]},
    ]
    tensors = [
        {"file": "model.safetensors", "name": "w", "before": ("F32", (2,)), "after": ("F32", (2,)),
         "norm": 0.5, "relative": 0.25, "largest": 0.5},
        {"file": "ema.safetensors", "name": "b", "before": None, "after": ("F32", (1,)),
         "norm": None, "relative": None, "largest": None},
    ]  # fmt: skip

    assert "\n".join(compared(("a:1", "b:2"), facts, tensors)) == (
        "a:1 -> b:2\n"
        "\nconfig\n"
        "  params.lr: 0.1 -> (none)\n"
        "\nmodel\n"
        "  model.net.tree:\n"
        "    -Net  3\n"
        "    +Net  4\n"
        "\ntensors\n"
        "  name      what                 norm of difference  relative  largest\n"
        "  model: w  F32 [2]              0.5                 0.25      0.5\n"
        "  ema: b    only after, F32 [1]  -                   -         -"
    )


def test_a_checkpoint_says_where_it_comes_from(store: DirectoryStore) -> None:
    facts = {
        "git": {"commit": "abc", "branch": "main", "dirty": True, "diff": "12",
                "untracked_files": 2},
        "command": ["python", "train.py"],
        "dataset": {"data": {"digest": "sha256:1", "kind": "file", "files": 1, "bytes": 3,
                             "path": "a.csv"}},
        "packages": {"torch": "2.6"},
        "params": {"lr": 0.1},
        "cuda": None,
        "model": {"model": {"class": "a.Net", "parameters": 1200, "trainable": 200,
                            "tree": ["Net  1,200"]}},
    }  # fmt: skip
    document = json.loads(save(store, 1, {"w": torch.ones(1)}, provenance=facts).manifest.to_json())

    lines = list(described({**document, "validation": None}))

    assert "validation           not tried" in lines
    assert lines[-7:] == [
        "code                 abc on main, and changes (sha256 12, 2 files git does not know)",
        "command              python train.py",
        "data                 data: sha256:1 (file, 1 files, 3 bytes) a.csv",
        "packages             1, see -o json",
        "params               lr: 0.1",
        "model                model: a.Net, 1,200 parameters, 200 of them trained",
        "    Net  1,200",
    ]
