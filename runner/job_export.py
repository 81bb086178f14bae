"""What a checkpoint needs to be deployed: the section `export` of a job."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from runner.job_types import Part, Text

_ENTRYPOINT = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"


def _entrypoint(text: str) -> str:
    if not re.fullmatch(_ENTRYPOINT, text, re.ASCII):
        raise ValueError("expected module:function, such as jobs.rul.onnx:network")
    return text


class Export(Part):
    """What `runner checkpoints export --to` and `runner promote` write beside the weights."""

    model: Text = Field(default="model", description="The component with the weights.")
    ema: Text = Field(default="ema", description="The component with their average, for --ema.")
    state: tuple[Text, ...] = Field(
        default=(),
        strict=False,
        description="Keys of run.state that are written as JSON, each into a file of its own:"
        " statistics of the preprocessing, for example.",
        examples=[["config", "statistics"]],
    )
    onnx: Annotated[str, AfterValidator(_entrypoint)] | None = Field(
        default=None,
        description="The function that builds the module for --onnx from an export, as"
        " module:function.",
        json_schema_extra={"pattern": f"^{_ENTRYPOINT}$"},
        examples=["jobs.rul.onnx:network"],
    )
