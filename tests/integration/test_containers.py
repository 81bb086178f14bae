"""What only containers have: how little they get, images that do not fit, engines that die."""

from __future__ import annotations

import grp
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import PROGRAMS, Called, Node, nodes_in
from servers.ceph import cache_folder
from servers.engine import IMAGE, Docker, LocalEngine
from waiting import wait_until

from runner.launch.engine import Engine

STEPS = 24


def change(job: str, **keys: object) -> str:
    """Change a job file."""
    path = Path(job)
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return job


def refused(node: Node, job: str, **env: str) -> Called:
    """A job that is refused when it is submitted: nothing of it is written."""
    done = node.run("run", job, env=env)
    assert done.code == 2, done.err
    assert not (node.store_folder / "job").exists()
    assert node.spools() == []
    return done


# ---------------------------------------------------------------- what it gets


def test_a_container_has_little_of_the_machine(node: Node, engine: Docker) -> None:
    node.use(engine)
    resources = {"memory": "512Mi", "shm": "32Mi"}
    job = node.job("python", str(PROGRAMS / "looks_around.py"), resources=resources)

    done = node.run("run", job, env={"SECRET_OF_THE_HOST": "x", "TZ": "UTC"})

    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["uid"] == 65532
    assert (facts["capabilities"], facts["no_new_privileges"]) == (0, True)
    assert facts["writes"] == ["/tmp", "/runner/outputs"]
    assert (facts["network"], facts["socket"], facts["shares"]) == (False, False, True)
    assert facts["shm"] == 32 << 20
    assert "TZ" in facts["environment"]
    assert "SECRET_OF_THE_HOST" not in facts["environment"]
    provenance = json.loads((node.store_folder / "job" / "run.json").read_text())
    assert provenance["image"] == {
        "name": IMAGE,
        "id": engine.run("image", "inspect", "-f", "{{.Id}}", IMAGE).strip(),
        "digest": None,
    }


def test_links_that_a_container_plants_lead_nowhere(
    node: Node, engine: Docker, tmp_path: Path
) -> None:
    node.use(engine)
    secret = tmp_path / "secret"
    secret.write_text("nobody but root may read this" + 64 * ".")
    secret.chmod(0o600)
    job = node.job(
        "python", str(PROGRAMS / "plants_links.py"),
        params={"file": str(secret)}, restart={"failures": 0},
    )  # fmt: skip
    before = secret.read_bytes(), secret.stat()

    done = node.run("run", job)

    assert "planted" in done.out, done.err
    assert done.code == 70
    assert (secret.read_bytes(), secret.stat()) == before
    files = [p for p in node.store_folder.rglob("*") if p.is_file() and not p.is_symlink()]
    assert not [path for path in files if b"nobody but root" in path.read_bytes()]


def test_the_doctor_looks_at_engine_and_image(node: Node, engine: Docker) -> None:
    node.use(engine)

    findings = node.call("doctor", _plain(node), "-o", "json").json["findings"]

    found = {finding["check"]: finding for finding in findings}

    assert found["engine"]["facts"].startswith("Docker ")
    assert "with Python 3.11" in found["image"]["facts"]
    assert "the user is 65532:65532" in found["image"]["facts"]


def test_the_doctor_tells_podman_from_docker(node: Node, podman: Docker) -> None:
    node.use(podman)

    findings = node.call("doctor", _plain(node), "-o", "json").json["findings"]

    found = {finding["check"]: finding for finding in findings}
    assert found["engine"]["facts"].startswith("Podman ")
    assert "with Python 3.11" in found["image"]["facts"]


