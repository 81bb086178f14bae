"""What a save costs the loop, and how long it takes, beside all the ways that users have today."""

from __future__ import annotations

import json
import statistics
import subprocess
from typing import Any

from tests.bench.figures import Check, Figure, Peer
from tests.bench.place import REPOSITORY, Place, neighbours
from tests.bench.supervised import RUNNER

_BATCHES = (8, 128, 512)  # steps of about 0.1, 0.4 and 1.2 s on two cores
_EVERY_STEP_STEPS = 20


def measure(place: Place, megabytes: float, repetitions: int) -> tuple[list[Figure], list[Check]]:
    """Stall, time until durable, slow-down, memory and restore, against each peer."""
    with neighbours() as others:
        place.settle()
        document = _run(place, megabytes, {"rounds": repetitions})
    by_mode: dict[str, list[dict[str, float]]] = {}
    for entry in document["rounds"]:
        by_mode.setdefault(entry["mode"], []).append(entry)
    ours, load = by_mode.pop("ours"), others.cores

    def column(rows: list[dict[str, float]], name: str, scale: float = 1.0) -> list[float]:
        return [row[name] * scale for row in rows]

    figures = []
    for mode, rows in by_mode.items():
        if mode != "write":
            peer = Peer(mode, column(rows, "stall"))
            stalls = column(ours, "stall")
            figures.append(Figure("stall per save", "s", stalls, peer, megabytes, neighbours=load))
    for mode, rows in by_mode.items():
        if mode != "copy":
            peer = Peer(mode, column(rows, "durable"))
            durable = column(ours, "durable")
            figures.append(Figure("until durable", "s", durable, peer, megabytes, neighbours=load))
    for mode in ("dcp.async_save", "torch.save"):
        for name, unit, scale in (("slow_down", "%", 100.0), ("memory", "MB", 1e-6)):
            peer = Peer(mode, column(by_mode[mode], name, scale))
            label = {"slow_down": "steps beside the save", "memory": "peak extra memory"}[name]
            values = column(ours, name, scale)
            figures.append(Figure(label, unit, values, peer, megabytes, neighbours=load))
    restores = document["restore"]
    peer = Peer("torch.load(mmap) + load_state_dict", [r["torch.load"] for r in restores])
    values = [r["ours"] for r in restores]
    figures.append(Figure("restore from a slot", "s", values, peer, megabytes, neighbours=load))
    return figures, []


def measure_every_step(
    place: Place, megabytes: float, repetitions: int
) -> tuple[list[Figure], list[Check]]:
    """The whole loop with a snapshot at every step, against the loop without any."""
    figures = []
    for batch in _BATCHES:
        with_snapshots, without = [], []
        with neighbours() as others:
            for _ in range(max(2, repetitions // 2)):
                for times, every in ((with_snapshots, 1), (without, 1_000_000)):
                    place.settle()
                    params = {"every_step": _EVERY_STEP_STEPS, "batch": batch}
                    steps = _run(place, megabytes, params, snapshot_every=every)["steps"]
                    times.append(statistics.mean(steps[_EVERY_STEP_STEPS // 4 :]))
        name = f"a step of batch {batch}, with a snapshot at each"
        peer = Peer("without snapshots", without)
        figures.append(Figure(name, "s", with_snapshots, peer, megabytes, neighbours=others.cores))
    return figures, []


def _run(
    place: Place, megabytes: float, params: dict[str, Any], snapshot_every: int = 1_000_000
) -> dict[str, Any]:
    out = place.disk / "saver.json"
    job = {
        "name": "saver",
        "command": ["python", "-m", "tests.bench.saver"],
        "workdir": str(REPOSITORY),
        "params": {
            "megabytes": megabytes,
            "out": str(out),
            "folder": str(place.disk / "peers"),
            **params,
        },
        "store": str(place.store),
        "checkpoint": {
            "every": {"minutes": 600},
            "snapshot_every": {"steps": snapshot_every},
            "keep": {"last": 1},
        },
        "restart": {"failures": 0},
    }
    file = place.disk / "saver-job.json"
    file.write_text(json.dumps(job))
    subprocess.run(
        [RUNNER, "run", str(file), "--new"], env=place.environment, check=True, timeout=1500
    )
    document: dict[str, Any] = json.loads(out.read_text())
    out.unlink()
    return document
