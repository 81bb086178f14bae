"""Where it is measured: temporary folders, the facts of the machine, and who else is using it.

A place owns everything that a measurement leaves behind; when it ends, all of that is gone.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from runner.supervisor.index import HOME_VARIABLE, SPOOL_ROOT_VARIABLE
from runner.supervisor.reaper import become_subreaper

REPOSITORY = Path(__file__).resolve().parents[2]
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_LOOK_SECONDS = 0.5
_QUIET_CORES = 0.15


@dataclass
class Neighbours:
    """Processor time that others took while something was measured; `cores` is their average."""

    seconds: float = 0.0
    used_seconds: float = 0.0

    @property
    def cores(self) -> float:
        return self.used_seconds / self.seconds if self.seconds else 0.0


@dataclass
class Place:
    """`disk` for stores, `memory` for spools and notes. `patience_seconds`: to wait for quiet.

    What is started here compiles Python files once, whatever the surroundings say: where
    PYTHONDONTWRITEBYTECODE is set, each start would compile all of `runner` again.
    """

    base: Path
    patience_seconds: float = 0.0
    disk: Path = field(init=False)
    memory: Path = field(init=False)
    _bytecode: Path = field(init=False)

    def __enter__(self) -> Self:
        become_subreaper()  # a supervisor that is killed leaves its trainer to us
        self.disk = Path(tempfile.mkdtemp(prefix="runner-bench-", dir=self.base))
        shared = Path("/dev/shm")
        self.memory = Path(tempfile.mkdtemp(prefix="runner-bench-", dir=shared))
        self._bytecode = Path(tempfile.mkdtemp(prefix="runner-bench-"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for child in psutil.Process().children(recursive=True):
            child.kill()
        reap()
        self.clear()
        for folder in (self.disk, self.memory, self._bytecode):
            shutil.rmtree(folder, ignore_errors=True)

    def clear(self) -> None:
        """Remove what the runs so far have left."""
        for path in (*self.disk.iterdir(), *self.memory.iterdir()):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()

    @property
    def environment(self) -> dict[str, str]:
        """What is started here inherits this."""
        spool = self.memory / "spool"
        spool.mkdir(exist_ok=True, mode=0o700)
        forbids = "PYTHONDONTWRITEBYTECODE"
        inherited = {name: value for name, value in os.environ.items() if name != forbids}
        return inherited | {
            HOME_VARIABLE: str(self.disk / "home"),
            SPOOL_ROOT_VARIABLE: str(spool),
            "PYTHONPYCACHEPREFIX": str(self._bytecode),
        }

    @property
    def store(self) -> Path:
        return self.disk / "store"

    def python(self, *arguments: str) -> tuple[float, str]:
        """Run Python to its end; the moment when it was started, and what it printed."""
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return started, done.stdout.strip()

    def seconds_to_print(self, *arguments: str) -> float:
        """From the start of Python to the moment (CLOCK_MONOTONIC) that it prints last."""
        started, printed = self.python(*arguments)
        return float(printed.split()[-1]) - started

    def settle(self) -> None:
        """Let what was written reach the disk, and others come to rest: nothing of ours runs."""
        os.sync()
        deadline = time.monotonic() + self.patience_seconds
        while time.monotonic() < deadline:
            with neighbours() as others:
                time.sleep(_LOOK_SECONDS)
            if others.cores < _QUIET_CORES:
                return

    def facts(self) -> dict[str, Any]:
        """What it was measured on."""
        import torch

        return {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "system": platform.platform(terse=True),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "runner": version("runner"),
            "store_file_system": file_system(self.disk),
            "spool_file_system": file_system(self.memory),
        }


@contextmanager
def neighbours(total: Neighbours | None = None) -> Iterator[Neighbours]:
    """How many cores others use meanwhile, added to `total`.

    Children of ours count as ours when they have been reaped: none may outlive this.
    """
    others = total or Neighbours()
    begun, busy, own = time.monotonic(), _busy_seconds(), _own_seconds()
    yield others
    others.seconds += time.monotonic() - begun
    others.used_seconds += max(0.0, (_busy_seconds() - busy) - (_own_seconds() - own))


def reap() -> None:
    """Wait for every child that is left, those too that were adopted."""
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def file_system(path: Path) -> str:
    """The type of the file system that a path is on."""
    mounts = psutil.disk_partitions(all=True)
    holding = [m for m in mounts if path.resolve().is_relative_to(m.mountpoint)]
    return max(holding, key=lambda mount: len(mount.mountpoint)).fstype


def _busy_seconds() -> float:
    """Processor time of everybody since the boot, see proc_stat(5)."""
    with Path("/proc/stat").open() as lines:
        user, nice, system, _, _, irq, softirq, *_ = map(int, next(lines).split()[1:])
    return (user + nice + system + irq + softirq) / _TICKS_PER_SECOND


def _own_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _cpu_model() -> str:
    with Path("/proc/cpuinfo").open() as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
