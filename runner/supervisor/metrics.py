"""Every metric of a run, by name: what it means, its labels, and how it is rendered.

Base units, `_total` for counters, and `run_id` on `runner_run_info` alone: the rest can be added up
across runs. Dashboard, alerts and documentation are made from, or checked against, this table.
"""

from __future__ import annotations

from dataclasses import replace

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from runner.supervisor.goodput import BADPUT
from runner.supervisor.tally import Definition, Labels, Tally

STORE = "{store}"  # stands for the URL of a run's store
SAVE_PHASES = ("snapshot", "persist", "upload", "commit", "total")
NO_TRIGGER = "none"  # of a save that nothing asked for: what a dead trainer has left
FAILURES = ("denied", "unfit", "refused", "local", "invalid")
CORRUPTIONS = ("manifest", "content")
VALIDATIONS = ("valid", "invalid", "unknown")
DELETIONS = ("superseded", "unfinished")
RESTORE_PHASES = ("fetch", "load", "total")
OTHER = "other"
SOURCES = ("SIGTERM", "aws", "gcp", "azure", OTHER)
RESTARTS = ("preemption", "stop", "lost", "crash", "hang", "memory", "unhealthy", "preparation")


def _each(*values: str) -> tuple[Labels, ...]:
    return tuple((value,) for value in values)


METRICS = (
    Definition("runner_run_info", "gauge", "Always 1; its labels say which run this is.",
               ("run_id", "job", "store", "launcher", "version")),
    Definition("runner_phase", "gauge", "1 for the phase that the supervisor is in.",
               ("phase",)),
    Definition("runner_attempt", "gauge", "Number of the attempt at hand."),
    Definition("runner_attempt_start_timestamp_seconds", "gauge",
               "When the attempt at hand began."),
    Definition("runner_step", "gauge", "Optimizer steps that are finished."),
    Definition("runner_epoch", "gauge", "The epoch at hand, from 0."),
    Definition("runner_epochs", "gauge", "Epochs of the whole run, where the script has any."),
    Definition("runner_step_seconds", "histogram",
               "What the steps took, from one boundary to the next."),
    Definition("runner_train_metric", "gauge", "The newest value logged under a name.",
               ("name",)),
    Definition("runner_checkpoint_save_seconds", "histogram",
               "What a save took: the copy into a slot, all from there until it was durable, "
               "of that writing the files and committing them; and in all.",
               ("phase", "trigger")),
    Definition("runner_checkpoint_stall_seconds", "histogram",
               "What the training loop waited at a boundary where a snapshot was taken."),
    Definition("runner_checkpoint_bytes", "gauge", "Size of the newest checkpoint."),
    Definition("runner_checkpoint_interval_seconds", "gauge",
               "Time between two checkpoints, as far as the job file and the run tell."),
    Definition("runner_checkpoint_last_success_timestamp_seconds", "gauge",
               "When a checkpoint became durable last.", ("store",)),
    Definition("runner_checkpoint_failures_total", "counter",
               "Saves that the store or this machine has refused.", ("store", "reason"),
               tuple((STORE, reason) for reason in FAILURES)),
    Definition("runner_checkpoint_corrupt_total", "counter",
               "Checkpoints that did not match their manifest and went into quarantine.",
               ("store",), ((STORE,),)),
    Definition("runner_checkpoints", "gauge", "Checkpoints that are kept.", ("store",)),
    Definition("runner_checkpoint_validations_total", "counter",
               "Checkpoints that were loaded and tried, by what came of it.",
               ("result",), _each(*VALIDATIONS)),
    Definition("runner_retention_deleted_total", "counter",
               "Checkpoints that were deleted, and remains of saves.", ("store", "reason"),
               tuple((STORE, reason) for reason in DELETIONS)),
    Definition("runner_restore_seconds", "histogram",
               "What a restore took: fetching and verifying, putting it into place, and in "
               "all.", ("phase",), _each(*RESTORE_PHASES)),
    Definition("runner_preemptions_total", "counter", "Notices that this node will go.",
               ("source",), _each(*SOURCES)),
    Definition("runner_preemption_lead_seconds", "gauge",
               "Time between the last notice and the kill that it announced."),
    Definition("runner_grace_seconds", "gauge", "Time between a notice and the kill here."),
    Definition("runner_grace_headroom_seconds", "gauge",
               "What the grace leaves after an emergency save; below 0 it does not fit."),
    Definition("runner_restarts_total", "counter",
               "Starts of the trainer after the first, by what ended the attempt before.",
               ("reason",), _each(*RESTARTS)),
    Definition("runner_failures_without_progress", "gauge",
               "Consecutive failures without a new durable step."),
    Definition("runner_failures_limit", "gauge",
               "So many of them are tried again; after that the run is given up."),
    Definition("runner_lost_steps_total", "counter", "Steps that had to be made again."),
    Definition("runner_goodput_ratio", "gauge",
               "Share of the time since the first submit that went into steps that count."),
    Definition("runner_badput_seconds_total", "counter",
               "The rest of that time, by what it went into.", ("kind",), _each(*BADPUT)),
    Definition("runner_productive_seconds_total", "counter",
               "Time that went into steps, those included that were lost later."),
    Definition("runner_trainer_memory_bytes", "gauge",
               "Private memory of the trainer's processes, without the slots."),
    Definition("runner_spool_size_bytes", "gauge", "Size of the file system of the spool."),
    Definition("runner_spool_free_bytes", "gauge", "What is free of it."),
    Definition("runner_store_throughput_bytes_per_second", "gauge",
               "Of the last save, or the last restore.", ("store", "direction")),
)  # fmt: skip


def tally_for(store: str) -> Tally:
    """A new tally of all metrics; `store` is the value of the label of that name."""
    return Tally([replace(each, start=_of(store, each.start)) for each in METRICS])


def _of(store: str, start: tuple[Labels, ...]) -> tuple[Labels, ...]:
    return tuple(tuple(store if value == STORE else value for value in row) for row in start)


def main_trigger(triggers: tuple[str, ...]) -> str:
    """The one trigger that a save with several is counted under: the most urgent."""
    order = ("preemption", "interrupt", "final", "best", "manual", "interval")
    return next((trigger for trigger in order if trigger in triggers), NO_TRIGGER)


def registry_of(tally: Tally) -> CollectorRegistry:
    """A registry that has these metrics and nothing else."""
    registry = CollectorRegistry()
    registry.register(tally)
    return registry


def rendered(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The metrics in the format that a request's Accept header asks for, and its type."""
    encode, kind = choose_encoder(accept)
    return encode(registry), kind
