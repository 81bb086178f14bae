"""How the time between a notice and the end of a node is used. Pure; seconds of one clock."""

from __future__ import annotations

_LEAST_MARGIN_SECONDS = 5.0
_WORTH_SECONDS = 5.0  # of training: for less, nobody needs to stay
_TIMES_AS_LONG = 3  # a save may take, compared with the last one


def train_until(notice_at: float, deadline: float, emergency_seconds: float | None) -> float:
    """When the last save must be asked for, so that it is surely durable before the deadline.

    What is kept free is a quarter of what the notice gave, or three times what the last save took
    if that is more, and never less than a save and five seconds. Before a save has been measured
    it is half of the time.
    """
    given = deadline - notice_at
    if emergency_seconds is None:
        return deadline - given / 2
    return deadline - max(
        given / 4,
        _TIMES_AS_LONG * emergency_seconds,
        emergency_seconds + _LEAST_MARGIN_SECONDS,
    )


def is_worth_staying(at: float, leave_at: float, emergency_seconds: float | None) -> bool:
    """Whether there is time to train between a save now and the last one."""
    return leave_at - at >= max(_WORTH_SECONDS, emergency_seconds or 0.0)


def patience_for_boundary(at: float, deadline: float) -> float:
    """Until when a trainer may take to come to its boundary: the rest is for saving."""
    return at + (deadline - at) / 4


def last_moment(notice_at: float, deadline: float) -> float:
    """When the tree must be killed at the latest, so that it is gone when the grace ends."""
    return deadline - min(1.0, (deadline - notice_at) / 10)
