"""The command line: parse, call, print, and turn errors into exit codes.

Facts go to stdout, progress and logs to stderr. `-o json` prints facts for programs.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from runner import exitcodes
from runner.errors import CheckpointCorrupt, RunnerError, UsageError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Run training jobs that survive preemption, bit for bit.",
)
checkpoints = typer.Typer(no_args_is_help=True, help="What is saved, and whether it is sound.")
app.add_typer(checkpoints, name="checkpoints")

Output = Literal["text", "json"]
JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job file (YAML).")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")]
StoreOption = Annotated[str | None, typer.Option("--store", help="Where the run's store is.")]
OutputOption = Annotated[Output, typer.Option("-o", "--output", help="How to print facts.")]
ParamOption = Annotated[
    list[str] | None,
    typer.Option("-p", "--param", metavar="K=V", help="Override one of the job's params."),
]
LauncherOption = Annotated[str | None, typer.Option("--launcher", help="How to start the trainer.")]
RunIdOption = Annotated[str | None, typer.Option("--run-id", help="Default: the job's name.")]
FromOption = Annotated[
    str | None,
    typer.Option("--from", metavar="STEP|best|PATH", help="The checkpoint to begin from."),
]
ComponentsOption = Annotated[
    str | None,
    typer.Option("--components", help="Take over only these (a,b); the new run is at step 0."),
]
NewOption = Annotated[bool, typer.Option("--new", help="Start another run of this job.")]
UpdateOption = Annotated[bool, typer.Option("--update", help="Go on with changed values.")]


def main() -> None:
    """The console script: no traceback for an error that was raised on purpose or by the system."""
    logging.basicConfig(
        level=logging.INFO, format="runner: %(message)s", stream=sys.stderr, force=True
    )
    if sys.argv[1:2] in (["run"], ["submit"]):
        _end_early_on_signals()
    try:
        app()
    except RunnerError as error:
        typer.echo(f"runner: {error}", err=True)
        sys.exit(exitcodes.USAGE if isinstance(error, UsageError) else exitcodes.GIVEN_UP)
    except OSError as error:
        typer.echo(f"runner: the system refuses: {error}", err=True)
        sys.exit(exitcodes.GIVEN_UP)


def _end_early_on_signals() -> None:
    """Until the supervisor listens to signals there is nothing to save: leave with the right code.

    Otherwise a preemption in the first tenths of a second would look like a crash.
    """
    for signum, code in (
        (signal.SIGINT, exitcodes.INTERRUPTED),
        (signal.SIGTERM, exitcodes.PREEMPTED),
    ):
        signal.signal(signum, lambda *_, code=code: os._exit(code))


def _clean_up_on_signals() -> None:
    """Leave by an exception, so that what was started is ended, and only once."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def leave(signum: int, _frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + signum)

    for signum in signals:
        signal.signal(signum, leave)


# ---------------------------------------------------------------------------- running


@app.command()
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
    detach: Annotated[bool, typer.Option("--detach", help="Return as soon as it runs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and start nothing.")] = False,
) -> None:
    """Start a run, or continue it if it exists."""
    from runner.job import check_launchable

    loaded = _load(job, param, launcher, store)
    if dry_run:
        check_launchable(loaded)
        _print_json(_resolved(loaded))
        return
    if detach:
        from runner.supervisor.detached import start_detached

        check_launchable(loaded)
        arguments = sys.argv[1:]
        started = start_detached([a for a in arguments if a != "--detach"])
        if started.exit_code is not None:
            typer.echo(started.log.read_text(errors="replace"), err=True, nl=False)
            code = started.exit_code
            raise typer.Exit(code if code >= 0 else exitcodes.GIVEN_UP)
        typer.echo(f"process {started.pid}; its log is {started.log}", err=True)
        return
    _supervise(loaded, run_id, new, update, begin_from, components)


@app.command()
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
    loaded = _load(job, param, launcher, store)
    _supervise(loaded, run_id, new, update, begin_from, components)


def _load(job: Path, param: list[str] | None, launcher: str | None, store: str | None) -> Any:
    from runner.job import load_job, parse_param

    given = dict(parse_param(text) for text in param or ())
    return load_job(job, params=given, launcher=launcher, store=store)


def _resolved(job: Any) -> dict[str, Any]:
    from runner.job import job_as_submitted

    return job_as_submitted(job)


def _supervise(
    job: Any,
    run_id: str | None,
    new: bool,
    update: bool,
    begin_from: str | None,
    components: str | None,
) -> None:
    from runner.supervisor.service import Wishes, supervise

    names = tuple(name.strip() for name in (components or "").split(",") if name.strip())
    raise typer.Exit(supervise(job, Wishes(run_id, new, update, begin_from, names)))


@app.command()
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
    from runner.job import check_launchable
    from runner.supervisor.service import Wishes, run_id_for, store_of
    from runner.units import parse_duration

    loaded = _load(job, param, None, store)
    check_launchable(loaded)
    try:
        seconds = loaded.preemption.grace_seconds if grace is None else parse_duration(grace)
    except ValueError as error:
        raise UsageError(f"--grace {grace}: {error}") from error
    plan = simulation.plan_from(
        seconds, preempt or [], lose_disk=lose_disk, trace=trace, speedup=speedup
    )
    opened = store_of(loaded)
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
        _print_json(report)
    else:
        typer.echo(simulation.as_text(report))
    raise typer.Exit(report["exit_code"] if report["exit_code"] >= 0 else 1)


