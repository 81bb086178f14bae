"""The store turns read-only under a run, as a file system does after an error of its disk.

Real processes on a file system that is mounted anew; that takes root.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import Node, start
from slots import small_disk
from waiting import wait_until

REFUSED = "runner: a checkpoint could not be saved"


@pytest.fixture
def store(node: Node) -> Iterator[Path]:
    """The store's folder, a file system of its own."""
    with small_disk(node.store_folder, "48m") as folder:
        yield folder


def turn(folder: Path, how: str) -> None:
    """`ro` or `rw`. Files that are being written hold it up for a moment."""

    def turned() -> bool:
        command = ["mount", "-o", f"remount,{how}", str(folder)]
        return subprocess.run(command, capture_output=True).returncode == 0

    wait_until(turned, what=f"the store to be {how}")


def test_a_store_that_is_read_only_for_a_while_costs_nothing(
    node: Node, store: Path, undisturbed: str
) -> None:
    """A crash comes into it, too: nothing may begin before it can be written down."""
    befalls = {"1": {"5": "be saved", "7": "wait", "14": "raise"}}
    job = node.training(
        params={"befalls": befalls},
        checkpoint={"every": {"steps": 4}, "snapshot_every": {"steps": 1}},
        restart={"failures": 1, "backoff": {"initial": "20ms", "max": "50ms"}},
    )
    supervisor = start(node, job, "step 7")
    turn(store, "ro")
    node.gate.touch()
    supervisor.wait_for(REFUSED, where="err")
    supervisor.wait_for("runner: the store is out of reach", where="err", times=4)
    turn(store, "rw")

    assert supervisor.wait() == 0, supervisor.err
    assert node.digest() == undisturbed
    assert [(r.start_step, r.outcome) for r in node.records()] == [(0, "failed"), (13, "succeeded")]
    lines = [line for line in supervisor.err.splitlines() if line.startswith(REFUSED)]
    assert len(lines) == 1, lines
    assert lines[0].endswith("Read-only file system")


def test_a_preemption_on_a_read_only_store_keeps_the_state_on_the_node(
    node: Node, store: Path, undisturbed: str
) -> None:
    job = node.training(params={"befalls": {"1": {"7": "wait"}}}, preemption={"grace": "2s"})
    supervisor = start(node, job, "step 7")
    turn(store, "ro")
    supervisor.send_signal(signal.SIGTERM)
    node.wait_until_asked()
    node.gate.touch()

    assert supervisor.wait() == 75, supervisor.err
    assert "nothing is durable: 7 steps are lost" in supervisor.err
    assert "Read-only file system" in supervisor.err
    assert len(node.spools()) == 1
    turn(store, "rw")
    done = node.run("run", job)
    assert done.code == 0, done.err
    assert node.digest() == undisturbed
    assert [r.start_step for r in node.records()] == [0, 7]
    assert node.spools() == []


@pytest.mark.parametrize("begun", [False, True])
def test_a_start_on_a_read_only_store_is_waited_for_by_run_and_refused_by_submit(
    node: Node, store: Path, begun: bool
) -> None:
    """Also of a run that is there; what it has saved can still be looked at."""
    job = node.training()
    if begun:
        assert node.run("run", job).code == 0
    turn(store, "ro")
    if begun:
        assert "is finished" in node.call("run", job).err
    anew = ("--run-id", "another") if begun else ()
    job = node.training(restart={"store_timeout": "1s"})

    unattended, attended = node.call("run", job, *anew), node.call("submit", job, *anew)

    assert (unattended.code, attended.code) == (75, 2)
    assert "tried again in" in unattended.err
    assert "the store was out of reach for 1 s" in unattended.err
    assert "tried again" not in attended.err
    for called in (unattended, attended):
        assert called.out == ""
        assert "is on a file system that is read-only; mount it writable" in called.err
    assert node.spools() == []
    examined = node.call("doctor", job)
    assert examined.code == 2
    assert "ead-only file system" in examined.out
    if begun:
        assert node.call("checkpoints", "verify", "job").code == 0


def test_a_start_waits_until_a_store_can_be_written(
    node: Node, store: Path, undisturbed: str
) -> None:
    turn(store, "ro")
    supervisor = node.start("run", node.training())
    supervisor.wait_for("runner: the store is out of reach", where="err")
    turn(store, "rw")

    assert supervisor.wait() == 0, supervisor.err
    assert node.digest() == undisturbed
