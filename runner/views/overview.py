"""One look at a run, as one plain JSON document. Pure: facts in, document out.

    run            where it is: what `runner status` prints, key for key
    attempts       each life of the trainer: when, which steps, why it ended, what was lost
    saves          each checkpoint that became durable: when, why, how long it took
    save_seconds   the same in a few numbers
    goodput        where the time went; the parts add up to the whole
    curves         what was logged, by metric and attempt; `kept` is the way that counts
    checkpoints    what is in the store now, why it stays, and whether it is sound
    quarantine     what was found damaged, and why
    job            what was submitted, and where it came from

Every view draws this document and nothing else, so no two of them tell different numbers. Times of
the wall clock are ISO 8601 in UTC; `…_seconds` beside them count from the first start of the run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from runner.checkpoint.attempts import AttemptRecord
from runner.supervisor.goodput import PRODUCTIVE
from runner.views.curves import Reading, kept_until
from runner.views.facts import Details, Facts
from runner.wallclock import parse_time

VERSION = 1
_ENDED_BY = {
    "succeeded": "finished",
    "preempted": "preemption",
    "interrupted": "interrupt",
    "stopped": "stop",
    "fenced": "fenced off",
    "failed": "failure",
}


def glance(facts: Facts) -> dict[str, Any]:
    """Where the run is: one flat object, the same for the terminal, for `-o json` and the page."""
    rows = attempt_rows(facts)
    record = facts.records[-1] if facts.records else None
    now = facts.seen_at if facts.is_live else _last_seen(facts)
    begun, goodput = _begun(facts), facts.goodput
    pace = _seconds_per_step(facts, now)
    left = _steps_left(facts)
    metric = main_metric(facts.newest_values)
    saved_at = _saved_at(facts)
    grace, emergency = facts.grace_seconds, facts.emergency_seconds
    return {
        **facts.status,
        "total_steps": facts.total_steps,
        "progress_ratio": _rounded(_progress(facts)),
        "seconds_per_step": _rounded(pace),
        "eta_seconds": _rounded(pace * left)
        if pace is not None and left and facts.goes_on
        else None,
        "metric": metric,
        "value": None if metric is None else json_number(facts.newest_values[metric]),
        "saved_at": iso(saved_at),
        "saved_seconds_ago": None if saved_at is None else _rounded(facts.seen_at - saved_at),
        "node": None if record is None else record.node,
        "preemptions": sum(row["ended_by"] in ("preemption", "lost") for row in rows),
        "failures": sum(row["ended_by"] == "failure" for row in rows),
        "lost_steps": sum(row["lost_steps"] for row in rows),
        "grace_seconds": grace,
        "emergency_seconds": _rounded(emergency),
        "headroom_seconds": None
        if grace is None or emergency is None
        else _rounded(grace - emergency),
        "goodput_ratio": _rounded(goodput.ratio) if facts.records else None,
        "wall_seconds": None if begun is None else _rounded(goodput.wall_seconds),
        "started_at": iso(begun),
        "seen_at": iso(facts.seen_at),
    }


def overview(facts: Facts, details: Details) -> dict[str, Any]:
    """The whole document."""
    return {
        "format": VERSION,
        "run": glance(facts),
        "attempts": attempt_rows(facts),
        "saves": _save_rows(facts, details),
        "save_seconds": _save_summary(details),
        "goodput": _goodput(facts),
        "curves": _curves(facts, details),
        "checkpoints": list(details.checkpoints),
        "quarantine": [
            {"name": name, "reason": reason} for name, reason in sorted(details.quarantine.items())
        ],
        "job": dict(facts.document.get("job") or {}),
        "provenance": facts.document.get("provenance"),
    }


# ---------------------------------------------------------------------------- attempts


def attempt_rows(facts: Facts) -> list[dict[str, Any]]:
    """What became of each attempt, oldest first."""
    origin = _begun(facts) or 0.0
    rows = []
    for number, record in enumerate(facts.records):
        later = facts.records[number + 1 :]
        is_last = not later
        began, ended = parse_time(record.started_at), _ended(facts, record, is_last=is_last)
        first = parse_time(record.first_step_at)
        following = next((r for r in later if r.first_step_at is not None), None)
        until = None if following is None else parse_time(following.first_step_at)
        end_step = _end_step(facts, record, is_last=is_last)
        rows.append(
            {
                "attempt": record.attempt,
                "node": record.node,
                "started_at": record.started_at,
                "first_step_at": record.first_step_at,
                "ended_at": record.ended_at,
                "begin_seconds": _offset(began, origin),
                "first_step_seconds": _offset(first, origin),
                "end_seconds": _offset(ended, origin),
                "ended_by": _ended_by(facts, record, is_last=is_last),
                "cause": record.cause,
                "exit_code": record.exit_code,
                "resumed_from": record.resumed_from,
                "start_step": record.start_step,
                "end_step": end_step,
                "saved_step": record.saved_step,
                "lost_steps": _lost(facts, record, later, end_step),
                "notice_to_durable_seconds": _rounded(record.notice_to_durable_seconds),
                "end_to_next_step_seconds": None
                if until is None or ended is None
                else _rounded(max(0.0, until - ended)),
            }
        )
    return rows


def _ended_by(facts: Facts, record: AttemptRecord, *, is_last: bool) -> str:
    if record.outcome is not None:
        return _ENDED_BY.get(record.outcome, record.outcome)
    return "running" if is_last and facts.goes_on else "lost"


def _ended(facts: Facts, record: AttemptRecord, *, is_last: bool) -> float | None:
    """When it ended: now, if it goes on; if nobody has noted it, when it was last heard of."""
    if is_last and facts.is_live and record.outcome is None:
        return facts.seen_at
    ended = parse_time(record.ended_at)
    last = facts.last_points.get(record.attempt)
    heard = [
        parse_time(record.first_step_at),
        parse_time(record.seen_at),
        None if last is None else last.time,
    ]
    return ended or max((at for at in heard if at is not None), default=None)


def _end_step(facts: Facts, record: AttemptRecord, *, is_last: bool) -> int:
    if is_last and facts.is_live and record.outcome is None:
        return max(record.start_step, int(facts.status["step"]))
    last = facts.last_points.get(record.attempt)
    known = [record.end_step, record.saved_step, None if last is None else last.step]
    return max(record.start_step, record.end_step or max(step or 0 for step in known))


def _lost(
    facts: Facts, record: AttemptRecord, later: Sequence[AttemptRecord], end_step: int
) -> int:
    """Steps that were made again, or have to be. What an attempt begins from is known late."""
    following = next((r for r in later if r.resumed_from or r.first_step_at), None)
    if following is not None:
        return max(0, end_step - following.start_step)
    if record.outcome == "succeeded" or (facts.goes_on and not later):
        return 0
    newest = 0 if facts.newest is None else facts.newest.moment.step
    return max(0, end_step - max(record.start_step, record.saved_step or 0, newest))


# ---------------------------------------------------------------------------- progress


def _begun(facts: Facts) -> float | None:
    return parse_time(facts.records[0].started_at) if facts.records else None


def _last_seen(facts: Facts) -> float:
    """The end of a run that does not go on here: of its last attempt, as far as that is known."""
    if not facts.records:
        return facts.seen_at
    record = facts.records[-1]
    return _ended(facts, record, is_last=True) or parse_time(record.started_at) or facts.seen_at


def _seconds_per_step(facts: Facts, now: float) -> float | None:
    """Of the attempt at hand, with all that lies between two steps; else of the run's steps."""
    record = facts.records[-1] if facts.records else None
    first = None if record is None else parse_time(record.first_step_at)
    steps = 0 if record is None else int(facts.status["step"]) - record.start_step - 1
    if facts.is_live and first is not None and steps > 0:
        return max(0.0, now - first) / steps
    moment = None if facts.newest is None else facts.newest.moment
    if moment is not None and moment.step and moment.productive_seconds:
        return moment.productive_seconds / moment.step
    return None


