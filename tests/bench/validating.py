"""What a validation costs the training loop while it is under way, and how long one takes.

One run, each third checkpoint of which is validated: the steps that had a validation beside them
are compared with those of the same run that had none, so what else the machine does falls on both.
The trainer leaves one processor free, as one does that waits for a GPU: a validation takes what is
left, and where nothing is left it waits.
"""

from __future__ import annotations

import statistics
import time

from runner.wallclock import parse_time
from tests.bench.figures import Check, Figure, Peer
from tests.bench.place import Neighbours, Place, neighbours
from tests.bench.supervised import Settings, SupervisedRun, spare_one

_SECONDS = 60.0
_SAVE_EVERY_STEPS = 200
_WARM_UP_STEPS = 20
VALIDATE = {"entrypoint": "tests.bench.validating:check", "every": 3}


def measure(place: Place, megabytes: float, repetitions: int) -> tuple[list[Figure], list[Check]]:
    """A value for each round is the mean over its steps."""
    beside, alone, seconds = [], [], []
    others = Neighbours()
    for number in range(repetitions):
        settings = Settings(
            megabytes,
            save_every_steps=_SAVE_EVERY_STEPS,
            validate=VALIDATE,
            threads=spare_one(),
        )
        run = SupervisedRun(place, f"validated-{megabytes:g}-{number}", settings)
        place.settle()
        try:
            with neighbours(others):
                run.start()
                spans = _watch(run)
                run.finish()
        finally:
            run.close()
        steps = run.steps()[_WARM_UP_STEPS:]
        took: dict[bool, list[float]] = {True: [], False: []}
        for step in steps:
            is_beside = any(step["begun"] < end and step["ended"] > begin for begin, end in spans)
            took[is_beside].append(step["ended"] - step["begun"])
        if took[True] and took[False]:
            beside.append(statistics.mean(took[True]))
            alone.append(statistics.mean(took[False]))
        seconds += [end - begin for begin, end in spans]
    peer = Peer("the steps of the same run without one", alone)
    load, limit = others.cores, 1.01 * statistics.median(alone) if alone else None
    return [
        Figure("a step beside a validation", "s", beside, peer, megabytes, limit, load),
        Figure("a validation", "s", seconds, None, megabytes, neighbours=load),
    ], [Check("a checkpoint was validated in each round", str(len(beside)), str(repetitions))]


def _watch(run: SupervisedRun) -> list[tuple[float, float]]:
    """Let it train for a while; when validations began and ended, on the monotonic clock."""
    run.wait_for_steps(_WARM_UP_STEPS, attempt=1)
    found: dict[str, tuple[float, float]] = {}
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        offset = time.time() - time.monotonic()
        for manifest in run.archive.manifests():
            validation = run.archive.validation(manifest.name)
            ended = validation and parse_time(validation.validated_at)
            if validation and ended:
                end = ended - offset
                found[manifest.name] = (end - validation.seconds, end)
        time.sleep(0.5)
    return list(found.values())


def check(components: dict, *, params: dict, state: dict) -> dict[str, float]:  # type: ignore[type-arg]
    """The entry point: the saved model, loaded, and one forward pass."""
    import torch

    from tests.bench.workload import build

    model, _ = build(params["megabytes"])
    model.load_state_dict(components["model"])
    with torch.no_grad():
        return {"mean": float(model(torch.ones(1, model[0].in_features)).mean())}
