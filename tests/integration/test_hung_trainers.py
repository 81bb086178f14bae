"""Real trainers that do not move any more, each in another way, and those that only seem so."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from nodes import PROGRAMS, Node, is_running, nodes_in

PROGRAM = str(PROGRAMS / "hangs.py")
STEPS = 24
TIMEOUT = "6s"
QUICKLY = {"initial": "1ms", "max": "1ms"}


def job(node: Node, **params: object) -> str:
    """Snapshots at every step; a trainer that does not move for six seconds is ended."""
    return node.job(
        "python",
        PROGRAM,
        params={"gate": str(node.gate), **params},
        env={"OMP_NUM_THREADS": "1"},
        restart={"hang_timeout": TIMEOUT, "backoff": QUICKLY, "failures": 3},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    with nodes_in(tmp_path_factory.mktemp("undisturbed")) as new:
        node = new("node")
        done = node.run("run", job(node))
        assert done.code == 0, done.err
        return node.digest()


def log_of(node: Node, attempt: int) -> str:
    """What one attempt has left in the log, the supervisor's own words included."""
    return node.call("logs", "job", "--attempt", str(attempt)).out


HANGS = [  # what befalls an attempt, at which step; what its log tells; the step that it began at
    ("start", -1, "has not attached", 0),
    ("freeze", 4, "stopped by a signal", 0),
    ("c", 8, "in wait_in_c", 3),
    ("loader", 12, "in _try_get_data", 7),
    ("heartbeat", 16, "in wait_with_a_heartbeat", 12),
]


@pytest.mark.timeout(480)
def test_however_a_trainer_hangs_it_is_shown_and_ended_and_goes_on_exactly(
    node: Node, undisturbed: str
) -> None:
    befalls = {str(n): how for n, (how, _, _, _) in enumerate(HANGS, 1)}
    at = {str(n): step for n, (_, step, _, _) in enumerate(HANGS, 1)}

    done = node.start("run", job(node, befalls=befalls, at=at))

    assert done.wait(timeout=400) == 0, done.err
    assert f"finished at {STEPS}" in done.out
    assert node.digest() == undisturbed
    *hung, last = node.records()
    assert [(r.outcome, r.cause) for r in hung] == [("failed", "hang")] * len(HANGS), done.err
    assert [r.start_step for r in hung] == [begun for *_, begun in HANGS]
    assert last.outcome == "succeeded"
    for _, _, told, _ in HANGS:
        assert told in done.err, told


def test_what_only_seems_to_hang_is_left_alone(node: Node, undisturbed: str) -> None:
    """A long and busy start, a long rest after the loop, both longer than the limit."""
    params = {"befalls": {"1": "busy start"}, "busy": 8.0, "rest": 8.0}

    done = node.run("run", job(node, **params))

    assert done.code == 0, done.err
    assert "no progress" not in done.err
    assert len(node.records()) == 1
    assert node.digest() == undisturbed


def test_py_spy_shows_native_stacks_where_it_is_installed(node: Node) -> None:
    tool = node.folder / "bin" / "py-spy"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "native stacks of $4"\n')
    tool.chmod(0o755)
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    params = {"befalls": {"1": "c"}, "at": {"1": 4}}

    done = node.run("run", job(node, **params), env={"PATH": path})

    assert done.code == 0, done.err
    assert node.records()[0].cause == "hang"
    (line,) = [line for line in done.err.splitlines() if "native stacks of" in line]
    assert not is_running(int(line.split()[-1]))


def test_a_supervisor_that_was_frozen_with_its_trainer_takes_that_for_no_hang(
    node: Node, undisturbed: str
) -> None:
    """As when a virtual machine is paused for longer than the limit; the gate says when to go."""
    supervisor = node.start("run", job(node, befalls={"1": "gate"}, at={"1": 5}))
    supervisor.wait_for("step 5")
    trainer = node.board().pid
    os.kill(supervisor.pid, signal.SIGSTOP)
    os.kill(trainer, signal.SIGSTOP)
    pause(seconds=7)

    os.kill(supervisor.pid, signal.SIGCONT)
    os.kill(trainer, signal.SIGCONT)
    node.gate.touch()

    assert supervisor.wait() == 0
    assert "no progress" not in supervisor.err
    assert len(node.records()) == 1
    assert node.digest() == undisturbed


def pause(seconds: float) -> None:
    """Let real time pass: there is nothing to wait for while all stand still."""
    threading.Event().wait(seconds)


def test_twenty_preemptions_use_up_nothing(node: Node) -> None:
    """With no failure to spare; the last attempt finishes by itself."""
    node.gate.touch()
    script = "test -e last && exit 0; echo ready; exec sleep 600"
    document = node.job("bash", "-c", script, preemption={"grace": "1s"}, restart={"failures": 0})
    for _ in range(20):
        supervisor = node.start("run", document)
        supervisor.wait_for("ready")
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait() == 75
    (node.folder / "last").touch()

    assert node.run("run", document).code == 0

    outcomes = [record.outcome for record in node.records()]
    assert outcomes == ["preempted"] * 20 + ["succeeded"]
    assert json.loads(Path(document).read_text())["restart"] == {"failures": 0}
