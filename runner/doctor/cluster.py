"""What a cluster has for a job: the grace of its nodes, who may do what, and whether it answers."""

from __future__ import annotations

from collections.abc import Iterator

from runner.doctor.finding import Finding, fail, ok, warn
from runner.errors import ClusterError, JobError
from runner.job import Job
from runner.launch.kubernetes import answers, client, objects, profiles
from runner.units import format_duration


def grace(job: Job) -> Iterator[Finding]:
    """Whether the nodes give the grace that the job counts on. Nothing where nobody knows."""
    given = profiles.platform_grace_seconds(job)
    if given is None:
        return
    warning = profiles.grace_warning(job)
    if warning is not None:
        yield warn("grace", warning)
    else:
        wanted = format_duration(job.preemption.grace_seconds)
        yield ok("grace", f"{wanted}, of {format_duration(given)} that the nodes give")


def rendered(job: Job, run_id: str) -> Iterator[Finding]:
    """The job can be made a Job, and what is to be said of that beside the grace."""
    try:
        made = objects.render(job, run_id)
    except JobError as error:
        yield from (fail("kubernetes", problem) for problem in error.problems)
        return
    warnings = [w for w in made.warnings if w != profiles.grace_warning(job)]
    yield from (warn("kubernetes", warning) for warning in warnings)
    if not warnings:
        yield ok("kubernetes", f"job {made.name}, image {job.image}")


def rights(job: Job, context: str | None) -> Iterator[Finding]:
    """The API answers, and whoever asks may do all that submit, stop, wait and logs do."""
    try:
        cluster = client.connect(context, job.kubernetes.namespace)
        missing = [f"{v} {kind.words}" for v, kind in answers.RIGHTS if not cluster.may(v, kind)]
    except ClusterError as error:
        yield fail("cluster", str(error))
        return
    where = f"namespace {cluster.namespace}"
    if missing:
        remedy = "add it to a Role, as in k8s/base/rbac.yaml"
        yield fail("cluster", f"in the {where} it is not allowed to {', '.join(missing)}", remedy)
    else:
        yield ok("cluster", f"it answers, and all that is needed is allowed in the {where}")
