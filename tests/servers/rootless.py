"""Docker's engine and Podman's service as an ordinary user has them, who is nobody on this machine.

That user is known in a view of `/etc` which only the processes of the tests have. It takes root,
what `servers.engine` or `servers.podman` needs, and Debian's `uidmap` and, for Docker,
`rootlesskit`. Docker is started as its own `dockerd-rootless.sh` would, but without a network.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from waiting import wait_until

from servers.engine import IMAGE, PATH_CHANGE, Docker
from servers.podman import CONFIGURATION, START_SECONDS, configured, unmount
from servers.podman import missing as missing_podman

Kind = Literal["docker", "podman"]
_MAY_READ = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
_UID = 64_873  # that of nobody else
_NAME = "runner-tests"
_SUBORDINATES = f"{_NAME}:1000000:65536\n"  # by number, rootlesskit would take them twice
_HIDDEN = {
    "passwd": f"{_NAME}:x:{_UID}:{_UID}::{{folder}}/home:/bin/sh\n",
    "group": f"{_NAME}:x:{_UID}:\n",
    "subuid": _SUBORDINATES,
    "subgid": _SUBORDINATES,
}
"""Lines that `/etc` has for that user."""

_CHANGES = ("-c", PATH_CHANGE, "-c", "ENV PYTHONUNBUFFERED=1")

# What lies under these names is root's, and was only copied into the engine's view by name.
_DOCKERD = 'rm -f /run/docker /run/containerd /run/xtables.lock /etc/docker; exec dockerd "$@"'


@dataclass(frozen=True)
class Rootless:
    """An ordinary user's engine. `words` come before a command that is to be that user's.

    `reader` is the same for one that may read whatever root may: the interpreter of the tests can
    lie in root's home. `folder` is the user's own, and so is `memory`, in `/dev/shm`.
    """

    docker: Docker
    uid: int
    folder: Path
    memory: Path
    words: Sequence[str]
    reader: Sequence[str]
    environment: Mapping[str, str]


def missing(kind: Kind, read: Path) -> str | None:
    """Why an ordinary user can have none here, if so; `read` is what it must be able to read."""
    if kind == "podman" and (problem := missing_podman()) is not None:
        return problem
    if os.geteuid() != 0:
        return "becoming an ordinary user takes root"
    if kind == "docker" and shutil.which("rootlesskit") is None:
        return "no rootlesskit: install the Debian package of that name"
    if shutil.which("newuidmap") is None or not Path("/etc/subuid").exists():
        return "no newuidmap: install the Debian package `uidmap`"
    if not _may("ls", str(read)):
        return f"an ordinary user cannot read {read}"
    if not _may("unshare", "--user", "true"):
        return "an ordinary user may have no namespaces here"
    return None


def _may(*words: str) -> bool:
    """Whether a command succeeds as that user."""
    done = subprocess.run(["setpriv", *_user(), *words], capture_output=True, check=False)
    return done.returncode == 0


def _user(*more: str) -> list[str]:
    return [f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups", *more]


@contextmanager
def serving(kind: Kind, base: Path) -> Iterator[Rootless]:
    """An engine of an ordinary user that has the base image, whose tree is the archive `base`."""
    with (
        tempfile.TemporaryDirectory(prefix="rootless-", ignore_cleanup_errors=True) as name,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
    ):
        folder = Path(name)
        enter = _enter(folder)
        settings = configured(folder) if kind == "podman" else {}
        rootless = Rootless(
            Docker(f"unix://{folder}/engine.sock"),
            _UID,
            folder,
            Path(memory),
            [enter, "setpriv", *_user()],
            [enter, "setpriv", *_user(*_MAY_READ)],
            {
                "HOME": f"{folder}/home",
                "XDG_RUNTIME_DIR": f"{folder}/run",
                **{name: settings[name] for name in CONFIGURATION if name in settings},
            },
        )
        for path in (folder, folder / "home", folder / "run", Path(memory)):
            path.mkdir(mode=0o700, exist_ok=True)
        for path in (*folder.rglob("*"), folder, Path(memory)):
            os.chown(path, _UID, _UID)
        with (folder / "log").open("wb") as log:
            service = subprocess.Popen(
                [*rootless.words, *_service(kind, rootless)],
                **_options(rootless), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            wait_until(rootless.docker.answers, START_SECONDS, f"the engine, see {log.name}")
            if kind == "podman":
                _import(rootless, base)
            else:
                rootless.docker.run("import", *_CHANGES, str(base), IMAGE)
            yield rootless
        finally:
            _end_all_of(_UID)
            service.wait(START_SECONDS)
            unmount(folder)


def _service(kind: Kind, rootless: Rootless) -> list[str]:
    host, own = rootless.docker.host, rootless.folder / "run"
    if kind == "podman":
        return ["podman", "system", "service", "--time=0", host]
    return [
        "rootlesskit", f"--state-dir={own}/kit", "--net=host", "--copy-up=/etc", "--copy-up=/run",
        "--propagation=rslave", "sh", "-c", _DOCKERD, "sh", f"--host={host}",
        f"--data-root={rootless.folder}/data", f"--exec-root={own}/docker",
        f"--pidfile={own}/docker.pid", "--bridge=none", "--iptables=false", "--ip6tables=false",
        "--ip-forward=false",
    ]  # fmt: skip


def _enter(folder: Path) -> str:
    """A command that executes its arguments where `/etc` knows the user."""
    mounts = []
    for name, line in _HIDDEN.items():
        text = Path("/etc", name).read_text() + line.format(folder=folder)
        (folder / name).write_text(text)
        mounts.append(f"mount --bind {folder}/{name} /etc/{name}")
    script = folder / "enter"
    inner = "; ".join((*mounts, 'exec "$@"'))
    script.write_text(f"#!/bin/sh\nexec unshare --mount sh -ec '{inner}' sh \"$@\"\n")
    script.chmod(0o755)
    return str(script)


def _import(rootless: Rootless, base: Path) -> None:
    image = rootless.folder / "base.tar"
    shutil.copyfile(base, image)
    image.chmod(0o644)
    done = subprocess.run(
        [*rootless.words, "podman", "import", *_CHANGES, str(image), IMAGE],
        **_options(rootless), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    image.unlink()


def _options(rootless: Rootless) -> dict[str, Any]:
    return {"env": {**os.environ, **rootless.environment}, "cwd": rootless.folder}


def _end_all_of(uid: int) -> None:
    """Nobody else is this user: the service, and what keeps its namespace."""

    def left() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["uids", "status"]) if _is_of(p, uid)]

    for process in left():
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    wait_until(lambda: not left(), START_SECONDS, "the end of the user's processes")


def _is_of(process: psutil.Process, uid: int) -> bool:
    uids = process.info["uids"]
    return uids is not None and uids.real == uid and process.info["status"] != psutil.STATUS_ZOMBIE
