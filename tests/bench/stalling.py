"""How long the training loop waits for a snapshot.

Seen twice: by the snapshot itself, as the manifest has it, and from the loop, as the time between
the end of one body and the begin of the next. There is one at every step here, so that there are
enough of them; by default `runner` takes as many as cost little. The peer is what a script without
`runner` does.
"""

from __future__ import annotations

import json
import statistics
from itertools import pairwise

from tests.bench.exactness import compare_with_undisturbed
from tests.bench.figures import Check, Figure, Peer
from tests.bench.place import Neighbours, Place, neighbours
from tests.bench.supervised import Settings, SupervisedRun

_STEPS = 20
_SAVE_EVERY_STEPS = 5
_SLOTS = 2


def measure(place: Place, megabytes: float, repetitions: int) -> tuple[list[Figure], list[Check]]:
    """A value for each round is the median over its saves."""
    in_loop, first, in_manifest, torch_save = [], [], [], []
    checks: list[Check] = []
    others = Neighbours()
    for number in range(repetitions):
        settings = Settings(megabytes, _STEPS, _SAVE_EVERY_STEPS, snapshot_every_steps=1)
        run = SupervisedRun(place, f"stalled-{megabytes:g}-{number}", settings)
        place.settle()
        try:
            with neighbours(others):
                run.start()
                checks += [] if number else compare_with_undisturbed(place, run)
                run.wait()
        finally:
            run.close()
        stalls = [after["begun"] - before["ended"] for before, after in pairwise(run.steps())]
        first.append(statistics.median(stalls[:_SLOTS]))
        in_loop.append(statistics.median(stalls[_SLOTS:]))
        in_manifest.append(
            statistics.median(m.moment.snapshot_seconds for m in run.archive.manifests())
        )
        place.settle()
        with neighbours(others):
            torch_save.append(_torch_save_seconds(place, megabytes))
    peer = Peer("torch.save into the same directory", torch_save)
    size, load = megabytes, others.cores
    return [
        Figure("stall per snapshot, in the loop", "s", in_loop, peer, size, neighbours=load),
        Figure("stall of the first into each slot", "s", first, peer, size, neighbours=load),
        Figure("snapshot, by the manifest", "s", in_manifest, peer, size, neighbours=load),
    ], checks


def _torch_save_seconds(place: Place, megabytes: float) -> float:
    path = place.store / "peer.pt"
    words = ["save", str(megabytes), str(_STEPS), str(_SAVE_EVERY_STEPS), str(path)]
    _, printed = place.python("-m", "tests.bench.trainer", *words)
    path.unlink()
    return statistics.median(json.loads(printed))
