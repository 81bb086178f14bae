from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slots import FOREIGN_NAMES, RUN, checkpoint_folder, commit, file_entry, snapshot, views

from runner.checkpoint import manifest as module
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.manifest import (
    TRIGGERS,
    Manifest,
    Moment,
    moment_from_json,
    moment_to_json,
)
from runner.checkpoint.persist import Persister
from runner.checkpoint.provenance import collect
from runner.checkpoint.retention import Keep
from runner.errors import CheckpointInvalid
from runner.store import DirectoryStore

quick = settings(max_examples=80, deadline=None)
MEBIBYTE = 1 << 20
FILES = (file_entry("model.safetensors", b"weights" * 10, 32), file_entry("state.json", b"{}"))
MOMENT = Moment(
    attempt=3,
    save=7,
    step=1200,
    epoch=2,
    batch=17,
    batch_size=64,
    batches_per_epoch=591,
    triggers=("best", "interval"),
    metrics={"val_rmse": 12.5, "loss": math.inf},
    created_at="2025-11-21T05:46:00+00:00",
    productive_seconds=12.25,
    snapshot_seconds=0.001,
)
MANIFEST = Manifest(RUN, MOMENT, FILES, {"host": "node-1", "git": {"commit": None}})


def sealed(document: Mapping[str, Any]) -> bytes:
    """A manifest of this content, whatever it is, with the digest that belongs to it."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps(rest | {"digest": hashlib.sha256(text.encode()).hexdigest()}).encode()


# ---------------------------------------------------------------- what is written is read

counts = st.integers(0, 2**63 - 1)
seconds = st.floats(0, allow_nan=False, allow_infinity=False)
moments = st.builds(
    Moment,
    attempt=counts,
    save=counts,
    step=counts,
    epoch=counts,
    batch=counts,
    batch_size=st.none() | counts,
    batches_per_epoch=st.none() | counts,
    triggers=st.lists(st.sampled_from(TRIGGERS), unique=True).map(tuple),
    scope=st.sampled_from(["full", "weights"]),
    metrics=st.dictionaries(st.text(max_size=5), st.floats(), max_size=4),
    healthy=st.booleans(),
    created_at=st.text(max_size=30),
    productive_seconds=seconds,
    snapshot_seconds=seconds,
)


def bits(metrics: Mapping[str, float]) -> dict[str, str]:
    """Metrics such that nan equals nan, and -0.0 is not 0.0."""
    return {name: value.hex() for name, value in metrics.items()}


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@quick
@given(moments)
def test_a_moment_comes_back_as_it_was(moment: Moment) -> None:
    text = json.dumps(moment_to_json(moment), allow_nan=False)

    back = moment_from_json(json.loads(text))

    assert bits(back.metrics) == bits(moment.metrics)
    assert replace(back, metrics={}) == replace(moment, metrics={})


@quick
@given(moments)
def test_a_manifest_comes_back_as_it_was(moment: Moment) -> None:
    manifest = Manifest(RUN, moment, FILES, {"host": "node-1", "gpus": []})

    data = manifest.to_json()
    back = Manifest.from_json(data, str(moment.name))

    json.loads(data, parse_constant=no_constant)
    assert back.to_json() == data
    assert (back.run_id, back.files, back.provenance) == (RUN, FILES, manifest.provenance)


def test_a_manifest_knows_its_name_and_its_bytes() -> None:
    assert MANIFEST.name == "step-000001200-a0003-s007"
    assert MANIFEST.nbytes == 72


def test_every_field_stands_in_the_manifest_under_its_own_name() -> None:
    document = json.loads(MANIFEST.to_json())
    digest = document.pop("digest")

    assert json.loads(sealed(document))["digest"] == digest
    assert document == {
        "format": 1,
        "run_id": RUN,
        "attempt": 3,
        "save": 7,
        "step": 1200,
        "epoch": 2,
        "batch": 17,
        "batch_size": 64,
        "batches_per_epoch": 591,
        "triggers": ["best", "interval"],
        "scope": "full",
        "metrics": {"val_rmse": 12.5, "loss": "inf"},
        "healthy": True,
        "created_at": "2025-11-21T05:46:00+00:00",
        "productive_seconds": 12.25,
        "snapshot_seconds": 0.001,
        "files": [
            {
                "name": file.name,
                "size": file.size,
                "part_bytes": file.part_bytes,
                "parts": list(file.parts),
                "digest": file.digest,
            }
            for file in FILES
        ],
        "provenance": {"host": "node-1", "git": {"commit": None}},
    }


# ---------------------------------------------------------------- damage

MISSING = object()
NO_COUNTS = [-1, 2**63, 10**30, True, 1.0, "7", None, [7], MISSING]
NO_SECONDS = [math.nan, math.inf, -math.inf, 10**400, "1.5", True, None, [1.0], MISSING]
DIGEST = hashlib.sha256(b"x").hexdigest()

DAMAGED_FIELDS: dict[str, list[Any]] = {
    "format": [0, 2, -1, "1", 1.0, True, None, [1], MISSING],
    "run_id": [None, 3, [RUN], MISSING],
    "attempt": [*NO_COUNTS, 4],
    "save": [*NO_COUNTS, 8],
    "step": [*NO_COUNTS, 1201],
    "epoch": NO_COUNTS,
    "batch": NO_COUNTS,
    "batch_size": [-1, 2**63, True, 1.0, "64", [64]],
    "batches_per_epoch": [-1, 2**63, True, 1.0, "64", [64]],
    "triggers": [None, "best", ["worst"], [1], [["best"]], {}, {"best": 1}, "", MISSING],
    "scope": ["half", "", None, ["full"], 1, MISSING],
    "metrics": [
        None, [], [["a", 1]], "a", {"a": None}, {"a": "much"}, {"a": "1.5"}, {"a": [1.0]},
        {"a": True}, {"a": 10**400}, MISSING,
    ],
    "healthy": [None, "yes", 1, 0, [], MISSING],
    "created_at": [None, 5, ["now"], MISSING],
    "productive_seconds": NO_SECONDS,
    "snapshot_seconds": NO_SECONDS,
    "files": [None, [], {}, "state.json", 3, [None], ["state.json"], [[]], MISSING],
    "provenance": [None, "text", [], [["a", 1]], 3, MISSING],
    "digest": [None, "", DIGEST, DIGEST.upper(), [DIGEST], 3, MISSING],
}  # fmt: skip

DAMAGED_ENTRY_FIELDS: dict[str, list[Any]] = {
    "name": [*FOREIGN_NAMES, None, 3, ["state.json"], "state.json", MISSING],
    "size": [*NO_COUNTS, 64, 97],
    "part_bytes": [*NO_COUNTS, 0, 16, 70],
    "parts": [
        [], [DIGEST], [DIGEST] * 2, [DIGEST] * 4, [DIGEST] * 3, [3, 3, 3], [None] * 3,
        ["z" * 64] * 3, [DIGEST.upper()] * 3, [DIGEST[1:]] * 3, DIGEST, None, MISSING,
    ],
    "digest": [DIGEST, FILES[0].digest.upper(), "", None, 3, [FILES[0].digest], MISSING],
}  # fmt: skip


def label(value: Any) -> str:
    return "missing" if value is MISSING else repr(value)[:40]


def damaged(document: dict[str, Any], key: str, value: Any) -> None:
    if value is MISSING:
        del document[key]
    else:
        document[key] = value


def test_the_manifest_that_is_damaged_below_is_sound() -> None:
    assert Manifest.from_json(MANIFEST.to_json(), MANIFEST.name) == MANIFEST
    assert set(json.loads(MANIFEST.to_json())) == set(DAMAGED_FIELDS)
    assert set(json.loads(MANIFEST.to_json())["files"][0]) == set(DAMAGED_ENTRY_FIELDS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param(key, value, id=f"{key} {label(value)}")
        for key, values in DAMAGED_FIELDS.items()
        for value in values
    ],
)
def test_a_damaged_field_is_refused(key: str, value: Any) -> None:
    document = json.loads(MANIFEST.to_json())
    damaged(document, key, value)
    data = json.dumps(document).encode() if key == "digest" else sealed(document)

    with pytest.raises(CheckpointInvalid) as caught:
        Manifest.from_json(data, MANIFEST.name)

    assert caught.value.checkpoint == MANIFEST.name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param(key, value, id=f"{key} {label(value)}")
        for key, values in DAMAGED_ENTRY_FIELDS.items()
        for value in values
    ],
)
def test_a_damaged_file_entry_is_refused(key: str, value: Any) -> None:
    document = json.loads(MANIFEST.to_json())
    damaged(document["files"][0], key, value)

    with pytest.raises(CheckpointInvalid):
        Manifest.from_json(sealed(document), MANIFEST.name)


def test_a_manifest_without_batch_sizes_is_sound() -> None:
    document = json.loads(MANIFEST.to_json())
    del document["batch_size"], document["batches_per_epoch"]

    moment = Manifest.from_json(sealed(document), MANIFEST.name).moment

    assert (moment.batch_size, moment.batches_per_epoch) == (None, None)


def test_a_file_that_is_named_twice_is_refused() -> None:
    twice = replace(MANIFEST, files=(*FILES, FILES[0]))

    with pytest.raises(CheckpointInvalid, match="once each"):
        Manifest.from_json(twice.to_json(), MANIFEST.name)


def test_a_manifest_without_a_state_is_refused() -> None:
    stateless = replace(MANIFEST, files=FILES[:1])

    with pytest.raises(CheckpointInvalid, match=r"state\.json"):
        Manifest.from_json(stateless.to_json(), MANIFEST.name)


def test_the_manifest_of_another_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointInvalid, match=MANIFEST.name):
        Manifest.from_json(MANIFEST.to_json(), "step-000001300-a0003-s008")


def test_another_format_version_says_which_one_is_read() -> None:
    document = json.loads(MANIFEST.to_json()) | {"format": 2}

    with pytest.raises(CheckpointInvalid, match="format 2, this version reads 1"):
        Manifest.from_json(sealed(document), MANIFEST.name)


def deep(opening: bytes, closing: bytes) -> Callable[[], bytes]:
    inner = opening * 100_000 + closing * 100_000
    return lambda: MANIFEST.to_json().replace(b'"node-1"', inner)


RUBBISH: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "zeros": lambda: bytes(4096),
    "no JSON": lambda: b"{'a': 1}",
    "not UTF-8": lambda: MANIFEST.to_json().replace(b"node-1", b"\xff\xfe"),
    "half of it": lambda: MANIFEST.to_json()[:300],
    "without the last brace": lambda: MANIFEST.to_json().rstrip()[:-1],
    "two of it": lambda: MANIFEST.to_json() * 2,
    "a list": lambda: b"[" + MANIFEST.to_json() + b"]",
    "null": lambda: b"null",
    "text": lambda: b'"manifest"',
    "a number": lambda: b"1",
    "a very long number": lambda: b"9" * 10_000,
    "NaN": lambda: b"NaN",
    "deep lists": lambda: b"[" * 100_000,
    "deep lists within": deep(b"[", b"]"),
    "deep objects within": deep(b'{"a":', b"1" + b"}"),
}


@pytest.mark.parametrize("data", RUBBISH.values(), ids=RUBBISH)
def test_what_is_no_manifest_is_refused(data: Callable[[], bytes]) -> None:
    with pytest.raises(CheckpointInvalid):
        Manifest.from_json(data(), MANIFEST.name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@quick
@given(st.sampled_from(sorted(DAMAGED_FIELDS)), json_values)
def test_no_value_of_a_field_raises_anything_else(key: str, value: Any) -> None:
    document = json.loads(MANIFEST.to_json()) | {key: value}

    try:
        manifest = Manifest.from_json(sealed(document), MANIFEST.name)
    except CheckpointInvalid:
        return
    if key != "provenance":  # the only field whose numbers nobody calculates with
        back = Manifest.from_json(manifest.to_json(), MANIFEST.name)
        assert moment_to_json(back.moment) == moment_to_json(manifest.moment)


@pytest.mark.parametrize("bit", [0, 3, 6])
def test_a_flipped_bit_is_refused_or_changes_nothing_that_is_said(bit: int) -> None:
    data, unnoticed = MANIFEST.to_json(), 0
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << bit
        try:
            manifest = Manifest.from_json(bytes(flipped), MANIFEST.name)
        except CheckpointInvalid:
            continue
        assert manifest == MANIFEST
        unnoticed += 1
    assert unnoticed < data.count(b" ") + data.count(b"\n")  # one blank for another


def test_another_order_and_other_blanks_say_the_same() -> None:
    document = dict(reversed(json.loads(MANIFEST.to_json()).items()))

    assert Manifest.from_json(json.dumps(document, indent=7).encode(), MANIFEST.name) == MANIFEST


# ---------------------------------------------------------------- how large it may be


def test_a_manifest_above_its_limit_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    name = commit(store, snapshot()).name
    path = checkpoint_folder(store, name) / "manifest.json"
    archive = Archive(store, RUN)
    assert archive.manifest(name).name == name
    with path.open("r+b") as file:
        file.seek(0, 2)
        file.write(b" " * 1000)
    assert archive.manifest(name).name == name

    with path.open("r+b") as file:
        file.truncate(64 * MEBIBYTE + 1)

    with pytest.raises(CheckpointInvalid):
        archive.manifest(name)


# ---------------------------------------------------------------- nothing secret in it


def test_no_environment_goes_into_a_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIK7MDENG")
    monkeypatch.setenv("HARMLESS_LOOKING", "correct-horse-battery")
    store, taken = DirectoryStore(tmp_path), snapshot()
    facts = collect(tmp_path, [sys.executable, "train.py", "--api-key=s3cr3t-of-mine"])
    persister = Persister(store, Ledger(store, RUN, "0" * 16), Keep(), lambda: facts)

    persister.persist(taken.moment, views(taken.files), {"torch": "2.6"})

    text = (checkpoint_folder(store, taken.name) / "manifest.json").read_text()
    provenance = json.loads(text)["provenance"]
    assert provenance["torch"] == "2.6"
    assert provenance["packages"]
    assert "train.py" in text
    for secret in ("wJalrXUtnFEMIK7MDENG", "correct-horse-battery", "s3cr3t-of-mine"):
        assert secret not in text


def test_the_triggers_are_those_of_the_design() -> None:
    assert module.TRIGGERS == ("interval", "best", "preemption", "interrupt", "manual", "final")
