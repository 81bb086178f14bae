"""What is known of a run from outside: its phase, where it is, what is saved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import exitcodes
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import AttemptRecord, Ledger
from runner.checkpoint.manifest import Manifest, moment_to_json
from runner.checkpoint.retention import pins
from runner.errors import RunnerError, UnknownName
from runner.spool import Board, Spool, spool_path
from runner.store import Store, open_store
from runner.supervisor import index

_EXIT_CODES = {
    "succeeded": exitcodes.FINISHED,
    "preempted": exitcodes.PREEMPTED,
    "interrupted": exitcodes.INTERRUPTED,
    "stopped": exitcodes.INTERRUPTED,
    "fenced": exitcodes.FENCED,
}


@dataclass(frozen=True)
class KnownRun:
    """A run that was found, by its store or in the index of this machine."""

    run_id: str
    store: Store
    spool: Spool
    logs: Path

    @property
    def archive(self) -> Archive:
        return Archive(self.store, self.run_id)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.store, self.run_id, owner="")

    def is_live(self) -> bool:
        """Whether a supervisor on this machine has it."""
        return self.spool.status() is not None

    def best_metric(self) -> tuple[str | None, str]:
        """What `best` means for this run, as its job file says."""
        document = self.ledger.run() or {}
        try:
            best = document["job"]["checkpoint"]["keep"]["best"]
            return str(best["metric"]), str(best.get("mode", "min"))
        except (KeyError, TypeError):
            return None, "min"

    def never_codes(self) -> list[int]:
        """The trainer's exit codes with which this run ends at once, as its job file says."""
        document = self.ledger.run() or {}
        try:
            return list(document["job"]["restart"]["never"])
        except (KeyError, TypeError):
            return []

    def find_checkpoint(self, which: str) -> Manifest:
        """`latest`, `best`, a step or a name. UnknownName if there is none."""
        metric, mode = self.best_metric()
        return self.archive.find(which, metric, mode)


def find_run(name: str, store: str | None = None) -> KnownRun:
    """The run of this name. UnknownName, with the nearest ones, if there is none."""
    if store is not None:
        opened = open_store(str(Path(store).expanduser().resolve()))
        if name not in opened.children("") or Ledger(opened, name, "").run() is None:
            raise UnknownName(f"run in {store}", name, opened.children(""))
        spool = spool_path(name, opened.url, os.environ.get(index.SPOOL_ROOT_VARIABLE))
        return KnownRun(name, opened, Spool(spool), index.logs_of(name, opened.url))
    known = index.entries()
    for entry in known:
        if entry.run_id == name:
            return _from_entry(entry)
    raise UnknownName("run on this machine", name, [entry.run_id for entry in known])


def all_runs(store: str | None = None) -> Iterator[KnownRun]:
    """Every run of a store, or all that were started on this machine."""
    if store is None:
        yield from map(_from_entry, index.entries())
        return
    for name in open_store(str(Path(store).expanduser().resolve())).children(""):
        try:
            yield find_run(name, store)
        except UnknownName:
            continue


def status_of(run: KnownRun) -> dict[str, Any]:
    """One look at a run, as plain JSON; live values where a supervisor of this machine has it."""
    record = run.ledger.latest()
    live = run.spool.status()
    board = _board(run) if live else None
    status: dict[str, Any] = {
        "run_id": run.run_id,
        "phase": live["phase"] if live else _phase(record),
        "live": live is not None,
        "step": record.end_step or record.saved_step or record.start_step if record else 0,
        "epoch": None,
        "epochs": None,
        "batch": None,
        "attempt": record.attempt if record else 0,
        "activity": None,
        "cause": record.cause if record else None,
        "saved_step": record.saved_step if record else None,
        "last_checkpoint": None,
        "store": run.store.url,
        "pid": live["pid"] if live else None,
    }
    newest = next(run.archive.manifests(), None)
    if newest is not None:
        status |= {
            "last_checkpoint": newest.name,
            "saved_step": newest.moment.step,
            "epoch": newest.moment.epoch,
        }
    if board is not None:
        status |= {
            "step": board.step,
            "epoch": board.epoch,
            "epochs": board.epochs or None,
            "batch": board.batch,
            "activity": board.phase,
        }
    return status


def exit_code_of(run: KnownRun) -> int:
    """How its supervisor ended, as far as the store tells: given up, where it does not."""
    record = run.ledger.latest()
    if record is None or record.outcome is None:
        return exitcodes.GIVEN_UP
    if record.outcome in _EXIT_CODES:
        return _EXIT_CODES[record.outcome]
    own = record.exit_code
    return own if own is not None and own in run.never_codes() else exitcodes.GIVEN_UP


def checkpoints_of(run: KnownRun) -> list[dict[str, Any]]:
    """All checkpoints, newest first, as `runner checkpoints ls -o json` prints them."""
    pinned = pins(run.store, run.run_id)
    return [checkpoint_row(manifest, pinned) for manifest in run.archive.manifests()]


def checkpoint_row(manifest: Manifest, pinned: set[str]) -> dict[str, Any]:
    moment = manifest.moment
    return {
        "name": manifest.name,
        "step": moment.step,
        "epoch": moment.epoch,
        "attempt": moment.attempt,
        "save": moment.save,
        "triggers": list(moment.triggers),
        "bytes": manifest.nbytes,
        "healthy": moment.healthy,
        "pinned": manifest.name in pinned,
        "created_at": moment.created_at,
        "metrics": moment_to_json(moment)["metrics"],
    }


def _from_entry(entry: index.Entry) -> KnownRun:
    store = open_store(entry.store)
    return KnownRun(entry.run_id, store, Spool(Path(entry.spool)), Path(entry.logs))


def _board(run: KnownRun) -> Board | None:
    try:
        return Board(run.spool.rank.folder / "board")
    except (OSError, RunnerError):
        return None  # between two attempts


def _phase(record: AttemptRecord | None) -> str:
    if record is None:
        return "new"
    return record.outcome or "lost"  # its supervisor was killed, or runs on another machine
