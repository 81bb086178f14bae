"""From a job file to a supervised run: which run it is, whether it may go on, and running it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from runner import __version__
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.provenance import mask_secrets
from runner.errors import NobodyAnswers, SpoolTaken, StoreError, UsageError, is_outage
from runner.exitcodes import FINISHED, PREEMPTED
from runner.job import Job, check_launchable, check_run_id, differences, is_s3, job_as_submitted
from runner.launch.base import Places
from runner.launch.site import Site, site_for
from runner.spool import Spool, new_owner, spool_path
from runner.store import Store
from runner.supervisor import index
from runner.supervisor.assignment import Assignment, LocalFiles
from runner.supervisor.audience import Audience
from runner.supervisor.beginning import beginning_of, real_place
from runner.supervisor.lookup import KnownRun, run_of
from runner.supervisor.loop import Supervisor
from runner.supervisor.preflight import (
    check_entrypoint,
    check_reachable,
    check_writable,
    refusals,
    s3_options,
    store_of,
    until_it_answers,
)
from runner.tracking import locate
from runner.wallclock import utc_now

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wishes:
    """What the command line says beside the job file."""

    run_id: str | None = None
    new: bool = False
    update: bool = False
    begin_from: str | None = None
    components: tuple[str, ...] = ()
    submitted: Mapping[str, Any] | None = None
    """What the job file itself says, for the run's record."""
    waits: bool = False
    """For a store that is out of reach: nobody is there to be told."""


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


def usable_store_of(job: Job) -> Store:
    """The job's store, after it was tried. UsageError if no run can live there."""
    store = store_of(job)
    check_reachable(job, store)
    check_writable(job, store)
    return store


def supervise(
    job: Job, wishes: Wishes, audience_of: Callable[[KnownRun], Audience] | None = None
) -> int:
    """Run a job, or continue it; the exit code. UsageError before anything is written.

    `audience_of` makes whoever looks on, when it is known which run it is.
    """
    check_launchable(job)
    if (wishes.begin_from or "").startswith(locate.SCHEME):
        place = locate.place_of(str(wishes.begin_from), job.tracking, job.workdir)
        wishes = replace(wishes, begin_from=place)
    store = store_of(job)
    patience_seconds = job.restart.store_timeout_seconds if wishes.waits else 0.0

    def look() -> tuple[dict[str, Any] | None, Assignment | None]:
        check_reachable(job, store)
        with refusals(store):
            known, found = _look(job, wishes, store)
        if found is not None:
            check_writable(job, store)
        return known, found

    try:
        known, found = until_it_answers(look, patience_seconds)
        if found is None:
            return FINISHED
        pinned = None if known is None or wishes.update else known.get("image")
        state_bytes = _state_bytes(store, found.run_id)
        images = index.home() / "images"
        site = site_for(job, pinned, state_bytes, images, newest=wishes.update)
        if not _has_validated_so(known, job):
            check_entrypoint(job, site)
        spool = _open_spool(found.run_id, store, site)
        ledger = Ledger(store, found.run_id, new_owner())
        try:
            until_it_answers(
                lambda: _write_run(ledger, known, job, wishes, site.image), patience_seconds
            )
        except StoreError as error:
            spool.remove()
            if is_outage(error) and (wishes.waits or is_s3(store.url)):
                raise  # it may work another time
            raise UsageError(f"the store cannot be written: {error}") from error
    except (NobodyAnswers, StoreError) as error:
        if not wishes.waits or not is_outage(error):
            raise
        log.error("the store was out of reach for %g s: %s", patience_seconds, error)
        return PREEMPTED
    entry = _remember(job, store, spool, found.run_id)
    files = LocalFiles(index.files_of(found.run_id, store.url))
    if is_s3(store.url):  # a directory store has it, with the run's record in it
        with contextlib.suppress(OSError):  # who needs it will say so
            files.folder.mkdir(parents=True, exist_ok=True)
    launcher = site.launcher(found.run_id, Places(spool.path, files.outputs, files.slots))
    audience = None if audience_of is None else audience_of(run_of(entry))
    return Supervisor(found, store, spool, ledger, launcher, audience).run()


def _open_spool(run_id: str, store: Store, site: Site) -> Spool:
    root = os.environ.get(index.SPOOL_ROOT_VARIABLE)
    slots = LocalFiles(index.files_of(run_id, store.url)).slots
    spool = Spool(spool_path(run_id, store.url, root), site.owner, slots)
    try:
        spool.open()
    except SpoolTaken as error:
        raise UsageError(
            f"run {run_id} is live on this machine; look at it with `runner status {run_id}`, "
            f"end it with `runner stop {run_id}`, or start another one with --new"
        ) from error
    return spool


def _remember(job: Job, store: Store, spool: Spool, run_id: str) -> index.Entry:
    """So that commands on this machine find the run."""
    logs = str(index.logs_of(run_id, store.url))
    options = asdict(s3_options(job)) if is_s3(store.url) else None
    entry = index.Entry(run_id, store.url, str(spool.path), logs, utc_now(), options)
    index.remember(entry)
    log.info("run %s: checkpoints in %s", run_id, store.url)
    return entry


def _state_bytes(store: Store, run_id: str) -> int | None:
    """The size of the run's state, as its newest checkpoint has it; None before there is one."""
    manifests = Archive(store, run_id).manifests()
    return next((m.nbytes for m in manifests if m.moment.scope == "full"), None)


def _look(
    job: Job, wishes: Wishes, store: Store
) -> tuple[dict[str, Any] | None, Assignment | None]:
    """What the store says of the run, and what is to be done: nothing, if it is finished.

    UsageError if it cannot go on like this. Nothing is written.
    """
    run_id = run_id_for(job, wishes, store)
    ledger = Ledger(store, run_id, owner="")
    known = ledger.run()
    _check_same_job(run_id, known, job, update=wishes.update)
    best = job.checkpoint.keep.best
    begin_at, origin = beginning_of(
        Archive(store, run_id),
        known,
        wishes.begin_from,
        wishes.components,
        (None, "min") if best is None else (best.metric, best.mode),
        s3_options(job),
    )
    latest = ledger.latest()
    if latest is not None and latest.outcome == "succeeded" and begin_at is None:
        log.info("run %s is finished; --new starts another one", run_id)
        return known, None
    return known, Assignment(job, run_id, begin_at, origin)


def _has_validated_so(known: dict[str, Any] | None, job: Job) -> bool:
    """Whether the run has this entry point already: then it was looked at, and a start is fast."""
    try:
        before = (known or {})["job"]["checkpoint"]["validate"]
    except (KeyError, TypeError):
        return False
    return bool(before == job_as_submitted(job)["checkpoint"].get("validate"))


def _write_run(
    ledger: Ledger,
    known: dict[str, Any] | None,
    job: Job,
    wishes: Wishes,
    image: Mapping[str, Any] | None,
) -> None:
    document: dict[str, Any] = {
        "run_id": ledger.run_id,
        "created_at": utc_now(),
        "runner": __version__,
        "job": mask_secrets(job_as_submitted(job)),
        "submitted": mask_secrets(wishes.submitted or {}),
    }
    if known is None:
        which = wishes.begin_from
        document["from"] = None if which is None else real_place(which)
        document["components"] = list(wishes.components)
        document |= {} if image is None else {"image": dict(image)}
        ledger.begin(document)
        return
    now = {**known, "job": document["job"], "submitted": document["submitted"]}
    now |= {} if image is None else {"image": dict(image)}
    if now != known:
        ledger.amend(now)


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
