"""A node of its own for a test, and `runner` on it as a user calls it.

    job = node.job("python", "train.py", params={...})
    supervisor = node.start("run", job)              # a process of its own
    supervisor.wait_for("step 5")                    # what it prints: nothing sleeps
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait() == 75

Home, spools and store are temporary folders, so that nothing is found by or left for anybody else.
Commands that only look are called in this process, which is faster.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from buckets import Bucket
from containers import in_container
from servers.engine import Docker
from waiting import wait_until

from runner import cli
from runner.board import Board
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import AttemptRecord, Ledger
from runner.checkpoint.manifest import Manifest
from runner.launch.namespace import inhabitants, number_of
from runner.launch.process_tree import read_entry
from runner.spool import Spool, spool_path
from runner.store import DirectoryStore, Store, open_store

PROGRAMS = Path(__file__).parent / "child_programs"
RUNNER = str(Path(sys.executable).with_name("runner"))
PATIENCE_SECONDS = 120.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Called:
    """A command that has ended: its exit code, the facts it printed, and what else it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document that stdout is; nothing in it is outside of the standard."""
        return json.loads(self.out, parse_constant=_refuse)


def _refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


class Started:
    """A command in a process and a session of its own."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.process, self._out, self._err = process, out, err

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    def wait_for(self, text: str, *, where: str = "out", times: int = 1) -> None:
        """Until it has printed a line that begins with this, and so often."""

        def printed() -> bool:
            # Asked first, so that what it printed last is not missed.
            is_over = self.process.poll() is not None
            lines = getattr(self, where).splitlines()
            found = sum(line.startswith(text) for line in lines) >= times
            assert found or not is_over, f"it ended without {text!r}:\n{self.out}{self.err}"
            return found

        wait_until(printed, PATIENCE_SECONDS, f"{text!r}, {times} times")

    def send_signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    def wait(self, timeout: float = PATIENCE_SECONDS) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.out}{self.err}") from None

    def pids(self) -> list[int]:
        """The processes that the script has named."""
        words = [line.split() for line in self.out.splitlines()]
        return [int(line[-1]) for line in words if len(line) > 1 and line[-2] == "process"]


