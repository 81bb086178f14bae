"""What is remembered of a save for good: one line, also after retention has deleted its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class SaveRecord:
    """A checkpoint that became durable at `time`, of the wall clock.

    Seconds are None where nobody has measured them: what is known from a manifest alone.
    """

    checkpoint: str
    attempt: int
    step: int
    time: float
    triggers: tuple[str, ...] = ()
    scope: str = "full"
    nbytes: int = 0
    snapshot_seconds: float | None = None
    persist_seconds: float | None = None

    @property
    def total_seconds(self) -> float | None:
        """From the copy to the commit."""
        if self.persist_seconds is None:
            return None
        return self.persist_seconds + (self.snapshot_seconds or 0.0)

    def to_line(self) -> bytes:
        return json.dumps(asdict(self), allow_nan=False, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> SaveRecord | None:
        """The inverse; None if the line is none of ours."""
        try:
            document = json.loads(line)
            return cls(
                checkpoint=str(document["checkpoint"]),
                attempt=int(document["attempt"]),
                step=int(document["step"]),
                time=float(document["time"]),
                triggers=tuple(map(str, document["triggers"])),
                scope=str(document["scope"]),
                nbytes=int(document["nbytes"]),
                snapshot_seconds=_seconds(document["snapshot_seconds"]),
                persist_seconds=_seconds(document["persist_seconds"]),
            )
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None


def saves_of(block: bytes) -> Iterator[SaveRecord]:
    """The records of whole lines, those that cannot be read passed over."""
    for line in block.splitlines():
        record = SaveRecord.from_line(line)
        if record is not None:
            yield record


def _seconds(value: object) -> float | None:
    return None if value is None else float(value)  # type: ignore[arg-type]
