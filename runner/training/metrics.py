"""What a script logs: the newest values for the state at hand, and one record for each epoch.

A value may be a tensor on a GPU. It is kept as it is and turned into a float only when a snapshot
or an epoch's end needs the number, so logging never waits for the device. Only then is it known
whether it is finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from runner.errors import CaptureError
from runner.points import Point
from runner.training.health import Health

_MAX_PENDING = 4096

Emit = Callable[[Sequence[Point]], None]


@dataclass(frozen=True)
class _Logged:
    """One value as it was logged; `in_body` says that it is of a step, not beside all of them."""

    name: str
    value: Any
    in_body: bool
    step: int
    epoch: int
    time: float

    @property
    def place(self) -> tuple[int, int]:
        return self.step, self.epoch


class Metrics:
    """Logged values. `history` has one dict per finished epoch: means of what was logged in the
    loop's body, the last values of what was logged beside it. `emit` is given each value once, as
    soon as it is a number; `attempt` is whose it is."""

    def __init__(self, health: Health, emit: Emit | None = None, attempt: int = 0) -> None:
        self.health = health
        self._emit, self._attempt = emit, attempt
        self.history: list[dict[str, Any]] = []
        self._fresh: dict[str, Any] = {}
        self._stale = False
        self._pending: list[_Logged] = []
        self._waits_for_device = False
        self._sums: dict[str, list[float]] = {}
        self._last: dict[str, float] = {}

    def log(self, values: dict[str, Any], *, in_body: bool, step: int, epoch: int = 0) -> None:
        """Take values of this step in; `in_body` ones are averaged over the epoch."""
        now = time.time()
        for name, value in values.items():
            _check(name, value)
        if self._stale:
            self._fresh, self._stale = {}, False
        for name, value in values.items():
            if hasattr(value, "detach"):
                value = value.detach().clone()  # the script may go on adding to it
                self._waits_for_device |= value.device.type != "cpu"
            self._fresh[name] = value
            self._pending.append(_Logged(name, value, in_body, step, epoch, now))
        if len(self._pending) > _MAX_PENDING:
            self._fold()

    def settle(self) -> None:
        """Look at what was logged, unless that would have to wait for a device."""
        if not self._waits_for_device:
            self._fold()

    def next_state(self) -> None:
        """The state is about to change: what was logged so far is of the one before."""
        self._stale = True

    def fresh(self) -> dict[str, float]:
        """The values logged for the state as it is now."""
        return {} if self._stale else {name: float(v) for name, v in self._fresh.items()}

    def fresh_value(self, name: str) -> float:
        """The value logged under this name for the state as it is now, NaN if there is none.

        Waits for the device that has it, and for no other value.
        """
        return math.nan if self._stale else float(self._fresh.get(name, math.nan))

    def end_epoch(self, epoch: int, step: int, learning_rate: float | None) -> None:
        """Close the epoch's record."""
        self._fold()
        record: dict[str, Any] = {"epoch": epoch, "step": step}
        if learning_rate is not None:
            record["lr"] = learning_rate
        record |= {name: total / count for name, (total, count) in self._sums.items()}
        self.history.append(record | self._last)
        self._sums, self._last = {}, {}
        self.health.end_epoch()

    def state(self) -> dict[str, Any]:
        """All of it as plain values."""
        self._fold()
        return {
            "history": self.history,
            "sums": self._sums,
            "last": self._last,
            "fresh": self.fresh(),
        }

    def load_state(self, saved: dict[str, Any]) -> None:
        self.history[:] = saved["history"]  # a script may have got hold of the list
        self._sums, self._last = saved["sums"], saved["last"]
        self._fresh, self._stale, self._pending = saved["fresh"], False, []
        self.health.forget()

    def _fold(self) -> None:
        groups: list[tuple[_Logged, dict[str, float]]] = []
        for logged in self._pending:
            number = float(logged.value)
            self.health.heard(logged.name, number, logged.step)
            if logged.in_body:
                entry = self._sums.setdefault(logged.name, [0.0, 0])
                entry[0] += number
                entry[1] += 1
            else:
                self._last[logged.name] = number
            if not groups or groups[-1][0].place != logged.place:
                groups.append((logged, {}))
            groups[-1][1][logged.name] = number
        self._pending, self._waits_for_device = [], False
        if groups and self._emit is not None:
            self._emit(
                [
                    Point(self._attempt, first.step, first.epoch, first.time, values)
                    for first, values in groups
                ]
            )


def _check(name: str, value: Any) -> None:
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise CaptureError(f"run.log({name}=…)", f"is a {type(value).__qualname__}, not a number")
    if hasattr(value, "numel") and value.numel() != 1:
        raise CaptureError(f"run.log({name}=…)", "has more than one element")
