"""What is kept of the code beside its commit."""

from __future__ import annotations

from pydantic import Field

from runner.job_types import Part, Switch


class Provenance(Part):
    """What checkpoints say of the code that made them."""

    diff: Switch = Field(
        default=False,
        description="Store the uncommitted changes of the repository with the run, as a patch.",
    )
