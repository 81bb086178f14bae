"""An engine that is slow, silent or not there: what that costs a run, and what it does not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from nodes import Node, Started
from servers.engine import IMAGE, Docker
from servers.engineproxy import EngineProxy
from waiting import wait_until

from runner.launch.engine import Engine

GRACE_SECONDS = 5.0
IN_TIME_SECONDS = GRACE_SECONDS + 3.0  # of a machine with other things to do
STEPS = 24


@pytest.fixture
def proxy(node: Node, engine: Docker) -> Iterator[EngineProxy]:
    """What the node's supervisors take for the engine."""
    with EngineProxy(engine, node.folder / "docker.sock") as proxy:
        node.use(proxy.docker)
        yield proxy
        proxy.release()
        node.use(engine)


def train(node: Node, until: str, **keys: object) -> Started:
    job = node.training(preemption={"grace": f"{GRACE_SECONDS:g}s"}, **keys)
    supervisor = node.start("run", job)
    supervisor.wait_for(until)
    return supervisor


def finish(node: Node) -> None:
    """Start it once more: it goes on, and takes away what an engine was not there for."""
    node.gate.touch()
    done = node.run("run", str(node.folder / "job.json"))
    assert done.code == 0, done.err
    assert f"finished at {STEPS}" in done.out


@pytest.mark.parametrize("held", ["POST .*/start", "DELETE "])
def test_a_start_that_does_not_come_back_is_not_waited_for(
    node: Node, proxy: EngineProxy, held: str
) -> None:
    """What a killed supervisor left in the slots is saved meanwhile, and all in time."""
    supervisor = train(node, "step 6", params={"befalls": {"1": {"6": "wait"}}})
    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.process.wait()
    proxy.hold(held)
    supervisor = node.start("run", str(node.folder / "job.json"))
    wait_until(lambda: bool(proxy.held), what="the request")

    supervisor.send_signal(signal.SIGTERM)

    assert supervisor.wait(IN_TIME_SECONDS) == 75, supervisor.err
    assert node.newest().moment.step == 5
    proxy.release()
    finish(node)


@pytest.mark.parametrize("how", ["silent", "gone"])
def test_an_engine_that_does_not_answer_holds_up_no_exit(
    node: Node, proxy: EngineProxy, how: str
) -> None:
    supervisor = train(node, "step 8", params={"pace": 0.1, "epochs": 2})
    if how == "silent":
        proxy.hold("")
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(IN_TIME_SECONDS) == 75, supervisor.err
        proxy.release()
    else:
        with proxy.away():
            supervisor.send_signal(signal.SIGTERM)
            assert supervisor.wait(IN_TIME_SECONDS) == 75, supervisor.err
    assert "are lost" not in supervisor.err
    assert node.newest().moment.step >= 7
    finish(node)


def test_a_notice_is_heard_while_the_engine_is_to_remove_the_attempt_before(
    node: Node, proxy: EngineProxy
) -> None:
    befalls = {"1": {"4": "wait", "5": "raise"}}
    supervisor = train(node, "step 4", params={"befalls": befalls})
    proxy.hold("DELETE ")
    node.gate.touch()
    wait_until(lambda: bool(proxy.held), what="the removal")

    supervisor.send_signal(signal.SIGTERM)

    assert supervisor.wait(IN_TIME_SECONDS) == 75, supervisor.err
    assert node.newest().moment.step == 4
    proxy.release()
    finish(node)


def test_an_engine_that_is_away_between_two_attempts_is_waited_for(
    node: Node, proxy: EngineProxy
) -> None:
    """The one failure that is allowed is the crash; it goes on from the newest state."""
    supervisor = train(
        node,
        "step 9",
        params={"befalls": {"1": {"9": "wait", "10": "raise"}}},
        restart={"failures": 1, "backoff": {"initial": "100ms", "max": "100ms"}},
    )
    proxy.hold("GET .*/containers/json")
    node.gate.touch()
    wait_until(lambda: bool(proxy.held), what="the next attempt's start")

    with proxy.away():
        wait_until(lambda: supervisor.err.count("does not answer") >= 3, what="some starts")
        assert supervisor.process.poll() is None, supervisor.err
    proxy.release()

    assert supervisor.wait() == 0, supervisor.err
    assert "failure 2" not in supervisor.err
    assert {record.start_step for record in node.records()[1:]} == {9}


def test_an_engine_that_is_silent_at_the_start_is_waited_for(
    node: Node, proxy: EngineProxy
) -> None:
    """It is asked for what a killed supervisor has left, before anything begins."""
    supervisor = train(node, "step 6", params={"befalls": {"1": {"6": "wait"}}})
    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.process.wait()
    proxy.hold("GET .*/containers/json")
    node.gate.touch()
    supervisor = node.start("run", str(node.folder / "job.json"))

    wait_until(lambda: "does not answer" in supervisor.err, what="it to be missed")
    proxy.release()

    assert supervisor.wait() == 0, supervisor.err


def test_what_a_killed_supervisor_has_left_may_take_its_time_to_die(
    node: Node, proxy: EngineProxy
) -> None:
    supervisor = train(node, "step 6", params={"befalls": {"1": {"6": "wait"}}})
    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.process.wait()
    proxy.hold("DELETE ")
    node.gate.touch()
    supervisor = node.start("run", str(node.folder / "job.json"))
    wait_until(lambda: bool(proxy.held), what="the removal")
    asked_at = time.monotonic()

    # Longer than an engine itself waits for the end of what it kills.
    wait_until(lambda: time.monotonic() >= asked_at + 12.0, what="a while")
    assert supervisor.process.poll() is None, supervisor.err
    assert "does not answer" not in supervisor.err
    proxy.release()

    assert supervisor.wait() == 0, supervisor.err
    assert "killed container" in supervisor.err


def test_a_removal_that_somebody_else_has_begun_is_waited_for(engine: Docker) -> None:
    connections = [Engine.connect({"DOCKER_HOST": engine.host}) for _ in range(8)]
    request = {"Image": IMAGE, "Entrypoint": ["sleep", "600"], "HostConfig": {"Init": True}}
    container = connections[0].create("runner-test-removed-by-many", request)
    connections[0].start(container)
    together = threading.Barrier(len(connections))

    def remove(connection: Engine) -> dict[str, Any]:
        together.wait()
        connection.remove(container)
        return connection.state(container)

    with ThreadPoolExecutor(len(connections)) as pool:
        states = list(pool.map(remove, connections))

    assert states == [{}] * len(connections)
    for connection in connections:
        connection.close()
