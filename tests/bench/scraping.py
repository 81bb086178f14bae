"""What it costs the supervisor to be asked for its metrics: time of its CPU for one scrape.

Scraped every five seconds, 50 ms would be a hundredth of a core. What the supervisor uses anyhow,
measured just before over some seconds, is taken off.
"""

from __future__ import annotations

import http.client
import os
import time
from pathlib import Path
from typing import NamedTuple

from tests.bench.figures import Check, Figure
from tests.bench.place import Place
from tests.bench.supervised import Settings, SupervisedRun

_SCRAPES = 100
_IDLE_SECONDS = 3.0
_OPENMETRICS = "application/openmetrics-text; version=1.0.0"
_LIMIT_MS = 50.0  # of five seconds: a hundredth of a core
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def measure(place: Place, repetitions: int) -> tuple[list[Figure], list[Check]]:
    """Ask a run that trains, as Prometheus does: in OpenMetrics, over one connection."""
    run = SupervisedRun(place, "scraped", Settings(1, save_every_steps=50, snapshot_every_steps=1))
    milliseconds: list[float] = []
    size = 0
    try:
        run.start()
        run.wait_for_steps(20, attempt=1)
        connection = http.client.HTTPConnection(run.address, timeout=10)
        for _ in range(repetitions):
            begun = _Moment.of(run.pid)
            time.sleep(_IDLE_SECONDS)
            idle = _Moment.of(run.pid)
            size = _scrape(connection)
            asked = _Moment.of(run.pid)
            anyhow = (idle.cpu - begun.cpu) / (idle.wall - begun.wall) * (asked.wall - idle.wall)
            own = asked.cpu - idle.cpu - anyhow
            milliseconds.append(1e3 * max(0.0, own) / _SCRAPES)
        run.end()
    finally:
        run.close()
    figure = Figure("CPU of the supervisor for a scrape", "ms", milliseconds, limit=_LIMIT_MS)
    return [figure], [Check("a scrape has metrics", str(size > 1000), "True")]


class _Moment(NamedTuple):
    """Seconds of the clock, and those that a process has used of the CPU until then."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, pid: int) -> _Moment:
        text = Path(f"/proc/{pid}/stat").read_text()
        fields = text[text.rindex(")") + 2 :].split()  # see proc_pid_stat(5)
        return cls(time.monotonic(), sum(map(int, fields[11:13])) / _TICKS_PER_SECOND)


def _scrape(connection: http.client.HTTPConnection) -> int:
    """Many times; bytes of the last answer."""
    size = 0
    for _ in range(_SCRAPES):
        connection.request("GET", "/metrics", headers={"Accept": _OPENMETRICS})
        size = len(connection.getresponse().read())
    return size
