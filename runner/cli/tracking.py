"""Commands about trackers and their registries: `track`, `promote`."""

from __future__ import annotations

from typing import Annotated

import typer

from runner import exitcodes
from runner.cli.common import (
    BundleOption,
    EndpointOption,
    RegionOption,
    RunName,
    StoreOption,
    chosen_checkpoint,
    found_run,
    where,
)


def track(
    name: RunName,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
) -> None:
    """Send what a run's trackers have not got yet: they were down when it ended, for example."""
    from runner.supervisor.trackers import catch_up

    run = found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle)
    if not catch_up(run, where(store, s3_endpoint, s3_region, s3_ca_bundle).s3):
        raise typer.Exit(exitcodes.GIVEN_UP)


def promote(
    name: RunName,
    which: Annotated[str | None, typer.Argument(metavar="[latest|best|STEP|NAME]")] = None,
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint.")] = False,
    model: Annotated[
        str, typer.Option("--name", metavar="NAME", help="The registered model's name.")
    ] = ...,  # type: ignore[assignment]
    alias: Annotated[
        str | None, typer.Option("--alias", help="Give the version this alias: champion.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The average of the weights.")] = False,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
) -> None:
    """Register a checkpoint in MLflow's model registry, as safetensors with a small loader."""
    from runner.supervisor import promoting

    chosen = chosen_checkpoint(which, best=best)
    run = found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle)
    version = promoting.promote(run, chosen, model, alias, ema=ema)
    typer.echo(f"{model}, version {version}{f', {alias}' if alias else ''}")
