"""The store or a disk fails a run for a while: it comes to its end all the same.

Real processes on small file systems, with a store that is moved away.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from nodes import Node, is_running, start
from waiting import wait_until

STEPS = 24


# ---------------------------------------------------------------- the store


def unmounted(node: Node) -> Path:
    """The store's directory is gone; an empty mount point is left."""
    away = node.store_folder.rename(node.folder / "unmounted")
    node.store_folder.mkdir()
    return away


def mounted(node: Node, away: Path) -> None:
    """It is there again. Nothing may have been written where it was missing."""
    node.store_folder.rmdir()
    away.rename(node.store_folder)


def test_a_store_that_is_gone_for_a_while_costs_no_step_and_no_failure(
    node: Node, undisturbed: str
) -> None:
    """Saves wait in their slot, and the next attempt waits too. The newest state is still kept."""
    befalls = {"1": {"5": "be saved", "7": "wait", "14": "raise"}}
    job = node.training(
        params={"befalls": befalls},
        checkpoint={"every": {"steps": 4}, "snapshot_every": {"steps": 1}},
        restart={"failures": 1, "backoff": {"initial": "20ms", "max": "50ms"}},
    )
    supervisor = start(node, job, "step 7")
    away = unmounted(node)
    node.gate.touch()
    supervisor.wait_for("runner: a checkpoint could not be saved", where="err")
    supervisor.wait_for("runner: the store is out of reach", where="err", times=4)
    mounted(node, away)

    assert supervisor.wait() == 0, supervisor.err
    assert node.digest() == undisturbed
    assert [(r.start_step, r.outcome) for r in node.records()] == [(0, "failed"), (13, "succeeded")]


def test_a_run_that_finds_no_store_for_too_long_asks_to_be_started_again(
    node: Node, undisturbed: str
) -> None:
    """With what the trainer has left kept on the node for then."""
    node.keeps_spool = True
    job = node.training(
        params={"befalls": {"1": {"7": "wait", "9": "raise"}}},
        restart={"store_timeout": "200ms", "backoff": {"initial": "20ms", "max": "50ms"}},
    )
    supervisor = start(node, job, "step 7")
    away = unmounted(node)
    node.gate.touch()

    assert supervisor.wait() == 75, supervisor.err
    assert "the store was out of reach for 0.2 s: start it again" in supervisor.err
    mounted(node, away)
    done = node.run("run", job)
    assert done.code == 0, done.err
    assert node.digest() == undisturbed
    assert [r.start_step for r in node.records()] == [0, 8]
    assert node.spools() == []


def test_a_preemption_without_a_store_leaves_the_state_on_the_node(
    node: Node, undisturbed: str
) -> None:
    """A node that is not taken away after all goes on from it."""
    job = node.training(
        params={"befalls": {"1": {"7": "wait"}}},
        preemption={"grace": "2s"},
    )
    supervisor = start(node, job, "step 7")
    away = unmounted(node)
    supervisor.send_signal(signal.SIGTERM)
    node.wait_until_asked()
    node.gate.touch()

    assert supervisor.wait() == 75, supervisor.err
    assert "nothing is durable: 7 steps are lost" in supervisor.err
    mounted(node, away)
    done = node.run("run", job)
    assert done.code == 0, done.err
    assert node.digest() == undisturbed
    assert [r.start_step for r in node.records()] == [0, 7]


