"""What a tracker costs the training loop: a run that is shown to MLflow, and one that is not.

Each step logs a value; the tracker is MLflow with a database beside the store, so that its work is
done on this machine, too, on the processor that the trainer leaves free. The two take turns, and
the time of a step is the mean over all but the first, which a start makes slow.
"""

from __future__ import annotations

import statistics

from tests.bench.figures import Check, Figure, Peer
from tests.bench.place import Neighbours, Place, neighbours
from tests.bench.supervised import Settings, SupervisedRun, spare_one

_STEPS = 2000
_WARM_UP_STEPS = 800  # while the library is loaded and the database is made
_SAVE_EVERY_STEPS = 400


def measure(place: Place, megabytes: float, repetitions: int) -> tuple[list[Figure], list[Check]]:
    """A value for each round is the mean over its steps."""
    shown: list[float] = []
    alone: list[float] = []
    others = Neighbours()
    database = f"sqlite:///{place.store / 'mlflow.db'}"
    for number in range(repetitions):
        for values, tracking in ((alone, None), (shown, {"mlflow": {"uri": database}})):
            settings = Settings(
                megabytes,
                _STEPS,
                save_every_steps=_SAVE_EVERY_STEPS,
                tracking=tracking,
                threads=spare_one(),
            )
            name = f"{'alone' if tracking is None else 'shown'}-{megabytes:g}-{number}"
            run = SupervisedRun(place, name, settings)
            place.settle()
            try:
                with neighbours(others):
                    run.start()
                    run.wait()
            finally:
                run.close()
            steps = run.steps()[_WARM_UP_STEPS:]
            values.append(statistics.mean(step["ended"] - step["begun"] for step in steps))
    peer = Peer("the steps of a run without a tracker", alone)
    limit = 1.01 * statistics.median(alone)
    figure = Figure(
        "a step of a run that is tracked", "s", shown, peer, megabytes, limit, others.cores
    )
    return [figure], [Check("rounds", str(len(shown)), str(repetitions))]
