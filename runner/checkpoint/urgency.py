"""Which of two snapshots to make durable when time is short: a pure decision.

The newest state is worth most, and so an older one that is on its way gives way to it, unless the
time that is left is not enough for the newer one: then what is further along is finished first.
"""

from __future__ import annotations

from dataclasses import dataclass

_MARGIN = 1.25
_TELLING_SECONDS = 1.0  # from when on the rate of an upload says something


@dataclass(frozen=True)
class Upload:
    """A save on its way: how large it is, what the store has been given, for how long it runs."""

    nbytes: int
    given_bytes: int
    seconds: float

    @property
    def rest_bytes(self) -> int:
        return max(0, self.nbytes - self.given_bytes)


def worth_abandoning(
    older: Upload,
    newer_bytes: int,
    seconds_left: float | None,
    bytes_per_second: float | None,
) -> bool:
    """Whether a save on its way gives way to one of a newer state.

    `seconds_left` is None where nothing presses; `bytes_per_second` is what earlier saves reached,
    None if there were none. How fast the one on its way is counts for more, as soon as it can be
    told: the store may have become slow, or stalled.
    """
    if seconds_left is None:
        return True
    rate = bytes_per_second
    if older.seconds >= _TELLING_SECONDS:
        rate = older.given_bytes / older.seconds
    if rate is None or older.given_bytes == 0:
        return True  # nothing is further along
    return newer_bytes * _MARGIN <= rate * seconds_left
