"""What is known of a run from outside: its phase, where it is, what is saved."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from runner import exitcodes
from runner.board import Board
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import AttemptRecord, Ledger
from runner.checkpoint.manifest import Manifest, moment_to_json
from runner.checkpoint.retention import pins
from runner.checkpoint.validation import Validation
from runner.errors import RunnerError, StoreError, UnknownName, UsageError
from runner.job import is_s3, s3_url
from runner.spool import Spool, spool_path
from runner.store import S3Options, Store, open_store
from runner.supervisor import index
from runner.supervisor.goodput import LOST_SECONDS
from runner.wallclock import parse_time

log = logging.getLogger(__name__)

_OVERVIEW_SECONDS = 10.0  # for one run, where many are listed
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
    def metrics(self) -> Path:
        """Where this machine keeps what the run's scripts have logged: beside the logs."""
        return self.logs.parent.with_name("metrics") / self.logs.name

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


@dataclass(frozen=True)
class Where:
    """Where to look for runs: in a store, or, without one, in the index of this machine."""

    store: str | None = None
    s3: S3Options = field(default_factory=S3Options)


def find_run(name: str, where: Where = Where()) -> KnownRun:
    """The run of this name. UnknownName, with the nearest ones, if there is none."""
    known = index.entries()
    if where.store is None:
        for entry in known:
            if entry.run_id == name:
                return run_of(entry)
        names = [entry.run_id for entry in known]
        remedy = "name its store with --store, if it was started elsewhere"
        raise UnknownName("run", name, names, "on this machine", remedy)
    opened = _opened(where, known)
    if Ledger(opened, name, "").run() is None:
        raise UnknownName("run", name, opened.children(""), f"in {where.store}")
    return _in_store(name, opened)


def all_runs(where: Where = Where()) -> Iterator[KnownRun]:
    """Every run of a store, or all that were started on this machine."""
    known = index.entries()
    if where.store is None:
        yield from map(run_of, known)
        return
    opened = _opened(where, known)
    for name in opened.children(""):
        if Ledger(opened, name, "").run() is not None:
            yield _in_store(name, opened)


def _opened(where: Where, known: Sequence[index.Entry]) -> Store:
    """The store that is meant; how to reach it is remembered from the runs started here."""
    given = str(where.store)
    if not is_s3(given):
        return open_store(str(Path(given).expanduser().resolve()))
    try:
        url = s3_url(given)
    except ValueError as error:
        raise UsageError(f"--store {given}: {error}") from error
    remembered = next((entry.options for entry in known if entry.store == url), S3Options())
    said = {k: v for k, v in asdict(where.s3).items() if v != getattr(S3Options, k)}
    return open_store(url, replace(remembered, **said))


def _in_store(name: str, store: Store) -> KnownRun:
    spool = spool_path(name, store.url, os.environ.get(index.SPOOL_ROOT_VARIABLE))
    return KnownRun(name, store, Spool(spool), index.logs_of(name, store.url))


def overview(where: Where = Where()) -> Iterator[dict[str, Any]]:
    """The status of every run. A store that cannot be asked does not keep the others back."""
    out_of_reach: set[str] = set()
    for run in all_runs(where):
        run.store.hurry(time.monotonic() + _OVERVIEW_SECONDS)
        try:
            if run.store.url not in out_of_reach:
                yield status_of(run)
                continue
        except StoreError as error:
            log.warning("nothing is known of the runs in %s: %s", run.store.url, error)
            out_of_reach.add(run.store.url)
        yield _status(run, None, run.spool.status()) | {"phase": "unknown"}


def status_of(run: KnownRun) -> dict[str, Any]:
    """One look at a run, as plain JSON; live values where a supervisor of this machine has it."""
    published = run.spool.status()
    board = board_of(run) if published else None
    newest = next(run.archive.manifests(), None)
    return status_from(run, run.ledger.latest(), newest, board, published)


def status_from(
    run: KnownRun,
    record: AttemptRecord | None,
    newest: Manifest | None,
    board: Board | None,
    published: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The same of what has been read already; `published` is what a supervisor here says."""
    status = _status(run, record, published)
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


def _status(
    run: KnownRun, record: AttemptRecord | None, live: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the attempt's record and the supervisor on this machine tell."""
    return {
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
    archive = run.archive
    return [
        checkpoint_row(manifest, pinned, archive.validation(manifest.name))
        for manifest in archive.manifests()
    ]


def checkpoint_row(
    manifest: Manifest, pinned: set[str], validation: Validation | None
) -> dict[str, Any]:
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
        "validated": None if validation is None else validation.verdict.value,
        "pinned": manifest.name in pinned,
        "created_at": moment.created_at,
        "metrics": moment_to_json(moment)["metrics"],
        "validation": None if validation is None else validation.to_json(),
    }


def run_of(entry: index.Entry) -> KnownRun:
    """The run that this machine remembers, with a connection of its own to the store."""
    store = open_store(entry.store, entry.options)
    return KnownRun(entry.run_id, store, Spool(Path(entry.spool)), Path(entry.logs))


def board_of(run: KnownRun) -> Board | None:
    """The board of the trainer that a supervisor of this machine has, if there is one now."""
    try:
        return Board(run.spool.rank.folder / "board")
    except (OSError, RunnerError):
        return None  # between two attempts


def _phase(record: AttemptRecord | None) -> str:
    if record is None:
        return "new"
    return record.outcome or ("running" if _is_heard_of(record) else "lost")


def _is_heard_of(record: AttemptRecord) -> bool:
    """Whether another machine seems to have it: on this one, a supervisor would have been seen."""
    heard = parse_time(record.seen_at) or parse_time(record.started_at)
    is_here = record.node == socket.gethostname()
    return not is_here and heard is not None and time.time() - heard < LOST_SECONDS
