"""What would fail, found out before any money is spent: the store, the machine, the grace.

Each thing is tried, not guessed. The keys that are written for that are removed again, and no
trainer is started.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from runner.checkpoint.archive import Archive
from runner.checkpoint.manifest import Manifest
from runner.doctor import cluster, machine, server
from runner.doctor.containers import container
from runner.doctor.finding import Finding, Verdict, fail, ok, size_text, warn
from runner.doctor.probes import Probes
from runner.errors import StoreError, UsageError
from runner.job import Job, check_run_id, is_s3
from runner.launch.kubernetes.profiles import grace_seconds
from runner.launch.site import ProcessSite
from runner.store import Store
from runner.supervisor.assignment import GRACE_VARIABLE
from runner.supervisor.forecast import EmergencySave
from runner.supervisor.preflight import check_prefix, s3_options, store_of

__all__ = ["Finding", "Verdict", "examine"]


def examine(job: Job, run_id: str | None = None, context: str | None = None) -> Iterator[Finding]:
    """Everything that can be looked at, in the order in which it would be needed.

    `run_id` is the run whose newest checkpoint tells the size of the state; default: the job's
    name. UsageError if it cannot be one. `context` is the kubeconfig's, for a run in a cluster.
    """
    run_id = check_run_id(job.name if run_id is None else run_id)
    in_cluster = job.launcher == "kubernetes"  # then this machine only looks at the store
    yield from cluster.grace(job)
    if in_cluster:
        yield from cluster.rendered(job, run_id)
        yield from cluster.rights(job, context)
        if not is_s3(job.store):
            return
    else:
        yield from _examine_machine(job)
    try:
        store = store_of(job)
        if is_s3(store.url):
            options = s3_options(job)
            yield from server.credentials(options)
            findings = list(server.server(store, options))
            yield from findings
            if any(finding.verdict is Verdict.FAIL for finding in findings):
                return
            yield from server.clock(options)
    except UsageError as error:
        yield fail("store", str(error))
        return
    if not in_cluster:
        yield from machine.spool(job, run_id, store.url)
    yield from _examine_store(job, run_id, store)


def _examine_machine(job: Job) -> Iterator[Finding]:
    yield from machine.command(job)
    if job.launcher == "docker":
        yield from container(job)
    else:
        yield from machine.validation(job, ProcessSite(job))
    yield from machine.gpu()
    yield machine.notices(job)


def _examine_store(job: Job, run_id: str, store: Store) -> Iterator[Finding]:
    probes = Probes(store, s3_options(job).conditional_writes)
    findings = []
    for finding in probes.permissions():
        findings.append(finding)
        yield finding
    usable = not any(finding.verdict is Verdict.FAIL for finding in findings)
    newest: Manifest | None = None
    if usable:
        try:
            check_prefix(store, s3_options(job))
            yield ok("store", store.url)
        except UsageError as error:
            yield fail("store", str(error))
        yield from probes.speed()
        newest = _newest(store, run_id)
    state_bytes = None if newest is None else newest.content_nbytes
    if job.launcher != "kubernetes":
        yield from machine.memory(job, run_id, store.url, state_bytes)
    yield _emergency_save(job, probes.upload_bytes_per_second, newest)


def _newest(store: Store, run_id: str) -> Manifest | None:
    """The newest full checkpoint of the run: what it tells of the state's size and of its save."""
    try:
        manifests = Archive(store, run_id).manifests()
        return next((m for m in manifests if m.moment.scope == "full"), None)
    except StoreError:
        return None  # what is wrong with the store has been said


def _emergency_save(job: Job, bytes_per_second: float | None, newest: Manifest | None) -> Finding:
    """Whether the state can be made durable between a notice and the kill."""
    given = os.environ.get(GRACE_VARIABLE)
    grace = float(given) if given else grace_seconds(job)
    if bytes_per_second is None:
        return warn("emergency save", "unknown: the store's throughput could not be measured")
    if newest is None:
        most = size_text(bytes_per_second * grace)
        return warn(
            "emergency save",
            f"the state's size is not known before the first checkpoint; at most {most} can be "
            f"stored in {grace:g} s of grace",
            "look again after the first save",
        )
    moment = newest.moment
    step_seconds = moment.productive_seconds / moment.step if moment.step else 0.0
    save = EmergencySave(step_seconds, moment.snapshot_seconds, newest.nbytes / bytes_per_second)
    fits, sentence = save.verdict(grace)
    facts = f"{sentence}; {size_text(newest.nbytes)} are to be stored"
    return ok("emergency save", facts) if fits else fail("emergency save", facts)
