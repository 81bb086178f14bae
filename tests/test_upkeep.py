"""Cleaning up, pinning and copying out: what goes, what stays and why, and who may say so."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodes import Node
from slots import commit, snapshot

from runner import job
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.manifest import Manifest, Moment
from runner.checkpoint.retention import Keep, pins, superfluous
from runner.supervisor.upkeep import policy_of, reasons

KEEP = {"last": 2, "best": {"metric": "loss", "mode": "min", "count": 1}, "every": {"epochs": 2}}


# ---------------------------------------------------------------- why something stays


def moment(save: int, **facts: Any) -> Moment:
    return Moment(1, save, 10 * save, **{"epoch": save, "batch": 1, **facts})


MOMENTS = [
    moment(1, metrics={"loss": 0.5}),
    moment(2, batch=0, metrics={"loss": 2.0}),
    moment(3, metrics={"loss": 3.0}),
    moment(4, batch=0),
    moment(5),
    moment(6, healthy=False),
]
WHY = {
    "the last alone": (Keep(last=2), [], None, {6: ["newest", "last"], 5: ["newest", "last"]}),
    "the best": (
        Keep(last=1, best_metric="loss"),
        [],
        None,
        {6: ["newest", "last"], 5: ["newest"], 1: ["best"]},
    ),
    "milestones": (
        Keep(last=1, every_epochs=2),
        [],
        None,
        {6: ["newest", "last"], 5: ["newest"], 4: ["milestone"], 2: ["milestone"]},
    ),
    "several reasons": (
        Keep(last=3, best_metric="loss", every_epochs=2),
        [1],
        4,
        {
            6: ["newest", "last"],
            5: ["newest", "last"],
            4: ["last", "milestone", "restored from"],
            2: ["milestone"],
            1: ["best", "pinned"],
        },
    ),
}


@pytest.mark.parametrize(("keep", "pinned", "restored", "expected"), WHY.values(), ids=WHY)
def test_each_checkpoint_that_stays_has_its_reasons(
    keep: Keep, pinned: list[int], restored: int | None, expected: dict[int, list[str]]
) -> None:
    names = {m.save: str(m.name) for m in MOMENTS}

    why = reasons(
        MOMENTS, keep, [names[save] for save in pinned], names[restored] if restored else None
    )

    assert {name: list(found) for name, found in why.items()} == {
        names[save]: found for save, found in expected.items()
    }


moments_drawn = st.lists(
    st.builds(
        Moment,
        attempt=st.integers(1, 3),
        save=st.integers(1, 6),
        step=st.integers(0, 50),
        epoch=st.integers(0, 4),
        batch=st.integers(0, 1),
        scope=st.sampled_from(["full", "full", "weights"]),
        metrics=st.dictionaries(st.just("loss"), st.floats(0, 9) | st.just(float("nan"))),
        healthy=st.booleans(),
    ),
    max_size=10,
    unique_by=lambda m: (m.attempt, m.save),
)
keeps_drawn = st.builds(
    Keep,
    last=st.integers(1, 4),
    best_metric=st.sampled_from([None, "loss"]),
    best_mode=st.sampled_from(["min", "max"]),
    best_count=st.integers(1, 3),
    every_epochs=st.none() | st.integers(1, 3),
)


@given(moments_drawn, keeps_drawn, st.integers(0, 9), st.none() | st.integers(0, 9))
def test_what_has_no_reason_to_stay_is_what_the_policy_lets_go(
    moments: Sequence[Moment], keep: Keep, pinned: int, restored: int | None
) -> None:
    names = [str(m.name) for m in moments]
    pinned_names, restored_name = names[pinned : pinned + 1], None
    if restored is not None and restored < len(names):
        restored_name = names[restored]

    why = reasons(moments, keep, pinned_names, restored_name)

    protected = {*pinned_names, *([restored_name] if restored_name else [])}
    going = {str(m.name) for m in superfluous(moments, keep, protected)}
    assert set(names) - set(why) == going


def test_what_the_job_file_says_about_keeping_is_the_policy() -> None:
    assert policy_of(job.Keep()) == Keep()
    assert policy_of(job.Keep.model_validate(KEEP)) == Keep(2, "loss", "min", 1, 2)


# ---------------------------------------------------------------- gc


@pytest.fixture
def saved(node: Node) -> list[Manifest]:
    """A run `job` with six checkpoints that no trainer has made, of which the job keeps four."""
    document = {"run_id": "job", "job": {"checkpoint": {"keep": KEEP}}}
    Ledger(node.store, "job", "0123456789abcdef").begin(document)
    losses = [0.5, 2.0, 3.0, 4.0, 5.0, 6.0]
    return [
        commit(
            node.store,
            snapshot(1, save, epoch=save, batch=save % 4, metrics={"loss": loss}),
            "job",
        )
        for save, loss in enumerate(losses, start=1)
    ]


def call(node: Node, command: str, *arguments: str) -> Any:
    return node.call("checkpoints", command, "job", *arguments, "--store", str(node.store_folder))


def left(node: Node) -> list[int]:
    """The saves that are there, newest first."""
    return [manifest.moment.save for manifest in node.manifests()]


def test_a_dry_run_says_what_would_go_and_why_the_rest_stays(
    node: Node, saved: list[Manifest]
) -> None:
    dry = call(node, "gc", "--dry-run", "-o", "json")
    text = call(node, "gc", "--dry-run").out.splitlines()

    assert dry.code == 0
    assert [(row["name"], row["action"], row["why"]) for row in dry.json] == [
        (saved[5].name, "stays", ["newest", "last"]),
        (saved[4].name, "stays", ["last"]),
        (saved[3].name, "stays", ["milestone"]),
        (saved[2].name, "would go", ["no rule keeps it"]),
        (saved[1].name, "would go", ["no rule keeps it"]),
        (saved[0].name, "stays", ["best"]),
    ]
    assert dry.json[0]["bytes"] == saved[5].nbytes
    assert text[0].split() == ["name", "action", "why", "bytes"]
    assert len(text) == 7
    assert left(node) == [6, 5, 4, 3, 2, 1]


def test_cleaning_deletes_what_no_rule_keeps_and_nothing_else(
    node: Node, saved: list[Manifest]
) -> None:
    call(node, "pin", saved[1].name)
    remains = node.checkpoint(saved[2]) / "manifest.json"
    remains.unlink()

    cleaned = call(node, "gc", "-o", "json")

    assert cleaned.code == 0
    assert {row["name"]: row["action"] for row in cleaned.json if row["action"] != "stays"} == {
        saved[2].name: "deleted"
    }
    assert left(node) == [6, 5, 4, 2, 1]
    assert not node.checkpoint(saved[2]).exists()
    assert [row["action"] for row in call(node, "gc", "-o", "json").json] == ["stays"] * 5


def test_what_a_run_continues_from_is_not_deleted(node: Node, saved: list[Manifest]) -> None:
    ledger = Ledger(node.store, "job", "0123456789abcdef")
    ledger.claim(socket.gethostname())
    ledger.update(resumed_from=saved[1].name)

    assert call(node, "gc").code == 0

    assert left(node) == [6, 5, 4, 2, 1]


def test_a_run_that_may_be_live_elsewhere_is_not_cleaned_unless_forced(
    node: Node, saved: list[Manifest]
) -> None:
    ledger = Ledger(node.store, "job", "0123456789abcdef")
    ledger.claim("another-node")

    refused = call(node, "gc")

    assert (refused.code, refused.out) == (2, "")
    assert "may be live on another-node: attempt 1 has not ended" in refused.err
    assert left(node) == [6, 5, 4, 3, 2, 1]
    assert call(node, "gc", "--dry-run").code == 0
    assert call(node, "gc", "--force").code == 0
    assert left(node) == [6, 5, 4, 1]


def test_a_run_that_has_ended_elsewhere_is_cleaned(node: Node, saved: list[Manifest]) -> None:
    ledger = Ledger(node.store, "job", "0123456789abcdef")
    ledger.claim("another-node")
    ledger.update(outcome="preempted")

    assert call(node, "gc").code == 0
    assert left(node) == [6, 5, 4, 1]


def test_a_run_that_is_live_here_is_not_cleaned(node: Node, saved: list[Manifest]) -> None:
    spool = node.spool()
    spool.open()
    spool.publish_status({"phase": "running", "pid": 1, "attempt": 1})

    refused = call(node, "gc")

    spool.remove()
    assert (refused.code, refused.out) == (2, "")
    assert "is live on this machine" in refused.err
    assert left(node) == [6, 5, 4, 3, 2, 1]


def test_nothing_is_deleted_by_a_policy_that_is_not_known(node: Node) -> None:
    Ledger(node.store, "job", "0123456789abcdef").begin({"run_id": "job"})
    commit(node.store, snapshot(1, 1), "job")

    refused = call(node, "gc", "--force")

    assert refused.code == 2
    assert "does not say which checkpoints to keep" in refused.err
    assert left(node) == [1]


# ---------------------------------------------------------------- pins


def test_a_pin_is_set_and_taken_away_by_step_name_or_rank(
    node: Node, saved: list[Manifest]
) -> None:
    pinned = [call(node, "pin", which) for which in ("300", saved[1].name, "latest", "best")]

    assert [done.out for done in pinned] == [
        f"pinned {saved[index].name}\n" for index in (2, 1, 5, 0)
    ]
    assert call(node, "pin", "300").code == 0, "once more is no error"
    rows = call(node, "ls", "-o", "json").json
    assert [row["pinned"] for row in rows] == [True, False, False, True, True, True]
    assert call(node, "unpin", "300").out == f"unpinned {saved[2].name}\n"
    assert pins(node.store, "job") == {saved[index].name for index in (0, 1, 5)}


def test_the_pin_of_a_checkpoint_that_is_gone_can_be_taken_away(
    node: Node, saved: list[Manifest]
) -> None:
    call(node, "pin", saved[0].name)
    (node.checkpoint(saved[0]) / "manifest.json").unlink()

    assert call(node, "unpin", saved[0].name).code == 0
    assert pins(node.store, "job") == set()


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (("pin", "305"), "300"),
        (("pin", "step-000000300-a0001-s004"), "step-000000300-a0001-s003"),
        (("unpin", "300"), "step-000000200-a0001-s002"),
        (("unpin", "step-000000200-a0001-s003"), "step-000000200-a0001-s002"),
        (("export", "305", "copy"), "300"),
    ],
)
def test_a_name_that_is_none_is_answered_with_the_nearest(
    node: Node, saved: list[Manifest], arguments: tuple[str, ...], near: str
) -> None:
    call(node, "pin", "200")

    wrong = call(node, *arguments)

    assert (wrong.code, wrong.out) == (2, "")
    assert "did you mean" in wrong.err
    assert near in wrong.err


# ---------------------------------------------------------------- export


def test_an_export_is_the_files_that_were_saved(node: Node, saved: list[Manifest]) -> None:
    (node.folder / "empty").mkdir()
    for target in ("copy/of/it", "empty"):
        done = call(node, "export", "300", target)

        assert done.code == 0, done.err
        assert saved[2].name in done.out
        files = {path.name: path.read_bytes() for path in (node.folder / target).iterdir()}
        assert set(files) == {"manifest.json", *(file.name for file in saved[2].files)}
        for file in saved[2].files:
            assert hashlib.sha256(files[file.name]).hexdigest() == file.digest
        assert Manifest.from_json(files["manifest.json"], saved[2].name) == saved[2]
    assert sorted(path.name for path in node.folder.iterdir() if path.name[0] == ".") == []


def test_an_export_of_a_damaged_checkpoint_leaves_nothing(
    node: Node, saved: list[Manifest]
) -> None:
    path = node.checkpoint(saved[2]) / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = sorted(node.folder.iterdir())

    refused = call(node, "export", "300", "copy")

    assert (refused.code, refused.out) == (70, "")
    assert "part 0 of optimizer.safetensors is not the one saved" in refused.err
    assert sorted(node.folder.iterdir()) == before


def test_an_export_does_not_write_over_what_is_there(node: Node, saved: list[Manifest]) -> None:
    target = node.folder / "copy"
    target.mkdir()
    (target / "mine").write_text("mine")

    refused = call(node, "export", "300", str(target))

    assert refused.code == 2
    assert "is there already" in refused.err
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_the_files_of_a_pin_are_plain_json(node: Node, saved: list[Manifest]) -> None:
    call(node, "pin", "300")

    (path,) = (Path(node.store_folder) / "job" / "pins").iterdir()
    assert json.loads(path.read_text())["checkpoint"] == saved[2].name
