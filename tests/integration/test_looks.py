"""Signals while a job is looked at, before its run begins: what was made for that goes again."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import Node, Started
from servers.engine import Docker
from servers.engineproxy import EngineProxy
from waiting import wait_until

SLOW = "import time\nprint('importing', flush=True)\ntime.sleep(3600)\n"


@pytest.fixture
def proxy(engine: Docker, tmp_path: Path) -> Iterator[EngineProxy]:
    with EngineProxy(engine, tmp_path / "engine.sock") as proxy:
        yield proxy


def made_by(supervisor: Started, docker: Docker, *filters: str) -> list[str]:
    """The containers that this supervisor has made for a look."""
    form = '{{.ID}} {{.Label "runner.maker"}}'
    chosen = [word for each in filters for word in ("--filter", each)]
    printed = docker.run("ps", "-a", "--no-trunc", "--format", form, *chosen)
    rows = [line.split() for line in printed.splitlines()]
    return [row[0] for row in rows if f"/{supervisor.pid}-" in row[-1]]


def is_looking(supervisor: Started, docker: Docker) -> bool:
    """Whether what it looks with has come to the module that takes so long."""
    made = made_by(supervisor, docker, "status=running")
    return bool(made) and "importing" in docker.run("logs", made[0], check=False)


def looking(node: Node, kind: str) -> Started:
    """A supervisor that looks into the image, or imports the entry point: for ever."""
    if kind == "trial":
        (node.folder / "slow.py").write_text(SLOW)
        validated = {"checkpoint": {"validate": {"entrypoint": "slow:check"}}}
        return node.start("run", node.job("python", "-c", "pass", **validated))
    (node.folder / "json.py").write_text(SLOW)  # which the program of the look imports
    return node.start("run", node.job("python", "-c", "pass"))


@pytest.mark.parametrize("kind", ["probe", "trial"])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_during_a_look_leaves_nothing(
    node: Node, engine: Docker, tmp_path: Path, kind: str, signum: int, code: int
) -> None:
    node.use(engine)
    node.environment["TMPDIR"] = str(tmp_path / "tmp")
    (tmp_path / "tmp").mkdir()
    supervisor = looking(node, kind)
    wait_until(lambda: is_looking(supervisor, engine), what=f"the {kind}")

    supervisor.send_signal(signum)

    assert supervisor.wait() == code, supervisor.err
    assert made_by(supervisor, engine) == []
    assert list((tmp_path / "tmp").iterdir()) == []
    assert "Traceback" not in supervisor.err


def test_a_second_signal_does_not_wait_for_the_engine(
    node: Node, engine: Docker, proxy: EngineProxy
) -> None:
    """And what it leaves is removed by whatever is looked at next; not what others are using."""
    node.use(proxy.docker)
    killed = looking(node, "probe")
    wait_until(lambda: is_looking(killed, engine), what="the look")
    proxy.hold("DELETE .*")
    killed.send_signal(signal.SIGINT)
    wait_until(lambda: any(line.startswith("DELETE") for line in proxy.asked), what="the removal")
    assert killed.process.poll() is None

    killed.send_signal(signal.SIGTERM)

    assert killed.wait() == 75
    assert len(made_by(killed, engine)) == 1
    node.use(engine)
    other = looking(node, "probe")
    wait_until(lambda: is_looking(other, engine), what="another's look")
    (node.folder / "json.py").unlink()
    assert node.run("run", node.job("python", "-c", "pass", name="next")).code == 0
    assert made_by(killed, engine) == []
    assert len(made_by(other, engine)) == 1
    other.send_signal(signal.SIGTERM)
    assert other.wait() == 75


CATCHES_EVERYTHING = """
import time
from runner.cli import app
app._TIDYING_SECONDS = 0.1
app._end_early_on_signals()
print("ready", flush=True)
while True:
    try:
        time.sleep(3600)
    except BaseException:
        pass
"""


def test_a_signal_that_got_lost_is_obeyed_after_a_while() -> None:
    words = [sys.executable, "-c", CATCHES_EVERYTHING]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"

        child.send_signal(signal.SIGTERM)

        try:
            assert child.wait(60) == 75
        finally:
            child.kill()
