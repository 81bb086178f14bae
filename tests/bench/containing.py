"""What a container costs a run: its start, against `docker run` by hand, and each snapshot.

With `DOCKER_HOST` in the environment: `PYTHONPATH=tests python -m servers.engine up` brings up an
engine with a base image and prints what reaches it. torch is mounted, so that the image is the same
on both sides and has nothing to pull.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sysconfig
import time
from typing import Any

from tests.bench.figures import Check, Figure, Peer
from tests.bench.place import REPOSITORY, Neighbours, Place, neighbours
from tests.bench.supervised import RUNNER, Settings, SupervisedRun

IMAGE = os.environ.get("RUNNER_TEST_IMAGE", "localbase:py311")
START_RATIO, STALL_RATIO = 1.2, 1.05
_MEGABYTES, _STEPS, _SLOTS = 500.0, 14, 2
_SAYS = {
    "a line": "import time; print(time.monotonic())",
    "a line after `import torch`": "import torch, time; print(time.monotonic())",
}
_FLAGSHIP = {"profile": "quick", "data": "synthetic", "epochs": 1}
_END_SECONDS = 120.0
_PACKAGES, _OURS = "/packages", "/ours"


def in_container(document: dict[str, Any], place: Place) -> dict[str, Any]:
    """The same job in a container; as root, so that it may write the trainer's diary."""
    return {
        **document,
        "launcher": "docker",
        "image": IMAGE,
        "user": "0:0",
        "env": {"PYTHONPATH": f"{_OURS}:{_PACKAGES}"},
        "mounts": [
            {"source": sysconfig.get_path("purelib"), "target": _PACKAGES},
            {"source": str(REPOSITORY / "runner"), "target": f"{_OURS}/runner"},
            {"source": str(place.memory), "target": str(place.memory), "writable": True},
        ],
    }


def measure(place: Place, repetitions: int) -> tuple[list[Figure], list[Check]]:
    starts = [*measure_start(place, repetitions), measure_flagship(place, repetitions)]
    return [*starts, *measure_stall(place, repetitions)], []


def measure_start(place: Place, repetitions: int) -> list[Figure]:
    """From the command to the first line, in turns with the same by hand."""
    figures = []
    for what, program in _SAYS.items():
        ours, by_hand = [], []
        others = Neighbours()
        for number in range(repetitions + 1):
            place.settle()
            with neighbours(others):
                first = _start(place, f"start-{len(what)}-{number}", program)
                second = _by_hand(place, program)
            if number:  # the first looks into the image, and reads all from the disk
                ours.append(first)
                by_hand.append(second)
        name = f"`runner run` in a container to {what}"
        peer = Peer("`docker run` of the same", by_hand)
        figures.append(Figure(name, "s", ours, peer, neighbours=others.cores))
    return figures


def measure_flagship(place: Place, repetitions: int) -> Figure:
    """From the command to the first line that a trainer prints: the C-MAPSS job's first epoch."""
    ours, by_hand = [], []
    others = Neighbours()
    for number in range(repetitions + 1):
        place.settle()
        with neighbours(others):
            first = _first_line(_flagship(place, f"flagship-{number}"), place)
            second = _first_line(_flagship_by_hand(), place)
        if number:
            ours.append(first)
            by_hand.append(second)
    name = "`runner run` in a container to the first line of the C-MAPSS job"
    peer = Peer("`docker run` of the same, unsupervised", by_hand)
    return Figure(name, "s", ours, peer, neighbours=others.cores)


def _flagship(place: Place, run_id: str) -> list[str]:
    job = place.disk / "flagship.json"
    document = {
        "name": "flagship",
        "command": ["python", "-m", "jobs.rul.train"],
        "params": _FLAGSHIP,
        "checkpoint": {"keep": {"best": {"metric": "val_rmse", "mode": "min"}}},
        "workdir": str(REPOSITORY),
        "store": str(place.store),
    }
    job.write_text(json.dumps(in_container(document, place)))
    return [RUNNER, "run", str(job), "--run-id", run_id]


def _flagship_by_hand() -> list[str]:
    variables = {
        "PYTHONPATH": f"{_PACKAGES}:/workdir",
        "RUNNER_PARAMS": json.dumps(_FLAGSHIP),
        "RUNNER_STORE": "/tmp/store",
        "PYTHONUNBUFFERED": "1",
        "HOME": "/tmp",
    }
    return [
        *("docker", "run", "--rm", "--init", "--read-only", "--network=none", "--cap-drop=ALL"),
        *("--security-opt=no-new-privileges", "--tmpfs=/tmp:exec", "--shm-size=2g", "-w=/workdir"),
        *(f"-v={REPOSITORY}:/workdir:ro", f"-v={sysconfig.get_path('purelib')}:{_PACKAGES}:ro"),
        *(f"-e={name}={value}" for name, value in variables.items()),
        *(IMAGE, "python3", "-m", "jobs.rul.train"),
    ]


def _first_line(words: list[str], place: Place) -> float:
    """Seconds until a command prints something to stdout; then it is left to its end."""
    started = time.monotonic()
    process = subprocess.Popen(
        words, env=place.environment, cwd=place.disk, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    seconds = time.monotonic() - started
    _, messages = process.communicate(timeout=_END_SECONDS)
    assert process.returncode == 0, messages.decode()
    assert line.startswith(b"epoch"), line
    return seconds


def _start(place: Place, run_id: str, program: str) -> float:
    job = place.disk / "start.json"
    document = {
        "name": "start",
        "command": ["python", "-c", program],
        "workdir": str(place.disk),
        "store": str(place.store),
    }
    job.write_text(json.dumps(in_container(document, place)))
    started = time.monotonic()
    done = subprocess.run(
        [RUNNER, "run", str(job), "--run-id", run_id],
        env=place.environment, cwd=place.disk, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout) - started


def _by_hand(place: Place, program: str) -> float:
    words = [
        *("docker", "run", "--rm", "--init", "--read-only", "--network=none", "--cap-drop=ALL"),
        *("--security-opt=no-new-privileges", "--tmpfs=/tmp:exec", f"-v={place.disk}:/workdir:ro"),
        *(f"-v={sysconfig.get_path('purelib')}:{_PACKAGES}:ro", f"-e=PYTHONPATH={_PACKAGES}"),
        *(IMAGE, "python3", "-c", program),
    ]
    started = time.monotonic()
    done = subprocess.run(words, env=place.environment, capture_output=True, text=True, check=True)
    return float(done.stdout) - started


def measure_stall(place: Place, repetitions: int) -> list[Figure]:
    """A snapshot at every step, once in a container and once in a process, in turns."""
    inside, outside = [], []
    others = Neighbours()
    for number in range(repetitions):
        for contained, values in ((True, inside), (False, outside)):
            settings = Settings(_MEGABYTES, _STEPS, _STEPS, 1, contained=contained)
            run = SupervisedRun(place, f"held-{number}-{contained}", settings)
            place.settle()
            try:
                with neighbours(others):
                    run.start()
                    run.wait()
            finally:
                run.close()
            pairs = zip(run.steps(), run.steps()[1:], strict=False)
            stalls = [after["begun"] - before["ended"] for before, after in pairs]
            values.append(statistics.median(stalls[_SLOTS:]))
            place.clear()
    peer = Peer("in a process", outside)
    name = "stall per snapshot in a container, in the loop"
    return [Figure(name, "s", inside, peer, _MEGABYTES, neighbours=others.cores)]