@dataclass
class Node:
    """A machine of its own. `memory` is where its spools lie; several nodes may share a store."""

    folder: Path
    memory: Path
    store_folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    keeps_spool: bool = False
    """Whether a test ends with a spool that is still of use."""
    bucket: Bucket | None = None
    """Where its store is instead of the folder; jobs have to say so, too."""
    docker: Docker | None = None
    """The engine in whose containers the trainers run; None: they are processes."""

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        # The trainer is given no RUNNER_HOME; all that it starts has the spool's path.
        self.environment |= {
            "RUNNER_HOME": str(self.folder / "home"),
            "RUNNER_SPOOL_ROOT": str(self.memory),
        }

    # ------------------------------------------------------------------ jobs

    def job(self, *command: str, name: str = "job", **keys: Any) -> str:
        """Write a job file: snapshots at every step, hardly any pause between attempts."""
        document: dict[str, Any] = {
            "name": name,
            "command": list(command),
            "workdir": str(self.folder),
            "store": str(self.store_folder),
            "checkpoint": {"every": {"minutes": 600}, "snapshot_every": {"steps": 1}},
            "restart": {"backoff": {"initial": "1ms", "max": "1ms"}},
            "metrics": {"port": "off"},
        }
        document |= keys
        if self.docker is not None:
            document = in_container(document, self.folder)
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(document))
        return str(path)

    def training(self, name: str = "job", *, command: list[str] | None = None, **keys: Any) -> str:
        """A job that runs `trains.py`; its gate is shut."""
        keys["params"] = {"gate": str(self.gate), **keys.get("params", {})}
        keys["env"] = {"OMP_NUM_THREADS": "1", **keys.get("env", {})}
        return self.job(*(command or ["python", str(PROGRAMS / "trains.py")]), name=name, **keys)

    def use(self, docker: Docker) -> None:
        """Run trainers in containers of this engine."""
        self.docker = docker
        self.environment["DOCKER_HOST"] = docker.host

    @property
    def python(self) -> str:
        """What a shell that is the trainer calls the Python that has torch."""
        return sys.executable if self.docker is None else "python3"

    @property
    def gate(self) -> Path:
        return self.folder / "gate"

    # ------------------------------------------------------------------ commands

    def start(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> Started:
        """Start `runner` in a process of its own, which leads a session.

        `before` is a command that executes what it is given as its last arguments.
        """
        number = len(list(self.folder.glob("*.out")))
        out, err = (self.folder / f"{number}.{kind}" for kind in ("out", "err"))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [*before, RUNNER, *arguments],
                cwd=self.folder,
                env={**_clean_environment(), **self.environment, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        return Started(process, out, err)

    def run(self, *arguments: str, env: Mapping[str, str] | None = None) -> Called:
        """The same, and wait for its end."""
        started = self.start(*arguments, env=env)
        code = started.wait()
        assert "Traceback" not in started.err or "trains.py" in started.err, started.err
        return Called(code, started.out, started.err)

    def call(self, *arguments: str) -> Called:
        """Call a command that starts nothing, in this process. What is no error comes through."""
        out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
        code = -1
        with (
            _as_it_was(),
            contextlib.chdir(self.folder),
            mock.patch.dict(os.environ, self.environment),
            mock.patch.object(sys, "argv", ["runner", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                cli.main()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0
        texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
        assert "Traceback" not in texts[1]
        return Called(code, *texts)

    # ------------------------------------------------------------------ what there is

    @property
    def store(self) -> DirectoryStore:
        store = open_store(str(self.store_folder))
        assert isinstance(store, DirectoryStore)
        return store

    @property
    def opened(self) -> Store:
        """The store, in whatever it is."""
        return self.store if self.bucket is None else self.bucket.opened

    def archive(self, run_id: str = "job") -> Archive:
        return Archive(self.opened, run_id)

    def manifests(self, run_id: str = "job") -> list[Manifest]:
        """All checkpoints, newest first."""
        return list(self.archive(run_id).manifests())

    def newest(self, run_id: str = "job") -> Manifest:
        return self.manifests(run_id)[0]

    def digest(self, run_id: str = "job") -> str:
        """Of the newest checkpoint's content."""
        return self.archive(run_id).digest(self.newest(run_id))

    def checkpoint(self, manifest: Manifest) -> Path:
        return self.store_folder / manifest.run_id / "checkpoints" / manifest.name

    def records(self, run_id: str = "job") -> list[AttemptRecord]:
        return Ledger(self.opened, run_id, "").records()

    def spool(self, run_id: str = "job") -> Spool:
        return Spool(spool_path(run_id, self.opened.url, str(self.memory)))

    def board(self, run_id: str = "job") -> Board:
        return Board(self.spool(run_id).rank.folder / "board")

    def wait_until_asked(self, run_id: str = "job") -> None:
        """Until the supervisor has asked the trainer for something."""
        wait_until(lambda: self.board(run_id).request_number > 0, what="the request on the board")

    def processes(self, memory: Path | None = None) -> list[int]:
        """All that were started on this node and live, or those with a spool in that folder."""
        needle = str(memory or self.memory).encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            pid = int(path.parent.name)
            with contextlib.suppress(OSError):
                entry = read_entry(pid)
                if needle in path.read_bytes() and entry is not None and entry.alive:
                    found.append(pid)
        return [pid for pid in found if pid != os.getpid()]

    def pid_here(self, pid: int) -> int:
        """What this machine calls a process of the trainer, by the number that it has printed."""
        if self.docker is None:
            return pid
        (container,) = self.containers("status=running")
        first = int(self.docker.run("inspect", "-f", "{{.State.Pid}}", container))
        found = number_of(pid, inhabitants(first))
        assert found is not None
        return found

    def containers(self, *filters: str) -> list[str]:
        """All that were made for runs of this node and are still there."""
        if self.docker is None:
            return []
        spools = [f"label=runner.spool={path}" for path in self.memory.iterdir()]
        return [one for spool in spools for one in self.docker.containers(spool, *filters)]

    def trainers(self, supervisor: Started) -> list[Any]:
        """What lives of a supervisor's trainer: processes, or a container."""
        if self.docker is not None:
            return list(self.containers("status=running"))
        return [pid for pid in self.processes() if pid != supervisor.pid]

    def spools(self) -> list[str]:
        return sorted(path.name for path in self.memory.iterdir())

    def end(self) -> list[Any]:
        """Kill what is left, containers too; the ids of those."""
        left = self.processes()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.processes(), what="the end of what was left")
        containers = self.containers()
        if self.docker is not None and containers:
            self.docker.run("rm", "-f", *containers)
        return [*containers, *left]


def start(node: Node, job: str, until: str, **env: str) -> Started:
    """Start a supervisor, and wait until the script has printed a line."""
    supervisor = node.start("run", job, env=env)
    supervisor.wait_for(until)
    return supervisor


@contextlib.contextmanager
def nodes_in(folder: Path, bucket: Bucket | None = None) -> Iterator[Callable[[str], Node]]:
    """Makes nodes by name, which share a store; afterwards, nothing of them may be left."""
    nodes: list[Node] = []

    def new(name: str) -> Node:
        shared_memory = Path("/dev/shm")
        memory = tempfile.mkdtemp(dir=shared_memory if shared_memory.is_dir() else None)
        nodes.append(Node(folder / name, Path(memory), folder / "store", bucket=bucket))
        return nodes[-1]

    try:
        yield new
    finally:
        left = {node.folder.name: node.end() for node in nodes}
        spools = [spool for node in nodes if not node.keeps_spool for spool in node.spools()]
        for node in nodes:
            shutil.rmtree(node.memory)
    assert not any(left.values()), f"processes are left: {left}"
    assert not spools, f"spools are left: {spools}"


def has_noticed(trainer: int) -> bool:
    """Whether a trainer knows that its supervisor is dead: what it prints goes nowhere then."""
    return Path(f"/proc/{trainer}/fd/1").readlink() == Path(os.devnull)


def is_running(pid: int) -> bool:
    entry = read_entry(pid)
    return entry is not None and entry.alive


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RUNNER_")}


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Put back what the console script sets up for its process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    signals = {number: signal.getsignal(number) for number in _SIGNALS}
    root.handlers.clear()
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler)
