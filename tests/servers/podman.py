"""Podman's service for tests, which answers as Docker's engine does: Debian's `podman`.

Everything of it lies in one folder, cgroups aside, and goes with it; the machine's own containers
are not touched. It needs root, `podman` and `catatonit`, and the base image that the tests' Docker
engine was given.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from waiting import wait_until

from servers.engine import IMAGE, PATH_CHANGE, Docker

START_SECONDS = 30.0
_MOST_PROCESSES = 32_768
_CGROUPS = Path("/sys/fs/cgroup")
_INIT = "/usr/bin/catatonit"

# For machines without systemd and without the right to raise limits. Where containers are kept is
# not said here: what ends one, a command of its own, would look for it elsewhere.
_ENGINE = """\
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
init_path = "{init}"
lock_type = "file"
runtime = "{runtime}"
tmp_dir = "{folder}/tmp"
"""
_STORAGE = """\
[storage]
driver = "overlay"
runroot = "{folder}/run"
graphroot = "{folder}/data"
"""


CONFIGURATION = {"CONTAINERS_CONF": _ENGINE, "CONTAINERS_STORAGE_CONF": _STORAGE}


def missing() -> str | None:
    """Why there can be none here, if so."""
    if shutil.which("podman") is None or not Path(_INIT).exists():
        return "no Podman: install the Debian packages `podman` and `catatonit`"
    return "Podman's service needs root here" if os.geteuid() != 0 else None


@contextmanager
def serving(folder: Path, base: Path) -> Iterator[Docker]:
    """A service that has the base image, whose tree is the archive `base`."""
    environment = configured(folder)

    def podman(*arguments: str) -> None:
        done = subprocess.run(
            ["podman", *arguments],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    podman("import", "-c", PATH_CHANGE, "-c", "ENV PYTHONUNBUFFERED=1", str(base), IMAGE)
    docker = Docker(f"unix://{folder}/podman.sock")
    with (folder / "log").open("wb") as log:
        service = subprocess.Popen(
            ["podman", "system", "service", "--time=0", docker.host],
            env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_until(docker.answers, START_SECONDS, f"Podman's service, see {log.name}")
        yield docker
    finally:
        service.terminate()
        service.wait(START_SECONDS)
        podman("rm", "--all", "--force")
        podman("rmi", "--all", "--force")
        unmount(folder)
        for group in sorted(_CGROUPS.glob("**/libpod_parent/**/"), reverse=True):
            with contextlib.suppress(OSError):  # of another worker's tests, which end just now
                group.rmdir()


def configured(folder: Path) -> dict[str, str]:
    """Podman's configuration in a folder of its own; the environment that names it."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    _, processes = resource.getrlimit(resource.RLIMIT_NPROC)
    values = {
        "folder": folder,
        "files": files,
        "processes": _MOST_PROCESSES if processes < 0 else min(processes, _MOST_PROCESSES),
        "init": _INIT,
        "runtime": "crun" if shutil.which("crun") else "runc",
    }
    environment = dict(os.environ)
    for variable, text in CONFIGURATION.items():
        file = folder / variable.lower()
        file.write_text(text.format(**values))
        environment[variable] = str(file)
    return environment


def unmount(folder: Path) -> None:
    """What is mounted below it, for good."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "-l", mount], check=False)
