"""Somebody who looks on while a run is supervised: shown on a terminal, and never waited for."""

from __future__ import annotations

from typing import Protocol

from runner.supervisor.output import PassThrough, Screen


class Audience(Protocol):
    """It looks at the run by itself, on threads of its own, and only reads.

    `screen` is for a terminal where what it shows stands below all that is printed; None if it only
    prints lines like others do.
    """

    screen: Screen | None

    def start(self, through: PassThrough) -> None:
        """The supervisor is about to begin; `through` is where things are shown."""

    def stop(self) -> None:
        """The run is over here, and its last state can be shown. Returns soon."""
