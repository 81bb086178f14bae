"""Commands that start a run: `submit`, `run`, `simulate`."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from runner import exitcodes
from runner.cli import cluster
from runner.cli.common import (
    ComponentsOption,
    ContextOption,
    FromOption,
    ImageOption,
    JobFile,
    LauncherOption,
    NamespaceOption,
    NewOption,
    OutputOption,
    ParamOption,
    ProfileOption,
    RunIdOption,
    StoreOption,
    UpdateOption,
    load,
    print_json,
)
from runner.errors import UsageError


def submit(
    job: JobFile,
    param: ParamOption = None,
    launcher: LauncherOption = None,
    store: StoreOption = None,
    run_id: RunIdOption = None,
    begin_from: FromOption = None,
    components: ComponentsOption = None,
    new: NewOption = False,
    update: UpdateOption = False,
    image: ImageOption = None,
    profile: ProfileOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="In a cluster: put this Job in an other's place.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Return as soon as it runs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and start nothing.")] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Lines instead of a view, also on a terminal.")
    ] = False,
) -> None:
    """Start a run, or continue it if it exists."""
    loaded = load(job, param, launcher, store, image=image, profile=profile, namespace=namespace)
    if loaded.launcher == "kubernetes":
        wishes = _wishes(job, run_id, new, update, begin_from, components)
        cluster.submit(loaded, wishes, context=context, replace_it=replace, dry_run=dry_run)
        return
    if replace or context is not None:
        raise UsageError("--replace and --context are for the launcher kubernetes")
    if dry_run:
        _check(loaded)
        print_json(_resolved(loaded))
        return
    if detach:
        from runner.supervisor.detached import start_detached

        _check(loaded)
        arguments = sys.argv[1:]
        started = start_detached([a for a in arguments if a != "--detach"])
        if started.exit_code is not None:
            typer.echo(started.log.read_text(errors="replace"), err=True, nl=False)
            code = started.exit_code
            raise typer.Exit(code if code >= 0 else exitcodes.GIVEN_UP)
        typer.echo(f"process {started.pid}; its messages are in {started.log}", err=True)
        return
    wishes = _wishes(job, run_id, new, update, begin_from, components)
    _supervise(loaded, wishes, _audience(plain=plain))


def run(
    job: JobFile,
    param: ParamOption = None,
    launcher: LauncherOption = None,
    store: StoreOption = None,
    run_id: RunIdOption = None,
    begin_from: FromOption = None,
    components: ComponentsOption = None,
    new: NewOption = False,
    update: UpdateOption = False,
) -> None:
    """Start or continue a run in the foreground, as PID 1 of a container."""
    loaded = load(job, param, launcher, store)
    if loaded.launcher == "kubernetes":
        raise UsageError(
            "launcher: kubernetes is for `runner submit`, which returns when the cluster has the "
            "run; in the foreground, say --launcher process"
        )
    wishes = _wishes(job, run_id, new, update, begin_from, components)
    _supervise(loaded, replace(wishes, waits=True))


def _check(job: Any) -> None:
    """UsageError if what the job names to be started or called is not there."""
    from runner.job import check_launchable
    from runner.launch.site import ProcessSite
    from runner.supervisor.preflight import check_entrypoint

    check_launchable(job)
    if job.launcher == "process":  # what is in an image is looked at when the run begins
        check_entrypoint(job, ProcessSite(job))


def _resolved(job: Any) -> dict[str, Any]:
    from runner.job import job_as_submitted

    return job_as_submitted(job)


def _wishes(
    path: Path,
    run_id: str | None,
    new: bool,
    update: bool,
    begin_from: str | None,
    components: str | None,
) -> Any:
    from runner.job import submitted
    from runner.supervisor.service import Wishes

    names = tuple(name.strip() for name in (components or "").split(",") if name.strip())
    return Wishes(run_id, new, update, begin_from, names, submitted(path))


def _audience(*, plain: bool) -> Any:
    """Who looks on: nobody, where the messages go into a file."""
    from runner.supervisor.detached import DETACHED_VARIABLE

    if DETACHED_VARIABLE in os.environ:
        return None
    from runner.views.live import audience

    return audience(plain=plain)


def _supervise(job: Any, wishes: Any, audience_of: Any = None) -> None:
    from runner.supervisor.service import supervise

    raise typer.Exit(supervise(job, wishes, audience_of))


def simulate(
    job: JobFile,
    preempt: Annotated[
        list[str] | None,
        typer.Option("--preempt", metavar="after=20s|step=150", help="A notice; may be repeated."),
    ] = None,
    grace: Annotated[
        str | None, typer.Option("--grace", help="Between notice and kill; default: the job's.")
    ] = None,
    lose_disk: Annotated[
        bool, typer.Option("--lose-disk", help="The node's disk and memory go with it.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Replay a recorded spot trace (JSON).")
    ] = None,
    speedup: Annotated[float, typer.Option("--speedup", help="Of the trace's time.")] = 1.0,
    param: ParamOption = None,
    store: StoreOption = None,
    run_id: RunIdOption = None,
    output: OutputOption = "text",
) -> None:
    """Run a job to its end on a simulated spot node, and report what the preemptions cost."""
    from runner import simulation
    from runner.supervisor.service import Wishes, run_id_for, usable_store_of
    from runner.units import parse_duration

    loaded = load(job, param, None, store)
    _check(loaded)
    try:
        seconds = loaded.preemption.grace_seconds if grace is None else parse_duration(grace)
    except ValueError as error:
        raise UsageError(f"--grace {grace}: {error}") from error
    plan = simulation.plan_from(
        seconds, preempt or [], lose_disk=lose_disk, trace=trace, speedup=speedup
    )
    opened = usable_store_of(loaded)
    _clean_up_on_signals()
    options = [option for text in param or () for option in ("-p", text)]
    options += ["--store", opened.url]
    report = simulation.simulate(
        job,
        plan,
        options,
        store=opened,
        run_id=run_id_for(loaded, Wishes(run_id=run_id, new=run_id is None), opened),
        quiet_stdout=output == "json",
    )
    if output == "json":
        print_json(report)
    else:
        typer.echo(simulation.as_text(report))
    raise typer.Exit(report["exit_code"] if report["exit_code"] >= 0 else 1)


def _clean_up_on_signals() -> None:
    """Leave by an exception, so that what was started is ended, and only once."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def leave(signum: int, _frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + signum)

    for signum in signals:
        signal.signal(signum, leave)