def test_long_lines_of_podmans_containers_are_read_whole(podman: Docker) -> None:
    """As the probe's is. Asked for the last lines, Podman 4.3 left out what it had split."""
    engine = Engine.connect({"DOCKER_HOST": podman.host})
    request = {
        "Image": IMAGE,
        "Entrypoint": ["python3", "-c", "print('x' * 100_000)"],
        "HostConfig": {"NetworkMode": "none", "LogConfig": {"Type": "json-file"}},
    }
    container = engine.create("runner-test-long-lines", request)
    engine.start(container)
    assert engine.wait(container, 60) == 0

    printed = engine.output(container, stdout=True, stderr=False)

    engine.remove(container)
    engine.close()
    assert len(printed) == 100_001


# ---------------------------------------------------------------- what cannot be


def test_without_an_engine_it_is_said_where_one_was_looked_for(node: Node) -> None:
    node.use(Docker(f"unix://{node.folder}/no.sock"))

    done = refused(node, _plain(node))

    assert f"no container engine: there is no socket {node.folder}/no.sock" in done.err


def _plain(node: Node) -> str:
    return node.job("python", "-c", "pass")


def test_a_socket_that_nobody_answers_is_no_engine(node: Node) -> None:
    subprocess.run(
        ["python3", "-c", "import socket,sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])",
         str(node.folder / "dead.sock")], check=True,
    )  # fmt: skip
    node.use(Docker(f"unix://{node.folder}/dead.sock"))

    assert "no container engine answers at unix://" in refused(node, _plain(node)).err


NOBODY = "65534"
# Somebody else who may read what is root's, such as this Python; that does not open sockets.
AS_NOBODY = ("setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--inh-caps=-all,+dac_read_search",
             "--ambient-caps=+dac_read_search")  # fmt: skip


@pytest.fixture
def guarded() -> Iterator[Path]:
    """A socket that is root's and a group's, as Docker's is; nobody listens."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("to be somebody else needs root, and setpriv")
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        socket.socket(socket.AF_UNIX) as bound,
    ):
        path = Path(folder, "docker.sock")
        bound.bind(str(path))
        os.chown(path, 0, grp.getgrnam("audio").gr_gid)  # of Debian's base
        path.chmod(0o660)
        path.parent.chmod(0o755)
        yield path


def as_nobody(socket: Path, *groups: str) -> str:
    """What somebody else is told who is a member of these groups; exit 2, and nothing begins."""
    with nodes_in(socket.parent) as new:
        node = new("node")
        node.use(Docker(f"unix://{socket}"))
        job = _plain(node)
        node.store_folder.mkdir(exist_ok=True)
        for folder in (node.folder, node.store_folder, node.memory):
            folder.chmod(0o777)
        chosen = ["--groups", ",".join(groups)] if groups else ["--clear-groups"]
        supervisor = node.start("run", job, before=[*AS_NOBODY, *chosen])
        assert supervisor.wait() == 2, supervisor.err
        assert "Traceback" not in supervisor.err
        assert not (node.store_folder / "job").exists()
        return supervisor.err


def test_who_may_not_use_the_socket_is_told_which_group_may(guarded: Path) -> None:
    err = as_nobody(guarded)

    assert f"no permission for the container engine's socket {guarded}: " in err
    assert "become a member of the group audio (usermod -aG audio USER" in err

    gid = str(grp.getgrnam("audio").gr_gid)
    assert f"no container engine answers at unix://{guarded}" in as_nobody(guarded, gid)


def test_a_socket_in_a_folder_of_somebody_elses_is_one_without_permission(guarded: Path) -> None:
    guarded.parent.chmod(0o700)

    # Without the right to read what is root's, which would open the folder, too.
    program = (
        "import docker, os, sys; from runner.launch.engine import Engine\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "Engine.connect({'DOCKER_HOST': sys.argv[1]})"
    )
    done = subprocess.run([sys.executable, "-c", program, f"unix://{guarded}"],
                          capture_output=True, text=True, check=False)  # fmt: skip

    assert done.stderr.splitlines()[-1] == (
        f"runner.errors.UsageError: no permission for the container engine's socket {guarded}: "
        "run as the user whose it is, or use a rootless engine of your own (DOCKER_HOST)"
    )


def test_an_engine_of_another_machine_is_refused(node: Node) -> None:
    node.use(Docker("tcp://engine.example:2375"))

    assert "the engine must be this machine's" in refused(node, _plain(node)).err


@pytest.fixture(scope="module")
def empty(engine: Docker, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image without anything to run."""
    path = tmp_path_factory.mktemp("empty") / "empty.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("nothing")
        tar.addfile(info, io.BytesIO())
    engine.run("import", str(path), "runner-test-empty")
    return "runner-test-empty"


