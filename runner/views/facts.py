"""What is known of a run, as plain records: `Facts` of one look, `Details` for a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.checkpoint.attempts import AttemptRecord
from runner.checkpoint.manifest import Manifest
from runner.points import Point
from runner.saves import SaveRecord
from runner.supervisor.goodput import Goodput, goodput_of
from runner.units import parse_duration
from runner.views.curves import Reading
from runner.wallclock import parse_time


@dataclass(frozen=True)
class Facts:
    """One look, at `seen_at` of the wall clock. `status` is what `lookup` says, `document` is
    `run.json`. `last_points` are of attempts whose end nobody has noted."""

    seen_at: float
    status: Mapping[str, Any]
    document: Mapping[str, Any] = field(default_factory=dict)
    records: tuple[AttemptRecord, ...] = ()
    newest: Manifest | None = None
    newest_values: Mapping[str, float] = field(default_factory=dict)
    last_points: Mapping[int, Point] = field(default_factory=dict)
    last_save: SaveRecord | None = None
    total_steps: int | None = None
    emergency_seconds: float | None = None

    @property
    def is_live(self) -> bool:
        """Whether a supervisor of this machine has the run now."""
        return bool(self.status["live"])

    @property
    def goes_on(self) -> bool:
        """Whether a supervisor has it, on this machine or, as it seems, on another one."""
        return self.is_live or self.status["phase"] == "running"

    @property
    def goodput(self) -> Goodput:
        """Where the time went."""
        try:
            per_hour = float(self.document["job"]["cost"]["per_hour"])
        except (KeyError, TypeError, ValueError):
            per_hour = None
        return goodput_of(
            self.records,
            self.seen_at,
            submitted_at=parse_time(str(self.document.get("created_at"))),
            live=self.is_live,
            per_hour=per_hour,
        )

    @property
    def grace_seconds(self) -> float | None:
        """What the job file says."""
        try:
            return parse_duration(self.document["job"]["preemption"]["grace"])
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True)
class Details:
    """What a report has beside one look. `checkpoints` are rows as `checkpoints ls` has them."""

    saves: Sequence[SaveRecord] = ()
    checkpoints: Sequence[Mapping[str, Any]] = ()
    quarantine: Mapping[str, str] = field(default_factory=dict)
    curves: Sequence[tuple[str, Mapping[int, list[Reading]]]] = ()
