"""The types of single values in a job file: text, names, counts, durations, sizes, switches.

A duration or a size in a file is text with a unit; the attribute is a number and carries the unit
in its name. Types are strict: "5" is not 5, and neither are 5.0 and true.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
)

from runner.job_yaml import not_unicode
from runner.units import (
    DURATION_PATTERN,
    SIZE_PATTERN,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)

LARGEST_COUNT = 1_000_000_000
DEFAULT_GUARD = 0.95
NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"


def dns_label(text: str) -> str:
    if not re.fullmatch(NAME_PATTERN.removesuffix("$"), text):
        raise ValueError(
            "expected a DNS label: at most 63 lower-case letters, digits and '-', with a letter or"
            " a digit at both ends"
        )
    return text


def any_text(text: str) -> str:
    if problem := not_unicode(text):
        raise ValueError(problem)
    if "\0" in text:
        raise ValueError("expected text without NUL characters")
    return text


def some_text(text: str) -> str:
    if not text.strip():
        raise ValueError("expected text, not nothing")
    return any_text(text)


def directory(value: object) -> object:
    """Make a path absolute; the folder the process is in is the base of a relative one."""
    if not isinstance(value, str | Path):
        raise ValueError("expected a directory, as text")
    try:
        return Path(some_text(str(value))).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a loop of links; no such user
        raise ValueError(f"expected a directory: {error}") from None


def _duration(value: object) -> object:
    seconds = 0.0
    with contextlib.suppress(ValueError):
        seconds = parse_duration(value) if isinstance(value, str) else 0.0
    if seconds <= 0:
        raise ValueError("expected a duration above zero, such as 250ms, 30s, 10m, 2h or 1d")
    return seconds


def _size(value: object) -> object:
    return parse_size(value if isinstance(value, str) else "")


def _switch(value: object) -> object:
    """YAML 1.1 reads `on` as true, YAML 1.2 as text: here both are the same."""
    meaning = {"on": True, "off": False}.get(value) if isinstance(value, str) else value
    if not isinstance(meaning, bool):
        raise ValueError("expected on or off")
    return meaning


def _guard(value: object) -> object:
    """A share of a limit in percent, as a number below 1; 0 is off. `on` is the default."""
    if value is False or value == "off":
        return 0.0
    if value is True or value == "on":
        return DEFAULT_GUARD
    match = re.fullmatch(r"([0-9]{2})%", value) if isinstance(value, str) else None
    if match is None or not 50 <= int(match[1]) <= 99:
        raise ValueError("expected a share from 50% to 99%, on or off")
    return int(match[1]) / 100


def _format_guard(share: float) -> str:
    return f"{round(100 * share)}%" if share else "off"


class Part(BaseModel):
    """A mapping of the job file whose keys are known."""

    # Built when it is first used, so that parts are built once, as parts of the whole job.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Text = Annotated[str, AfterValidator(some_text), Field(json_schema_extra={"minLength": 1})]
_ABOVE_ZERO = DURATION_PATTERN.replace("^", "^(?=.*[1-9])", 1)
Duration = Annotated[
    float,
    BeforeValidator(_duration),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema({"type": "string", "pattern": _ABOVE_ZERO, "examples": ["30s", "10m"]}),
]
Size = Annotated[
    int,
    BeforeValidator(_size),
    PlainSerializer(format_size, return_type=str),
    WithJsonSchema({"type": "string", "pattern": SIZE_PATTERN, "examples": ["8Gi", "500M"]}),
]
Switch = Annotated[
    bool,
    BeforeValidator(_switch),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"enum": ["on", "off"]}]}),
]
Guard = Annotated[
    float,
    BeforeValidator(_guard),
    PlainSerializer(_format_guard, return_type=str),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": "^[5-9][0-9]%$", "examples": ["95%"]},
                {"enum": ["on", "off"]},
                {"type": "boolean"},
            ]
        }
    ),
]