def test_what_an_image_lacks_is_named_at_submit(node: Node, engine: Docker, empty: str) -> None:
    node.use(engine)
    job = _plain(node)

    gone = refused(node, change(job, image="127.0.0.1:9/no/such:image"))
    assert "image: 127.0.0.1:9/no/such:image is not here and cannot be pulled: " in gone.err
    assert "pulling the image" in gone.err

    assert f"image: {empty} has no Python" in refused(node, change(job, image=empty)).err

    bare = refused(node, change(job, image=IMAGE, env={}))
    assert f"image: {IMAGE} has no runner; add to its Dockerfile: RUN pip install" in bare.err

    lacking = refused(node, node.job("no-such-program"))
    assert "has no program 'no-such-program'" in lacking.err


def test_what_the_machine_lacks_is_named_at_submit(node: Node, engine: Docker) -> None:
    node.use(engine)
    job = _plain(node)

    mounts = json.loads(Path(job).read_text())["mounts"]
    missing = refused(node, change(job, mounts=[*mounts, {"source": "/no/such"}]))
    assert "mounts[3].source: there is nothing at /no/such" in missing.err

    folder = {"source": str(node.folder), "target": "/etc/passwd"}
    over_a_file = refused(node, change(job, mounts=[*mounts, folder]))
    assert "error mounting" in over_a_file.err
    assert '"/etc/passwd"' in over_a_file.err
    assert "has no Python" not in over_a_file.err

    gpus = refused(node, change(job, mounts=mounts, resources={"gpus": 1}))
    assert "resources.gpus: no NVIDIA driver is loaded on this machine" in gpus.err

    node.folder.chmod(0o700)
    closed = refused(node, change(job, resources={}))
    node.folder.chmod(0o755)
    assert f"workdir: the trainer is user 65532, who may not read {node.folder}" in closed.err


# ---------------------------------------------------------------- an engine that dies


@pytest.fixture
def own_engine(engine: Docker) -> Iterator[LocalEngine]:
    """An engine that may be killed: the others' tests have one of their own."""
    local = LocalEngine(cache_folder(), "engine-2")
    if not local.base.exists():
        pytest.skip("the base image is that of an engine that was brought up by somebody else")
    local.up()
    yield local
    local.start()
    local.down()


def test_a_run_outlives_its_engine(
    node: Node, own_engine: LocalEngine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It dies twice. Back again it kills the trainer once, as it does; once it comes too late."""
    with nodes_in(tmp_path_factory.mktemp("undisturbed")) as new:
        undisturbed = new("node")
        assert undisturbed.run("run", undisturbed.training()).code == 0
        digest = undisturbed.digest()
    node.use(own_engine.docker)
    job = node.training(params={"befalls": {"1": {"5": "wait"}, "2": {"9": "wait"}}})
    supervisor = node.start("run", job)
    supervisor.wait_for("step 5")

    own_engine.kill()
    own_engine.start()
    supervisor.wait_for("ready at 4 in attempt 2")

    supervisor.wait_for("step 9")
    own_engine.kill()
    node.gate.touch()
    supervisor.wait_for(f"finished at {STEPS}")
    wait_until(lambda: "does not answer" in supervisor.err, 60, "the engine to be missed")
    own_engine.start()

    assert supervisor.wait() == 0, supervisor.err
    assert node.digest() == digest
    assert [r.start_step for r in node.records()][:2] == [0, 4]
