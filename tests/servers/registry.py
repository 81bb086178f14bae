"""An OCI registry for tests: Debian's `docker-registry`, on a free port of this machine.

Several may serve one folder, so that what was pushed to one that asks for nothing can be pulled
from one that wants a password. Engines speak plain http to 127.0.0.1, so none needs a certificate.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from waiting import wait_until

PROGRAM = "docker-registry"
USER, PASSWORD = "trainer", "open-sesame-d41c"
# Of this password: perl -e 'print crypt("open-sesame-d41c", q($2b$05$) . "abcdefghijklmnopqrstuu")'
_HASH = "$2b$05$abcdefghijklmnopqrstuuM/6y7yv5lFuWceE3mazzx5Zn8YbjrTq"
_START_SECONDS = 20.0
_LISTENING = re.compile(r"listening on (127\.0\.0\.1:\d+)")


def missing() -> str | None:
    """Why there can be none here, if so."""
    if shutil.which(PROGRAM) is None:
        return "no registry: install the Debian package `docker-registry`"
    return None


@contextmanager
def serving(folder: Path, *, locked: bool = False) -> Iterator[str]:
    """A registry of what lies in `folder`: its `host:port`. `locked`: for USER with PASSWORD."""
    folder.mkdir(exist_ok=True)
    name = "locked" if locked else "open"
    users, log = folder / "htpasswd", folder / f"{name}.log"
    users.write_text(f"{USER}:{_HASH}\n")
    auth = {"htpasswd": {"realm": "tests", "path": str(users)}}
    configuration = {
        "version": 0.1,
        "log": {"accesslog": {"disabled": True}, "level": "info"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": "127.0.0.1:0"},
        **({"auth": auth} if locked else {}),
    }
    file = folder / f"{name}.json"  # which is YAML
    file.write_text(json.dumps(configuration))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [PROGRAM, "serve", str(file)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip

    def address() -> str | None:
        assert process.poll() is None, log.read_text()
        found = _LISTENING.search(log.read_text())
        return found and found.group(1)

    try:
        yield str(wait_until(address, _START_SECONDS, "the registry to listen"))
    finally:
        process.terminate()
        process.wait(_START_SECONDS)