def _steps_left(facts: Facts) -> int | None:
    total = facts.total_steps
    return None if total is None else max(0, total - int(facts.status["step"]))


def _progress(facts: Facts) -> float | None:
    if facts.status["phase"] == "succeeded":
        return 1.0
    total = facts.total_steps
    return None if not total else min(1.0, int(facts.status["step"]) / total)


def main_metric(values: Mapping[str, float]) -> str | None:
    """The one to show where there is room for one: a loss, the training's before others."""
    names = sorted(values, key=lambda name: (len(name), name))
    losses = [name for name in names if "loss" in name.lower()]
    training = [name for name in losses if "train" in name.lower() or name.lower() == "loss"]
    return next(iter([*training, *losses, *names]), None)


def _saved_at(facts: Facts) -> float | None:
    if facts.last_save is not None:
        return facts.last_save.time
    return None if facts.newest is None else parse_time(facts.newest.moment.created_at)


# ---------------------------------------------------------------------------- saves


def _save_rows(facts: Facts, details: Details) -> list[dict[str, Any]]:
    origin = _begun(facts) or 0.0
    return [
        {
            "checkpoint": save.checkpoint,
            "attempt": save.attempt,
            "step": save.step,
            "triggers": list(save.triggers),
            "scope": save.scope,
            "bytes": save.nbytes,
            "at": iso(save.time),
            "at_seconds": _offset(save.time, origin),
            "snapshot_seconds": _rounded(save.snapshot_seconds),
            "persist_seconds": _rounded(save.persist_seconds),
            "total_seconds": _rounded(save.total_seconds),
        }
        for save in details.saves
    ]


