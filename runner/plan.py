"""What a trainer must know of its job: written into the spool by whoever supervises it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from runner.errors import SpoolError


@dataclass(frozen=True)
class BestMetric:
    """A metric whose best `count` values are each worth a checkpoint."""

    metric: str
    mode: str = "min"
    count: int = 1

    def better(self, one: float, other: float) -> bool:
        return one < other if self.mode == "min" else one > other


@dataclass(frozen=True)
class Interval:
    """When to save: whichever comes first; what is None does not apply."""

    steps: int | None = None
    minutes: float | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class Plan:
    """When to save, and into how many slots.

    `every` is for the full state, `weights_every` for the weights alone. With `every_auto` the
    supervisor gives the interval, on the board. `snapshot_steps` None is to
    find out.
    `disk` is where a slot goes that memory is too short for; with 0 slots there is only that one.
    In a container, `disk_here` is where that folder is mounted.
    `hold_at_step` makes the trainer wait at the first boundary with at least this step until it is
    asked for something: how a simulated node hits a run at an exact place.
    """

    run_id: str
    attempt: int
    output_dir: str
    disk: str = ""
    disk_here: str = ""
    every: Interval = Interval()
    weights_every: Interval = Interval()
    every_auto: bool = False
    snapshot_steps: int | None = None
    slots: int = 2
    overlap: bool = True
    best: BestMetric | None = None
    health_metrics: tuple[str, ...] = ()
    hold_at_step: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any] | None) -> Plan:
        """The inverse. SpoolError if it is none."""
        try:
            fields = dict(document or {})
            best = fields.get("best")
            fields["best"] = None if best is None else BestMetric(**best)
            fields["every"] = Interval(**fields["every"])
            fields["weights_every"] = Interval(**fields["weights_every"])
            fields["health_metrics"] = tuple(fields["health_metrics"])
            return cls(**fields)
        except (TypeError, KeyError) as error:
            raise SpoolError(f"plan.json is of another version: {error}") from error

    def is_health_metric(self, name: str) -> bool:
        """Whether this metric must be finite: those that were named, else the losses."""
        return name in self.health_metrics if self.health_metrics else "loss" in name.lower()
