"""Signals and clouds, as events for the loop; and whether a cloud may be told to go ahead."""

from __future__ import annotations

import signal
from pathlib import Path

from runner import notices
from runner.spool import SPOOL_PREFIX, is_locked
from runner.supervisor import events

SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGHUP,
    signal.SIGUSR2,
    signal.SIGRTMIN,
)
"""What a supervisor listens to."""


def event_of_signal(signum: int, at: float, grace_seconds: float) -> events.Event:
    """What one of `SIGNALS` asks for. Those that mean nothing here are the trainer's."""
    match signum:
        case signal.SIGTERM:
            return events.Notice(at, "SIGTERM", at + grace_seconds, leave=True)
        case signal.SIGINT:
            return events.Interrupt(at)
        case signal.SIGUSR1:
            return events.SaveAsked(at)
        case signal.SIGRTMIN:
            return events.StacksAsked(at)
    return events.Relayed(at, signum)


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
