"""The numbers behind the metrics: counters, gauges and histograms that outlive a process.

Counters and histograms can be written down as JSON and taken up again, so that they go on across
attempts, supervisors and nodes; the client library's own cannot. Prometheus reads them through a
collector, in a registry that is nobody else's. May be used from any thread.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from runner.histogram import BOUNDS_SECONDS, BUCKETS, bucket_of

Labels = tuple[str, ...]  # the values, in the order of the definition's names
_LE = (*(f"{bound:g}" for bound in BOUNDS_SECONDS), "+Inf")


@dataclass(frozen=True)
class Definition:
    """A metric: its name as it is queried, its kind, what it says, its labels.

    `start` has the label values whose series exist from the beginning, at zero: what first appears
    at 1 has not increased for Prometheus.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    says: str
    labels: Labels = ()
    start: tuple[Labels, ...] = ()


@dataclass
class _Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    sum_seconds: float = 0.0
    exemplars: dict[int, Exemplar] = field(default_factory=dict)

    def buckets(self) -> list[Any]:
        """Cumulative, as Prometheus has them."""
        found, total = [], 0
        for index, count in enumerate(self.counts):
            total += count
            exemplar = self.exemplars.get(index)
            found.append((_LE[index], total) if exemplar is None else (_LE[index], total, exemplar))
        return found


class Tally(Collector):
    """Knows its definitions; anything else is a mistake of the program (KeyError)."""

    def __init__(self, definitions: Sequence[Definition]) -> None:
        self._definitions = {definition.name: definition for definition in definitions}
        self._lock = threading.Lock()
        self._numbers: dict[str, dict[Labels, float]] = {}
        self._histograms: dict[str, dict[Labels, _Histogram]] = {}
        for definition in definitions:
            start = definition.start or (() if definition.labels else ((),))
            if definition.kind == "counter":
                self._numbers[definition.name] = dict.fromkeys(start, 0.0)
            elif definition.kind == "gauge":
                self._numbers[definition.name] = {}
            else:
                self._histograms[definition.name] = {labels: _Histogram() for labels in start}

    def add(self, name: str, amount: float = 1.0, labels: Labels = ()) -> None:
        """Count something."""
        with self._lock:
            numbers = self._numbers[name]
            numbers[labels] = numbers.get(labels, 0.0) + amount

    def raise_to(self, name: str, value: float, labels: Labels = ()) -> None:
        """Say what a counter is by now. It never goes down, whatever turns out later."""
        with self._lock:
            numbers = self._numbers[name]
            numbers[labels] = max(numbers.get(labels, 0.0), value)

    def set(self, name: str, value: float | None, labels: Labels = ()) -> None:
        """Say what something is; None if it is not known (any more)."""
        with self._lock:
            if value is None:
                self._numbers[name].pop(labels, None)
            else:
                self._numbers[name][labels] = float(value)

    def set_all(self, name: str, values: Mapping[Labels, float]) -> None:
        """Say what all series of a metric are; others are gone."""
        with self._lock:
            self._numbers[name] = {labels: float(value) for labels, value in values.items()}

    def observe(
        self, name: str, seconds: float, labels: Labels = (), exemplar: str | None = None
    ) -> None:
        """Count a duration; `exemplar` names the checkpoint that it is of."""
        with self._lock:
            histogram = self._histograms[name].setdefault(labels, _Histogram())
            index = bucket_of(seconds)
            histogram.counts[index] += 1
            histogram.sum_seconds += seconds
            if exemplar is not None:
                histogram.exemplars[index] = Exemplar({"checkpoint": exemplar}, seconds)

    def observe_many(self, name: str, counts: Sequence[int], sum_seconds: float) -> None:
        """Count durations that somebody else has put into the buckets."""
        with self._lock:
            histogram = self._histograms[name].setdefault((), _Histogram())
            histogram.counts = [a + b for a, b in zip(histogram.counts, counts, strict=True)]
            histogram.sum_seconds += sum_seconds

    def value(self, name: str, labels: Labels = ()) -> float | None:
        """What a counter or a gauge is now."""
        with self._lock:
            return self._numbers[name].get(labels)

    # ------------------------------------------------------------------ written down

    def to_json(self) -> dict[str, Any]:
        """What must go on elsewhere: counters and histograms."""
        with self._lock:
            return {
                name: [{"labels": list(labels), "value": value} for labels, value in series.items()]
                for name, series in self._numbers.items()
                if self._definitions[name].kind == "counter" and any(series.values())
            } | {
                name: [
                    {"labels": list(labels), "counts": h.counts, "sum": round(h.sum_seconds, 6)}
                    for labels, h in series.items()
                    if any(h.counts)
                ]
                for name, series in self._histograms.items()
                if any(any(h.counts) for h in series.values())
            }

    def go_on_from(self, document: Mapping[str, Any]) -> None:
        """Add what another one has counted. What it has that is unknown here is passed over."""
        for name, rows in document.items():
            definition = self._definitions.get(name)
            for row in rows if definition is not None and isinstance(rows, list) else ():
                labels = _labels(row, definition)
                if labels is not None:
                    self._take(name, labels, row)

    def _take(self, name: str, labels: Labels, row: Mapping[str, Any]) -> None:
        with self._lock:
            if name in self._histograms:
                counts, total = row.get("counts"), row.get("sum")
                if _are_counts(counts) and _is_number(total):
                    held = self._histograms[name].setdefault(labels, _Histogram())
                    held.counts = [a + b for a, b in zip(held.counts, counts, strict=True)]
                    held.sum_seconds += float(total or 0.0)
            elif _is_number(row.get("value")):
                numbers = self._numbers[name]
                numbers[labels] = numbers.get(labels, 0.0) + float(row["value"])

    # ------------------------------------------------------------------ read by Prometheus

    def collect(self) -> Iterator[Metric]:
        """All families, as the client library asks for them."""
        with self._lock:
            return iter([self._family(each) for each in self._definitions.values()])

    def _family(self, definition: Definition) -> Metric:
        name, says, labels = definition.name, definition.says, definition.labels
        if definition.kind == "histogram":
            histogram = HistogramMetricFamily(name, says, labels=labels)
            for values, held in self._histograms[name].items():
                histogram.add_metric(values, held.buckets(), held.sum_seconds)
            return histogram
        family = (
            CounterMetricFamily(name, says, labels=labels)
            if definition.kind == "counter"
            else GaugeMetricFamily(name, says, labels=labels)
        )
        for values, number in self._numbers[name].items():
            family.add_metric(values, number)
        return family


def _labels(row: Any, definition: Definition | None) -> Labels | None:
    """The label values of a row that was written down, if it is one."""
    values = row.get("labels") if isinstance(row, Mapping) else None
    if definition is None or not isinstance(values, list) or len(values) != len(definition.labels):
        return None
    return tuple(map(str, values))


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) == BUCKETS
        and all(type(count) is int and count >= 0 for count in value)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0
