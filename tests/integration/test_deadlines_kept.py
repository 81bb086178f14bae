"""From a notice to the end of a node, with real processes: what is trained, saved and said."""

from __future__ import annotations

import signal
import time

from nodes import Node
from servers.metadata import AzureService
from waiting import wait_until

from runner.notices import URL_VARIABLE

GIVEN_SECONDS = 16.0


def test_with_time_left_it_saves_trains_on_and_saves_again(node: Node) -> None:
    """The trainer goes on for a while after the first save, and the second is in time."""
    job = node.training(params={"epochs": 100_000}, preemption={"notices": ["azure"]})
    with AzureService() as azure:
        supervisor = node.start("run", job, env={URL_VARIABLE: azure.url})
        supervisor.wait_for("step 5")
        azure.evict(in_seconds=GIVEN_SECONDS)
        node.wait_until_asked()
        asked_at = time.monotonic()
        wait_until(lambda: len(node.manifests()) == 1, what="the first save")
        (first,) = node.manifests()

        assert supervisor.wait() == 75, supervisor.err

        trained_seconds = time.monotonic() - asked_at
    last = node.newest()
    assert [m.name for m in node.manifests()] == [last.name, first.name]
    assert "preemption" in first.moment.triggers
    assert "preemption" in last.moment.triggers
    assert last.moment.step > first.moment.step
    assert GIVEN_SECONDS / 4 < trained_seconds < GIVEN_SECONDS
    assert "are lost" not in supervisor.err
    (record,) = node.records()
    assert record.end_step == last.moment.step


def test_what_cannot_be_saved_in_time_is_told_in_steps(node: Node) -> None:
    """The store refuses from the first checkpoint on: that one stands."""
    befalls = {"1": {"4": "save", "9": "wait"}}
    job = node.training(params={"befalls": befalls}, preemption={"grace": "3s"})
    supervisor = node.start("run", job)
    supervisor.wait_for("step 9")
    wait_until(lambda: len(node.manifests()) == 1, what="the checkpoint of step 4")
    checkpoints = node.store_folder / "job" / "checkpoints"
    checkpoints.rename(aside := checkpoints.with_name("aside"))
    checkpoints.write_text("a file, where the folder should be")

    supervisor.send_signal(signal.SIGTERM)

    assert supervisor.wait() == 75
    checkpoints.unlink()
    aside.rename(checkpoints)
    assert "at step 8 and step 4 is durable: 4 steps are lost" in supervisor.err
    assert node.newest().moment.step == 4
    assert len(node.spools()) == 1, "but on this machine they are not"
    node.keeps_spool = True


def test_a_second_ctrl_c_says_what_it_costs(node: Node) -> None:
    befalls = {"1": {"4": "save", "9": "wait"}}
    job = node.training(params={"befalls": befalls})
    supervisor = node.start("run", job)
    supervisor.wait_for("step 9")
    wait_until(lambda: len(node.manifests()) == 1, what="the checkpoint of step 4")

    supervisor.send_signal(signal.SIGINT)
    node.wait_until_asked()
    supervisor.send_signal(signal.SIGINT)

    assert supervisor.wait(timeout=10) == 130
    assert "interrupted twice: nothing more is saved" in supervisor.err
    assert "at step 8 and step 4 is durable: 4 steps are lost" in supervisor.err
    node.keeps_spool = True
