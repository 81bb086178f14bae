"""A Docker engine for tests, and a base image with Python 3.11, without any image registry.

    python -m servers.engine up      prints the environment that reaches it
    python -m servers.engine down    stops it and its containers; --purge forgets its images, too

It needs root on Debian 12, whose packages `docker.io` and `mmdebstrap` it installs. All else lies
in one folder of the cache (`XDG_CACHE_HOME`); of the machine it touches the bridge docker0, and no
rule of the firewall: containers reach the network with `network: host` alone. What is up already is
left as it is, so calling it twice costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from waiting import wait_until

from servers.ceph import cache_folder

IMAGE = os.environ.get("RUNNER_TEST_IMAGE", "localbase:py311")
START_SECONDS = 60.0
_CLIENT = "/usr/bin/docker"  # of Debian: its builder needs no plugin
PATH_CHANGE = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Docker:
    """An engine that answers at `host`, and its command."""

    host: str

    def run(self, *arguments: str, check: bool = True, env: dict[str, str] | None = None) -> str:
        """A command of Docker's client; what it printed."""
        done = subprocess.run(
            [client(), *arguments], capture_output=True, text=True, check=False,
            env={**os.environ, "DOCKER_HOST": self.host, **(env or {})}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"docker {' '.join(arguments[:2])}: {done.stderr[-2000:]}")
        return done.stdout

    def answers(self) -> bool:
        return bool(self.run("version", "-f", "{{.Server.Version}}", check=False).strip())

    def has(self, image: str) -> bool:
        return bool(self.run("image", "inspect", "-f", "{{.Id}}", image, check=False).strip())

    def containers(self, *filters: str) -> list[str]:
        """Ids of all containers, those too that have ended."""
        chosen = [word for each in filters for word in ("--filter", each)]
        return self.run("ps", "-aq", "--no-trunc", *chosen).split()


def client() -> str:
    return _CLIENT if Path(_CLIENT).exists() else "docker"


def given() -> Docker | None:
    """The engine that the environment names, if it answers and has the base image."""
    host = os.environ.get("DOCKER_HOST")
    if not host or not shutil.which(client()):
        return None
    docker = Docker(host)
    return docker if docker.answers() and docker.has(IMAGE) else None


class LocalEngine:
    """An engine in one folder of the cache. `name` tells several apart; they share a base image."""

    def __init__(self, cache: Path, name: str = "engine") -> None:
        self.folder, self.base = cache / name, cache / "base-py311.tar"
        self.docker = Docker(f"unix://{self.folder}/docker.sock")

    def up(self) -> Docker:
        """Bring up whatever is not: seconds, or a minute or two the first time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._install()
            self.start()
            if not self.docker.has(IMAGE):
                self._make_base()
                self.docker.run("import", "-c", PATH_CHANGE, "-c", "ENV PYTHONUNBUFFERED=1",
                                "-c", 'CMD ["python3"]', str(self.base), IMAGE)  # fmt: skip
        return self.docker

    def start(self) -> None:
        """Start the engine, unless it runs."""
        if self.docker.answers():
            return
        self._forget_dead_daemons()
        with (self.folder / "dockerd.log").open("ab") as log:
            subprocess.Popen(
                ["dockerd", "-H", self.docker.host, "--pidfile", str(self._pid_file),
                 "--data-root", str(self.folder / "data"), "--exec-root",
                 str(self.folder / "exec"), "--iptables=false", "--ip-masq=false",
                 "--ip-forward=false"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_until(self.docker.answers, START_SECONDS, f"dockerd, see {log.name}")

    def kill(self) -> None:
        """The engine dies, and what it runs does not."""
        pid = self.pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.pid() is None, START_SECONDS, "the engine to be dead")

    def down(self, purge: bool = False) -> None:
        """Remove its containers, stop it, leave no mount of it; `purge` takes its files, too."""
        pid = self.pid()
        if pid is not None:
            left = self.docker.containers()
            if left:
                self.docker.run("rm", "-f", *left)
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: self.pid() is None, START_SECONDS, "the engine to end")
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted((m for m in mounts if m.startswith(f"{self.folder}/")), reverse=True):
            subprocess.run(["umount", "-l", mount], check=False)
        shutil.rmtree(self.folder / "exec", ignore_errors=True)
        if purge:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.base.unlink(missing_ok=True)

    # ------------------------------------------------------------------ steps

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two test sessions may begin at the same moment."""
        with (self.folder.parent / "engine.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _install(self) -> None:
        if shutil.which("dockerd") and (self.base.exists() or shutil.which("mmdebstrap")):
            return
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
        subprocess.run([*apt, "update"], check=True, env=quiet)
        subprocess.run(
            [*apt, "-y", "--no-install-recommends", "install", "docker.io", "mmdebstrap",
             "iproute2"], check=True, env=quiet, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def _make_base(self) -> None:
        """A tree of Debian with Python. The host's certificates go in: never publish this image."""
        if self.base.exists():
            return
        temporary = self.base.with_suffix(".new")
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=minbase",
             "--include=python3,python3-pip,python3-venv,ca-certificates",
             *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "locale", "doc")),
             "--customize-hook=copy-in /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs",
             '--customize-hook=rm -f "$1"/usr/lib/python3.11/EXTERNALLY-MANAGED',
             '--customize-hook=ln -s ../../bin/python3 "$1"/usr/local/bin/python',
             # A mirror may be a copy of some earlier day.
             '--aptopt=Acquire::Check-Valid-Until "false"', "--format=tar", "bookworm",
             str(temporary)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        temporary.replace(self.base)

    # ------------------------------------------------------------------ daemons

    @property
    def _pid_file(self) -> Path:
        return self.folder / "dockerd.pid"

    def pid(self) -> int | None:
        """The engine's process. A number in a file proves nothing, and neither does a zombie."""
        return self._process_of(self._pid_file)

    def _process_of(self, file: Path) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            pid = int(file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            return pid if f"{self.folder}/".encode() in command else None
        return None

    def _forget_dead_daemons(self) -> None:
        """dockerd believes a file that names a process, also one that is somebody else's by now."""
        for file in (self._pid_file, self.folder / "exec" / "containerd" / "containerd.pid"):
            if self._process_of(file) is None:
                file.unlink(missing_ok=True)


if __name__ == "__main__":
    engine = LocalEngine(cache_folder())
    if sys.argv[1:2] == ["up"]:
        print(f"export DOCKER_HOST={engine.up().host}")
    elif sys.argv[1:2] == ["down"]:
        engine.down(purge="--purge" in sys.argv)
    else:
        sys.exit("usage: python -m servers.engine up | down [--purge]")
