"""The store becomes slow under a run: it trains on, and a preemption makes the best of its time.

Real processes, a real S3 server, and a proxy before it that delays what passes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from buckets import Bucket, new_bucket
from nodes import Node
from servers.ceph import Gateway
from servers.faultproxy import Fault, FaultProxy
from waiting import wait_until

from runner.board import Board
from runner.spool import Spool, spool_path

pytestmark = pytest.mark.ceph

ALWAYS = 10**6
SAVING = "PUT .*/checkpoints/"
STEPS = 24


@dataclass
class SlowStore:
    """A bucket that the runs of a node reach through a proxy only."""

    bucket: Bucket
    proxy: FaultProxy
    node: Node

    def training(self, befalls: dict[str, str], **keys: Any) -> str:
        s3 = {"endpoint": self.proxy.url, "region": "us-east-1"}
        keys = {"params": {"befalls": {"1": befalls}}, "store": self.bucket.url, "s3": s3, **keys}
        return self.node.training(**keys)

    def steps(self) -> list[int]:
        """Of all checkpoints, newest first."""
        return [manifest.moment.step for manifest in self.bucket.archive().manifests()]

    def digest(self) -> str:
        archive = self.bucket.archive()
        return archive.digest(archive.find("latest"))

    def wait_until_saved(self, step: int) -> None:
        wait_until(lambda: step in self.steps(), what=f"the checkpoint of step {step}")

    def wait_until_asked(self) -> None:
        spool = Spool(spool_path("job", self.bucket.url, str(self.node.memory)))
        board = Board(spool.rank.folder / "board")
        wait_until(lambda: board.request_number > 0, what="the request on the board")

    def uploads(self) -> list[Any]:
        return list(
            self.bucket.client.list_multipart_uploads(Bucket=self.bucket.name).get("Uploads", ())
        )


@pytest.fixture
def slow(gateway: Gateway, node: Node) -> Iterator[SlowStore]:
    port = urlsplit(gateway.endpoint).port
    assert port is not None
    with new_bucket(gateway) as bucket, FaultProxy(port) as proxy:
        yield SlowStore(bucket, proxy, node)


@pytest.mark.parametrize("slots", [2, 3])
def test_a_store_that_takes_for_ever_holds_up_no_step(
    slow: SlowStore, undisturbed: str, slots: int
) -> None:
    """Not one save is taken before all steps are trained: they are late, or skipped.

    With a single slot a save that is due has to wait for it, and the trainer with it.
    """
    checkpoint = {"every": {"steps": 4}, "snapshot_every": {"steps": 1}, "slots": slots}
    slow.proxy.add(SAVING, Fault("hold"), times=ALWAYS)
    supervisor = slow.node.start("run", slow.training({"6": "wait"}, checkpoint=checkpoint))
    supervisor.wait_for("step 6")
    wait_until(lambda: slow.proxy.hits > 0, what="a save that has begun")
    slow.node.gate.touch()

    supervisor.wait_for(f"step {STEPS}")
    assert slow.steps() == [], "it has not come to an end"
    slow.proxy.release()

    assert supervisor.wait() == 0, supervisor.err
    assert slow.steps()[0] == STEPS
    assert slow.digest() == undisturbed
    assert slow.uploads() == []


def test_a_preemption_on_a_slow_store_saves_the_newest_state_within_its_grace(
    slow: SlowStore, undisturbed: str
) -> None:
    """An older save is stuck on its way when the notice comes."""
    job = slow.training({"4": "save", "9": "wait"}, preemption={"grace": "20s"})
    slow.proxy.add(f"{SAVING}.*model", Fault("hold"), times=1)
    slow.proxy.add(SAVING, Fault("slow_upload", 10_000), times=ALWAYS)
    supervisor = slow.node.start("run", job)
    supervisor.wait_for("step 9")
    wait_until(lambda: slow.proxy.hits > 1, what="a save that is stuck, and others on their way")

    supervisor.send_signal(signal.SIGTERM)
    slow.wait_until_asked()
    slow.node.gate.touch()

    assert supervisor.wait() == 75, supervisor.err
    assert "are lost" not in supervisor.err
    assert slow.steps()[0] == 9
    assert slow.node.spools() == []
    slow.proxy.clear()
    done = slow.node.run("run", job)
    assert done.code == 0, done.err
    assert "ready at 9 in attempt 2" in done.out.splitlines()
    assert slow.digest() == undisturbed


def test_a_preemption_on_a_store_that_is_too_slow_says_what_it_costs(
    slow: SlowStore, undisturbed: str
) -> None:
    """On this node, which is not taken away after all, it costs nothing."""
    job = slow.training({"4": "save", "9": "wait"}, preemption={"grace": "3s"})
    supervisor = slow.node.start("run", job)
    supervisor.wait_for("step 9")
    slow.wait_until_saved(4)
    slow.proxy.add(SAVING, Fault("hold"), times=ALWAYS)

    supervisor.send_signal(signal.SIGTERM)
    slow.wait_until_asked()
    slow.node.gate.touch()

    assert supervisor.wait() == 75, supervisor.err
    assert "at step 9 and step 4 is durable: 5 steps are lost" in supervisor.err
    assert slow.steps() == [4]
    slow.proxy.release()
    done = slow.node.run("run", job)
    assert done.code == 0, done.err
    assert "ready at 9 in attempt 2" in done.out.splitlines()
    assert slow.digest() == undisturbed
    assert slow.uploads() == []
