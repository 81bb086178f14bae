"""What people do to the checkpoints of a run: clean up, pin, unpin, copy out.

Cleaning asks the same policy that a supervisor applies after every save, with the `keep` of the job
as it was submitted last.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from runner import job
from runner.checkpoint.copies import appearing, copy_files
from runner.checkpoint.format import CheckpointName
from runner.checkpoint.manifest import Manifest, Moment
from runner.checkpoint.retention import (
    Keep,
    counted_apart,
    delete_checkpoint,
    pins,
    superfluous,
)
from runner.checkpoint.validation import Verdict
from runner.errors import CheckpointCorrupt, NotFound, UnknownName, UsageError
from runner.supervisor.lookup import KnownRun
from runner.wallclock import utc_now

_NEWER_THAN_ALL = tuple(
    Moment(attempt=1 << 40, save=save, step=0, epoch=0, batch=1, scope=scope)
    for save, scope in enumerate(("full", "weights"))
)


@dataclass(frozen=True)
class Fate:
    """What cleaning does with one checkpoint, and why."""

    name: str
    goes: bool
    why: tuple[str, ...]
    nbytes: int


def policy_of(keep: job.Keep) -> Keep:
    """What a job file says under `checkpoint.keep`, as the policy takes it."""
    best = keep.best
    return Keep(
        last=keep.last,
        best_metric=None if best is None else best.metric,
        best_mode="min" if best is None else best.mode,
        best_count=1 if best is None else best.count,
        every_epochs=None if keep.every is None else keep.every.epochs,
    )


def reasons(
    moments: Sequence[Moment],
    keep: Keep,
    pinned: Collection[str],
    restored: str | None,
    verdicts: Mapping[str, Verdict] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Why each checkpoint stays; those that go are not among them.

    Each rule is asked alone, of the policy itself, so this cannot tell another story than the
    policy does. One of each scope that is newer than all stands in for what stays as the newest.
    """
    none = Keep(last=0)
    later = [*moments, *_NEWER_THAN_ALL]
    restored_from = () if restored is None else (restored,)
    rules = {
        "newest": superfluous(moments, none),
        "last": superfluous(later, Keep(last=keep.last + 1)),
        "best": superfluous(later, replace(keep, last=0, every_epochs=None)),
        "milestone": superfluous(later, replace(keep, last=0, best_metric=None)),
        "pinned": superfluous(later, none, pinned),
        "restored from": superfluous(later, none, restored_from),
        "validated": superfluous(later, none, (), verdicts),
    }
    why: dict[str, tuple[str, ...]] = {}
    for moment in moments:
        found = tuple(rule for rule, going in rules.items() if moment not in going)
        if found:
            why[str(moment.name)] = found
    return why


def plan(run: KnownRun) -> list[Fate]:
    """What cleaning would do with each checkpoint, newest first. Deletes nothing."""
    manifests: dict[str, Manifest] = {}
    remains: list[str] = []
    for name in run.archive.names():
        try:
            manifests[str(name)] = run.archive.manifest(str(name))
        except NotFound:
            # Newer than every manifest, it may be an upload in progress.
            remains += [str(name)] if manifests else []
        except CheckpointCorrupt:
            continue
    moments = [manifest.moment for manifest in manifests.values()]
    latest = run.ledger.latest()
    restored = None if latest is None else latest.resumed_from
    gone_back = run.ledger.look_for_gone_back()
    pinned = pins(run.store, run.run_id)
    going, why = decided(run, run.ledger.run() or {}, moments, restored, gone_back, pinned)
    fates = [
        Fate(
            name,
            name in going,
            ("no rule keeps it",) if name in going else why.get(name, ("kept",)),
            manifest.nbytes,
        )
        for name, manifest in manifests.items()
    ]
    fates += [Fate(name, True, ("it has no manifest",), 0) for name in remains]
    return sorted(fates, key=lambda fate: CheckpointName.parse(fate.name) or (), reverse=True)


