"""What a supervisor is given to run, and what that means for it and for its trainer.

Pure but for two variables of the environment, by which a simulated node tells what it is going to
do.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

from runner.checkpoint.keeper import Origin
from runner.job import Every, Job
from runner.launch.base import Places
from runner.plan import BestMetric, Interval, Plan
from runner.supervisor import machine, stacks

HOLD_VARIABLE = "RUNNER_HOLD_AT_STEP"
GRACE_VARIABLE = "RUNNER_GRACE_SECONDS"


@dataclass(frozen=True)
class Assignment:
    """A job, under which name it runs, and what it begins from."""

    job: Job
    run_id: str
    begin_at: str | None = None
    origin: Origin | None = None


@dataclass(frozen=True)
class LocalFiles:
    """The folder of a run on this node.

    What lies in it is made where it is needed; the folder itself never is, once the run has begun:
    where the run's store was unmounted, it would come into being in the mount point.
    """

    folder: Path

    @property
    def outputs(self) -> Path:
        """The script's own files."""
        return self.folder / "outputs"

    @property
    def validation(self) -> Path:
        """Where a checkpoint is read back to, to be tried."""
        return self.folder / ".validation"

    @property
    def slots(self) -> Path:
        """Where a slot goes that memory is too short for."""
        return self.folder / ".slots"


def policy_for(assignment: Assignment) -> machine.Policy:
    """What the machine obeys."""
    job, grace = assignment.job, os.environ.get(GRACE_VARIABLE)
    restart = job.restart
    return machine.Policy(
        grace_seconds=float(grace) if grace else job.preemption.grace_seconds,
        failures=restart.failures,
        backoff_initial_seconds=restart.backoff.initial_seconds,
        backoff_max_seconds=restart.backoff.max_seconds,
        hang_timeout_seconds=restart.hang_timeout_seconds,
        store_timeout_seconds=restart.store_timeout_seconds,
        never=tuple(restart.never),
        restore_healthy=job.health.restore == "healthy",
        seed=random.SystemRandom().getrandbits(32),
        stacks_seconds=stacks.seconds_needed(),
        logs=f"`runner logs {assignment.run_id}`",
    )


def plan_for(assignment: Assignment, attempt: int, places: Places, files: LocalFiles) -> Plan:
    """What the trainer of an attempt must know. `places` is where it sees the run's folders."""
    job = assignment.job
    checkpoint, best = job.checkpoint, job.checkpoint.keep.best
    every, snapshots = checkpoint.every, checkpoint.snapshot_every
    hold = os.environ.get(HOLD_VARIABLE)
    return Plan(
        run_id=assignment.run_id,
        attempt=attempt,
        output_dir=str(places.outputs),
        disk=str(files.slots),
        disk_here="" if places.slots == files.slots else str(places.slots),
        every=_interval(every),
        weights_every=_interval(checkpoint.weights_every),
        every_auto=every is None,
        snapshot_steps=snapshots.steps if snapshots else None,
        slots=checkpoint.slots,
        overlap=checkpoint.overlap,
        best=None if best is None else BestMetric(best.metric, best.mode, best.count),
        health_metrics=tuple(job.health.metrics),
        hold_at_step=int(hold) if hold else None,
    )


def variables_for(assignment: Assignment, attempt: int, places: Places) -> dict[str, str]:
    """What the trainer of an attempt is told by its environment."""
    return {
        "RUNNER_RUN_ID": assignment.run_id,
        "RUNNER_ATTEMPT": str(attempt),
        "RUNNER_SPOOL": str(places.spool),
        "RUNNER_PARAMS": json.dumps(assignment.job.params),
        "RUNNER_OUTPUT_DIR": str(places.outputs),
    }


def _interval(every: Every | None) -> Interval:
    return Interval() if every is None else Interval(every.steps, every.minutes, every.epochs)
