"""What the engine is asked for, compared whole with files; and what is decided around it. Pure.

A golden file never changes by itself: a request that is meant to change is written by hand.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from runner.errors import EngineError, UsageError
from runner.job import Job
from runner.launch.base import Order, Places
from runner.launch.container_trial import folders_inside
from runner.launch.docker import (
    Seat,
    container_environment,
    device_requests,
    probe_request,
    trainer_request,
    trial_request,
)
from runner.launch.engine import Engine as RealEngine
from runner.launch.image import Image, Progress, gpu_problem, problem_of, repository_of
from runner.launch.refusal import is_of_gpus, is_of_program
from runner.launch.site import check_memory
from runner.launch.users import container_user

GOLDEN = Path(__file__).parent / "golden" / "docker"
HOST = {
    "PATH": "/usr/bin",
    "HOME": "/home/somebody",
    "TZ": "Europe/Berlin",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "eu-central-1",
    "HF_TOKEN": "secret",
    "DOCKER_HOST": "unix:///run/docker.sock",
    "RUNNER_HOME": "/elsewhere",
}
OWN = {"RUNNER_SPOOL": "/runner/spool", "RUNNER_ATTEMPT": "3"}


def job(**keys: Any) -> Job:
    given = {
        "name": "rul",
        "command": ["python", "train.py", "--fast"],
        "workdir": "/project",
        "launcher": "docker",
        "image": "registry.example/rul:1.0",
    }
    return Job.model_validate({**given, **keys})


SEAT = Seat(
    image="sha256:" + "ab" * 32,
    python="/usr/bin/python3",
    user="1000:1000",
    places=Places(Path("/shm/spool"), Path("/state/outputs"), Path("/state/.slots")),
    first_program=Path("/site/runner/launch/inside.py"),
    run_id="rul-2",
    host_memory=64 << 30,
)
CASES = {
    "little": {},
    "everything": {
        "command": ["bash", "train.sh"],
        "network": "bridge",
        "user": "1234:100",
        "mounts": ["/data", {"source": "cache", "target": "/cache", "writable": True}],
        "resources": {"gpus": [0, "GPU-8a56"], "cpus": 2.5, "memory": "32Gi", "shm": "8Gi"},
        "env": {"OMP_NUM_THREADS": "2", "HOME": "/cache"},
        "credentials": "pass",
    },
    "gpus by number": {"resources": {"gpus": 2, "memory": "1G"}},
}


@pytest.mark.parametrize("name", CASES)
def test_a_job_becomes_this_request(name: str) -> None:
    order = Order(3, OWN, 1, 2, lambda target, data: None)

    made = trainer_request(job(**CASES[name]), SEAT, order, HOST)

    assert made == json.loads((GOLDEN / f"{name.replace(' ', '-')}.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_no_request_gives_the_container_more_than_it_needs(name: str) -> None:
    """Whatever else is in the files."""
    made = trainer_request(
        job(**CASES[name]), SEAT, Order(1, OWN, 1, 2, lambda target, data: None), HOST
    )
    host = made["HostConfig"]

    assert not made["User"].startswith("0")
    assert (host["CapDrop"], host["SecurityOpt"]) == (["ALL"], ["no-new-privileges"])
    assert host["ReadonlyRootfs"]
    assert not host["Privileged"]
    writable = [mount["Target"] for mount in host["Mounts"] if not mount["ReadOnly"]]
    asked = [m["target"] for m in CASES[name].get("mounts", []) if isinstance(m, dict)]
    assert writable == [*asked, "/runner/spool", "/runner/outputs", "/runner/slots"]
    assert "sock" not in json.dumps(host["Mounts"])
    assert "HF_TOKEN" not in json.dumps(made["Env"])


def test_the_look_into_an_image_has_no_network_and_nothing_of_the_run() -> None:
    made = probe_request(job(network="host"), "sha256:ab", ["python3", "-c", "x"], "host", HOST)

    assert made["HostConfig"]["NetworkMode"] == "none"
    assert made["User"] == "", "whose image it is shows who its user is"
    assert [m["Target"] for m in made["HostConfig"]["Mounts"]] == ["/runner/workdir"]
    assert made["HostConfig"]["UsernsMode"] == "host"


def test_a_validation_gets_neither_network_nor_gpu_nor_credentials() -> None:
    wanted = job(**CASES["everything"], params={"depth": 3})

    made = trial_request(wanted, SEAT, Path("/state/.validation"), HOST)

    assert made == json.loads((GOLDEN / "trial.json").read_text())


def test_a_validation_imports_from_where_the_trainer_does(tmp_path: Path) -> None:
    project, link = tmp_path / "project", tmp_path / "link"
    (project / "src").mkdir(parents=True)
    (project / "src" / "train.py").touch()
    link.symlink_to(project)

    def folders(*command: str) -> list[str]:
        return folders_inside(job(command=["python", *command], workdir=str(link)))

    assert folders("src/train.py") == ["/runner/workdir/src"]
    assert folders("-m", "train") == ["/runner/workdir"]
    assert folders("/opt/in-the-image/train.py") == ["/opt/in-the-image"]


def test_of_the_hosts_environment_a_container_has_what_is_named() -> None:
    environment = container_environment(job(env={"A": "1", "TZ": "UTC"}), OWN, HOST)

    assert environment == {
        "A": "1",
        "HOME": "/tmp",
        "PYTHONUNBUFFERED": "1",
        "TZ": "UTC",
        "USER": "runner",
        **OWN,
    }
    passed = container_environment(job(credentials="pass"), OWN, HOST)
    assert passed["AWS_SECRET_ACCESS_KEY"] == "secret"
    assert passed["AWS_REGION"] == "eu-central-1"
    assert "HF_TOKEN" not in passed


def test_gpus_are_asked_for_by_number_or_by_name() -> None:
    assert device_requests(job()) == []
    (by_number,) = device_requests(job(resources={"gpus": 4}))
    (by_name,) = device_requests(job(resources={"gpus": [1, "GPU-1"]}))

    assert (by_number["Count"], by_number["Capabilities"]) == (4, [["gpu"]])
    assert (by_name["DeviceIDs"], "Count" in by_name) == (["1", "GPU-1"], False)


# ---------------------------------------------------------------- who it is


class Engine:
    """What is asked of an engine here."""

    def __init__(self, rootless: bool = False, podman: bool = False) -> None:
        self.is_rootless, self.is_podman, self.remaps_users = rootless, podman, False


USERS = {
    # engine, the job's user, the image's, who calls runner → who the trainer is
    "an ordinary user": (Engine(), None, 0, 1000, "1000:1000"),
    "in an image with a user": (Engine(), None, 999, 1000, "1000:1000"),
    "root, and an image with a user": (Engine(), None, 999, 0, "999:999"),
    "root, and an image of root": (Engine(), None, 0, 0, "65532:65532"),
    "root, and a user that is named": (Engine(), "1234:100", 999, 0, "1234:100"),
    "root that asks for root": (Engine(), "0:0", 999, 0, "0:0"),
    "with another group": (Engine(), "1000:100", 0, 1000, "1000:100"),
    "without root, docker": (Engine(rootless=True), None, 0, 1000, "0:0"),
    "without root, podman": (Engine(rootless=True, podman=True), None, 0, 1000, "1000:1000"),
}


@pytest.mark.parametrize(("engine", "asked", "images", "uid", "user"), USERS.values(), ids=USERS)
def test_the_trainer_is_root_only_where_that_is_asked_or_means_nothing(
    engine: Any, asked: str | None, images: int, uid: int, user: str
) -> None:
    given = job(user=asked) if asked else job()
    image = Image("rul", "sha256:ab", None, uid=images, gid=images)

    assert container_user(engine, given, image, uid, uid) == user


# What engines say of themselves: Docker's 20.10 and 27 without root, Podman 4.3 and 5 without it.
SECCOMP = "name=seccomp,profile=default"
SAYS = {
    "docker": ({"SecurityOptions": [SECCOMP], "CgroupVersion": "1"}, False, False),
    "docker, v2": ({"SecurityOptions": [SECCOMP], "CgroupVersion": "2"}, False, False),
    "docker without root": (
        {"SecurityOptions": [SECCOMP, "name=rootless"], "CgroupVersion": "2"},
        True,
        False,
    ),
    "docker without root or systemd": (
        {"SecurityOptions": ["name=rootless"], "CgroupVersion": "2", "CgroupDriver": "none"},
        True,
        True,
    ),
    "docker without root, v1": (
        {"SecurityOptions": ["name=rootless"], "CgroupVersion": "1"},
        True,
        True,
    ),
    "podman": (
        {"SecurityOptions": [SECCOMP], "Rootless": False, "CgroupVersion": "1"},
        False,
        False,
    ),
    "podman without root": (
        {"SecurityOptions": [SECCOMP], "Rootless": True, "CgroupVersion": "2"},
        True,
        False,
    ),
    "podman without root, v1": (
        {"SecurityOptions": [SECCOMP], "Rootless": True, "CgroupVersion": "1"},
        True,
        True,
    ),
    "nothing": ({}, False, False),
}


@pytest.mark.parametrize(("facts", "rootless", "no_limits"), SAYS.values(), ids=SAYS)
def test_an_engine_without_root_is_known_by_what_it_says(
    facts: dict[str, Any], rootless: bool, no_limits: bool
) -> None:
    class Client:
        def info(self) -> dict[str, Any]:
            return facts

    engine = RealEngine(Client(), types.ModuleType("sdk"), "unix:///engine.sock")

    assert (engine.is_rootless, engine.has_no_limits) == (rootless, no_limits)


def test_an_ordinary_user_cannot_give_the_spool_away() -> None:
    with pytest.raises(UsageError, match="the trainer can only be 1000"):
        container_user(Engine(), job(user="1001:1001"), Image("i", "i", None), 1000, 1000)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what cannot work

FACTS = {"version": [3, 11, 2], "runner": "0.1.0", "where": "/x", "program": True}
PROBLEMS: dict[str, tuple[Mapping[str, Any], dict[str, Any], str | None]] = {
    "none": ({}, {}, None),
    "an old Python": ({"version": [3, 10, 9]}, {}, "rul has Python 3.10.9, and runner needs 3.11"),
    "no runner": ({"runner": None}, {}, "RUN pip install runner=="),
    "a folder of that name": ({"where": None}, {}, "rul has no runner"),
    "another runner": ({"runner": "0.0.9"}, {}, "rul has runner 0.0.9, and this is"),
    "no program": ({"program": False}, {"command": ["./go"]}, "has no program './go'"),
    "no program is needed": ({"program": False}, {}, None),
}


@pytest.mark.parametrize(("facts", "keys", "problem"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_an_image_lacks_is_named(
    facts: Mapping[str, Any], keys: dict[str, Any], problem: str | None
) -> None:
    found = problem_of({**FACTS, **facts}, job(**keys), "rul")

    assert (found is None) if problem is None else (found is not None and problem in found)


def test_a_limit_that_the_slots_use_up_is_refused() -> None:
    check_memory(job(), 10**12)
    check_memory(job(resources={"memory": "1G"}), None)
    check_memory(job(resources={"memory": "1G"}), 10**8)

    with pytest.raises(UsageError, match="1000 MB are not enough for 2 slots of 500 MB"):
        check_memory(job(resources={"memory": "1G"}), 5 * 10**8)
    check_memory(job(resources={"memory": "1G"}, checkpoint={"slots": 0}), 5 * 10**8)
    with pytest.raises(UsageError, match=r"not enough for 2 slots of 500 MB"):
        check_memory(job(resources={"memory": "1G"}, checkpoint={"max_state": "500M"}), None)
    check_memory(job(resources={"memory": "1G"}, checkpoint={"max_state": "500M"}), 10**8)


def test_what_is_missing_for_gpus_is_told_in_order(tmp_path: Path) -> None:
    assert "no NVIDIA driver is loaded" in gpu_problem(tmp_path)
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").touch()
    assert "the NVIDIA Container Toolkit is not installed" in gpu_problem(tmp_path)
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/nvidia-container-cli").touch()
    assert "nvidia-ctk runtime configure" in gpu_problem(tmp_path)


SHIM = "failed to create shim task: OCI runtime create failed: "
REFUSALS = {
    'could not select device driver "" with capabilities: [[gpu]]': True,
    "failed to discover GPU vendor from CDI: no known GPU vendor found": True,
    f"{SHIM}error running hook: exit status 1, stderr: Auto-detected mode as 'legacy' "
    "nvidia-container-cli: initialization error: driver rpc error: unknown": True,
    f"{SHIM}nvidia-container-cli: device error: GPU-1: unknown device: unknown": True,
    "CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=all": True,
    f"{SHIM}mkdir /run/containerd/x: no space left on device: unknown": False,
    'connection error: desc = "dial unix /run/containerd/containerd.sock": refused': False,
}


@pytest.mark.parametrize(("said", "of_gpus"), REFUSALS.items())
def test_only_what_names_the_gpus_is_their_fault(said: str, of_gpus: bool) -> None:
    assert is_of_gpus(EngineError("start the container", said, 500)) == of_gpus


START = f"{SHIM}runc create failed: unable to start container process: "
ALONE = {
    f'{START}exec: "python3": executable file not found in $PATH: unknown': True,
    f'{START}exec: "python3": stat python3: no such file or directory: unknown': True,
    "crun: executable file `python3` not found in $PATH: No such file or directory": True,
    f'{START}exec: "python": executable file not found in $PATH: unknown': False,
    f'{START}error mounting "/x" to rootfs at "/etc/passwd": not a directory: unknown': False,
    f'{START}error mounting "/a/python3" to rootfs: no such file or directory: unknown': False,
    f'{START}exec: "python3": permission denied: unknown': False,
}


@pytest.mark.parametrize(("said", "is_missing"), ALONE.items())
def test_a_program_is_missing_where_the_engine_names_it(said: str, is_missing: bool) -> None:
    assert is_of_program(EngineError("start the container", said, 400), "python3") == is_missing


# ---------------------------------------------------------------- pulling


@pytest.mark.parametrize(
    ("reference", "repository"),
    {
        "ubuntu": "ubuntu",
        "ubuntu:24.04": "ubuntu",
        "docker.io/library/ubuntu:24.04": "ubuntu",
        "index.docker.io/nvidia/cuda:12": "nvidia/cuda",
        "127.0.0.1:5000/a/b:1.0": "127.0.0.1:5000/a/b",
        "127.0.0.1:5000/b": "127.0.0.1:5000/b",
        "registry.example/b:1@sha256:abcd": "registry.example/b",
        "registry.example/library/b@sha256:abcd": "registry.example/library/b",
    }.items(),
)
def test_a_name_and_a_digest_are_of_the_same_repository(reference: str, repository: str) -> None:
    assert repository_of(reference) == repository


def test_a_pull_is_as_far_as_its_layers_are() -> None:
    def message(layer: str, status: str, current: int = 0, total: int = 0) -> dict[str, Any]:
        detail = {"current": current, "total": total} if total else {}
        return {"id": layer, "status": status, "progressDetail": detail}

    progress = Progress()
    told = []
    for each in (
        message("a", "Pulling fs layer"),
        message("b", "Already exists"),
        message("a", "Downloading", 20_000_000, 40_000_000),
        message("c", "Downloading", 1_000_000, 10_000_000),
        message("a", "Download complete"),
        message("c", "Retrying in 5 seconds"),
        message("a", "Extracting", 1_000_000, 40_000_000),
        message("c", "Verifying Checksum"),
    ):
        progress.take(each)
        told.append(str(progress) if progress else None)

    assert told == [
        None,
        None,
        "20 of 40 MB",
        "21 of 50 MB",
        "41 of 50 MB",
        "41 of 50 MB",
        "41 of 50 MB",
        "unpacking 50 MB",
    ]
