"""What a run tells about itself, and to whom; and what an hour of its node costs."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema

from runner.job_types import Part, Text

OFF = -1
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


def _port(value: object) -> object:
    """A port, or none: `off` is false where YAML 1.1 was read."""
    if value is False or value == "off":
        return OFF
    if type(value) is not int or not 0 <= value <= 65535:
        raise ValueError("expected a port from 0 to 65535 (0: any that is free), or off")
    return value


def _format_port(port: int) -> int | str:
    return "off" if port == OFF else port


def _host(text: str) -> str:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        if not _HOST_NAME.fullmatch(text):
            raise ValueError(
                "expected an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all"
            ) from None
    return text


def _gateway(text: str) -> str:
    """The URL of a Pushgateway. Nothing of a URL that holds credentials is repeated."""
    try:
        url = urlsplit(text)
        is_server = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        url, is_server = urlsplit(""), False
    if url.username is not None or url.password is not None:
        raise ValueError("expected a URL without credentials: they never stand in a job file")
    if not is_server or url.query or url.fragment:
        raise ValueError("expected the URL of a Pushgateway, such as http://pushgateway:9091")
    return text.rstrip("/")


Port = Annotated[
    int,
    BeforeValidator(_port),
    PlainSerializer(_format_port),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": 65535},
                {"enum": ["off"]},
                {"const": False},
            ]
        }
    ),
]


class Metrics(Part):
    """Where the supervisor can be asked how the run is doing, by Prometheus and by probes."""

    port: Port = Field(
        default=9400,
        description="Of the supervisor's HTTP endpoint; 0: any that is free; `off`: none.",
    )
    host: Annotated[Text, AfterValidator(_host)] = Field(
        default="127.0.0.1",
        description="The address that it listens on; 0.0.0.0 lets other machines ask.",
    )
    pushgateway: Annotated[Text, AfterValidator(_gateway)] | None = Field(
        default=None,
        description="A Pushgateway that gets the metrics at the end, for runs that are over before"
        " anybody has asked.",
        examples=["http://pushgateway:9091"],
    )

    @property
    def is_served(self) -> bool:
        """Whether there is an endpoint at all."""
        return self.port != OFF


class Cost(Part):
    """What the node costs: with it, reports tell what was lost and saved in money."""

    per_hour: Annotated[float, Field(gt=0, le=1e6)] = Field(
        description="For each hour that a supervisor has the node, in any currency.",
        examples=[1.2],
    )
