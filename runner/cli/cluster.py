"""What the commands do with a run in a Kubernetes cluster.

Whether a run is in one, the index of this machine remembers; elsewhere `--namespace` or `--context`
says it. What its store has is read where the store can be read from here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import typer

from runner.cli.common import print_json, where
from runner.errors import RunnerError, StoreError, UnknownName, UsageError

log = logging.getLogger(__name__)

_STORE_SECONDS = 15.0  # for what a store has to say to a look at a run


@dataclass(frozen=True)
class InCluster:
    """A run in a cluster: its name there, and what was said of how it is reached."""

    run_id: str
    cluster: Any
    store: str | None = None
    s3: Any = None

    @property
    def name(self) -> str:
        from runner.launch.kubernetes.names import object_name

        return object_name(self.run_id)

    def job(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.cluster.job(self.name)
        return found

    def known_run(self) -> Any:
        """What its store knows of it; None if that is not to be read from here."""
        from runner.job import is_s3
        from runner.launch.kubernetes.names import STORE_ANNOTATION
        from runner.supervisor.lookup import Where, find_run

        place = self.store
        if place is None and (job := self.job()) is not None:
            place = job["metadata"].get("annotations", {}).get(STORE_ANNOTATION)
        if place is None or not (is_s3(place) or self.store):
            return None  # a directory of the pod's
        try:
            run = find_run(self.run_id, Where(place, *([self.s3] if self.s3 else [])))
        except UnknownName:
            return None  # it has not begun yet
        run.store.hurry(time.monotonic() + _STORE_SECONDS)
        return run


def find(
    run_id: str,
    namespace: str | None,
    context: str | None,
    store: str | None,
    s3: tuple[str | None, str | None, Path | None],
) -> InCluster | None:
    """The run, if it is one in a cluster. `s3` is what `where` takes for a store's server."""
    from runner.launch.kubernetes.client import connect
    from runner.supervisor import index

    entry = next((e for e in index.entries() if e.run_id == run_id), None)
    remembered = dict(entry.cluster) if entry is not None and entry.cluster is not None else None
    if remembered is None and namespace is None and context is None:
        return None
    known = remembered or {}
    cluster = connect(context or known.get("context"), namespace or known.get("namespace"))
    said = where(store, *s3).s3
    options = entry.options if store is None and entry is not None and remembered else said
    return InCluster(run_id, cluster, store, options)


# ---------------------------------------------------------------------------- submit


def submit(job: Any, wishes: Any, *, context: str | None, replace_it: bool, dry_run: bool) -> None:
    """Create the run's objects, or have it go on; return when the cluster has taken it."""
    from runner.launch.kubernetes import control, objects
    from runner.launch.kubernetes.client import connect

    run_id = _run_id(job, wishes)
    rendered = objects.render(job, run_id, _options(wishes))
    for warning in rendered.warnings:
        log.warning("%s", warning)
    if dry_run:
        print_json({"apiVersion": "v1", "kind": "List", "items": rendered.objects})
        return
    cluster = connect(context, job.kubernetes.namespace)
    step = control.submit(cluster, rendered, replace=replace_it)
    _remember(job, run_id, cluster.namespace, context)
    if step is control.Step.FINISHED:
        log.info("run %s is finished; --new starts another one", run_id)
    elif step is control.Step.LEAVE:
        log.info("run %s is there already: nothing to do", run_id)
    typer.echo(f"job {rendered.name} in namespace {cluster.namespace}")


def _run_id(job: Any, wishes: Any) -> str:
    from runner.job import check_run_id, is_s3
    from runner.supervisor.preflight import refusals, store_of
    from runner.supervisor.service import run_id_for

    if not wishes.new:
        return check_run_id(wishes.run_id or job.name)
    if not is_s3(job.store):
        raise UsageError("--new looks for an unused run id in the store; say it with --run-id")
    store = store_of(job)
    with refusals(store):
        return run_id_for(job, wishes, store)


def _options(wishes: Any) -> list[str]:
    """What every pod of the run is told: it must mean the same each time."""
    options = ["--update"] if wishes.update else []
    place = wishes.begin_from
    if place is not None:
        if "/" not in place:
            raise UsageError(
                f"--from {place}: each new pod would go back again; begin another run from that "
                "checkpoint: --new --from s3://bucket/prefix/run/checkpoints/NAME"
            )
        options += ["--from", place]
    if wishes.components:
        options += ["--components", ",".join(wishes.components)]
    return options


