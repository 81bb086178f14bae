"""What was measured: figures, each with its peer from the same run, and the table they make."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Peer:
    """The simplest thing that does the comparable work, measured among the same repetitions."""

    name: str
    values: Sequence[float]


@dataclass(frozen=True)
class Figure:
    """One quantity: a value for each repetition, in `unit`; `limit` is what it has to stay under.

    `size_mb` is the size of the state in 10^6 bytes, `neighbours` the cores that other processes
    used on average meanwhile.
    """

    name: str
    unit: str
    values: Sequence[float]
    peer: Peer | None = None
    size_mb: float | None = None
    limit: float | None = None
    neighbours: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def ratio(self) -> float | None:
        """How many times the peer it takes; None where there is nothing to compare with."""
        peer = 0.0 if self.peer is None else statistics.median(self.peer.values)
        return self.median / peer if peer else None

    @property
    def holds(self) -> bool | None:
        """Whether the median is under the limit, None where there is none."""
        return None if self.limit is None else self.median < self.limit

    def to_json(self) -> dict[str, Any]:
        peer = self.peer
        return {
            "name": self.name,
            "size_mb": self.size_mb,
            "unit": self.unit,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
            "peer": None
            if peer is None
            else {
                "name": peer.name,
                "median": statistics.median(peer.values),
                "values": list(peer.values),
            },
            "ratio": self.ratio,
            "limit": self.limit,
            "holds": self.holds,
            "neighbours_cores": self.neighbours,
        }


@dataclass(frozen=True)
class Check:
    """Whether what was measured is right at all: what was found, and what had to be."""

    name: str
    found: str
    expected: str

    @property
    def holds(self) -> bool:
        return self.found == self.expected

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def as_table(figures: Sequence[Figure]) -> str:
    """A table for people, in Markdown."""
    rows = [
        ("what", "state", "median", "from – to", "n", "peer", "ratio", "others' cores"),
        *(_row(figure) for figure in figures),
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _row(figure: Figure) -> tuple[str, ...]:
    unit, peer, limit = figure.unit, figure.peer, figure.limit
    median = _value(figure.median, unit)
    if limit is not None:
        median += f" ({'<' if figure.holds else 'NOT <'} {_value(limit, unit)})"
    return (
        figure.name,
        "" if figure.size_mb is None else f"{figure.size_mb:g} MB",
        median,
        f"{_value(min(figure.values), unit)} – {_value(max(figure.values), unit)}",
        str(len(figure.values)),
        "" if peer is None else f"{peer.name}: {_value(statistics.median(peer.values), unit)}",
        "" if figure.ratio is None else f"{figure.ratio:.2f}",
        "" if figure.neighbours is None else f"{figure.neighbours:.1f}",
    )


def _value(value: float, unit: str) -> str:
    if unit == "s" and value < 0.1:
        return f"{1000 * value:.1f} ms"
    return f"{value:.2f} s" if unit == "s" else f"{value:.0f} {unit}"
