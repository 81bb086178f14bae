"""Commands that show runs to people who would rather look than read: `report`, `ui`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from runner.cli.common import (
    BundleOption,
    EndpointOption,
    RegionOption,
    RunName,
    StoreOption,
    found_run,
    print_json,
    where,
)
from runner.errors import UsageError


def report(
    name: RunName,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE|json",
            help="The page to write, by default RUN.html; `json` prints what is in it.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte of every checkpoint.")
    ] = False,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
) -> None:
    """Write a page about a run: one HTML file that asks for nothing else."""
    from runner.views.looking import Looker
    from runner.views.page import page

    found = found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle)
    overview = Looker(found).overview("deep" if verify else "quick")
    if output == "json":
        print_json(overview)
        return
    path = Path(f"{name}.html" if output is None else output).expanduser()
    _write(path, page(overview))
    typer.echo(str(path))


def ui(
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")
    ] = 8470,
    host: Annotated[
        str, typer.Option("--host", help="An address of this machine that only it can ask.")
    ] = "127.0.0.1",
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
) -> None:
    """Serve the pages of all runs of a store, live, for a browser on this machine."""
    from runner.views.server import Pages, Server

    # Ctrl-C ends it also where it was inherited as ignored, as by a job in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pages = Pages(where(store, s3_endpoint, s3_region, s3_ca_bundle))
    with Server(host, port, pages) as server:
        typer.echo(server.address)
        sys.stdout.flush()
        server.serve_forever()


def _write(path: Path, text: str) -> None:
    """All at once, so that a browser that looks at it never sees half a page."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
