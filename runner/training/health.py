"""Since when, and for how many steps, the metrics that must be finite have not been."""

from __future__ import annotations

import math
from collections.abc import Callable


class Health:
    """Hears each value in the order in which it was logged.

    `since` is the step of the first bad value, None while all is well; `steps` counts from there
    to the last bad one, both included. A metric that is logged once in an epoch is bad until it is
    finite again, but one bad value alone is one bad step. One that is not logged any more counts
    no longer than to the end of the next epoch.
    """

    def __init__(self, is_health_metric: Callable[[str], bool]) -> None:
        self._is_health_metric = is_health_metric
        self._since: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._heard: set[str] = set()

    def heard(self, name: str, value: float, step: int) -> None:
        """One value, logged for this step."""
        if not self._is_health_metric(name):
            return
        self._heard.add(name)
        if math.isfinite(value):
            self._since.pop(name, None)
        else:
            self._since.setdefault(name, step)
            self._last[name] = step

    def end_epoch(self) -> None:
        """An epoch is over: what was not logged in it is not known any more."""
        self._since = {name: step for name, step in self._since.items() if name in self._heard}
        self._heard.clear()

    def forget(self) -> None:
        """Another state has been put in place."""
        self._since.clear()

    @property
    def since(self) -> int | None:
        return min(self._since.values(), default=None)

    @property
    def steps(self) -> int:
        return max((self._last[name] - since + 1 for name, since in self._since.items()), default=0)
