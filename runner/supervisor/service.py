"""From a job file to a supervised run: which run it is, whether it may go on, and running it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import __version__
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger, utc_now
from runner.checkpoint.format import MANIFEST_FILE, STATE_FILE
from runner.checkpoint.keeper import Origin
from runner.checkpoint.provenance import mask_secrets
from runner.errors import SpoolTaken, StoreError, UnknownName, UsageError
from runner.exitcodes import FINISHED
from runner.job import Best, Job, check_launchable, check_run_id, differences, job_as_submitted
from runner.spool import Spool, new_owner, spool_path
from runner.store import Store, open_store
from runner.supervisor import index
from runner.supervisor.loop import Assignment, Supervisor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wishes:
    """What the command line says beside the job file."""

    run_id: str | None = None
    new: bool = False
    update: bool = False
    begin_from: str | None = None
    components: tuple[str, ...] = ()


def store_of(job: Job) -> Store:
    """The job's store under its real path, by which its runs are found whatever way led there.

    UsageError if nothing can be written there.
    """
    path = job.store_path.resolve()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise UsageError(f"the store cannot be written: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"the store cannot be written: no permission for {there}")
    return open_store(str(path))


def run_id_for(job: Job, wishes: Wishes, store: Store) -> str:
    """The run that is meant: the job's name, the id that was given, or with `new` an unused one."""
    run_id = check_run_id(job.name if wishes.run_id is None else wishes.run_id)
    if not wishes.new:
        return run_id
    taken = set(store.children(""))
    number, candidate = 2, run_id
    while candidate in taken:
        candidate = f"{run_id}-{number}"
        number += 1
    return check_run_id(candidate)


def supervise(job: Job, wishes: Wishes) -> int:
    """Run a job, or continue it; the exit code. UsageError before anything is written."""
    check_launchable(job)
    store = store_of(job)
    run_id = run_id_for(job, wishes, store)
    ledger = Ledger(store, run_id, new_owner())
    known = ledger.run()
    _check_same_job(run_id, known, job, update=wishes.update)
    begin_at, origin = _beginning(wishes, store, run_id, known, job.checkpoint.keep.best)
    latest = ledger.latest()
    if latest is not None and latest.outcome == "succeeded" and begin_at is None:
        log.info("run %s is finished; --new starts another one", run_id)
        return FINISHED
    spool = Spool(spool_path(run_id, store.url, os.environ.get(index.SPOOL_ROOT_VARIABLE)))
    try:
        spool.open()
    except SpoolTaken as error:
        raise UsageError(
            f"run {run_id} is live on this machine; look at it with `runner status {run_id}`, "
            f"end it with `runner stop {run_id}`, or start another one with --new"
        ) from error
    try:
        _write_run(ledger, known, job, wishes)
    except StoreError as error:
        spool.remove()
        raise UsageError(f"the store cannot be written: {error}") from error
    index.remember(
        index.Entry(
            run_id, store.url, str(spool.path), str(index.logs_of(run_id, store.url)), utc_now()
        )
    )
    assignment = Assignment(job, run_id, begin_at, origin)
    log.info("run %s: checkpoints in %s", run_id, store.url)
    return Supervisor(assignment, store, spool, ledger).run()


def _write_run(ledger: Ledger, known: dict[str, Any] | None, job: Job, wishes: Wishes) -> None:
    document: dict[str, Any] = {
        "run_id": ledger.run_id,
        "created_at": utc_now(),
        "runner": __version__,
        "job": mask_secrets(job_as_submitted(job)),
    }
    if known is None:
        which = wishes.begin_from
        document["from"] = None if which is None else _real(which)
        document["components"] = list(wishes.components)
        ledger.begin(document)
    elif known.get("job") != document["job"]:
        ledger.amend({**known, "job": document["job"]})


def _check_same_job(run_id: str, known: dict[str, Any] | None, job: Job, *, update: bool) -> None:
    """A run goes on with the command and the params that it began with, unless told otherwise."""
    if known is None or "job" not in known or update:
        return
    changed = differences(known["job"], mask_secrets(job_as_submitted(job)))
    if changed:
        raise UsageError(
            "\n".join(
                [
                    f"run {run_id} exists and differs from this job:",
                    *(f"  {line}" for line in changed),
                    "say --update to go on with the new values, or --new for another run",
                ]
            )
        )


def _beginning(
    wishes: Wishes, store: Store, run_id: str, known: dict[str, Any] | None, best: Best | None
) -> tuple[str | None, Origin | None]:
    """What the first attempt begins from: a checkpoint of this run, or another run's."""
    which, components = wishes.begin_from, wishes.components
    if which is None and components:
        raise UsageError("--components says what to take over; --from must say from where")
    if which is not None and _is_path(which):
        if known is None:
            return None, _origin(which, components)
        if (known.get("from"), known.get("components")) != (_real(which), list(components)):
            raise UsageError(f"run {run_id} exists; --from another run needs --new")
        which = None  # started again as it was at first: it goes on
    if which is None:
        return None, None if known is None else _recorded_origin(store, run_id, known)
    if known is None:
        raise UsageError(f"--from {which}: run {run_id} does not exist, so it has no checkpoints")
    if components:
        raise UsageError(
            "--components begins a new run: give --from a checkpoint's path, and --new"
        )
    metric, mode = (None, "min") if best is None else (best.metric, best.mode)
    Archive(store, run_id).find(which, metric, mode)
    return which, None


def _recorded_origin(store: Store, run_id: str, known: dict[str, Any]) -> Origin | None:
    """What the run began from, if it has saved nothing of its own yet."""
    which, components = known.get("from"), known.get("components")
    if which is None or any(record.committed for record in Ledger(store, run_id, "").records()):
        return None
    return _origin(which, components or ())


def _is_path(which: str) -> bool:
    return "/" in which or which.startswith(".")


def _real(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _origin(which: str, components: Sequence[str]) -> Origin:
    """The checkpoint at a path: its own directory, or a run's, of which the newest is taken."""
    if "://" in which:
        raise UsageError(f"--from {which}: this version reads directories only")
    path = Path(_real(which))
    if (path / MANIFEST_FILE).is_file():
        run, name = path.parent.parent, path.name
    elif (path / "checkpoints").is_dir():
        run, name = path, "latest"
    else:
        raise UsageError(f"--from {which}: there is neither a checkpoint nor a run")
    archive = Archive(open_store(str(run.parent)), run.name)
    manifest = archive.find(name)
    archive.verify(manifest)
    state = json.loads((run / "checkpoints" / manifest.name / STATE_FILE).read_bytes())
    for component in components:
        if component not in state["components"]:
            raise UnknownName(f"component in {which}", component, list(state["components"]))
    return Origin(archive, manifest.name, tuple(components))
