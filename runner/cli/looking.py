"""Commands that look at a run: `status`, `stop`, `wait`."""

from __future__ import annotations

import time
from typing import Annotated

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
