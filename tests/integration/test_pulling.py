"""Images that come from a registry: pulled, pinned by their digest, with and without a password."""

from __future__ import annotations

import base64
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from nodes import Called, Node, Started
from servers import registry
from servers.engine import IMAGE, Docker
from servers.faultproxy import Fault, FaultProxy
from waiting import wait_until

STEPS = 24
LAYER_BYTES = 16_000_000
BASIC = base64.b64encode(f"{registry.USER}:{registry.PASSWORD}".encode()).decode()


@dataclass
class Registry:
    """A registry's addresses: what is pushed to the open one is in the locked one, too."""

    engine: Docker
    address: str
    locked: str
    folder: Path
    proxies: list[str] = field(default_factory=list)

    def publish(self, name: str, content: bytes) -> str:
        """Push the base image with a file more, and forget it here; its digest there."""
        reference = f"{self.address}/{name}"
        context = self.folder / "context"
        context.mkdir(exist_ok=True)
        (context / "content").write_bytes(content)
        (context / "Dockerfile").write_text(f"FROM {IMAGE}\nCOPY content /content\n")
        self.engine.run("build", "-q", "-t", reference, str(context))
        self.engine.run("push", "-q", reference)
        digests = self.engine.run(
            "image", "inspect", "-f", "{{join .RepoDigests `\n`}}", reference
        ).split()
        (digest,) = [each for each in digests if each.startswith(f"{self.address}/")]
        self.forget()
        return digest.partition("@")[2]

    @contextmanager
    def behind(self) -> Iterator[tuple[str, FaultProxy]]:
        """The open registry behind a proxy; its address there."""
        with FaultProxy(int(self.address.rpartition(":")[2])) as proxy:
            self.proxies.append(proxy.url.removeprefix("http://"))
            yield self.proxies[-1], proxy

    def forget(self) -> None:
        """Nothing of the registry is left in the engine."""
        for address in (self.address, self.locked, *self.proxies):
            found = self.engine.run(
                "images", "-aq", "--no-trunc", "--filter", f"reference={address}/*"
            )
            if found.split():
                self.engine.run("rmi", "-f", *dict.fromkeys(found.split()))


