"""How long `runner run` takes to the trainer's first act, and how much memory it holds then."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import yaml

from tests.bench.figures import Figure, Peer
from tests.bench.place import Neighbours, Place, neighbours
from tests.bench.supervised import RUNNER, Settings, SupervisedRun

START_LIMIT_SECONDS = 0.5
MEMORY_LIMIT_MB = 80.0

_SAY_WHEN = "import time; print(time.monotonic())"
_WATCH_SECONDS = 2.0
_LOOK_SECONDS = 0.02


def measure(place: Place, repetitions: int) -> list[Figure]:
    """The start is measured with a trainer that only says when it began."""
    starts, bare, imports = [], [], []
    others = Neighbours()
    for number in range(repetitions):
        place.settle()
        with neighbours(others):
            starts.append(_start(place, number))
            bare.append(place.seconds_to_print("-c", _SAY_WHEN))
            imports.append(place.seconds_to_print("-c", f"import pydantic, typer; {_SAY_WHEN}"))
    name = "`runner run` to the trainer's first act"
    return [
        Figure(
            name,
            "s",
            starts,
            Peer(f"python -c {peer}", values),
            limit=START_LIMIT_SECONDS,
            neighbours=others.cores,
        )
        for peer, values in (("pass", bare), ('"import pydantic, typer"', imports))
    ]


def _start(place: Place, number: int) -> float:
    """Each time a new run in an empty store."""
    job = place.disk / "start.yaml"
    document = {"name": "start", "command": ["python", "-I", "-S", "-c", _SAY_WHEN]}
    job.write_text(yaml.safe_dump({**document, "store": str(place.store)}))
    started = time.monotonic()
    done = subprocess.run(
        [RUNNER, "run", str(job), "--run-id", f"start-{number}"],
        env=place.environment,
        cwd=place.disk,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout) - started


def measure_memory(place: Place, repetitions: int) -> list[Figure]:
    """Of a supervisor whose trainer takes a snapshot at every step, saving every hundredth."""
    resident, peak = [], []
    with neighbours() as others:
        for number in range(repetitions):
            run = SupervisedRun(
                place, f"memory-{number}", Settings(1, save_every_steps=100, snapshot_every_steps=1)
            )
            try:
                run.start()
                run.wait_for_steps(1, attempt=1)
                until = time.monotonic() + _WATCH_SECONDS
                seen = []
                while time.monotonic() < until:
                    seen.append(memory_mb(run.pid, "VmRSS"))
                    time.sleep(_LOOK_SECONDS)
                resident.append(sorted(seen)[len(seen) // 2])
                peak.append(memory_mb(run.pid, "VmHWM"))
                run.finish()
            finally:
                run.close()
    name = "supervisor's resident memory, trainer running"
    return [
        Figure(name, "MB", resident, None, 1, MEMORY_LIMIT_MB, others.cores),
        Figure(f"{name}, peak", "MB", peak, None, 1, MEMORY_LIMIT_MB, others.cores),
    ]


def memory_mb(pid: int, field: str) -> float:
    """A field of /proc/PID/status in 10^6 bytes, see proc_pid_status(5).

    psutil has all of them but the peak, which only the kernel sees.
    """
    with Path(f"/proc/{pid}/status").open() as lines:
        line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e6
