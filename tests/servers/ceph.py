"""A Ceph RADOS gateway for tests: one monitor, one OSD in a sparse file, http and https.

    python -m servers.ceph up      prints the environment that reaches it
    python -m servers.ceph down    stops the daemons; --purge forgets their data, too

It needs root and Debian's `mmdebstrap`, and touches nothing of the machine: the software lies in a
chroot of Debian testing, everything else in one folder of the cache (`XDG_CACHE_HOME`). What is up
already is left as it is, so calling it twice costs a fraction of a second.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from waiting import wait_until

SUITE = "forky"  # Ceph 20: it verifies SHA-256 checksums, and conditional writes are atomic
PORT, TLS_PORT, STS_PORT, MONITOR_PORT = 7580, 7543, 7581, 13400
DISK_BYTES = 20 << 30
START_SECONDS = 60.0
ROLE_TRUSTED = "runner-tests"
ROLE_CLOSED = "runner-tests-closed"
STS_KEY = "0123456789abcdef"  # of a server that only this machine reaches

CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{monitor_port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
auth allow insecure global id reclaim = false
mon allow pool size one = true
# A cluster of one waits for nobody.
paxos propose interval = 0.1
paxos min wait = 0.01
mon data avail warn = 2
mon data avail crit = 1
mon max pg per osd = 1000
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = bluestore
osd mclock skip benchmark = true
osd memory target = 1073741824
bluestore block size = {disk_bytes}
mon data = {folder}/mon
osd data = {folder}/osd
run dir = {folder}/run
pid file = {folder}/run/$name.pid
admin socket =
log file = {folder}/log/$name.log
crash dir = {folder}/log

[client]
# Without this the gateway waits five minutes for an encrypted session with the monitor.
ms mon client mode = crc
rgw init timeout = 60
rgw dns name = s3.localhost
# There is nobody whom a cache would have to tell of changes, and a killed gateway leaves no watch.
rgw cache enabled = false
rgw thread pool size = 64
rgw gc obj min wait = 30
rgw gc processor period = 30
rgw mp lock max time = 10

[client.rgw]
# Without tcp_nodelay each small answer takes 40 ms.
rgw frontends = beast endpoint=127.0.0.1:{port} ssl_endpoint=127.0.0.1:{tls_port} \
ssl_certificate={folder}/tls.pem tcp_nodelay=1

[client.sts]
# A second gateway, for roles: with STS, Ceph tells wrong credentials from missing permissions no
# more, and answers AccessDenied to both.
rgw frontends = beast endpoint=127.0.0.1:{sts_port} tcp_nodelay=1
rgw s3 auth use sts = true
rgw sts key = {sts_key}
"""


