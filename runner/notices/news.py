"""What there is to tell: each thing once, with times on this machine's monotonic clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from runner.notices.metadata import Answer, seconds_since_1970

SHORTEST_SECONDS = 2.0
"""What is assumed to be left when a deadline has passed already: it may be about to happen."""

_SOONER_SECONDS = 1.0  # dates have whole seconds, so anything less is no change


@dataclass(frozen=True)
class Preemption:
    """This machine is taken away at `deadline`. Both times are monotonic seconds."""

    source: str
    at: float
    deadline: float


@dataclass(frozen=True)
class Advice:
    """The cloud advises to move somewhere else. Nothing may come of it."""

    source: str
    at: float


News = Preemption | Advice


@dataclass(frozen=True)
class Found:
    """What was found in one answer, whether or not it was there before.

    `event` names what will happen, `version` is all that the cloud says of it: while that stays
    the same, nothing has changed. `deadline` is None where the cloud names none.
    """

    event: str
    version: str
    at: float
    deadline: float | None = None
    is_advice: bool = False


class Source(Protocol):
    """What one cloud is asked, and what its answers mean."""

    name: str
    pause_seconds: float
    """Between two looks; 0 for one that waits inside."""

    def look(self) -> Iterator[Found]:
        """All that is announced at present. MetadataError where that cannot be known."""

    def acknowledge(self) -> None:
        """Tell the cloud that it need not wait. MetadataError if it does not hear."""


class Memory:
    """What was told before."""

    def __init__(self) -> None:
        self._told: dict[str, Found] = {}

    def is_new(self, found: Found) -> bool:
        """Whether to tell it: something else, or the same at an earlier time than was told.

        If the time that was told has passed and nothing happened, any other time is news.
        """
        told = self._told.get(found.event)
        if told is not None and not _changes(told, found):
            return False
        self._told[found.event] = found
        return True


def _changes(told: Found, found: Found) -> bool:
    if told.version == found.version:
        return False
    if told.deadline is None or found.at > told.deadline:
        return True
    return found.deadline is not None and found.deadline < told.deadline - _SOONER_SECONDS


def deadline_of(answer: Answer, time_of_day: float, longest_seconds: float) -> float:
    """When a time of day in an answer is, on the monotonic clock.

    Counted from the moment of the answer, so a node whose clock is wrong, or jumps later on, hears
    of the same deadline. Between `SHORTEST_SECONDS` and `longest_seconds` from then.
    """
    left = time_of_day - answer.time_of_day
    return answer.at + min(max(left, SHORTEST_SECONDS), longest_seconds)


def time_of_day(text: object) -> float | None:
    """`2026-01-01T00:00:00Z` or `Mon, 19 Sep 2016 18:29:47 GMT` in seconds since 1970, or None."""
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return seconds_since_1970(text)