def _remember(job: Any, run_id: str, namespace: str, context: str | None) -> None:
    from runner.job import is_s3
    from runner.spool import spool_path
    from runner.supervisor import index
    from runner.supervisor.preflight import s3_options
    from runner.wallclock import utc_now

    place = {"namespace": namespace, **({} if context is None else {"context": context})}
    options = asdict(s3_options(job)) if is_s3(job.store) else None
    logs = str(index.logs_of(run_id, job.store))
    spool = str(spool_path(run_id, job.store))  # as if it were here: nobody has it
    entry = index.Entry(run_id, job.store, spool, logs, utc_now(), options)
    index.remember(replace(entry, cluster=place))


# ---------------------------------------------------------------------------- looking


def status(run: InCluster) -> dict[str, Any]:
    """As `status_of` has it for a run of this machine, and what the cluster knows of it."""
    from runner.launch.kubernetes import state

    job = run.job()
    pods = run.cluster.pods(run.name)
    phase = state.phase_of(job)
    facts = _facts_of_store(run)
    if job is None and facts is None:
        raise UnknownName("run", run.run_id, place=f"in namespace {run.cluster.namespace}")
    facts = facts or {"run_id": run.run_id}
    if job is not None:
        facts |= {"phase": phase.value, "live": not phase.is_over}
        facts["cause"] = state.why_failed(job) or facts.get("cause")
    job_status = {} if job is None else job.get("status", {})
    return facts | {
        "cluster": {
            "namespace": run.cluster.namespace,
            "job": None if job is None else run.name,
            "failed_pods": job_status.get("failed", 0),
            "pods": [state.pod_row(pod) for pod in pods],
        }
    }


def _facts_of_store(run: InCluster) -> dict[str, Any] | None:
    from runner.supervisor.lookup import status_of

    try:
        known = run.known_run()
        return None if known is None else status_of(known)
    except StoreError as error:
        log.warning("what is saved is not known from here: %s", error)
        return None


def print_status(facts: dict[str, Any]) -> None:
    """For people: the facts, then one line for each pod."""
    cluster = facts.pop("cluster")
    shown = {**facts, **{key: value for key, value in cluster.items() if key != "pods"}}
    for key, value in shown.items():
        typer.echo(f"{key:<16} {'-' if value is None else value}")
    for pod in cluster["pods"]:
        about = [pod["phase"], pod["reason"], pod["node"] and f"on {pod['node']}"]
        code = pod["exit_code"]
        about.append(None if code is None else f"exit code {code}")
        typer.echo(f"{'pod':<16} {pod['name']} {', '.join(filter(None, about))}")


def read_log(run: InCluster, attempt: int | None, *, follow: bool) -> Iterator[bytes]:
    """The log across pods; of one attempt, what the store has of it."""
    from runner.checkpoint.logs import StoredLogs
    from runner.launch.kubernetes import reading
    from runner.logs.reading import LogReader

    try:
        known = run.known_run()
    except StoreError as error:
        log.warning("older lines cannot be read from here: %s", error)
        known = None
    stored = None if known is None else StoredLogs(known.store, run.run_id)
    if attempt is None:
        yield from reading.read_log(run.cluster, run.name, stored, follow=follow)
    elif stored is None:
        raise UsageError("--attempt needs the store, which cannot be read from here; say --store")
    else:
        yield from LogReader(attempt).advance([stored])


def stop(run: InCluster) -> None:
    """Have it save and end."""
    from runner.launch.kubernetes import control

    control.stop(run.cluster, run.name)
    facts = _facts_of_store(run)
    saved = None if facts is None else facts["saved_step"]
    typer.echo("stopped" if saved is None else f"stopped, saved at step {saved}")


def wait(run: InCluster) -> int:
    """Until it is over; the exit code."""
    from runner.launch.kubernetes import control

    phase, code = control.wait(run.cluster, run.name)
    typer.echo(phase.value)
    return code


def complete(rows: list[dict[str, Any]]) -> None:
    """Put into rows of `runner status` where the runs in clusters are there."""
    from runner.launch.kubernetes import state
    from runner.launch.kubernetes.client import connect
    from runner.supervisor import index

    clusters = {e.run_id: dict(e.cluster) for e in reversed(index.entries()) if e.cluster}
    for row in rows:
        if (place := clusters.get(row["run_id"])) is None:
            continue
        try:
            cluster = connect(place.get("context"), place.get("namespace"))
            row["phase"] = state.phase_of(InCluster(row["run_id"], cluster).job()).value
        except RunnerError as error:
            log.warning("nothing is known of run %s: %s", row["run_id"], error)
            row["phase"] = "unknown"
