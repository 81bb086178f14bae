"""Runs of an ordinary user whose engine has no root either: Podman, as it is by default; Docker.

The trainer is that user on both sides of the spool, which nobody else may open.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import Node, Started
from servers.rootless import Rootless

from runner.spool import Spool

STEPS = 24


class UsersNode(Node):
    """A machine of which everything is the ordinary user's."""

    def be(self, rootless: Rootless) -> None:
        self._reader = rootless.reader
        self.use(rootless.docker)
        self.environment |= rootless.environment
        os.chown(self.folder, rootless.uid, rootless.uid)

    def spool(self, run_id: str = "job") -> Spool:
        (path,) = self.memory.glob(f"runner-*-{run_id}-*")  # its name has the user's number
        return Spool(path)

    def begin(self, *arguments: str) -> Started:
        return self.start(*arguments, before=self._reader)


@pytest.fixture
def node(rootless: Rootless) -> Iterator[UsersNode]:
    folder = rootless.folder / "node"
    node = UsersNode(folder, rootless.memory, folder / "store")
    node.be(rootless)
    yield node
    assert node.end() == []
    assert node.spools() == []
    shutil.rmtree(folder)


def test_an_ordinary_users_run_is_preempted_killed_and_goes_on_exactly(
    node: UsersNode, rootless: Rootless, undisturbed: str
) -> None:
    befalls = {"1": {"5": "wait"}, "2": {"9": "kill"}, "3": {"14": "wait"}}
    job = node.training(params={"befalls": befalls}, resources={"cpus": 1})

    supervisor = node.begin("run", job)
    supervisor.wait_for("step 5")
    trainer = Path(f"/proc/{node.pid_here(supervisor.pids()[0])}")
    assert trainer.stat().st_uid == rootless.uid
    supervisor.send_signal(signal.SIGTERM)
    node.wait_until_asked()
    node.gate.touch()
    assert supervisor.wait() == 75, supervisor.err
    assert (node.newest().moment.step, node.newest().moment.triggers) == (5, ("preemption",))

    node.gate.unlink()
    supervisor = node.begin("run", job)
    supervisor.wait_for("step 14")
    supervisor.send_signal(signal.SIGINT)
    node.wait_until_asked()
    node.gate.touch()
    assert supervisor.wait() == 130, supervisor.err

    supervisor = node.begin("run", job)
    assert supervisor.wait() == 0, supervisor.err
    assert node.digest() == undisturbed
    assert [(r.outcome, r.end_step) for r in node.records()] == [
        ("preempted", 5),
        ("failed", 8),
        ("interrupted", 14),
        ("succeeded", STEPS),
    ]
    version, driver = rootless.docker.run(
        "info", "-f", "{{.CgroupVersion}} {{.CgroupDriver}}"
    ).split()
    if version == "1" or driver == "none":
        assert "resources.cpus: not kept to" in supervisor.err
    assert {path.stat().st_uid for path in node.store_folder.rglob("*")} == {rootless.uid}


def test_the_doctor_of_an_ordinary_user_says_who_the_trainer_is(
    node: UsersNode, rootless: Rootless
) -> None:
    looked = node.begin("doctor", node.training(), "-o", "json")

    assert looked.wait() == 0, looked.err
    numbers = f"{rootless.uid}:{rootless.uid}"
    assert re.search(f"the user is (0:0, who is )?{numbers}", looked.out), looked.out
