"""Engines that refuse, are slow or go away, and what of that is final and what is left behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from nodes import Node, is_running
from servers.engine import IMAGE, Docker
from servers.engineproxy import EngineProxy
from waiting import wait_until

from runner.errors import EngineError, UsageError
from runner.job import Job
from runner.launch.base import Order, Places
from runner.launch.container import ContainerTrainer, DockerLauncher, seat_of
from runner.launch.engine import Engine
from runner.launch.image import Image


@pytest.fixture
def proxy(engine: Docker, tmp_path: Path) -> Iterator[EngineProxy]:
    with EngineProxy(engine, tmp_path / "engine.sock") as proxy:
        yield proxy


def gpu_launcher(proxy: EngineProxy, folder: Path) -> tuple[DockerLauncher, Order]:
    """A launcher of a job with GPUs, by an engine that starts nothing; its order is the first."""
    image = proxy.docker.run("image", "inspect", "-f", "{{.Id}}", IMAGE).strip()
    places = Places(*(folder / name for name in ("spool", "outputs", "slots")))
    places.spool.mkdir()
    gpus = {"gpus": 1}
    job = Job.model_validate({"name": "gpus", "command": ["true"], "workdir": str(folder),
                              "launcher": "docker", "image": IMAGE, "resources": gpus})  # fmt: skip
    found = Image(IMAGE, image, None, python="python3")
    engine = Engine.connect({"DOCKER_HOST": proxy.docker.host})
    launcher = DockerLauncher(
        engine, job, found, seat_of(engine, job, found, places, "gpus", "65532:65532"), {}
    )
    return launcher, Order(1, {}, 1, 2, lambda target, data: None)


def fail(launcher: DockerLauncher, order: Order) -> NoReturn:
    """Start a trainer, and raise what comes of it."""
    trainer = launcher.start(order)
    raise wait_until(lambda: trainer.failure, what="the start to fail")


def test_a_full_disk_is_not_taken_for_gpus_that_are_missing(
    proxy: EngineProxy, tmp_path: Path
) -> None:
    """That would be final, and it may pass."""
    launcher, order = gpu_launcher(proxy, tmp_path)
    proxy.refuse("POST .*/start", 500, "mkdir /run/containerd/x: no space left on device")

    with pytest.raises(EngineError, match="no space left on device"):
        fail(launcher, order)

    proxy.be_true()
    proxy.refuse(
        "POST .*/start", 500, "stderr: Auto-detected mode\nnvidia-container-cli: no driver"
    )
    with pytest.raises(UsageError, match=r"resources.gpus: .*nvidia-container-cli: no driver"):
        fail(launcher, order)

    proxy.be_true()
    with pytest.raises(UsageError, match=r"resources.gpus: .*could not select device driver"):
        fail(launcher, order)
    assert proxy.docker.containers("label=runner.run-id=gpus") == []


def test_gpus_that_were_there_may_come_back(proxy: EngineProxy, tmp_path: Path) -> None:
    launcher, order = gpu_launcher(proxy, tmp_path)
    proxy.answer("POST .*/start", b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
    trainer = launcher.start(order)
    wait_until(lambda: any("/start" in line for line in proxy.asked), what="the start")
    proxy.docker.run("rm", "-f", *proxy.docker.containers("label=runner.run-id=gpus"))
    assert trainer.kill_tree() == []
    proxy.be_true()

    with pytest.raises(EngineError, match="could not select device driver"):
        fail(launcher, order)
    assert proxy.docker.containers("label=runner.run-id=gpus") == []


def test_a_full_disk_at_submit_is_not_final(proxy: EngineProxy, node: Node) -> None:
    node.use(proxy.docker)
    proxy.refuse("POST .*/start", 500, "mkdir /run/containerd/x: no space left on device")

    done = node.run("run", node.job("python", "-c", "pass", resources={"gpus": 1}))

    assert done.code == 70, done.err
    assert "no space left on device" in done.err
    assert "gpus" not in done.err


def test_a_container_that_starts_when_its_supervisor_is_dead_ends_by_itself(
    proxy: EngineProxy, node: Node
) -> None:
    node.use(proxy.docker)
    assert node.run("run", node.job("python", "-c", "pass", name="looks")).code == 0
    asked = len(proxy.asked)
    proxy.hold("POST .*/start", passes_forsaken=True)
    supervisor = node.start("run", node.job("python", "-c", "import time; time.sleep(3600)"))
    wait_until(lambda: any("/start" in line for line in proxy.asked[asked:]), what="the start")

    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.wait()
    proxy.release()

    (container,) = wait_until(lambda: node.containers("status=exited"), what="its end")
    assert proxy.docker.run("inspect", "-f", "{{.State.ExitCode}}", container).strip() == "75"
    proxy.docker.run("rm", container)
    node.keeps_spool = True


def test_an_engine_that_dies_in_the_middle_of_a_pull_does_not_answer(
    proxy: EngineProxy, node: Node
) -> None:
    """Its answer is cut off inside of a piece that it has announced."""
    node.use(proxy.docker)
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    told = b'{"status":"Downloading","id":"a","progressDetail":{"current":1,"total":9}}\r\n'
    proxy.answer("POST .*/images/create", head + b"%x\r\n%s\r\n" % (len(told), told))
    job = Path(node.job("python", "-c", "pass"))
    job.write_text(json.dumps(json.loads(job.read_text()) | {"image": "registry.example/x:1"}))

    done = node.run("run", str(job))  # which fails at a traceback

    assert done.code == 70, done.err
    cannot = "runner: the container engine cannot pull registry.example/x:1: it does not answer at "
    assert done.err.endswith(f"{cannot}{proxy.docker.host}\n")


def test_an_engine_that_goes_away_during_a_look_is_not_final(
    proxy: EngineProxy, node: Node
) -> None:
    node.use(proxy.docker)
    proxy.answer("POST .*/wait", b"")

    done = node.run("run", node.job("python", "-c", "pass"))

    assert done.code == 70, done.err
    assert "does not answer" in done.err


def test_a_container_whose_log_cannot_be_read_is_removed(proxy: EngineProxy) -> None:
    engine = Engine.connect({"DOCKER_HOST": proxy.docker.host})
    request = {
        "Image": IMAGE,
        "Entrypoint": ["sleep", "3600"],
        "HostConfig": {"NetworkMode": "none"},
    }
    container = engine.create("runner-test-log", request)
    engine.start(container)
    first = int(engine.state(container)["Pid"])
    trainer = ContainerTrainer(engine, container, first, None, lambda target, data: None)
    proxy.refuse("GET .*/logs", 500, "error reading the log: unexpected EOF")

    assert trainer.kill_tree() == []

    assert engine.state(container) == {}
    assert not is_running(first)
    engine.close()


def test_what_could_not_be_removed_for_a_while_is_not_left_behind(
    proxy: EngineProxy, node: Node
) -> None:
    node.use(proxy.docker)
    assert node.run("run", node.job("python", "-c", "pass", name="looks")).code == 0
    asked = len(proxy.asked)
    proxy.refuse("DELETE .*", 503, "containerd is just starting")

    supervisor = node.start("run", node.job("python", "-c", "pass"))
    wait_until(lambda: deletions(proxy.asked[asked:]) > 1, what="another try")
    proxy.be_true()

    assert supervisor.wait() == 0, supervisor.err
    assert "cannot remove the container: containerd is just starting" in supervisor.err
    assert node.docker is not None
    assert node.docker.containers(f"label=runner.spool={node.spool().path}") == []


def deletions(asked: list[str]) -> int:
    return sum(line.startswith("DELETE") for line in asked)
