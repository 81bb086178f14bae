"""Runs that a cloud gives notice to, from outside: real processes and a service like the cloud's.

The script waits in the middle of step 5, for a gate that stays shut unless a test opens it: what
can be saved then is the state after step 4.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from nodes import Node, Started
from servers.metadata import AwsService, AzureService, GcpService, Service, hangs
from waiting import wait_until

from runner.notices import URL_VARIABLE

SECONDS = 4.0  # from a notice to the end of the node
SERVICES: dict[str, type[Service]] = {"aws": AwsService, "gcp": GcpService, "azure": AzureService}


def start(node: Node, cloud: str, service: Service) -> Started:
    """A run that has come to the middle of step 5."""
    job = node.training(
        params={"befalls": {"1": {"5": "wait"}}, "epochs": 1},
        preemption={"grace": f"{SECONDS:g}s", "notices": [cloud]},
    )
    supervisor = node.start("run", job, env={URL_VARIABLE: service.url})
    supervisor.wait_for("step 5")
    return supervisor


def announce(service: Service) -> None:
    if isinstance(service, AwsService):
        service.interrupt(in_seconds=SECONDS + 5)  # it is asked every 5 s
    elif isinstance(service, AzureService):
        service.evict(in_seconds=SECONDS)
    elif isinstance(service, GcpService):
        service.preempt()


@pytest.mark.parametrize("cloud", SERVICES)
def test_a_notice_is_a_preemption(node: Node, cloud: str) -> None:
    with SERVICES[cloud]() as service:
        supervisor = start(node, cloud, service)

        announce(service)

        assert supervisor.wait() == 75, supervisor.err
    (record,) = node.records()
    assert (record.outcome, record.cause) == ("preempted", f"preemption ({cloud})")
    assert record.notice_to_durable_seconds is not None
    assert node.newest().moment.step == 4
    assert "preemption" in node.newest().moment.triggers
    assert node.spools() == []


def test_azure_is_told_to_go_ahead_when_the_state_is_durable(node: Node) -> None:
    saved_then: list[int] = []
    with AzureService() as azure:
        azure.on_start = lambda _: saved_then.append(node.newest().moment.step)
        supervisor = start(node, "azure", azure)
        azure.evict("E-theirs", Resources=["another_1"])
        azure.evict("E-ours", in_seconds=SECONDS)

        assert supervisor.wait() == 75, supervisor.err

        assert azure.started() == ["E-ours"]
    assert saved_then == [4]


def refuse_checkpoints(node: Node) -> object:
    folder = node.store_folder / "job" / "checkpoints"
    assert not folder.exists()
    return folder.write_text("a file, where the folder should be")


def live_elsewhere_on_the_node(node: Node) -> object:
    """Another run has its spool open, for as long as this is kept."""
    spool = node.spool("other")
    spool.open()
    return spool


@pytest.mark.parametrize("hinder", [refuse_checkpoints, live_elsewhere_on_the_node])
def test_azure_is_told_nothing_while_somebody_still_has_to_save(
    node: Node, hinder: Callable[[Node], object]
) -> None:
    node.keeps_spool = True
    with AzureService() as azure:
        supervisor = start(node, "azure", azure)
        kept = hinder(node)
        azure.evict(in_seconds=2)

        assert supervisor.wait() == 75, supervisor.err

        assert azure.started() == []
    assert kept


def test_a_run_that_finishes_in_time_is_finished_and_azure_has_to_wait(node: Node) -> None:
    """The machine would be gone before anybody has read the exit code."""
    with AzureService() as azure:
        supervisor = start(node, "azure", azure)
        azure.evict(in_seconds=60)
        node.wait_until_asked()
        node.gate.touch()

        assert supervisor.wait() == 0, supervisor.err

        assert azure.started() == []
    assert [m.moment.step for m in node.manifests()] == [12, 5]
    assert "preemption (azure)" in supervisor.err


def test_a_rebalance_recommendation_saves_and_stops_nothing(node: Node) -> None:
    with AwsService() as aws:
        supervisor = start(node, "aws", aws)
        aws.recommend()
        node.wait_until_asked()
        node.gate.touch()

        assert supervisor.wait() == 0, supervisor.err

    assert [m.moment.step for m in node.manifests()] == [12, 5]
    assert len(node.records()) == 1


def test_a_cloud_that_is_silent_changes_nothing(node: Node) -> None:
    with GcpService() as gcp:
        gcp.spoil("", hangs, times=99)
        supervisor = start(node, "gcp", gcp)
        wait_until(lambda: gcp.requests, what="the first question")
        node.gate.touch()

        assert supervisor.wait() == 0, supervisor.err

    assert node.newest().moment.step == 12
    assert "Traceback" not in supervisor.err
