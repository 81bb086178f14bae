"""The time of day as it is written into records, and read from them."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> str:
    """The wall clock as ISO 8601 with microseconds: for people and reports, never for order."""
    return datetime.now(UTC).isoformat()


def parse_time(text: str | None) -> float | None:
    """Seconds since the epoch of a time in a record; None if there is none or it is unreadable."""
    try:
        return None if text is None else datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
