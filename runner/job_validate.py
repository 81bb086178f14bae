"""How checkpoints are validated: the job's own function, how often, and how exact it must be."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from runner.job_types import Count, Duration, Part, Text

_ENTRYPOINT = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"

Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _entrypoint(text: str) -> str:
    if not re.fullmatch(_ENTRYPOINT, text, re.ASCII):
        raise ValueError("expected module:function, such as jobs.rul.validate:check")
    return text


class Validate(Part):
    """Load saved checkpoints in a process of its own, and try them with the job's function."""

    entrypoint: Annotated[str, AfterValidator(_entrypoint)] = Field(
        description="The function to call, as module:function.",
        json_schema_extra={"pattern": f"^{_ENTRYPOINT}$"},
        examples=["jobs.rul.validate:check"],
    )
    every: Count = Field(default=1, description="Validate each n-th checkpoint, and the final one.")
    timeout_seconds: Duration = Field(
        default=600.0,
        alias="timeout",
        description="What one may take; waiting for a processor that is busy does not count.",
    )
    tolerance: Annotated[Tolerance, Field(le=1)] = Field(
        default=0.001,
        description="By what share of its logged value a metric may differ.",
    )
    metrics: dict[Text, Tolerance] = Field(
        default={},
        description="Metrics that must be compared, and by how much each may differ, in its unit.",
        examples=[{"val_rmse": 0.05}],
    )
