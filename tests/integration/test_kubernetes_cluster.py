"""Whole runs in a simulated cluster: what the Job's own rules make of evictions and crashes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import SimulatedCluster, cluster_on
from nodes import PROGRAMS, Node
from servers.kubeapi import KubeApi, kube_api

pytest.importorskip("kubernetes")

EVICTIONS = 20
STEPS = 24
CLAIM = "/mnt/checkpoints"


@pytest.fixture
def api(node: Node) -> Iterator[KubeApi]:
    with kube_api() as started:
        node.environment["KUBECONFIG"] = str(started.kubeconfig(node.folder))
        yield started


@pytest.fixture
def cluster(node: Node, api: KubeApi) -> Iterator[SimulatedCluster]:
    with cluster_on(node, api, {"checkpoints": node.store_folder}) as simulated:
        yield simulated


def in_cluster(node: Node, command: list[str] | None = None, **keys: Any) -> str:
    keys.setdefault("params", {"gate": "", "pace": 0.05})
    return node.training(
        command=command,
        launcher="kubernetes",
        image="registry.example/trains:1",
        store=CLAIM,
        kubernetes={"claims": {"checkpoints": CLAIM}},
        preemption={"grace": "4s"},
        checkpoint={
            "every": {"minutes": 600}, "snapshot_every": {"steps": 1}, "max_state": "16Mi",
        },
        metrics={},
        **keys,
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_twenty_evictions_are_no_failure_and_cost_no_bit(
    node: Node, new_node: Callable[[str], Node], api: KubeApi, cluster: SimulatedCluster
) -> None:
    """Most are evicted while they start, every fifth in a step of its own; then one crashes."""
    undisturbed = new_node("undisturbed")
    apart = str(undisturbed.folder / "store")
    reference = undisturbed.start(
        "run", undisturbed.training(params={"gate": "", "pace": 0.05}), "--store", apart
    )
    job = in_cluster(node, restart={"failures": 1})
    assert node.call("submit", job).code == 0

    for number in range(EVICTIONS):
        begun = "step " if number % 5 == 0 else "importing in process"
        cluster.evict(cluster.wait_for_pod(printed=begun))
    pod = cluster.wait_for_pod(printed="step ")
    assert cluster.failed("job") == 0
    assert len(cluster.started) == EVICTIONS + 1, "one after the other, each taken away"

    pod.process.kill()
    pod = cluster.wait_for_pod(printed="ready at")
    assert cluster.failed("job") == 1

    stopped = node.call("stop", "job")
    assert stopped.code == 0, stopped.err
    assert node.call("wait", "job").code == 130
    assert node.call("submit", job).code == 0
    waited = node.call("wait", "job")

    assert (waited.code, waited.out) == (0, "succeeded\n")
    assert cluster.failed("job") == 1
    assert reference.wait() == 0
    undisturbed.store_folder = Path(apart)
    assert node.newest().moment.step == STEPS
    assert node.digest() == undisturbed.digest()

    store = str(node.store_folder)
    assert f"finished at {STEPS}" in node.call("logs", "job", "--store", store).out
    facts = node.call("status", "job", "--store", store, "-o", "json").json
    assert (facts["phase"], facts["saved_step"]) == ("succeeded", STEPS)
    last = node.records()[-1]
    assert last.metrics, "the last scrape is in the store"
    assert node.call("submit", job).code == 0, "a finished run is left as it is"


def test_a_wrong_job_file_fails_the_job_at_once(node: Node, cluster: SimulatedCluster) -> None:
    node.call("submit", in_cluster(node, ["python", str(PROGRAMS / "is_not_there.py")]))

    assert node.call("wait", "job").code == 2
    assert len(cluster.started) == 1
    assert "PodFailurePolicy" in node.call("status", "job").out


def test_crashes_beyond_the_budget_fail_the_job(node: Node, cluster: SimulatedCluster) -> None:
    gate = str(node.gate)
    job = in_cluster(node, params={"gate": gate, "befalls": {"1": {"0": "import"}}},
                     restart={"failures": 0})  # fmt: skip
    node.call("submit", job)
    cluster.wait_for_pod(printed="importing in process").process.kill()

    assert node.call("wait", "job").code == 70
    assert cluster.failed("job") == len(cluster.started) == 1
