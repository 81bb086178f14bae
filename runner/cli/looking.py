"""Commands that look at a run: `status`, `logs`, `stop`, `wait`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from runner.cli.common import (
    BundleOption,
    EndpointOption,
    OutputOption,
    RegionOption,
    RunName,
    StoreOption,
    found_run,
    print_json,
    print_rows,
    where,
)
from runner.errors import UsageError


def status(
    name: Annotated[str | None, typer.Argument(metavar="[RUN]")] = None,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
    output: OutputOption = "text",
) -> None:
    """Where a run is, or all runs of this machine or of a store."""
    from runner.supervisor.lookup import overview, status_of

    if name is not None:
        one = status_of(found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle))
        if output == "json":
            print_json(one)
        else:
            for key, value in one.items():
                typer.echo(f"{key:<16} {'-' if value is None else value}")
        return
    rows = list(overview(where(store, s3_endpoint, s3_region, s3_ca_bundle)))
    columns = ("run_id", "phase", "step", "epoch", "attempt", "saved_step", "store")
    print_rows(rows, columns, output)


def logs(
    name: RunName,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it comes.")] = False,
) -> None:
    """What the trainer has printed, over all attempts on this machine."""
    found = found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle)
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


def stop(
    name: RunName,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
) -> None:
    """Save a run and end it; `runner submit` continues it."""
    from runner.supervisor.lookup import status_of

    found = found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle)
    if not found.is_live():
        raise UsageError(f"run {name} is not live on this machine")
    found.spool.ask_to_stop()
    while found.is_live():
        time.sleep(0.05)
    after = status_of(found)
    saved = after["saved_step"]
    what = "nothing is saved" if saved is None else f"saved at step {saved}"
    typer.echo(f"{after['phase']} at step {after['step']}, {what}")


def wait(
    name: RunName,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
) -> None:
    """Wait until a run on this machine has ended; exit as it did."""
    from runner.supervisor.lookup import exit_code_of, status_of

    found = found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle)
    while found.is_live():
        time.sleep(0.1)
    typer.echo(status_of(found)["phase"])
    raise typer.Exit(exit_code_of(found))