@pytest.fixture(scope="module")
def images(engine: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    if (problem := registry.missing()) is not None:
        pytest.skip(problem)
    folder = tmp_path_factory.mktemp("registry")
    with registry.serving(folder) as address, registry.serving(folder, locked=True) as locked:
        yield Registry(engine, address, locked, folder)


@pytest.fixture(autouse=True)
def nothing_left(images: Registry) -> Iterator[None]:
    yield
    images.forget()


def using(node: Node, engine: Docker, image: str, **params: object) -> str:
    """A job that trains in this image."""
    node.use(engine)
    path = Path(node.training(params=params))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image": image}))
    return str(path)


def preempted_at(node: Node, step: int, supervisor: Started) -> None:
    supervisor.wait_for(f"step {step}")
    supervisor.send_signal(signal.SIGTERM)
    node.wait_until_asked()
    node.gate.touch()
    assert supervisor.wait() == 75, supervisor.err
    node.gate.unlink()


def refused(node: Node, job: str, env: dict[str, str]) -> Called:
    done = node.run("run", job, env=env)
    assert done.code == 2, done.err
    assert not (node.store_folder / "job").exists()
    assert node.spools() == []
    return done


def configuration(node: Node, name: str, **content: object) -> dict[str, str]:
    """Docker's own configuration, in a folder of its own; the environment that names it."""
    folder = node.folder / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return {"DOCKER_CONFIG": str(folder)}


def test_a_run_goes_on_with_the_image_it_began_with_until_it_is_told_otherwise(
    node: Node, engine: Docker, images: Registry
) -> None:
    name = f"{images.address}/moves:1"
    first = images.publish("moves:1", b"first")
    job = using(node, engine, name, befalls={"1": {"5": "wait"}, "2": {"9": "wait"}})

    def record() -> dict[str, str]:
        return dict(json.loads((node.store_folder / "job" / "run.json").read_text())["image"])

    supervisor = node.start("run", job)
    preempted_at(node, 5, supervisor)
    assert f"pulling the image {name}" in supervisor.err
    assert f"pulled {name}: " in supervisor.err
    began_with = record()
    assert began_with["name"] == name
    assert began_with["digest"] == f"{images.address}/moves@{first}"
    assert node.newest().provenance["image"] == began_with

    images.forget()
    second = images.publish("moves:1", b"second")
    supervisor = node.start("run", job)
    preempted_at(node, 9, supervisor)
    assert f"pulling the image {images.address}/moves@{first}" in supervisor.err
    assert (node.newest().moment.step, node.newest().provenance["image"]) == (9, began_with)
    assert record() == began_with

    # The name stands here for what it stood for then, and in the registry for the new one.
    engine.run("tag", began_with["id"], name)
    done = node.run("run", job, "--update")
    assert done.code == 0, done.err
    assert f"finished at {STEPS}" in done.out
    assert record()["digest"] == f"{images.address}/moves@{second}"
    assert record()["id"] != began_with["id"]
    assert node.newest().provenance["image"] == record()


def test_what_is_here_is_gone_on_with_where_nobody_can_be_asked_for_a_newer_one(
    node: Node, engine: Docker, images: Registry
) -> None:
    images.publish("alone:1", b"alone")
    with images.behind() as (address, _):
        name = f"{address}/alone:1"
        job = using(node, engine, name, befalls={"1": {"5": "wait"}})
        preempted_at(node, 5, node.start("run", job))

    done = node.run("run", job, "--update")

    assert done.code == 0, done.err
    assert f"no newer {name} can be looked for" in done.err
    assert "going on with the one that is here" in done.err
    assert len({manifest.provenance["image"]["digest"] for manifest in node.manifests()}) == 1


def test_a_pull_that_takes_a_while_says_how_far_it_is(
    node: Node, engine: Docker, images: Registry
) -> None:
    images.publish("large:1", os.urandom(LAYER_BYTES))
    with images.behind() as (address, proxy):
        proxy.add("GET .*/blobs/", Fault("trickle"), times=100)
        supervisor = node.start("run", using(node, engine, f"{address}/large:1"))

        wait_until(lambda: "of 16 MB" in supervisor.err, 60, "a word on how far it is")
        proxy.hurry.set()

        assert supervisor.wait() == 0, supervisor.err
    assert "pulling: " in supervisor.err


def test_an_image_that_the_registry_does_not_have_is_named(
    node: Node, engine: Docker, images: Registry
) -> None:
    images.publish("known:1", b"known")

    for name in (f"{images.address}/known:2", f"{images.address}/unknown:1"):
        err = refused(node, using(node, engine, name), {}).err
        assert f"image: {name} is not here and cannot be pulled: " in err
        assert "check the name" in err
        assert "unknown" in err.partition("cannot be pulled: ")[2]


def test_an_image_that_was_deleted_cannot_be_gone_on_with(
    node: Node, engine: Docker, images: Registry
) -> None:
    with images.behind() as (address, proxy):
        images.publish("gone:1", b"gone")
        name = f"{address}/gone:1"
        job = using(node, engine, name, befalls={"1": {"5": "wait"}})
        preempted_at(node, 5, node.start("run", job))
        digest = node.newest().provenance["image"]["digest"]
        images.forget()
        # Its blobs, too: the engine may have the manifest still, and pull the rest by it.
        proxy.add("/v2/gone/", Fault("status", 404, code="x"), times=100)

        done = node.run("run", job)

    assert done.code == 2, done.err
    assert f"image: {digest} is not here and cannot be pulled" in done.err
    assert f"the run began with it as {name}" in done.err
    assert "--update" in done.err
    assert len(node.records()) == 1


def test_a_registry_with_a_password_gets_that_of_dockers_own_configuration(
    node: Node, engine: Docker, images: Registry
) -> None:
    images.publish("private:1", b"private")
    name = f"{images.locked}/private:1"
    job = using(node, engine, name)
    without = configuration(node, "without")
    wrong = base64.b64encode(b"trainer:wrong-password").decode()
    wrongly = configuration(node, "wrongly", auths={images.locked: {"auth": wrong}})
    rightly = configuration(node, "rightly", auths={images.locked: {"auth": BASIC}})

    for env, reason in ((without, "no basic auth credentials"), (wrongly, "unauthorized")):
        err = refused(node, job, env).err
        assert f"image: {name} is not here and cannot be pulled: " in err
        assert reason in err
        assert "`docker login` if its registry asks for that" in err
        assert "wrong-password" not in err
        assert wrong not in err
    done = node.run("run", job, env=rightly)

    assert done.code == 0, done.err
    assert node.newest().provenance["image"]["digest"].startswith(f"{images.locked}/private@")
    told = [
        path
        for folder in (node.folder, node.store_folder)
        for path in folder.rglob("*")
        if path.is_file() and not path.is_relative_to(node.folder / "rightly")
    ]
    assert len(told) > 10
    for path in told:
        content = path.read_bytes()
        assert registry.PASSWORD.encode() not in content, path
        assert BASIC.encode() not in content, path


def test_a_helper_of_docker_is_asked_for_credentials_and_named_if_it_cannot_tell(
    node: Node, engine: Docker, images: Registry
) -> None:
    images.publish("helped:1", b"helped")
    name = f"{images.locked}/helped:1"
    job = using(node, engine, name)
    programs = node.folder / "programs"
    programs.mkdir()
    env = configuration(node, "helped", credHelpers={images.locked: "tests"})
    env["PATH"] = f"{programs}:{os.environ['PATH']}"

    err = refused(node, job, env).err
    assert f"image: {name} is not here and cannot be pulled: " in err
    assert "docker-credential-tests not installed" in err

    helper = programs / "docker-credential-tests"
    answer = {"Username": registry.USER, "Secret": registry.PASSWORD}
    helper.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    helper.chmod(0o755)
    done = node.run("run", job, env=env)
    assert done.code == 0, done.err
    assert registry.PASSWORD not in done.err + done.out


@pytest.mark.parametrize("auth", ["not base64", "bm8gY29sb24="])
def test_credentials_that_are_none_are_named_with_their_file(
    node: Node, engine: Docker, images: Registry, auth: str
) -> None:
    env = configuration(node, "broken", auths={images.locked: {"auth": auth}})

    err = refused(node, using(node, engine, f"{images.locked}/any:1"), env).err

    assert f"Docker's configuration {env['DOCKER_CONFIG']}/config.json" in err
    assert "docker login" in err
    assert auth not in err
