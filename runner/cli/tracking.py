"""Commands about trackers and their registries: `track`, `promote`."""

from __future__ import annotations

import typer

from runner import exitcodes
from runner.cli.common import (
    BundleOption,
    EndpointOption,
    RegionOption,
    RunName,
    StoreOption,
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
