"""What each kind of end costs: SIGTERM until durable, SIGKILL until the first new step.

One run is disturbed again and again. It takes a snapshot at every step, so that a kill costs a step
at most: with `auto` it costs what was trained since the last one, however fast the restart is. The
kills fall anywhere in a step, at other places from round to round. Each round starts a supervisor
(from the store, because one that ends well takes its spool with it), kills the trainer, kills the
whole tree and starts another supervisor, preempts that, and then measures the peers while nothing
else of ours runs. Steps that were done before a kill and have to be done again are not new: they
are counted.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from functools import partial

from tests.bench.exactness import compare_with_undisturbed
from tests.bench.figures import Check, Figure, Peer
from tests.bench.place import Neighbours, Place, neighbours
from tests.bench.starting import memory_mb
from tests.bench.supervised import Settings, SupervisedRun

_STEPS_BETWEEN = 4
_CHUNK_BYTES = 1 << 20

Values = defaultdict[str, list[float]]


def measure(place: Place, megabytes: float, repetitions: int) -> tuple[list[Figure], list[Check]]:
    values: Values = defaultdict(list)
    run = SupervisedRun(
        place, f"disturbed-{megabytes:g}", Settings(megabytes, snapshot_every_steps=1)
    )
    others = Neighbours()
    try:
        for number in range(repetitions):
            place.settle()
            with neighbours(others):
                _disturb(run, 3 * number, values, phase=(number + 0.5) / repetitions)
            place.settle()
            with neighbours(others):
                _measure_peers(place, run, values)
        run.start()
        checks = compare_with_undisturbed(place, run)
        wanted = f"{run.run_id}: preemptions with notice_to_durable_seconds in their record"
        checks.append(Check(wanted, str(len(values["recorded"])), str(repetitions)))
    finally:
        run.close()
    values["step"] = [note["ended"] - note["begun"] for note in run.steps()]
    figure = partial(_figure, values, megabytes, others.cores)
    write = Peer("write + fsync of as many bytes", values["written"])
    first = Peer("python: import torch, build, one step", values["first step"])
    kept = Peer("the same, its slot still on this node", values["slot kept"])
    return [
        figure("SIGTERM to durable, as the supervisor records it", "recorded", write),
        figure("SIGTERM to the rename, seen from outside", "renamed", write),
        figure("SIGTERM to exit code 75", "exited", write),
        figure("trainer killed, to the next trainer's first act", "relaunched"),
        figure("trainer killed, to the first new step", "restarted", first),
        figure("tree killed and supervisor started, to the first new step", "revived", first),
        figure("supervisor started, to the first new step, from the store", "resumed", first),
        figure("supervisor started, to the first new step, fetched and verified", "resumed", kept),
        figure("steps done again after a SIGKILL", "redone", unit="steps"),
        figure("supervisor's private memory after persisting and a restart", "private", unit="MB"),
        figure("one training step", "step"),
    ], checks


def _figure(
    values: Values, size: float, cores: float, name: str, key: str, peer: Peer | None = None,
    unit: str = "s",
) -> Figure:  # fmt: skip
    return Figure(name, unit, values[key], peer, size, neighbours=cores)


def _disturb(run: SupervisedRun, attempts: int, values: Values, phase: float) -> None:
    """One of each, after so many attempts; kills so far into a step."""
    started = run.start()
    begin = run.wait_for_steps(_STEPS_BETWEEN, attempt=attempts + 1)
    if attempts:
        values["resumed"].append(begin[0]["ended"] - started)

    _killed(run, run.kill_trainer(phase), attempts + 2, values, "restarted")
    values["private"].append(memory_mb(run.pid, "RssAnon"))

    killed = run.kill_tree(phase)
    started = run.start()
    _killed(run, killed, attempts + 3, values, "revived")
    values["slot kept"].append(values["revived"][-1] - (started - killed))

    renamed, exited = run.preempt()
    values["renamed"].append(renamed)
    values["exited"].append(exited)
    recorded = run.record(attempts + 3).notice_to_durable_seconds
    if recorded is not None:
        values["recorded"].append(recorded)


def _measure_peers(place: Place, run: SupervisedRun, values: Values) -> None:
    """The same bytes written by themselves, and the shortest way to a first step."""
    values["written"].append(_write_plainly(place, run.newest().nbytes))
    values["first step"].append(
        place.seconds_to_print("-m", "tests.bench.trainer", "first-step", str(run.megabytes))
    )


def _killed(run: SupervisedRun, killed: float, attempt: int, values: Values, key: str) -> None:
    """Wait for the attempt that follows a kill, and count what it cost."""
    before = max(note["step"] for note in run.steps() if note["attempt"] < attempt)
    new = run.wait_for_steps(_STEPS_BETWEEN, attempt=attempt, beyond=before)
    done = next(note for note in run.steps() if note["attempt"] == attempt)
    values[key].append(new[0]["ended"] - killed)
    values["redone"].append(new[0]["step"] - done["step"])
    if key == "restarted":
        values["relaunched"].append(run.notes("began")[-1]["at"] - killed)


def _write_plainly(place: Place, nbytes: int) -> float:
    """Write a file of so many bytes into the store's directory, and fsync it; seconds."""
    path = place.store / "plain"
    chunk = memoryview(os.urandom(_CHUNK_BYTES))
    begun = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for done in range(0, nbytes, _CHUNK_BYTES):
            file.write(chunk[: nbytes - done])
        os.fsync(file.fileno())
    seconds = time.monotonic() - begun
    path.unlink()
    return seconds