def decided(
    run: KnownRun,
    document: Mapping[str, Any],
    moments: Sequence[Moment],
    restored: str | None,
    gone_back: Collection[str],
    pinned: Collection[str],
) -> tuple[set[str], dict[str, tuple[str, ...]]]:
    """Which checkpoints no rule keeps, and for the others, why they stay.

    `document` is `run.json`, `restored` what the newest attempt began from. UsageError if the
    policy cannot be known.
    """
    keep = keep_of(document, run.run_id)
    verdicts = verdicts_of(run, document, [str(moment.name) for moment in moments])
    protected = {*pinned, *([restored] if restored else [])}
    going: set[str] = set()
    why: dict[str, tuple[str, ...]] = {}
    for group in counted_apart(moments, gone_back, verdicts):
        going |= {str(m.name) for m in superfluous(group, keep, protected, verdicts)}
        why |= reasons(group, keep, pinned, restored, verdicts)
    return going, why


def clean(run: KnownRun, *, force: bool = False) -> list[Fate]:
    """Delete what no rule keeps, and what unfinished saves of dead attempts have left.

    UsageError if a supervisor may have the run, which cleans up by itself, unless `force` is given.
    """
    if not force:
        _refuse_live(run)
    fates = plan(run)
    for fate in reversed(fates):
        if fate.goes:
            delete_checkpoint(run.store, run.ledger, fate.name)
    latest = run.ledger.latest()

    def is_stale(name: str) -> bool:
        staged = CheckpointName.parse(name)
        return staged is not None and latest is not None and staged.attempt < latest.attempt

    with contextlib.suppress(NotFound):
        run.store.sweep(f"{run.run_id}/checkpoints", is_stale)
    return fates


def pin(run: KnownRun, which: str) -> str:
    """Keep a checkpoint whatever the policy says; its name. UnknownName if there is none."""
    name = run.find_checkpoint(which).name
    note = {"checkpoint": name, "pinned_at": utc_now()}
    run.store.create(f"{run.run_id}/pins/{name}", json.dumps(note).encode())
    return name


def unpin(run: KnownRun, which: str) -> str:
    """Leave a checkpoint to the policy again; its name. UnknownName if it is not pinned."""
    pinned = pins(run.store, run.run_id)
    name = which if which in pinned else run.find_checkpoint(which).name
    if name not in pinned:
        raise UnknownName("pinned checkpoint", name, sorted(pinned), f"of run {run.run_id}")
    run.store.delete([f"{run.run_id}/pins/{name}"])
    return name


def export(run: KnownRun, which: str, folder: Path) -> Manifest:
    """Copy a checkpoint's files, each part verified, into a folder that is new or empty.

    Those that are compressed come out plain, and the manifest there says so. All files appear at
    once. CheckpointCorrupt if a part is not the one that was saved; UsageError if something is in
    the way. Nothing is left behind then.
    """
    with appearing(folder) as partial:
        return copy_files(run.archive, run.find_checkpoint(which), partial)


def verdicts_of(
    run: KnownRun, document: Mapping[str, Any], names: Iterable[str]
) -> dict[str, Verdict]:
    """How they were validated, if the job wants that: else it says nothing of what is kept."""
    try:
        validates = document["job"]["checkpoint"].get("validate") is not None
    except (KeyError, TypeError, AttributeError):
        validates = False
    found = {name: run.archive.validation(name) for name in names if validates}
    return {name: one.verdict for name, one in found.items() if one is not None}


def keep_of(document: Mapping[str, Any], run_id: str) -> Keep:
    """The policy of the job as it was submitted last. UsageError where it cannot be known."""
    try:
        return policy_of(job.Keep.model_validate(document["job"]["checkpoint"]["keep"]))
    except (KeyError, TypeError, ValidationError) as error:
        raise UsageError(
            f"run.json of run {run_id} does not say which checkpoints to keep; nothing is "
            "deleted. Submit the run once with this version of runner"
        ) from error


def _refuse_live(run: KnownRun) -> None:
    if run.is_live():
        raise UsageError(
            f"run {run.run_id} is live on this machine, and cleans up after every save; stop it "
            "first, or say --force"
        )
    latest = run.ledger.latest()
    if latest is not None and latest.outcome is None and latest.node != socket.gethostname():
        raise UsageError(
            f"run {run.run_id} may be live on {latest.node}: attempt {latest.attempt} has not "
            "ended there; stop it first, or say --force if that node is gone"
        )
