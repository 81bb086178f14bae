"""The supervisor's courier: a thread that brings logs into the store, after everything else.

It goes when an attempt has ended, and every few minutes while one runs: more seldom the longer it
runs, so that a month is not ten thousand objects. It gives way to the trainer, and begins nothing
while an emergency save may need the connection.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runner.checkpoint.logs import StoredLogs
from runner.errors import Fenced, StoreError
from runner.logs.files import LocalLogs

log = logging.getLogger(__name__)

_SHORTEST_SECONDS = 120.0
_LONGEST_SECONDS = 900.0
_SHARE_OF_AGE = 0.1
_NICENESS = 10


@dataclass(frozen=True)
class Shipment:
    """Files on this node that belong into the store, and how much of them is kept there."""

    local: LocalLogs
    stored: StoredLogs
    max_bytes: int


class Courier(threading.Thread):
    """Ships what is new. A store that refuses is asked again at the next round."""

    def __init__(
        self,
        shipments: Sequence[Shipment],
        check_fence: Callable[[], None],
        may_go_on: Callable[[], bool],
    ) -> None:
        super().__init__(name="courier", daemon=True)
        self._shipments = shipments
        self._check_fence, self._may_go_on = check_fence, may_go_on
        self._attempt, self._began_at = 0, time.monotonic()
        self._wake = threading.Event()
        self._over = self._ships_in_the_end = False

    def begin(self, attempt: int) -> None:
        """Another attempt; what this supervisor may ship goes up to it."""
        self._attempt, self._began_at = attempt, time.monotonic()

    def ship_soon(self) -> None:
        self._wake.set()

    def finish(self, timeout_seconds: float, *, ship: bool) -> None:
        """Ship what is left, if asked to, and end, in time or with a warning."""
        self._ships_in_the_end = ship
        self._over = True
        self._wake.set()
        self.join(timeout_seconds)
        if self.is_alive() and ship:
            log.warning("the end of the log is on this node only: the store took too long")

    def run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while not self._over:
            self._wake.wait(self._pause_seconds())
            self._wake.clear()
            if not self._over and self._may_go_on() and not self._ship():
                return
        if self._ships_in_the_end:
            self._ship()

    def _pause_seconds(self) -> float:
        age = time.monotonic() - self._began_at
        return min(_LONGEST_SECONDS, max(_SHORTEST_SECONDS, _SHARE_OF_AGE * age))

    def _ship(self) -> bool:
        """False if a newer supervisor has the run: then nothing is written any more."""
        try:
            self._check_fence()
            for one in self._shipments:
                one.stored.ship(one.local, one.max_bytes, self._attempt, self._may_begin)
        except Fenced:
            return False
        except (StoreError, OSError) as error:
            log.warning("the log could not be stored: %s", error)
        return True

    def _may_begin(self) -> bool:
        """In the end the save is done, and there is only the log left to be stored."""
        return self._ships_in_the_end if self._over else self._may_go_on()
