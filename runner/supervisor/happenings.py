"""What happens to a run that is worth a line in the log and a count in the metrics.

One frozen record feeds both: its `text` is the line, its fields are what is counted. Durations are
seconds, sizes bytes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from runner.checkpoint.keeper import Resumption, Saved
from runner.errors import CheckpointError, RunnerError, StoreDenied, StoreError, StoreUnfit
from runner.supervisor.metrics import main_trigger

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Happening:
    """Something that has happened."""

    level: ClassVar[int] = logging.INFO

    @property
    def text(self) -> str:
        """The line for the log; none if empty."""
        return ""


@dataclass(frozen=True)
class CheckpointSaved(Happening):
    """A snapshot became durable."""

    saved: Saved

    @property
    def trigger(self) -> str:
        """The one that it is counted under."""
        return main_trigger(self.saved.manifest.moment.triggers)

    @property
    def text(self) -> str:
        manifest, moment = self.saved.manifest, self.saved.manifest.moment
        return (
            f"saved {manifest.name} ({', '.join(moment.triggers) or 'newest state'}, "
            f"{manifest.nbytes / 1e6:.1f} MB in {self.saved.persist_seconds:.2f} s)"
        )


@dataclass(frozen=True)
class SaveRefused(Happening):
    """A snapshot could not be made durable; it stays in its slot, and is tried again.

    The supervisor's machine says so in the log, with what it means for the run.
    """

    reason: str

    @classmethod
    def by(cls, error: Exception) -> SaveRefused:
        """Told by the type of the error, never by its text."""
        match error:
            case StoreDenied():
                return cls("denied")
            case StoreUnfit():
                return cls("unfit")
            case StoreError():
                return cls("refused")
            case CheckpointError():
                return cls("invalid")
            case RunnerError() | OSError():
                return cls("local")
        return cls("invalid")


@dataclass(frozen=True)
class CheckpointQuarantined(Happening):
    """A checkpoint does not match its manifest, or has none that can be used."""

    name: str
    problem: str
    level: ClassVar[int] = logging.ERROR

    @property
    def text(self) -> str:
        return f"checkpoint {self.name} is corrupt: {self.problem}; it goes into quarantine"


@dataclass(frozen=True)
class RemainsRemoved(Happening):
    """What unfinished saves of dead attempts had left."""

    count: int


@dataclass(frozen=True)
class StateFetched(Happening):
    """What an attempt begins from lies in the spool."""

    attempt: int
    resumption: Resumption

    @property
    def text(self) -> str:
        place = "this node's memory" if self.resumption.source == "slot" else "the store"
        moment = self.resumption.moment
        return f"attempt {self.attempt} begins at step {moment.step}, from {moment.name} in {place}"


@dataclass(frozen=True)
class Noticed(Happening):
    """This node will be taken away; the machine says so in the log."""

    source: str
    lead_seconds: float


@dataclass(frozen=True)
class Restarted(Happening):
    """A trainer is started again, after what ended the attempt before."""

    reason: str


def write_down(happening: Happening) -> None:
    """Into the log."""
    if happening.text:
        log.log(happening.level, "%s", happening.text)
