"""Waiting in tests: ask again until it is so, or fail at a deadline and say for what."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PAUSE_SECONDS = 0.002


def wait_until(predicate: Callable[[], T], timeout: float = 60, what: str = "it to happen") -> T:
    """Call `predicate` until it returns something true, and return that.

    `timeout` is in seconds. Fails with AssertionError, naming `what` was waited for.
    """
    deadline = time.monotonic() + timeout
    while True:
        if result := predicate():
            return result
        assert time.monotonic() < deadline, f"waited {timeout:g} s for {what}"
        time.sleep(PAUSE_SECONDS)
