"""C-MAPSS: where its files come from, what they must look like, and windows over engines.

A subset (FD001 … FD004) is three text files: `train_`, `test_` and `RUL_{subset}.txt`, one row a
cycle: unit, cycle, 3 settings, 21 sensors. They are looked for in this order:

    params.data      a folder, or the word `synthetic`
    RUL_DATA         the same, from the environment
    the cache        $XDG_CACHE_HOME/runner/cmapss, filled by an earlier download
    NASA             a zip within a zip, checked against known SHA-256 sums, into the cache
    the generator    jobs/rul/synthetic.py, announced in one line that says why

A folder that was named is taken or refused, never replaced by something else. A download that
fails, or whose contents are not the known ones, is said and leads to the generator. A run that has
begun stays with what it began with. What is wrong with a file is said with its name and line.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from jobs.rul import synthetic
from jobs.rul.nasa import NASA_ZIP, SUBSETS, DataError, cached_folder, file_names

COLUMN_NAMES = (
    "unit",
    "cycle",
    *(f"setting {i}" for i in range(1, 4)),
    *(f"sensor {i}" for i in range(1, 22)),
)
SENSORS = 21

# Rows whose settings lie this close together were flown under the same condition.
SAME_CONDITION = np.array([1.0, 0.05, 1.0])
MOST_CONDITIONS = 16
MOST_DEVIATIONS = 10.0  # a sensor that hardly ever moves must not drown the others when it does

HEALTHY, DEGRADING, CRITICAL = 0, 1, 2
CRITICAL_CYCLES = 30  # at most this many left; healthy is what lies at the cap


class DataOutOfReach(DataError):
    """The files with which the run began cannot be had now; another attempt may have them."""


@dataclass(frozen=True)
class Engine:
    """The recorded cycles of one engine: `settings` (cycles, 3), `sensors` (cycles, 21)."""

    unit: int
    settings: np.ndarray
    sensors: np.ndarray


@dataclass(frozen=True)
class Subset:
    """One subset as read. `truth` holds the remaining cycles of each test engine, uncapped.

    `source` is `folder`, `nasa` or `synthetic`; `sha256` is over the bytes of the three files.
    """

    train: tuple[Engine, ...]
    test: tuple[Engine, ...]
    truth: np.ndarray
    source: str
    sha256: str


def say(line: str) -> None:
    """One line for the one who runs the job; not part of its output."""
    print(f"rul: {line}", file=sys.stderr, flush=True)


# --- Which files ---------------------------------------------------------------------------------


def load(
    name: str,
    data: str | None = None,
    *,
    began_with: str | None = None,
    engines: int | None = None,
    url: str = NASA_ZIP,
    announce: Callable[[str], None] = say,
) -> Subset:
    """Find and read the subset `name` (see the order above).

    `began_with` is the source of the run that is being continued; `engines` limits what the
    generator makes. Raises DataError where the name or a file is wrong, and DataOutOfReach where
    NASA's files are needed and cannot be had.
    """
    if name not in SUBSETS:
        raise DataError(f"unknown subset {name!r}: there are {', '.join(SUBSETS)}")
    who, named = ("params.data", data) if data else ("RUL_DATA", os.environ.get("RUL_DATA"))
    if named == "synthetic":
        return _generated(name, engines, f"{who} asks for it", announce)
    if named:
        if not Path(named).is_dir():
            raise DataError(f"{who}: {named} is not a folder")
        return read_subset(Path(named), name, "folder")
    if began_with == "synthetic":
        return _generated(name, engines, "the run began with it", announce)
    try:
        folder = cached_folder(name, url, announce)
    except (DataError, OSError, HTTPException, RuntimeError) as error:  # Runtime: there is no home
        if began_with is not None:
            raise DataOutOfReach(
                f"the run began with other data than can be had now ({error}); "
                "set params.data or RUL_DATA to the folder with its files"
            ) from error
        return _generated(name, engines, f"NASA's files cannot be had: {error}", announce)
    return read_subset(folder, name, "nasa")


def _generated(name: str, engines: int | None, why: str, announce: Callable[[str], None]) -> Subset:
    announce(f"SYNTHETIC DATA, not NASA's, is used for {name} ({why})")
    with tempfile.TemporaryDirectory(prefix="rul-") as folder:
        synthetic.write(Path(folder), name, engines)
        return read_subset(Path(folder), name, "synthetic")


# --- What the files must look like -------------------------------------------------------------


def read_subset(folder: Path, name: str, source: str) -> Subset:
    """Read the three files of a subset from a folder. Raises DataError, with file and line."""
    contents = []
    for file in file_names(name):
        try:
            contents.append((folder / file).read_bytes())
        except OSError as error:
            raise DataError(f"{folder / file}: {error.strerror}") from error
    train_path, test_path, truth_path = (folder / file for file in file_names(name))
    train = read_engines(train_path, contents[0])
    test = read_engines(test_path, contents[1])
    truth = read_truth(truth_path, contents[2], test, test_path.name)
    digest = hashlib.sha256(b"".join(hashlib.sha256(c).digest() for c in contents)).hexdigest()
    return Subset(train, test, truth, source, digest)


def read_engines(path: Path, content: bytes) -> tuple[Engine, ...]:
    """The engines of a `train_` or `test_` file: units 1, 2, 3 …, each with cycles 1, 2, 3 …"""
    rows: list[list[float]] = []
    begins: list[int] = []
    unit, cycle = 0, 0
    for line, text in _lines(content):
        row = _numbers(f"{path}:{line}", text.split(), COLUMN_NAMES)
        if row[:2] == [unit, cycle + 1]:
            cycle += 1
        elif row[:2] == [unit + 1, 1]:
            unit, cycle = unit + 1, 1
            begins.append(len(rows))
        else:
            raise DataError(f"{path}:{line}: {_misplaced(row[0], row[1], unit, cycle)}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}:1: the file has no rows")
    parts = np.split(np.array(rows), begins[1:])
    return tuple(Engine(int(part[0, 0]), part[:, 2:5], part[:, 5:]) for part in parts)


def _misplaced(found_unit: float, found_cycle: float, unit: int, cycle: int) -> str:
    """Say what is wrong with a row that neither continues an engine nor begins the next."""
    if found_unit == unit:
        return f"engine {unit}: cycle {found_cycle:g} follows cycle {cycle}, expected {cycle + 1}"
    if found_unit == unit + 1:
        return f"engine {unit + 1}: the first cycle is {found_cycle:g}, expected 1"
    expected = f"{unit} or {unit + 1}" if unit else "1"
    return f"engine {found_unit:g} follows engine {unit or 'none'}, expected {expected}"


def read_truth(path: Path, content: bytes, test: Sequence[Engine], test_name: str) -> np.ndarray:
    """The remaining cycles of each test engine, in order: shape (engines,), float64."""
    values: list[float] = []
    line = 1
    for line, text in _lines(content):
        (value,) = _numbers(f"{path}:{line}", text.split(), ("remaining cycles",))
        if value < 0:
            raise DataError(
                f"{path}:{line}: remaining cycles must not be negative, found {value:g}"
            )
        if len(values) == len(test):
            raise DataError(f"{path}:{line}: more rows than the {len(test)} engines in {test_name}")
        values.append(value)
    if len(values) < len(test):
        raise DataError(
            f"{path}:{line}: the file ends after {len(values)} rows; "
            f"there are {len(test)} engines in {test_name}"
        )
    return np.array(values)


def _lines(content: bytes) -> list[tuple[int, str]]:
    """Numbered lines with something in them; what is not ASCII becomes text that is no number."""
    lines = content.decode("ascii", errors="replace").split("\n")
    return [(n, text) for n, text in enumerate(lines, start=1) if text and not text.isspace()]


def _numbers(where: str, fields: list[str], names: Sequence[str]) -> list[float]:
    if len(fields) != len(names):
        raise DataError(f"{where}: expected {len(names)} columns, found {len(fields)}")
    try:
        numbers = [float(field) for field in fields]
    except ValueError:
        numbers = []
    if not numbers or not np.isfinite(numbers).all():
        for name, field in zip(names, fields, strict=True):
            if not _is_finite_number(field):
                raise DataError(f"{where}: {name} is not a number: {field!r}")
    return numbers


def _is_finite_number(field: str) -> bool:
    try:
        return bool(np.isfinite(float(field)))
    except ValueError:
        return False


# --- Normalization and windows -----------------------------------------------------------------


def split(
    engines: Sequence[Engine], held_out: float, seed: int
) -> tuple[list[Engine], list[Engine]]:
    """Training engines and held-out ones: whole engines, since windows of one overlap."""
    if len(engines) < 2:
        raise DataError(f"{len(engines)} engine cannot be split into training and validation")
    count = min(max(1, round(held_out * len(engines))), len(engines) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(engines))[:count].tolist())
    return (
        [engine for i, engine in enumerate(engines) if i not in chosen],
        [engine for i, engine in enumerate(engines) if i in chosen],
    )


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each sensor under each operating condition.

    `centers` (conditions, 3) are the settings of a condition; `mean` and `std` (conditions, 21).
    """

    centers: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, engines: Sequence[Engine]) -> Statistics:
        """From the training engines alone. A sensor that never moves gets std 1, hence value 0."""
        settings = np.concatenate([engine.settings for engine in engines])
        sensors = np.concatenate([engine.sensors for engine in engines])
        centers = find_conditions(settings)
        condition = nearest_condition(settings, centers)
        groups = [sensors[condition == c] for c in range(len(centers))]
        mean = np.stack([group.mean(axis=0) for group in groups])
        std = np.stack([group.std(axis=0) for group in groups])
        std[std < 1e-9 * np.maximum(np.abs(mean), 1.0)] = 1.0
        return cls(centers, mean, std)

    def normalize(self, engine: Engine) -> Tensor:
        """Sensors (cycles, 21), float32: deviations under each row's condition, clipped to ±10."""
        condition = nearest_condition(engine.settings, self.centers)
        values = (engine.sensors - self.mean[condition]) / self.std[condition]
        return torch.from_numpy(values.clip(-MOST_DEVIATIONS, MOST_DEVIATIONS).astype(np.float32))

    def as_dict(self) -> dict[str, np.ndarray]:
        """For the checkpoint; `Statistics(**d)` is the way back."""
        return {"centers": self.centers, "mean": self.mean, "std": self.std}

    @classmethod
    def from_lists(cls, lists: dict[str, Any]) -> Statistics:
        """From JSON."""
        return cls(**{name: np.array(values, dtype=np.float64) for name, values in lists.items()})


