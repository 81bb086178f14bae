"""Submit, stop and await a run in a cluster: in which order what is done. Said as it is done.

A Job's template is immutable and a finished Job stays, so to continue a run means to delete its Job
and to create it again; what is saved is in the store. A Job is deleted in the foreground: it is
there until its pod has saved and ended, so that there are never two pods of one run.
"""

from __future__ import annotations

import contextlib
import logging
from enum import Enum
from typing import Any

from runner.errors import ClusterError
from runner.launch.kubernetes import state
from runner.launch.kubernetes.answers import Absent, Taken
from runner.launch.kubernetes.client import Cluster
from runner.launch.kubernetes.names import RUN_ID_ANNOTATION, STOPPED_ANNOTATION
from runner.launch.kubernetes.objects import Rendered
from runner.launch.kubernetes.state import Phase

log = logging.getLogger(__name__)


class Step(Enum):
    """What has to be done to have a run live."""

    CREATE = "create"
    RESUME = "resume"
    RECREATE = "recreate"
    LEAVE = "leave"  # it is live, or queued
    FINISHED = "finished"


def next_step(rendered: Rendered, live: dict[str, Any] | None, *, replace: bool) -> Step:
    """ClusterError if there is a Job that is not to be touched: it shows what differs."""
    if live is None:
        return Step.CREATE
    own = live["metadata"].get("annotations", {}).get(RUN_ID_ANNOTATION)
    if own != rendered.run_id:
        raise ClusterError(
            f"job {rendered.name} exists and is no run of this id ({own or 'not of runner'}); "
            "choose another one with --run-id"
        )
    differs = state.differences(rendered.job, live)
    if differs and not replace:
        raise ClusterError(
            "\n".join(
                [
                    f"job {rendered.name} exists and differs from this one:",
                    *(f"  {line}" for line in differs),
                    "say --replace to delete it (it saves and ends) and create it anew",
                ]
            )
        )
    phase = state.phase_of(live)
    if differs or phase in (Phase.FAILED, Phase.ENDING):
        return Step.RECREATE
    if phase is Phase.SUCCEEDED:
        return Step.FINISHED
    return Step.RESUME if phase is Phase.STOPPED else Step.LEAVE


def submit(cluster: Cluster, rendered: Rendered, *, replace: bool) -> Step:
    """Have the run live in the cluster; what was done for that. Nothing is left half done."""
    name = rendered.name
    live = cluster.job(name)
    step = next_step(rendered, live, replace=replace)
    if step is Step.RESUME:
        log.info("job %s was stopped: it goes on", name)
        cluster.change_job(
            name,
            {
                "metadata": {"annotations": {STOPPED_ANNOTATION: None}},
                "spec": {"suspend": False},
            },
        )
    elif step is Step.RECREATE and live is not None:
        log.info("job %s is deleted; its pod, if there is one, saves and ends", name)
        cluster.delete_job(name)
        _wait_until_gone(cluster, name)
    if step in (Step.CREATE, Step.RECREATE):
        _create(cluster, rendered)
        log.info("job %s is created in the namespace %s", name, cluster.namespace)
    return step


def stop(cluster: Cluster, name: str) -> None:
    """Have the run save and end; `submit` continues it. Absent if there is no Job.

    ClusterError if it is over already.
    """
    live = cluster.job(name)
    if live is None:
        raise Absent(f"there is no job {name} in the namespace {cluster.namespace}")
    phase = state.phase_of(live)
    if phase.is_over:
        raise ClusterError(f"job {name} is not live: it is {phase.value}")
    if state.is_queued_by_kueue(live):
        log.info("job %s is deleted: Kueue would start a suspended one again", name)
        cluster.delete_job(name)
        _wait_until_gone(cluster, name)
        return
    cluster.change_job(
        name,
        {
            "metadata": {"annotations": {STOPPED_ANNOTATION: "true"}},
            "spec": {"suspend": True},
        },
    )
    log.info("job %s is suspended; its pod saves and ends", name)
    for job in cluster.follow_job(name):
        if state.phase_of(job).is_over:
            return


def wait(cluster: Cluster, name: str) -> tuple[Phase, int]:
    """Until the run is over: how, and the exit code. Absent if there is no Job."""
    was_there = False
    for job in cluster.follow_job(name):
        phase = state.phase_of(job)
        if job is None and not was_there:
            raise Absent(f"there is no job {name} in the namespace {cluster.namespace}")
        was_there = True
        if phase.is_over:
            return phase, state.exit_code_of(job, cluster.pods(name))
    raise AssertionError("a Job is followed without an end")


def _create(cluster: Cluster, rendered: Rendered) -> None:
    """First what the pod needs, then the Job; and if that is refused, neither."""
    config_map = rendered.config_map["metadata"]["name"]
    # One that is there may be an earlier Job's, and go with it.
    cluster.delete_config_map(config_map)
    cluster.create_config_map(rendered.config_map)
    try:
        job = cluster.create_job(rendered.job)
    except Taken as error:
        raise ClusterError(
            f"job {rendered.name} was created by somebody else at this moment; look at it with "
            f"`runner status {rendered.run_id}`, or submit again"
        ) from error
    except ClusterError:
        with contextlib.suppress(ClusterError):
            cluster.delete_config_map(config_map)
        raise
    try:
        cluster.give_to(config_map, job)
    except ClusterError as error:
        log.warning("the ConfigMap %s will outlive its Job: %s", config_map, error)


def _wait_until_gone(cluster: Cluster, name: str) -> None:
    for job in cluster.follow_job(name):
        if job is None:
            return
