"""What a tracker must be able to do: a handful of methods, the same for all of them.

Each may take long and may raise whatever its library raises. Then nothing is known of what has
arrived, so `sent` is asked again before anything else is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Reading(NamedTuple):
    """One value of one metric. `time` is seconds of the wall clock."""

    name: str
    value: float
    step: int
    epoch: int
    time: float


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run. `key` is the same for all attempts, and no other run's.

    `settings` are those of the tracker's section in the job file; `params` and `tags` hold no
    secrets. `folder` is where a tracker that writes files may keep them.
    """

    run_id: str
    key: str
    job: str
    settings: Mapping[str, Any]
    folder: Path
    workdir: Path
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """A checkpoint as a tracker is shown it. `files` is a folder with its files, if wanted."""

    name: str
    step: int
    uri: str
    manifest: Mapping[str, Any]
    files: Path | None = None


class Tracker(Protocol):
    """One run in a tracker."""

    def begin(self, about: About, known: str | None) -> str:
        """Find the tracker's run, by the id under which it is known, or create it; its id."""

    def sent(self) -> Mapping[str, int]:
        """The highest step of each metric that has arrived; empty where it cannot be asked."""

    def log(self, readings: Sequence[Reading]) -> None:
        """Send values. TrackerRefused if they can never be taken."""

    def note(self, tags: Mapping[str, str]) -> None:
        """Set tags, over those of the same names."""

    def show(self, checkpoint: Shown) -> None:
        """Send a checkpoint's manifest and place, and its files if there are some."""

    def end(self, outcome: str | None) -> None:
        """The supervisor leaves; how the run ended is None where it goes on elsewhere."""


def flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested parameters as trackers want them: `optimizer.lr` and a text."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def by_step(readings: Sequence[Reading]) -> Iterator[tuple[int, dict[str, float]]]:
    """Neighbours of one step together, in their order."""
    step, values = -1, dict[str, float]()
    for reading in readings:
        if reading.step != step and values:
            yield step, values
            values = {}
        step = reading.step
        values[reading.name] = reading.value
    if values:
        yield step, values
