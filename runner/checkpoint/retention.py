"""What may be deleted: one pure policy, and the thin hand that carries it out.

It runs after a commit, never before, so the newest checkpoint is already safe when the first old
one goes. Whatever a rule keeps stays, whatever the other rules say.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from runner.checkpoint.attempts import Ledger
from runner.checkpoint.format import MANIFEST_FILE, VALIDATION_FILE
from runner.checkpoint.manifest import Moment
from runner.checkpoint.validation import Verdict
from runner.store import Store


@dataclass(frozen=True)
class Keep:
    """The last N of each scope, the best K of a metric, and every M-th epoch's end."""

    last: int = 3
    best_metric: str | None = None
    best_mode: str = "min"
    best_count: int = 1
    every_epochs: int | None = None


def ranked(moments: Sequence[Moment], metric: str, mode: str) -> list[Moment]:
    """Those that have the metric, best first; of equals the earlier one is the better."""
    sign = 1.0 if mode == "min" else -1.0
    scored = [m for m in moments if math.isfinite(m.metrics.get(metric, math.nan))]
    return sorted(scored, key=lambda m: (sign * m.metrics[metric], m.attempt, m.save))


def counted_apart(
    moments: Sequence[Moment], gone_back: Collection[str], verdicts: Mapping[str, Verdict]
) -> tuple[list[Moment], ...]:
    """The groups to which the policy applies, each by itself.

    What the run has gone back from, and what validation found invalid, must not crowd out what
    the run may have to begin from.
    """
    avoided = [m for m in moments if str(m.name) in gone_back]
    rest = [m for m in moments if str(m.name) not in gone_back]
    invalid = [m for m in rest if verdicts.get(str(m.name)) is Verdict.INVALID]
    return [m for m in rest if m not in invalid], avoided, invalid


def superfluous(
    moments: Sequence[Moment],
    keep: Keep,
    protected: Collection[str] = (),
    verdicts: Mapping[str, Verdict] | None = None,
) -> list[Moment]:
    """What may go, oldest first. `protected` names stay: pinned, or restored from.

    The last N are counted for full checkpoints and for weights alone, each by itself. The newest
    full checkpoint always stays, and so do the newest healthy one and the newest that was
    validated, even behind N newer ones.
    """
    known = verdicts or {}
    newest_first = sorted(moments, key=lambda m: m.name, reverse=True)
    full = [m for m in newest_first if m.scope == "full"]
    weights = [m for m in newest_first if m.scope != "full"]
    kept = {m.name for m in full[: keep.last] + weights[: keep.last]}
    healthy = [m for m in full if m.healthy]
    valid = [m for m in full if known.get(str(m.name)) is Verdict.VALID]
    kept.update(m.name for m in full[:1] + healthy[:1] + valid[:1])
    if keep.best_metric is not None:
        best = ranked(moments, keep.best_metric, keep.best_mode)
        kept.update(m.name for m in best[: keep.best_count])
    if keep.every_epochs is not None:
        ends = [m for m in moments if m.batch == 0 and m.epoch > 0]
        kept.update(m.name for m in ends if m.epoch % keep.every_epochs == 0)
    kept.update(m.name for m in moments if str(m.name) in protected)
    return [m for m in reversed(newest_first) if m.name not in kept]


def delete_checkpoint(store: Store, ledger: Ledger, name: str, files: Sequence[str] = ()) -> None:
    """Delete one checkpoint, manifest first, unless a newer attempt has the run (Fenced).

    `files` are those of its manifest, where that is known; else the store is asked for them.
    """
    ledger.check_fence()
    prefix = f"{ledger.run_id}/checkpoints/{name}"
    ours = (MANIFEST_FILE, VALIDATION_FILE)
    found = files or [file for file in store.children(prefix) if file not in ours]
    store.delete([f"{prefix}/{file}" for file in [*ours, *found]])


def pins(store: Store, run_id: str) -> set[str]:
    """Names of the checkpoints that people have pinned: `pins/<name>`."""
    return set(store.children(f"{run_id}/pins"))
