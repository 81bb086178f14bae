"""From what happens to a run to its metrics: which number each happening changes."""

from __future__ import annotations

import time

from runner.supervisor.happenings import (
    CheckpointQuarantined,
    CheckpointSaved,
    Happening,
    Noticed,
    RemainsRemoved,
    Restarted,
    SaveRefused,
    StateFetched,
)
from runner.supervisor.metrics import OTHER, SOURCES
from runner.supervisor.tally import Tally


class Counting:
    """Counts in a tally; `store` is the value of the label of that name."""

    def __init__(self, tally: Tally, store: str) -> None:
        self._tally, self._store = tally, store

    def count(self, happening: Happening) -> None:
        """Change what this happening changes."""
        tally, store = self._tally, self._store
        match happening:
            case CheckpointSaved():
                self._count_save(happening)
            case SaveRefused(reason):
                tally.add("runner_checkpoint_failures_total", 1, (store, reason))
            case CheckpointQuarantined():
                tally.add("runner_checkpoint_corrupt_total", 1, (store,))
            case RemainsRemoved(count) if count:
                tally.add("runner_retention_deleted_total", count, (store, "unfinished"))
            case StateFetched(_, resumption):
                tally.observe("runner_restore_seconds", resumption.seconds, ("fetch",))
                if resumption.source == "store":
                    self._throughput("read", resumption.nbytes, resumption.seconds)
            case Noticed(source, lead_seconds):
                known = source if source in SOURCES else OTHER
                tally.add("runner_preemptions_total", 1, (known,))
                tally.set("runner_preemption_lead_seconds", lead_seconds)
            case Restarted(reason):
                tally.add("runner_restarts_total", 1, (reason,))

    def _count_save(self, happening: CheckpointSaved) -> None:
        saved, tally, store = happening.saved, self._tally, self._store
        manifest, timing, trigger = saved.manifest, saved.timing, happening.trigger
        took = {
            "snapshot": manifest.moment.snapshot_seconds,
            "persist": saved.persist_seconds,
            "upload": timing.upload_seconds,
            "commit": timing.commit_seconds,
            "total": manifest.moment.snapshot_seconds + saved.persist_seconds,
        }
        for phase, seconds in took.items():
            tally.observe(
                "runner_checkpoint_save_seconds", seconds, (phase, trigger), manifest.name
            )
        ago = time.monotonic() - saved.durable_at
        tally.set("runner_checkpoint_last_success_timestamp_seconds", time.time() - ago, (store,))
        tally.set("runner_checkpoint_bytes", manifest.nbytes)
        tally.set("runner_checkpoints", saved.kept, (store,))
        tally.add("runner_retention_deleted_total", len(saved.deleted), (store, "superseded"))
        self._throughput("write", timing.nbytes, timing.upload_seconds)

    def _throughput(self, direction: str, nbytes: int, seconds: float) -> None:
        if nbytes and seconds > 0:
            name = "runner_store_throughput_bytes_per_second"
            self._tally.set(name, nbytes / seconds, (self._store, direction))
