"""Commands that look at a run: `status`, `stop`, `wait`."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from runner.cli import cluster
from runner.cli.common import (
    BundleOption,
    ContextOption,
    EndpointOption,
    NamespaceOption,
    Output,
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
    watch: Annotated[
        bool, typer.Option("-w", "--watch", help="Go on looking, until the run ends.")
    ] = False,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    output: OutputOption = "text",
) -> None:
    """Where a run is, or all runs started on this machine, or those of a store."""
    from runner.supervisor.lookup import overview

    s3 = (s3_endpoint, s3_region, s3_ca_bundle)
    if name is not None and (run := cluster.find(name, namespace, context, store, s3)):
        facts = cluster.status(run)
        print_json(facts) if output == "json" else cluster.print_status(facts)
        return
    if name is not None:
        found = found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle)
        if watch:
            from runner.views.watching import watch as look_on

            look_on(found, as_json=output == "json")
        else:
            _show(found, output)
        return
    if watch:
        raise UsageError("--watch needs the name of a run")
    rows = list(overview(where(store, s3_endpoint, s3_region, s3_ca_bundle)))
    if store is None:
        cluster.complete(rows)
    columns = ("run_id", "phase", "step", "epoch", "attempt", "saved_step", "store")
    print_rows(rows, columns, output)


def _show(run: Any, output: Output) -> None:
    from runner.views import live, terminal
    from runner.views.looking import Looker
    from runner.views.overview import glance
    from runner.views.words import plain

    seen = glance(Looker(run).look())
    if output == "json":
        print_json(seen)
        return
    is_terminal = sys.stdout.isatty()
    columns = live.terminal_size(sys.stdout.fileno()).columns if is_terminal else 80
    color = is_terminal and live.wants_color()
    for line in terminal.frame(seen, columns, color=color):
        typer.echo(line, color=True)
    typer.echo()
    for key in ("phase", "cause", "node", "last_checkpoint", "store", "pid"):
        typer.echo(f"{key:<16} {'-' if seen[key] is None else plain(seen[key])}")


def stop(
    name: RunName,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
) -> None:
    """Save a run and end it; `runner submit` continues it."""
    from runner.supervisor.lookup import status_of

    s3 = (s3_endpoint, s3_region, s3_ca_bundle)
    if run := cluster.find(name, namespace, context, store, s3):
        cluster.stop(run)
        return
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
    namespace: NamespaceOption = None,
    context: ContextOption = None,
) -> None:
    """Wait until a run on this machine, or in a cluster, has ended; exit as it did."""
    from runner.supervisor.lookup import exit_code_of, status_of

    s3 = (s3_endpoint, s3_region, s3_ca_bundle)
    if run := cluster.find(name, namespace, context, store, s3):
        raise typer.Exit(cluster.wait(run))
    found = found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle)
    while found.is_live():
        time.sleep(0.1)
    typer.echo(status_of(found)["phase"])
    raise typer.Exit(exit_code_of(found))
