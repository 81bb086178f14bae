"""What clouds say, as events for the loop; and whether they may be told to go ahead."""

from __future__ import annotations

from pathlib import Path

from runner import notices
from runner.spool import SPOOL_PREFIX, is_locked
from runner.supervisor import events


def event_of(news: notices.News) -> events.Event:
    """An event with the same times: both sides use the monotonic clock."""
    match news:
        case notices.Preemption(source, at, deadline):
            return events.Notice(at, source, deadline)
        case notices.Advice(source, at):
            return events.Hint(at, source)


def is_alone(spool: Path) -> bool:
    """Whether no other run is live on this machine, as far as can be seen from here.

    A cloud that is told to go ahead takes the whole machine, also from those who are still saving.
    Another user's spool cannot be looked into, and counts as live.
    """
    others = (path for path in spool.parent.glob(f"{SPOOL_PREFIX}*") if path != spool)
    return not any(is_locked(path / "lock") for path in others if path.is_dir())