def _save_summary(details: Details) -> dict[str, Any]:
    seconds = sorted(
        save.total_seconds
        for save in details.saves
        if save.scope == "full" and save.total_seconds is not None
    )
    return {
        "count": len(details.saves),
        "measured": len(seconds),
        "median": _rounded(statistics.median(seconds)) if seconds else None,
        "p95": _rounded(seconds[math.ceil(0.95 * len(seconds)) - 1]) if seconds else None,
        "max": _rounded(seconds[-1]) if seconds else None,
    }


# ---------------------------------------------------------------------------- goodput, curves


def _goodput(facts: Facts) -> dict[str, Any]:
    goodput = facts.goodput
    whole = goodput.wall_seconds
    parts = [(PRODUCTIVE, goodput.productive_seconds), *goodput.badput_seconds.items()]
    return {
        "ratio": _rounded(goodput.ratio),
        "wall_seconds": _rounded(whole),
        "parts": [
            {
                "kind": kind,
                "seconds": _rounded(seconds),
                "ratio": _rounded(seconds / whole) if whole > 0 else None,
            }
            for kind, seconds in (parts if facts.records else ())
        ],
        "cost": goodput.cost(),
    }


def _curves(facts: Facts, details: Details) -> list[dict[str, Any]]:
    begun = {
        record.attempt: record.start_step
        for record in facts.records
        if record.first_step_at is not None
    }
    curves = []
    for name, traces in details.curves:
        bounds = kept_until(begun, traces)
        kept = [
            reading
            for attempt, trace in traces.items()
            for reading in trace
            if reading.step <= bounds[attempt]
        ]
        finite = [reading.value for reading in kept if math.isfinite(reading.value)]
        curves.append(
            {
                "name": name,
                "last": json_number(kept[-1].value) if kept else None,
                "min": min(finite, default=None),
                "max": max(finite, default=None),
                "traces": [
                    {
                        "attempt": attempt,
                        "kept": _pairs(r for r in trace if r.step <= bounds[attempt]),
                        "again": _pairs(r for r in trace if r.step > bounds[attempt]),
                    }
                    for attempt, trace in traces.items()
                ],
            }
        )
    return curves


def _pairs(readings: Iterable[Reading]) -> list[list[Any]]:
    return [[reading.step, json_number(reading.value)] for reading in readings]


# ---------------------------------------------------------------------------- numbers


def json_number(value: float) -> float | str:
    """A number as JSON has it; those that it lacks by their names, as in manifests."""
    return value if math.isfinite(value) else str(value)


def iso(seconds: float | None) -> str | None:
    """A time of the wall clock."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def _offset(at: float | None, origin: float) -> float | None:
    return None if at is None else round(at - origin, 3)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
