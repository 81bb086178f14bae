"""The buckets in which durations are counted: from 1 ms to 10 min, the same for all."""

from __future__ import annotations

from bisect import bisect_left

BOUNDS_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
"""Upper bounds, each included in its bucket. What is longer goes into one bucket more."""

BUCKETS = len(BOUNDS_SECONDS) + 1


def bucket_of(seconds: float) -> int:
    """The index of the bucket that this duration belongs to."""
    return bisect_left(BOUNDS_SECONDS, seconds)
