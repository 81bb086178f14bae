"""What the preemptions cost: from the attempts' records in the store and what the node saw."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import AttemptRecord, Ledger
from runner.checkpoint.manifest import Manifest
from runner.exitcodes import FINISHED
from runner.store import Store
from runner.supervisor.goodput import goodput_of
from runner.wallclock import parse_time

_CAUSES = {
    "succeeded": "finished",
    "preempted": "preemption",
    "interrupted": "interrupt",
    "stopped": "stop",
    "fenced": "fenced",
}
_RESULTS_FILE = "metrics.json"


@dataclass(frozen=True)
class Death:
    """The end of one supervisor: its last attempt, when (seconds of the wall clock), how."""

    attempt: int
    at: float
    exit_code: int
    step: int


def build_report(
    store: Store,
    run_id: str,
    first: int,
    deaths: Sequence[Death],
    wall_seconds: float,
    outputs: Path | None = None,
) -> dict[str, Any]:
    """The report of a simulation; `first` is the number of its first attempt.

    `outputs` is the folder where the script has written its own files, if that is known.
    """
    archive, now = Archive(store, run_id), time.time()
    records = [r for r in Ledger(store, run_id, "").records() if r.attempt >= first]
    exit_code = deaths[-1].exit_code if deaths else 1
    # A supervisor that died before it began an attempt has none of its own: the first one counts.
    death_of = {death.attempt: death for death in reversed(deaths)}
    final = next((m for m in archive.manifests() if m.moment.scope == "full"), None)
    ended = [_with_end(record, death_of.get(record.attempt)) for record in records]
    goodput = goodput_of(ended, now, submitted_at=now - wall_seconds).to_json()
    return {
        "run_id": run_id,
        "outcome": "succeeded" if exit_code == FINISHED else "failed",
        "exit_code": exit_code,
        "final_step": 0 if final is None else final.moment.step,
        "final_digest": None if final is None else archive.digest(final),
        "goodput_ratio": goodput["goodput_ratio"],
        "wall_seconds": round(wall_seconds, 3),
        "goodput": goodput,
        "attempts": _attempts(records, death_of, final),
        "results": {} if outputs is None else _results(outputs / _RESULTS_FILE),
    }


def _with_end(record: AttemptRecord, death: Death | None) -> AttemptRecord:
    """A record whose supervisor was killed does not say when it ended; the node has seen it."""
    if death is None or record.outcome is not None:
        return record
    ended_at = datetime.fromtimestamp(death.at, UTC).isoformat()
    return replace(record, ended_at=ended_at, end_step=max(record.start_step, death.step))


def _attempts(
    records: Sequence[AttemptRecord], deaths: dict[int, Death], final: Manifest | None
) -> list[dict[str, Any]]:
    rows = []
    for record, following in zip(records, [*records[1:], None], strict=True):
        death = deaths.get(record.attempt)
        end_step = record.end_step
        if end_step is None or (death is not None and record.outcome is None):
            end_step = max(record.start_step, death.step if death else record.saved_step or 0)
        kept = following.start_step if following else (final.moment.step if final else 0)
        rows.append(
            {
                "attempt": record.attempt,
                "start_step": record.start_step,
                "end_step": end_step,
                "saved_step": record.saved_step,
                "cause": _cause(record),
                "exit_code": death.exit_code if death else record.exit_code,
                "lost_steps": max(0, end_step - kept),
                "notice_to_durable_seconds": _rounded(record.notice_to_durable_seconds),
                "kill_to_first_step_seconds": _rounded(_until_next_step(record, death, following)),
            }
        )
    return rows


def _cause(record: AttemptRecord) -> str:
    if record.outcome is None:
        return "killed"
    return _CAUSES.get(record.outcome) or record.cause or record.outcome


def _until_next_step(
    record: AttemptRecord, death: Death | None, following: AttemptRecord | None
) -> float | None:
    if following is None or following.first_step_at is None:
        return None
    ended = death.at if death else parse_time(record.ended_at)
    began = parse_time(following.first_step_at)
    return None if ended is None or began is None else began - ended


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _results(path: Path) -> dict[str, Any]:
    """What the script has written to `metrics.json` in its output folder, if anything."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    attempts = report["attempts"]
    preemptions = [a for a in attempts if a["cause"] in ("preemption", "killed")]
    summary = (
        f"run {report['run_id']}: {report['outcome']} at step {report['final_step']} after "
        f"{report['wall_seconds']:.1f} s, {len(preemptions)} preemptions, "
        f"{sum(a['lost_steps'] for a in attempts)} steps lost, "
        f"goodput {100 * report['goodput_ratio']:.0f} %"
    )
    heading = (
        f"{'attempt':>7}  {'steps':>13}  {'saved':>6}  {'lost':>4}  "
        f"{'notice → durable':>16}  {'kill → next step':>16}  ended by"
    )
    lines = ["", summary, "", heading]
    for a in attempts:
        steps = f"{a['start_step']}–{a['end_step']}"
        saved = "-" if a["saved_step"] is None else a["saved_step"]
        lines.append(
            f"{a['attempt']:>7}  {steps:>13}  {saved:>6}  {a['lost_steps']:>4}  "
            f"{_duration(a['notice_to_durable_seconds']):>16}  "
            f"{_duration(a['kill_to_first_step_seconds']):>16}  {a['cause']}"
        )
    lines += ["", _where_time_went(report["goodput"])]
    lines += ["", f"final state  sha256 {report['final_digest']}"]
    for name, value in report["results"].items():
        if isinstance(value, int | float):
            lines.append(f"{name:<28} {value:.4g}")
    return "\n".join(lines)


def _where_time_went(goodput: dict[str, Any]) -> str:
    """In one line, the longest first; what is under a hundredth of it is left out."""
    parts = {"productive": goodput["productive_seconds"], **goodput["badput_seconds"]}
    told = sorted(parts.items(), key=lambda part: -part[1])
    least = goodput["wall_seconds"] / 100
    found = [
        f"{kind.replace('_', ' ')} {seconds:.1f} s" for kind, seconds in told if seconds > least
    ]
    return f"time went into  {', '.join(found)}"


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s"
