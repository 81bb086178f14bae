"""Made-up runs for the views: what a look at one would have found, without a run."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from runner.checkpoint.attempts import AttemptRecord
from runner.points import Point
from runner.saves import SaveRecord
from runner.views.curves import Curves
from runner.views.facts import Details, Facts

BEGUN = 1_790_000_000.0


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(BEGUN + seconds, UTC).isoformat()


def status(**values: Any) -> dict[str, Any]:
    """What `lookup` would say of a run that has finished."""
    return {
        "run_id": "rul-fd001",
        "phase": "succeeded",
        "live": False,
        "step": 1760,
        "epoch": 30,
        "epochs": None,
        "batch": None,
        "attempt": 3,
        "activity": None,
        "cause": None,
        "saved_step": 1760,
        "last_checkpoint": "step-000001760-a0003-s002",
        "store": "s3://training/runs",
        "pid": None,
    } | values


def record(attempt: int, began: float, first: float, ended: float, **values: Any) -> AttemptRecord:
    """An attempt from a second of the run to another."""
    spent = {"startup": first - began - 1, "restore": 1.0, "stall": 0.6, "draining": 0.5}
    spent["validation"] = 0.05 * (ended - first)
    spent["productive"] = ended - began - sum(spent.values())
    return AttemptRecord(
        **{
            "attempt": attempt,
            "owner": "f00d",
            "node": "spot-eu-1a-7f",
            "started_at": iso(began),
            "first_step_at": iso(first),
            "ended_at": iso(ended),
            "outcome": "preempted",
            "spent": spent,
            "seen_at": iso(ended),
            "resumed_productive_seconds": 0.22 * values.get("start_step", 0),
            **values,
        }
    )


def records() -> tuple[AttemptRecord, ...]:
    """Preempted, lost with 30 steps, failed, finished."""
    return (
        record(1, 0, 4, 120, end_step=450, saved_step=450, cause="preempted by SIGTERM",
               notice_to_durable_seconds=0.31),
        record(2, 150, 155, 290, start_step=450, end_step=None, saved_step=880, outcome=None,
               ended_at=None, resumed_from="step-000000450-a0001-s004"),
        record(3, 330, 334, 420, start_step=880, end_step=1210, saved_step=1200, outcome="failed",
               cause="the trainer ended with 1", exit_code=1,
               resumed_from="step-000000880-a0002-s004"),
        record(4, 422, 426, 560, start_step=1200, end_step=1760, saved_step=1760,
               outcome="succeeded", resumed_from="step-000001200-a0003-s003"),
    )  # fmt: skip


def points(rows: Sequence[AttemptRecord]) -> list[Point]:
    """A loss that falls, and one that is logged now and then; attempt 2 went on to step 910."""
    chance = random.Random(1)
    found = []
    for row in rows:
        end = 910 if row.attempt == 2 else row.end_step or 0
        begun = datetime.fromisoformat(row.first_step_at or row.started_at).timestamp()
        for step in range(row.start_step + 1, end + 1):
            loss = (
                2.2 * math.exp(-step / 260) + 0.02 + 0.04 * chance.random() * math.exp(-step / 900)
            )
            values = {"train_loss": loss, "lr": 1e-3 * (1 + math.cos(math.pi * step / 1760)) / 2}
            if step % 58 == 0:
                values["val_rmse"] = 13 + 30 * math.exp(-step / 300) + chance.random()
            found.append(
                Point(row.attempt, step, step // 58, begun + 0.28 * (step - row.start_step), values)
            )
    return found


def saves(rows: Sequence[AttemptRecord]) -> list[SaveRecord]:
    chance = random.Random(2)
    found = []
    for row in rows:
        begun = datetime.fromisoformat(row.first_step_at or row.started_at).timestamp()
        steps = range(row.start_step + 110, (row.saved_step or 0) + 1, 110)
        for number, step in enumerate(steps, 1):
            last = step + 110 > (row.saved_step or 0)
            triggers = ("preemption",) if last and row.outcome == "preempted" else ("interval",)
            found.append(
                SaveRecord(f"step-{step:09d}-a{row.attempt:04d}-s{number:03d}", row.attempt, step,
                     begun + 0.28 * (step - row.start_step), triggers, "full", 8_120_000,
                     0.012, 0.2 + 0.3 * chance.random())
            )  # fmt: skip
    return found


def checkpoints(made: Sequence[SaveRecord]) -> list[dict[str, Any]]:
    reasons = [
        ["newest", "last", "restored from"],
        ["last"],
        ["last", "best"],
        ["best"],
        ["pinned"],
    ]
    return [
        {
            "name": save.checkpoint, "step": save.step, "epoch": save.step // 58,
            "attempt": save.attempt, "save": 1, "triggers": list(save.triggers),
            "bytes": save.nbytes, "healthy": True, "pinned": "pinned" in why,
            "created_at": datetime.fromtimestamp(save.time, UTC).isoformat(),
            "validated": "valid" if n == 0 else None,
            "validation": {"verdict": "valid", "reason": ""} if n == 0 else None,
            "metrics": {"val_rmse": 13.1}, "kept_because": why, "sound": n != 3,
            "compared": "size, the store's checksum",
            "problem": "" if n != 3 else "optimizer.safetensors has another checksum in the store",
        }
        for n, (save, why) in enumerate(zip(reversed(made), reasons, strict=False))
    ]  # fmt: skip


def finished(**values: Any) -> tuple[Facts, Details]:
    """A run of four attempts that has come to its end."""
    rows, curves = records(), Curves()
    curves.take(points(rows))
    made = saves(rows)
    facts = Facts(
        seen_at=BEGUN + 700,
        status=status(attempt=4, **values),
        document={
            "created_at": iso(-2),
            "job": {
                "name": "rul-fd001",
                "preemption": {"grace": "30s"},
                "params": {"epochs": 30, "lr": 0.001},
            },
        },
        records=rows,
        newest_values=curves.newest,
        last_points=curves.last,
        last_save=made[-1],
        total_steps=1760,
        emergency_seconds=0.74,
    )  # fmt: skip
    bad = {"step-000000990-a0003-s001": "part 0 of model.safetensors has other bytes"}
    details = Details(made, checkpoints(made), bad, list(curves.traces()))
    return facts, details
