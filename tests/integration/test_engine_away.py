"""An engine that is slow, silent or not there: what that costs a run, and what it does not."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from nodes import Node, Started
from servers.engine import Docker
from servers.engineproxy import EngineProxy
from waiting import wait_until

GRACE_SECONDS = 5.0
IN_TIME_SECONDS = GRACE_SECONDS + 3.0  # of a machine with other things to do
STEPS = 24


@pytest.fixture
def proxy(node: Node, engine: Docker) -> Iterator[EngineProxy]:
    """What the node's supervisors take for the engine."""
    with EngineProxy(node.folder / "docker.sock", engine.host) as proxy:
        node.use(Docker(proxy.host))
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


def test_a_start_that_does_not_come_back_is_not_waited_for(node: Node, proxy: EngineProxy) -> None:
    """What a killed supervisor left in the slots is saved meanwhile, and all in time."""
    supervisor = train(node, "step 6", params={"befalls": {"1": {"6": "wait"}}})
    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.process.wait()
    proxy.hold("POST .*/start")
    supervisor = node.start("run", str(node.folder / "job.json"))
    wait_until(lambda: bool(proxy.held), what="the start")

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
