"""Made-up engines in NASA's file format, for machines that cannot reach NASA's files.

The engines begin with some wear, hold for most of their life, then degrade faster and faster until
they fail; test engines are cut off before. Levels, drifts and noise are close to C-MAPSS, so that
a network learns something, but a figure reached on these files says nothing about the real ones.
The same arguments always give the same bytes.

    python -m jobs.rul.synthetic FOLDER [SUBSET ...]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VERSION = 1  # goes into the seed: another generator makes other engines


@dataclass(frozen=True)
class Plan:
    """What NASA says about a subset: how many engines, flight conditions and faults it has."""

    train_engines: int
    test_engines: int
    conditions: int
    faults: int


PLANS = {
    "FD001": Plan(100, 100, conditions=1, faults=1),
    "FD002": Plan(260, 259, conditions=6, faults=1),
    "FD003": Plan(100, 100, conditions=1, faults=2),
    "FD004": Plan(248, 249, conditions=6, faults=2),
}

# Altitude (1000 ft), Mach number, throttle resolver angle; the first is sea level.
CONDITIONS = np.array(
    [(0, 0, 100), (10, 0.25, 100), (20, 0.7, 100), (25, 0.62, 60), (35, 0.84, 100), (42, 0.84, 100)]
)
SETTING_NOISE = np.array([0.0022, 0.0003, 0.0])

# For each of the 21 sensors: level at sea level, drift until failure, noise, decimals in the file.
SENSORS = np.array(
    [
        (518.67, 0.0, 0.0, 2),
        (642.30, 1.5, 0.33, 2),
        (1586.0, 18.0, 4.5, 2),
        (1401.0, 29.0, 4.5, 2),
        (14.62, 0.0, 0.0, 2),
        (21.61, 0.0, 0.001, 2),
        (554.0, -2.7, 0.5, 2),
        (2388.04, 0.22, 0.04, 2),
        (9055.0, 35.0, 8.0, 2),
        (1.30, 0.0, 0.0, 2),
        (47.35, 0.85, 0.14, 2),
        (522.0, -2.3, 0.4, 2),
        (2388.04, 0.22, 0.04, 2),
        (8137.0, 25.0, 8.0, 2),
        (8.4150, 0.11, 0.02, 4),
        (0.03, 0.0, 0.0, 2),
        (392.0, 4.5, 1.0, 0),
        (2388.0, 0.0, 0.0, 0),
        (100.0, 0.0, 0.0, 2),
        (38.95, -0.55, 0.10, 2),
        (23.37, -0.33, 0.06, 4),
    ]
)
LEVEL, DRIFT, NOISE = SENSORS[:, 0], SENSORS[:, 1], SENSORS[:, 2]
# The second fault (of the fan) moves these sensors the other way.
FAN_FAULT = np.where(np.isin(np.arange(1, 22), (7, 12, 15, 20, 21)), -1.0, 1.0)

ROW_FORMAT = " ".join(
    ["%d", "%d", "%.4f", "%.4f", "%.1f"] + [f"%.{int(d)}f" for d in SENSORS[:, 3]]
)
ROW_END = "  \n"
SHORTEST_TEST = {1: 31, 6: 21}  # by the number of conditions, as in NASA's files


def write(folder: Path, subset: str, engines: int | None = None) -> None:
    """Write `train_`, `test_` and `RUL_{subset}.txt` into `folder`, which is created.

    `engines` limits the number of engines of both files. Raises KeyError for an unknown subset.
    """
    plan = PLANS[subset]
    rng = np.random.Generator(np.random.PCG64([VERSION, int(subset[2:])]))
    folder.mkdir(parents=True, exist_ok=True)
    train = [_engine(plan, rng) for _ in range(min(plan.train_engines, engines or 10**6))]
    whole = [_engine(plan, rng) for _ in range(min(plan.test_engines, engines or 10**6))]
    shortest = SHORTEST_TEST[plan.conditions]
    left = [int(rng.integers(7, min(146, len(engine) - shortest))) for engine in whole]
    if shortest < 30:  # make sure that there is one engine which needs padding
        left[0] = len(whole[0]) - shortest
    test = [engine[: len(engine) - rest] for engine, rest in zip(whole, left, strict=True)]
    _write_rows(folder / f"train_{subset}.txt", train)
    _write_rows(folder / f"test_{subset}.txt", test)
    truth = "".join(f"{rest} \n" for rest in left)
    (folder / f"RUL_{subset}.txt").write_text(truth, encoding="ascii", newline="\n")


def _engine(plan: Plan, rng: np.random.Generator) -> np.ndarray:
    """One engine from new to failure: settings and sensors of shape (cycles, 24)."""
    cycles = int(np.clip(np.exp(rng.normal(5.28, 0.22)), 128, 362))
    age = np.arange(1, cycles + 1) / cycles
    wear = rng.uniform(0.0, 0.12) + age ** rng.uniform(3.5, 6.0)
    fault = FAN_FAULT if rng.integers(plan.faults) else np.ones(21)
    condition = rng.integers(plan.conditions, size=cycles)
    settings = CONDITIONS[condition] + rng.normal(size=(cycles, 3)) * SETTING_NOISE
    # Thinner air and less throttle: everything is measured on a smaller scale.
    scale = 1.0 - 0.012 * CONDITIONS[condition, :1] - 0.003 * (100 - CONDITIONS[condition, 2:])
    noise = rng.normal(size=(cycles, 21)) * NOISE
    sensors = scale * LEVEL + wear[:, None] * (DRIFT * fault) + noise
    return np.hstack([settings, sensors])


def _write_rows(path: Path, engines: list[np.ndarray]) -> None:
    with path.open("w", encoding="ascii", newline="\n") as file:
        for unit, rows in enumerate(engines, start=1):
            for cycle, row in enumerate(rows.tolist(), start=1):
                file.write(ROW_FORMAT % (unit, cycle, *row) + ROW_END)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m jobs.rul.synthetic FOLDER [SUBSET ...]")
    for name in sys.argv[2:] or list(PLANS):
        if name not in PLANS:
            sys.exit(f"unknown subset {name!r}; there are {', '.join(PLANS)}")
        write(Path(sys.argv[1]), name)