@dataclass(frozen=True)
class Gateway:
    """How a running gateway is reached.

    Only where it is our own: `admin` runs `radosgw-admin`, `sts_endpoint` knows roles.
    """

    endpoint: str
    tls_endpoint: str
    ca_bundle: str
    access_key: str
    secret_key: str
    admin: Callable[..., str] | None = None
    sts_endpoint: str | None = None

    def environment(self) -> dict[str, str]:
        return {
            "S3_ENDPOINT": self.endpoint,
            "S3_TLS_ENDPOINT": self.tls_endpoint,
            "AWS_CA_BUNDLE": self.ca_bundle,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def given() -> Gateway | None:
    """The gateway that the environment names, if it does."""
    names = ("S3_ENDPOINT", "S3_TLS_ENDPOINT", "AWS_CA_BUNDLE", "AWS_ACCESS_KEY_ID",
             "AWS_SECRET_ACCESS_KEY")  # fmt: skip
    if "S3_ENDPOINT" not in os.environ:
        return None
    return Gateway(*(os.environ[name] for name in names))


class Ceph:
    """The cluster in one folder of the cache."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / "ceph"
        self.root = cache / SUITE

    def up(self) -> Gateway:
        """Bring up whatever is not: seconds, or half a minute the first time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._install()
            self._configure()
            self._monitor()
            self._disk()
            self._daemon("client.rgw", "radosgw", "-n", "client.rgw")
            self._daemon("client.sts", "radosgw", "-n", "client.sts")
            for port in (PORT, STS_PORT):
                _wait(lambda p=port: _answers(p), "the gateways to answer")
            return self._users()

    def down(self, purge: bool = False) -> None:
        daemons = {"client.sts": "radosgw", "client.rgw": "radosgw", "osd.0": "ceph-osd",
                   "mon.a": "ceph-mon"}  # fmt: skip
        for name, program in daemons.items():
            pid = self._pid(name, program)
            if pid is not None:
                os.kill(pid, signal.SIGTERM)
                _wait(lambda n=name, p=program: self._pid(n, p) is None, f"{name} to end")
        if purge:
            shutil.rmtree(self.folder)

    def run(self, *command: str, check: bool = True) -> str:
        """Run something in the chroot, in a mount namespace of its own: no mount outlives it."""
        inside = self.root / str(self.folder).lstrip("/")
        inside.mkdir(parents=True, exist_ok=True)
        script = (
            'root=$1 folder=$2; shift 2; mount --rbind /dev "$root/dev"; '
            'mount -t proc proc "$root/proc"; mount --bind "$folder" "$root$folder"; '
            'exec chroot "$root" env CEPH_CONF="$folder/ceph.conf" "$@"'
        )
        arguments = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh"]
        done = subprocess.run(
            [*arguments, str(self.root), str(self.folder), *command],
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command[:3])} … ended with {done.returncode}: "
                               f"{done.stderr[-2000:]}")  # fmt: skip
        return done.stdout

    # ------------------------------------------------------------------ steps

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two test sessions may begin at the same moment."""
        with (self.folder.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _install(self) -> None:
        ready = self.root / ".ready"
        if ready.exists():
            return
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        if shutil.which("mmdebstrap") is None:
            subprocess.run(["apt-get", "-qq", "update"], check=True, env=quiet)
            subprocess.run(
                ["apt-get", "-qq", "-y", "--no-install-recommends",
                 "-o", "DPkg::Lock::Timeout=300", "install", "mmdebstrap"],
                check=True, env=quiet, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=apt", "--mode=root",
             "--include=ceph-mon,ceph-osd,radosgw",
             '--aptopt=APT::Install-Recommends "false"',
             # A mirror may be a copy of some earlier day.
             '--aptopt=Acquire::Check-Valid-Until "false"', SUITE, str(self.root)],
            check=True, env=quiet, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        ready.touch()

    def _configure(self) -> None:
        for name in ("run", "log", "mon", "osd"):
            (self.folder / name).mkdir(exist_ok=True)
        if not (self.folder / "tls.pem").exists():
            names = "DNS:localhost,DNS:s3.localhost,DNS:*.s3.localhost,IP:127.0.0.1"
            key, certificate = self.folder / "key.pem", self.folder / "cert.pem"
            subprocess.run(
                ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3650",
                 "-subj", "/CN=localhost", "-addext", f"subjectAltName={names}",
                 "-keyout", str(key), "-out", str(certificate)],
                check=True, capture_output=True,
            )  # fmt: skip
            (self.folder / "tls.pem").write_text(key.read_text() + certificate.read_text())
        configuration = self.folder / "ceph.conf"
        if not configuration.exists():
            configuration.write_text(
                CONFIGURATION.format(
                    fsid=uuid.uuid4(),
                    folder=self.folder,
                    monitor_port=MONITOR_PORT,
                    port=PORT,
                    tls_port=TLS_PORT,
                    sts_port=STS_PORT,
                    disk_bytes=DISK_BYTES,
                    sts_key=STS_KEY,
                )
            )

    def _monitor(self) -> None:
        ready = self.folder / "mon-ready"
        if not ready.exists():
            [fsid] = [
                line.split(" = ")[1]
                for line in (self.folder / "ceph.conf").read_text().splitlines()
                if line.startswith("fsid")
            ]
            shape = str(self.folder / "monmap")
            self.run("monmaptool", "--create", "--clobber", "--fsid", fsid,
                     "--addv", "a", f"[v2:127.0.0.1:{MONITOR_PORT}]", shape)  # fmt: skip
            self.run("ceph-mon", "-i", "a", "--mkfs", "--monmap", shape)
            ready.touch()
        self._daemon("mon.a", "ceph-mon", "-i", "a")

    def _disk(self) -> None:
        ready = self.folder / "osd-ready"
        if not ready.exists():
            identity = self.folder / "osd-uuid"
            if not identity.exists():
                identity.write_text(str(uuid.uuid4()))
            self.run("ceph", "--connect-timeout", "30", "osd", "new", identity.read_text())
            shutil.rmtree(self.folder / "osd")
            (self.folder / "osd").mkdir()
            self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", identity.read_text())
            ready.touch()
        if self._daemon("osd.0", "ceph-osd", "-i", "0"):
            status = ("ceph", "--connect-timeout", "5", "osd", "stat", "-f", "json")
            _wait(lambda: '"num_up_osds":1' in self.run(*status, check=False), "the OSD to be up")

    def _users(self) -> Gateway:
        """The user of the tests, and two roles: one that it may take on, one that it may not."""
        known = self.folder / "user.json"
        if not known.exists():
            key, secret = secrets.token_hex(10), secrets.token_hex(20)
            self.admin("user", "create", "--uid=runner", "--display-name=runner",
                       f"--access-key={key}", f"--secret-key={secret}")  # fmt: skip
            for role, user in ((ROLE_TRUSTED, "runner"), (ROLE_CLOSED, "somebody-else")):
                trust = _policy("Allow", "sts:AssumeRole",
                                Principal={"AWS": [f"arn:aws:iam:::user/{user}"]})  # fmt: skip
                self.admin("role", "create", f"--role-name={role}",
                           f"--assume-role-policy-doc={trust}")  # fmt: skip
                allowed = _policy("Allow", "s3:*", Resource="arn:aws:s3:::*")
                self.admin("role", "policy", "put", f"--role-name={role}",
                           "--policy-name=all", f"--policy-doc={allowed}")  # fmt: skip
            known.write_text(json.dumps({"key": key, "secret": secret}))
        user = json.loads(known.read_text())
        return Gateway(
            f"http://127.0.0.1:{PORT}",
            f"https://127.0.0.1:{TLS_PORT}",
            str(self.folder / "cert.pem"),
            user["key"],
            user["secret"],
            self.admin,
            f"http://127.0.0.1:{STS_PORT}",
        )

    def admin(self, *arguments: str) -> str:
        return self.run("radosgw-admin", *arguments)

    # ------------------------------------------------------------------ daemons

    def _daemon(self, name: str, program: str, *arguments: str) -> bool:
        """Start a daemon unless it runs; whether it was started."""
        if self._pid(name, program) is not None:
            return False
        self.run(program, *arguments)
        _wait(lambda: self._pid(name, program) is not None, f"{name} to start")
        return True

    def _pid(self, name: str, program: str) -> int | None:
        try:
            pid = int((self.folder / "run" / f"{name}.pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return (
            pid
            if program.encode() in command[0]
            and name.partition(".")[2].encode() in b" ".join(command)
            else None
        )


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "runner-tests"


def _policy(effect: str, action: str, **more: object) -> str:
    statement = {"Effect": effect, "Action": [action], **more}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
            return True
    except OSError:
        return False


def _wait(predicate: Callable[[], bool], what: str) -> None:
    wait_until(predicate, START_SECONDS, what)


if __name__ == "__main__":
    cluster = Ceph(cache_folder())
    if sys.argv[1:2] == ["up"]:
        for name, value in cluster.up().environment().items():
            print(f"export {name}={value}")
    elif sys.argv[1:2] == ["down"]:
        cluster.down(purge="--purge" in sys.argv)
    else:
        sys.exit("usage: python -m servers.ceph up | down [--purge]")
