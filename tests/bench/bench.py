"""Measure what `runner` promises to be fast at, beside a peer in the same run.

    python -m tests.bench.bench [--quick] [--json FILE | -o json] [--only NAME] [--patience SECONDS]

With `S3_ENDPOINT` in the environment, a bucket, too: `PYTHONPATH=tests python -m servers.ceph up`
brings up a server and prints what reaches it. With `DOCKER_HOST`, containers: `servers.engine`.
Prints a table, or one JSON document with everything in it. Ends with 1 if what was measured was
not right: if a run that was disturbed did not end in the very state of one that was not. A limit
that was missed is printed, and no error: it may be the machine's fault.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.bench import (
    containing,
    disturbing,
    enduring,
    s3,
    saving,
    scraping,
    stalling,
    starting,
    tracking,
    validating,
)
from tests.bench.figures import Check, Figure, as_table
from tests.bench.place import Place
from tests.bench.supervised import warm_up

SIZES_MB = (1.0, 500.0)
SAVING_SIZES_MB = (50.0, 600.0, 3000.0)
EMERGENCY_SIZE_MB = 600.0
VALIDATED_SIZE_MB = 50.0
REPETITIONS, QUICK_REPETITIONS = 5, 2
STARTS = 15

Measured = tuple[list[Figure], list[Check]]


def measurements(repetitions: int, starts: int) -> dict[str, Callable[[Place], Measured]]:
    """By name, in the order in which they are taken."""

    def of_size(
        measure: Callable[[Place, float, int], Measured], megabytes: float
    ) -> Callable[[Place], Measured]:
        return lambda place: measure(place, megabytes, repetitions)

    parts: dict[str, Callable[[Place], Measured]] = {
        "start": lambda place: (starting.measure(place, starts), []),
        "memory": lambda place: (starting.measure_memory(place, repetitions), []),
    }
    for size in SIZES_MB:
        parts[f"disturb-{size:g}"] = of_size(disturbing.measure, size)
        parts[f"stall-{size:g}"] = of_size(stalling.measure, size)
    for size in SAVING_SIZES_MB:
        parts[f"save-{size:g}"] = of_size(saving.measure, size)
    parts["scrape"] = lambda place: scraping.measure(place, repetitions)
    parts["every-step"] = of_size(saving.measure_every_step, EMERGENCY_SIZE_MB)
    parts["track"] = of_size(tracking.measure, VALIDATED_SIZE_MB)
    parts["validate"] = of_size(validating.measure, VALIDATED_SIZE_MB)
    many = repetitions > QUICK_REPETITIONS
    times = enduring.PREEMPTIONS if many else enduring.QUICK_PREEMPTIONS
    parts["endure"] = lambda place: enduring.measure(place, times)
    if "DOCKER_HOST" in os.environ:
        parts["container"] = lambda place: containing.measure(place, repetitions)
    if "S3_ENDPOINT" in os.environ:
        parts["s3"] = lambda place: s3.measure(place, repetitions)
        parts["s3-memory"] = lambda place: s3.measure_memory(place, 1)
        parts["s3-emergency"] = of_size(s3.measure_emergency, EMERGENCY_SIZE_MB)
        parts["s3-requests"] = lambda place: s3.measure_requests(place, repetitions)
    return parts


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    """Take the measurements that were asked for; the whole document, and its figures."""
    repetitions = QUICK_REPETITIONS if options.quick else REPETITIONS
    parts = measurements(repetitions, repetitions if options.quick else STARTS)
    figures: list[Figure] = []
    checks: list[Check] = []
    begun, load_before = time.monotonic(), os.getloadavg()
    with Place(options.dir, options.patience) as place:
        facts = place.facts()
        warm_up(place)
        for name in options.only or parts:
            print(f"bench: {name} …", file=sys.stderr, flush=True)
            more, found = parts[name](place)
            figures += more
            checks += found
            place.clear()
    document = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begun, 1),
        "quick": options.quick,
        "machine": facts,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "figures": [figure.to_json() for figure in figures if figure.values],
        "checks": [check.to_json() for check in checks],
    }
    return document, [figure for figure in figures if figure.values]


def as_text(document: dict[str, Any], figures: list[Figure]) -> str:
    """The document for people, in Markdown."""
    load = document["load_average"]
    facts = [
        *(f"{name.replace('_', ' ')}: {fact}" for name, fact in document["machine"].items()),
        f"measured: {document['measured_at']}, in {document['seconds']:.0f} s",
        f"load average (1 min): {load['before'][0]:.1f} before, {load['after'][0]:.1f} after",
    ]
    checks = [
        f"- {'yes' if check['holds'] else 'NO'}: {check['name']} ({check['found']:.12}"
        + ("" if check["holds"] else f", and not {check['expected']:.12}")
        + ")"
        for check in document["checks"]
    ]
    lines = [*(f"- {fact}" for fact in facts), "", as_table(figures)]
    return "\n".join([*lines, "", "Is it right?", "", *checks] if checks else lines)


def main() -> int:
    options = _parser().parse_args()
    document, figures = measure(options)
    text = json.dumps(document, indent=1)
    if options.json is not None:
        options.json.write_text(text + "\n")
    print(text if options.output == "json" else as_text(document, figures))
    return 0 if all(check["holds"] for check in document["checks"]) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bench", description="Measure runner, beside its peers."
    )
    known = list(measurements(0, 0))
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON document")
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    parser.add_argument("--only", action="append", choices=known, help="may be repeated")
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the store goes"
    )
    parser.add_argument(
        "--patience", type=float, default=0.0, metavar="SECONDS",
        help="wait so long, before each repetition, for others to be quiet",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