def find_conditions(settings: np.ndarray) -> np.ndarray:
    """The centers (conditions, 3) of groups of rows with about the same three settings, sorted.

    The first row that is in no group yet begins the next one, so the same rows in the same order
    give the same centers. Raises DataError for settings that do not fall into a few groups.
    """
    centers = []
    left = settings
    while len(left):
        same = (np.abs(left - left[0]) <= SAME_CONDITION).all(axis=1)
        centers.append(left[same].mean(axis=0))
        left = left[~same]
        if len(centers) > MOST_CONDITIONS:
            raise DataError(f"the settings form more than {MOST_CONDITIONS} operating conditions")
    return np.array(sorted(centers, key=tuple))


def nearest_condition(settings: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """The index of each row's condition, shape (rows,)."""
    away = (settings[:, None] - centers[None]) / SAME_CONDITION
    return np.asarray((away**2).sum(axis=2).argmin(axis=1))


def health(target: Tensor, cap: float) -> Tensor:
    """The states of capped targets: healthy at the cap, critical in the last cycles (int64)."""
    state = torch.where(target <= CRITICAL_CYCLES, CRITICAL, DEGRADING)
    return torch.where(target >= cap, HEALTHY, state)


def pad(rows: Tensor, window: int) -> Tensor:
    """Repeat the first row in front until there are `window` rows; longer ones stay as they are."""
    missing = max(0, window - len(rows))
    return torch.cat([rows[:1].expand(missing, -1), rows])


def last_windows(engines: Sequence[Engine], statistics: Statistics, window: int) -> Tensor:
    """The last `window` cycles of each engine, padded: (engines, window, 21)."""
    return torch.stack([pad(statistics.normalize(e), window)[-window:] for e in engines])


class Windows(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Every window of `window` cycles of run-to-failure engines.

    An item is the sensors (window, 21), the cycles left after the window's last one, capped
    (float32), and the health state (int64). `noise` adds Gaussian noise of that many standard
    deviations, drawn from torch's global generator each time an item is read.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        statistics: Statistics,
        window: int,
        cap: float,
        noise: float = 0.0,
    ) -> None:
        self.window, self.noise = window, noise
        rows, begins, targets = [], [], []
        offset = 0
        for engine in engines:
            padded = pad(statistics.normalize(engine), window)
            count = len(padded) - window + 1
            rows.append(padded)
            begins.append(torch.arange(offset, offset + count))
            targets.append(torch.arange(count - 1, -1, -1, dtype=torch.float32))
            offset += len(padded)
        self.rows = torch.cat(rows)
        self.begins: list[int] = torch.cat(begins).tolist()
        self.targets = torch.cat(targets).clamp(max=cap)
        self.states = health(self.targets, cap)

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        begin = self.begins[index]
        sensors = self.rows[begin : begin + self.window]
        if self.noise:
            sensors = sensors + self.noise * torch.randn(sensors.shape)
        return sensors, self.targets[index], self.states[index]