# ---------------------------------------------------------------------------- looking


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="[RUN]")] = None,
    store: StoreOption = None,
    output: OutputOption = "text",
) -> None:
    """Where a run is, or all runs of this machine or of a store."""
    from runner.supervisor.lookup import all_runs, find_run, status_of

    if name is not None:
        one = status_of(find_run(name, store))
        if output == "json":
            _print_json(one)
        else:
            for key, value in one.items():
                typer.echo(f"{key:<16} {'-' if value is None else value}")
        return
    rows = [status_of(found) for found in all_runs(store)]
    columns = ("run_id", "phase", "step", "epoch", "attempt", "saved_step", "store")
    _print_rows(rows, columns, output)


@app.command()
def logs(
    name: RunName,
    store: StoreOption = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it comes.")] = False,
) -> None:
    """What the trainer has printed, over all attempts on this machine."""
    from runner.supervisor.lookup import find_run

    found = find_run(name, store)
    _copy_logs(found.logs, follow and found.is_live, sys.stdout.buffer.write)


def _copy_logs(
    folder: Path, still_live: Callable[[], bool] | bool, write: Callable[[bytes], Any]
) -> None:
    """Write all log files in order; go on for as long as the run is live, if asked to."""
    done: dict[Path, int] = {}
    while True:
        live = still_live() if callable(still_live) else still_live
        for path in sorted(folder.glob("*.log")):
            with path.open("rb") as file:
                file.seek(done.get(path, 0))
                while chunk := file.read(1 << 20):
                    write(chunk)
                done[path] = file.tell()
        sys.stdout.flush()
        if not live:
            return
        time.sleep(0.1)


@app.command()
def stop(name: RunName, store: StoreOption = None) -> None:
    """Save a run and end it; `runner submit` continues it."""
    from runner.supervisor.lookup import find_run, status_of

    found = find_run(name, store)
    if not found.is_live():
        raise UsageError(f"run {name} is not live on this machine")
    found.spool.ask_to_stop()
    while found.is_live():
        time.sleep(0.05)
    after = status_of(found)
    saved = after["saved_step"]
    what = "nothing is saved" if saved is None else f"saved at step {saved}"
    typer.echo(f"{after['phase']} at step {after['step']}, {what}")


@app.command()
def wait(name: RunName, store: StoreOption = None) -> None:
    """Wait until a run on this machine has ended; exit as it did."""
    from runner.supervisor.lookup import exit_code_of, find_run, status_of

    found = find_run(name, store)
    while found.is_live():
        time.sleep(0.1)
    typer.echo(status_of(found)["phase"])
    raise typer.Exit(exit_code_of(found))


@checkpoints.command("ls")
def list_checkpoints(
    name: RunName, store: StoreOption = None, output: OutputOption = "text"
) -> None:
    """All checkpoints of a run, newest first."""
    from runner.supervisor.lookup import checkpoints_of, find_run

    columns = ("name", "step", "epoch", "triggers", "bytes", "healthy", "pinned", "created_at")
    _print_rows(checkpoints_of(find_run(name, store)), columns, output)


@checkpoints.command("show")
def show_checkpoint(
    name: RunName,
    which: Annotated[str, typer.Argument(metavar="[latest|best|STEP|NAME]")] = "latest",
    store: StoreOption = None,
    digest: Annotated[
        bool, typer.Option("--digest", help="Print one SHA-256 over the content, and nothing else.")
    ] = False,
    output: OutputOption = "text",
) -> None:
    """What a checkpoint is, and where it comes from."""
    from runner.supervisor.lookup import find_run

    found = find_run(name, store)
    manifest = found.find_checkpoint(which)
    if digest:
        value = found.archive.digest(manifest)
        _print_json({"name": manifest.name, "digest": value}) if output == "json" else typer.echo(
            value
        )
        return
    document = json.loads(manifest.to_json())
    if output == "json":
        _print_json(document)
        return
    for key, value in document.items():
        if key == "files":
            for file in value:
                typer.echo(f"{'file':<20} {file['name']} {file['size']} bytes {file['digest']}")
        else:
            typer.echo(f"{key:<20} {json.dumps(value)}")


@checkpoints.command("verify")
def verify_checkpoints(
    name: RunName,
    which: Annotated[str | None, typer.Argument(metavar="[latest|best|STEP|NAME]")] = None,
    store: StoreOption = None,
    output: OutputOption = "text",
) -> None:
    """Read checkpoints and compare every byte with the manifest; exit 1 if one is not sound."""
    from runner.supervisor.lookup import find_run

    found = find_run(name, store)
    names = [str(n) for n in found.archive.names()] if which is None else [which]
    rows = []
    for one in names:
        row = {"name": one, "sound": True, "problem": ""}
        try:
            manifest = found.find_checkpoint(one)
            row["name"] = manifest.name
            found.archive.verify(manifest)
        except (CheckpointCorrupt, RunnerError) as error:
            if isinstance(error, UsageError) and which is not None:
                raise
            row |= {"sound": False, "problem": getattr(error, "problem", str(error))}
        rows.append(row)
    _print_rows(rows, ("name", "sound", "problem"), output)
    raise typer.Exit(0 if all(row["sound"] for row in rows) else 1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the job file."""
    from runner.job import job_schema

    _print_json(job_schema())


# ---------------------------------------------------------------------------- printing


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _print_rows(rows: list[dict[str, Any]], columns: tuple[str, ...], output: Output) -> None:
    """A table for people, the whole rows for programs."""
    if output == "json":
        _print_json(rows)
        return
    table = [columns, *(tuple(_cell(row[column]) for column in columns) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
