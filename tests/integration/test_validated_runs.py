"""Whole runs whose checkpoints are tried while they train."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable

import pytest
from nodes import PROGRAMS, Node, Started
from waiting import wait_until

VALIDATE = {"entrypoint": "judges:val_loss"}
PATIENCE_SECONDS = 300.0  # a run waits up to two minutes for the last validation
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(params=["process", "docker"])
def node(request: pytest.FixtureRequest, new_node: Callable[[str], Node]) -> Node:
    """A machine whose trainers are processes, and one where they are containers."""
    node = new_node("node")
    if request.param == "docker":
        node.use(request.getfixturevalue("engine"))
    return node


in_a_container = pytest.mark.parametrize("node", ["docker"], indirect=True)


def checkpoints(node: Node) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = node.call(
        *("checkpoints", "ls", "job", "--store", str(node.store_folder), "-o", "json")
    ).json
    return rows


def test_a_run_ends_with_a_checkpoint_that_was_proven(node: Node) -> None:
    job = node.training(
        workdir=str(PROGRAMS), checkpoint={"every": {"epochs": 1}, "validate": VALIDATE}
    )
    run = node.start("run", job)

    assert run.wait(PATIENCE_SECONDS) == 0

    newest, *_ = checkpoints(node)
    assert newest["validated"] == "valid"
    validation = newest["validation"]
    assert isinstance(validation, dict)
    assert validation["compared"]["val_loss"]["logged"] == newest["metrics"]["val_loss"]  # type: ignore[index]
    assert f"runner: {newest['name']} is valid" in run.err
    shown = node.call("checkpoints", "show", "job", "--store", str(node.store_folder))
    assert "validation           valid" in shown.out


def test_what_was_found_invalid_is_not_begun_from(
    node: Node, new_node: Callable[[str], Node]
) -> None:
    """And a preemption does not wait for what is being validated."""
    befalls = {"1": {"4": "save", "8": "save", "10": "wait"}}
    job = node.training(
        workdir=str(PROGRAMS),
        params={"befalls": befalls},
        checkpoint={"validate": VALIDATE, "every": {"minutes": 600}},
    )
    run = node.start("run", job)
    run.wait_for("step 10")
    wait_until(lambda: len(node.manifests()) == 2, 30, "two checkpoints")

    run.send_signal(signal.SIGTERM)
    node.wait_until_asked()
    node.gate.touch()

    assert run.wait() == 75
    newest, before, *_ = node.manifests()
    verdict = {"verdict": "invalid", "reason": "val_loss is nan", "metrics": {}, "compared": {}}
    facts = {"entrypoint": "", "seconds": 1.0, "validated_at": "", "host": ""}
    (node.checkpoint(newest) / "validation.json").write_text(json.dumps(verdict | facts))

    assert node.start("run", job).wait(PATIENCE_SECONDS) == 0

    assert node.records()[1].resumed_from == before.name
    rows = {row["name"]: row["validated"] for row in checkpoints(node)}
    assert rows[newest.name] == "invalid"  # counted apart, and not put away


def test_a_run_is_not_begun_with_an_entry_point_that_is_not_there(node: Node) -> None:
    validate = {"entrypoint": "judges:val_los"}
    job = node.training(workdir=str(PROGRAMS), checkpoint={"validate": validate})

    called = node.run("run", job)

    assert called.code == 2
    assert "checkpoint.validate.entrypoint: module judges has no 'val_los'" in called.err
    assert "did you mean 'val_loss'?" in called.err
    assert not (node.store_folder / "job").exists()


@pytest.fixture
def endless(node: Node) -> Started:
    """A run that waits in step 10, beside a validation that never ends."""
    job = node.training(
        workdir=str(PROGRAMS),
        params={"befalls": {"1": {"4": "save", "10": "wait"}}},
        checkpoint={
            "validate": {"entrypoint": "judges:never_ends", "timeout": "10m"},
            "every": {"minutes": 600},
        },
    )
    run = node.start("run", job)
    run.wait_for("step 10")
    wait_until(lambda: len(containers(node)) == 2, 60, "a container beside the trainer's")
    return run


def containers(node: Node) -> list[str]:
    """Of this node's run alone, also when its spool is gone: others use the engine beside it."""
    assert node.docker is not None
    return node.docker.containers(f"label=runner.spool={node.spool().path}")


@in_a_container
def test_a_validation_that_never_ends_keeps_no_preemption_and_no_container(
    node: Node, endless: Started
) -> None:
    assert node.docker is not None
    facts = [json.loads(node.docker.run("inspect", each))[0] for each in containers(node)]
    assert {fact["HostConfig"]["NetworkMode"] for fact in facts} == {"none"}

    endless.send_signal(signal.SIGTERM)
    node.wait_until_asked()
    node.gate.touch()

    assert endless.wait() == 75
    assert containers(node) == []
    assert not list(node.store_folder.rglob(".validation/*"))
    assert {row["validated"] for row in checkpoints(node)} == {None}


@in_a_container
def test_what_a_killed_supervisor_was_validating_ends_before_the_next_attempt(
    node: Node, endless: Started
) -> None:
    left = containers(node)
    endless.send_signal(signal.SIGKILL)
    assert endless.wait() == -signal.SIGKILL
    node.gate.touch()

    again = node.start("run", str(node.folder / "job.json"))
    again.wait_for("importing")

    assert not set(left) & set(containers(node))
    again.send_signal(signal.SIGTERM)
    assert again.wait() == 75


@in_a_container
def test_a_validation_that_dies_in_a_container_says_how(node: Node) -> None:
    job = node.training(
        workdir=str(PROGRAMS), env={"JUDGE_DIES": "1"}, checkpoint={"validate": VALIDATE}
    )

    called = node.run("run", job)

    assert called.code == 2
    assert "checkpoint.validate.entrypoint: it ended with signal SIGSEGV" in called.err
    assert node.docker is not None
    assert node.docker.containers("name=runner-trial") == []
