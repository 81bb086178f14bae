"""Keys of a job whose trainer runs in a container: the image, and what it gets of the world."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from runner.job_types import Part, Text, some_text

# Source: https://pkg.go.dev/github.com/distribution/reference
_NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
_TAG, _DIGEST = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", r"sha256:[0-9a-f]{64}"
IMAGE_PATTERN = rf"^(?:(?:{_HOST}/)?{_NAME}(?:/{_NAME})*(?::{_TAG})?(?:@{_DIGEST})?|{_DIGEST})$"
NETWORK_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}$"
USER_PATTERN = r"^[0-9]{1,10}(:[0-9]{1,10})?$"
_LARGEST_ID = 2**32 - 2
_OURS, _WORKDIR = Path("/runner"), Path("/runner/workdir")  # in the container


def _image(text: str) -> str:
    if not re.fullmatch(IMAGE_PATTERN.removesuffix("$"), text):
        raise ValueError("expected an image, such as registry.example/team/rul:1.0")
    return text


def _network(text: str) -> str:
    if not re.fullmatch(NETWORK_PATTERN.removesuffix("$"), text):
        raise ValueError("expected none, bridge, host, or the name of a network")
    return text


def _user(value: object) -> object:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and re.fullmatch(USER_PATTERN.removesuffix("$"), text):
        user, _, group = text.partition(":")
        if max(int(user), int(group or user)) <= _LARGEST_ID:
            return f"{int(user)}:{int(group or user)}"
    raise ValueError('expected the numbers of a user and a group, such as "1000:1000"')


Image = Annotated[str, AfterValidator(_image), Field(json_schema_extra={"pattern": IMAGE_PATTERN})]
Network = Annotated[
    str, AfterValidator(_network), Field(json_schema_extra={"pattern": NETWORK_PATTERN})
]
User = Annotated[
    str,
    BeforeValidator(_user),
    # An integer is a number of a user, whose group has the same.
    WithJsonSchema({"type": ["string", "integer"], "pattern": USER_PATTERN, "minimum": 0}),
]


def _target(text: str) -> str:
    path = Path(some_text(text))
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError("expected an absolute path in the container")
    return str(_free(Path("/", *path.parts[1:])))  # // begins a path of another kind


def _free(target: Path) -> Path:
    if target == Path("/"):
        raise ValueError("expected an absolute path in the container, and not all of it")
    if target.is_relative_to(_OURS) and _WORKDIR not in target.parents:
        raise ValueError(
            f"expected a path that is not in {_OURS}, where the run's own folders are, or one "
            f"below {_WORKDIR}"
        )
    return target


def _source(text: str) -> str:
    if ":" in some_text(text):
        raise ValueError("expected a path without ':'; where it goes is said by target")
    return text


class Mount(Part):
    """A file or folder of this machine that the trainer sees."""

    source: Annotated[Text, AfterValidator(_source)] = Field(
        description="On this machine; relative to the workdir.", examples=["/data/cmapss"]
    )
    target: Annotated[Text, AfterValidator(_target)] | None = Field(
        default=None, description="In the container; default: the same path.", examples=["/data"]
    )
    writable: bool = Field(default=False, description="Whether the trainer may write there.")

    @model_validator(mode="after")
    def _is_free(self) -> Mount:
        if self.target is None and Path(self.source).is_absolute():
            _free(Path(self.source))
        return self

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


def needed(field: str) -> PydanticCustomError:
    """The error of a key that another one makes necessary."""
    return PydanticCustomError("needed", "is missing: {field} needs it", {"field": field})


def each_target_once(mounts: tuple[Mount, ...]) -> tuple[Mount, ...]:
    targets = [mount.target or mount.source for mount in mounts]
    if len(set(targets)) < len(targets):
        raise ValueError("expected each target once")
    return mounts