def test_a_server_that_nobody_starts_is_waited_for_by_run_and_told_by_submit(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container is started again; a person who has mistyped an address wants to know."""
    monkeypatch.setattr("runner.supervisor.preflight._LOOKS_AT_SERVER", 1)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    keys = {"store": "s3://bucket/x", "s3": {"endpoint": nobody, "region": "us-east-1"}}
    job = node.job("true", **keys, restart={"store_timeout": "2s"})

    unattended, attended = node.call("run", job), node.call("submit", job)

    assert (unattended.code, attended.code) == (75, 2)
    assert "tried again in" in unattended.err
    assert "the store was out of reach for 2 s" in unattended.err
    assert "tried again" not in attended.err
    assert "correct the address, or start the server" in attended.err


# ---------------------------------------------------------------- calls that never come back


@contextlib.contextmanager
def stuck(path: Path) -> Iterator[None]:
    """Whoever opens this file waits for ever, as on a network file system whose server is gone."""
    aside = path.with_name(f"{path.name}.aside")
    if path.exists():
        path.rename(aside)
    os.mkfifo(path)
    try:
        yield
    finally:
        path.unlink()
        if aside.exists():
            aside.rename(path)


def test_a_save_that_never_comes_back_does_not_outlast_the_grace(
    node: Node, undisturbed: str
) -> None:
    """Whoever is still there then is killed, and that would look like a crash."""
    node.keeps_spool = True
    job = node.training(
        params={"befalls": {"1": {"7": "wait"}}},
        preemption={"grace": "2s"},
    )
    supervisor = start(node, job, "step 7")
    with stuck(node.store_folder / "job" / "attempts" / "000002.json"):
        supervisor.send_signal(signal.SIGTERM)
        node.wait_until_asked()
        node.gate.touch()

        assert supervisor.wait(30) == 75, supervisor.err
    assert "nothing is durable: 7 steps are lost" in supervisor.err
    done = node.run("run", job)
    assert done.code == 0, done.err
    assert node.digest() == undisturbed
    assert [r.start_step for r in node.records()] == [0, 7]


def test_a_periodic_save_that_never_comes_back_does_not_outlast_the_grace(
    node: Node, undisturbed: str
) -> None:
    """The thread that stands in it is not waited for, and the trainer is not held up by it."""
    node.keeps_spool = True
    job = node.training(
        params={"befalls": {"1": {"7": "wait"}}, "pace": 0.1},
        checkpoint={"every": {"steps": 4}, "snapshot_every": {"steps": 1}},
        preemption={"grace": "2s"},
    )
    supervisor = start(node, job, "step 7")
    with stuck(node.store_folder / "job" / "attempts" / "000002.json"):
        node.gate.touch()
        wait_until(lambda: node.board().step > 10, what="steps beside the save")
        supervisor.send_signal(signal.SIGTERM)

        assert supervisor.wait(30) == 75, supervisor.err
    assert "steps are lost" in supervisor.err
    done = node.run("run", job)
    assert done.code == 0, done.err
    assert node.digest() == undisturbed
    assert node.records()[1].start_step > 10, "what the slot on the node held"


def test_a_start_that_never_comes_back_is_given_up(node: Node, undisturbed: str) -> None:
    """By itself when it was waited for long enough, and within the grace if the node is to go."""
    job = node.training(
        params={"befalls": {"1": {"7": "wait"}}},
        preemption={"grace": "2s"},
        restart={"store_timeout": "1s"},
    )
    supervisor = start(node, job, "step 7")
    supervisor.send_signal(signal.SIGTERM)
    node.wait_until_asked()
    node.gate.touch()
    assert supervisor.wait() == 75, supervisor.err
    with stuck(node.checkpoint(node.newest()) / "validation.json"):
        called_away = start(node, job, "importing in process")
        called_away.send_signal(signal.SIGTERM)
        assert called_away.wait(30) == 75, called_away.err

        waited = node.start("run", job)
        assert waited.wait(60) == 75, waited.err
        assert "the store was out of reach for 1 s: start it again" in waited.err
        assert "a call of it has not come back" in waited.err

    done = node.run("run", job)
    assert done.code == 0, done.err
    assert node.digest() == undisturbed
    assert node.records()[-1].start_step == 7


def test_the_first_look_at_a_store_is_given_up_too(node: Node) -> None:
    """Before there is a supervisor. The process must end though a thread of it stands still."""
    job = node.training(params={"epochs": 1}, restart={"store_timeout": "1s"})
    node.store_folder.joinpath("job").mkdir(parents=True)
    with stuck(node.store_folder / "job" / "run.json"):
        unattended = node.start("run", job)
        assert unattended.wait(60) == 75, unattended.err
    assert "the store was out of reach for 1 s: a call of the store has not" in unattended.err
    assert node.spools() == []


# ---------------------------------------------------------------- disks and memory


@pytest.fixture
def small(node: Node) -> Iterator[Path]:
    """A small file system that holds all of the node's folder and the store: skips without root."""
    folder = node.folder.parent
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here: that takes root")
    node.folder.mkdir()  # what was there is hidden
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(file: IO[bytes]) -> None:
    """Write until there is no room."""
    with contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_a_disk_that_is_full_for_a_while_costs_no_result(
    node: Node, small: Path, undisturbed: str
) -> None:
    """The store, the logs and the run's own files lie on it. A crash comes into it, too."""
    befalls = {"1": {"5": "be saved", "7": "wait", "14": "raise"}}
    job = node.training(
        params={"befalls": befalls},
        checkpoint={"every": {"steps": 4}, "snapshot_every": {"steps": 1}},
        restart={"failures": 5, "backoff": {"initial": "20ms", "max": "50ms"}},
    )
    supervisor = start(node, job, "step 7")
    first = node.board().pid
    with (small / "filler").open("wb", buffering=0) as filler:
        fill(filler)
        node.gate.touch()
        wait_until(lambda: not is_running(first), what="the trainer to crash")
        for _ in range(20):  # whatever becomes free is taken
            fill(filler)
    (small / "filler").unlink()

    assert supervisor.wait() == 0
    assert node.digest() == undisturbed
    assert node.call("checkpoints", "verify", "job").code == 0
    assert [r.start_step for r in node.records()] == [0, 13]
