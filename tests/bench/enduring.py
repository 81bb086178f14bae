"""Does it wear out? Hundreds of preemptions of one run, and hundreds of restarts in one supervisor.

Memory, descriptors and threads of the supervisor, and the time to the first step, of the last fifth
beside the first fifth: a leak shows as a ratio above one.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from tests.bench.figures import Check, Figure, Peer
from tests.bench.place import Neighbours, Place, neighbours
from tests.bench.starting import memory_mb
from tests.bench.supervised import Settings, SupervisedRun

PREEMPTIONS, QUICK_PREEMPTIONS = 500, 20

Samples = defaultdict[str, list[float]]
_UNITS = {"memory": "MB", "descriptors": "open", "threads": "threads", "to the first step": "s"}


def measure(place: Place, count: int) -> tuple[list[Figure], list[Check]]:
    """Both ways, each so many times."""
    others = Neighbours()
    with neighbours(others):
        preempted = _preemptions(place, count)
        restarted = _restarts(place, count)
    figures = [
        *_compared("after a preemption", preempted, count, others.cores),
        *_compared("after a restart", restarted, count, others.cores),
    ]
    wanted = "preemptions that the run came through"
    return figures, [Check(wanted, str(len(preempted["threads"])), str(count))]


def _preemptions(place: Place, count: int) -> Samples:
    samples: Samples = defaultdict(list)
    run = SupervisedRun(place, "preempted", Settings(1, snapshot_every_steps=1))
    try:
        for number in range(1, count + 1):
            started = run.start()
            steps = run.wait_for_steps(2, attempt=number)
            samples["to the first step"].append(steps[0]["ended"] - started)
            _look(run.pid, samples)
            run.end()
    finally:
        run.close()
    return samples


def _restarts(place: Place, count: int) -> Samples:
    samples: Samples = defaultdict(list)
    run = SupervisedRun(place, "restarted", Settings(1, snapshot_every_steps=1))
    try:
        run.start()
        run.wait_for_steps(2, attempt=1)
        for number in range(2, count + 2):
            killed = run.kill_trainer()
            steps = run.wait_for_steps(2, attempt=number)
            samples["to the first step"].append(steps[0]["ended"] - killed)
            _look(run.pid, samples)
        run.end()
    finally:
        run.close()
    return samples


def _look(pid: int, samples: Samples) -> None:
    samples["memory"].append(memory_mb(pid, "RssAnon"))
    samples["descriptors"].append(float(len(list(Path(f"/proc/{pid}/fd").iterdir()))))
    samples["threads"].append(float(len(list(Path(f"/proc/{pid}/task").iterdir()))))


def _compared(when: str, samples: Samples, count: int, cores: float) -> list[Figure]:
    fifth = max(1, count // 5)
    return [
        Figure(
            f"{name} {when}, the last {fifth} of {count}",
            unit,
            samples[name][-fifth:],
            Peer(f"the first {fifth}", samples[name][:fifth]),
            neighbours=cores,
        )
        for name, unit in _UNITS.items()
    ]
