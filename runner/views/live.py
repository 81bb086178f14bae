"""A run that is supervised here, while it goes on: a view below all that it prints, or plain lines.

Threads that only read. Whatever befalls them, the run goes on.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from runner.errors import StoreError
from runner.supervisor.lookup import KnownRun
from runner.supervisor.output import STDERR, PassThrough, Screen
from runner.views import terminal
from runner.views.looking import Looker
from runner.views.overview import glance
from runner.views.screen import Screen as TerminalScreen

log = logging.getLogger(__name__)

_VIEW_SECONDS = 0.5
_LINE_SECONDS = 60.0
_STOP_SECONDS = 1.0
_STORE_SECONDS = 5.0  # that a look into the store may take
_SIZE = os.terminal_size((80, 24))


class Onlooker(ABC):
    """Looks every so often, and shows what it sees: `show` gets the glance at the run."""

    screen: Screen | None = None

    def __init__(self, run: KnownRun, pause_seconds: float) -> None:
        self._looker, self._pause_seconds = Looker(run), pause_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="view", daemon=True)

    def start(self, through: PassThrough) -> None:
        self._through = through
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(_STOP_SECONDS)

    @abstractmethod
    def show(self, run: dict[str, Any]) -> None:
        """Bring it before whoever looks on."""

    def _look_on(self) -> None:
        try:
            while not self._over.wait(self._pause_seconds):
                self._look_once()
            self._look_once()  # how it ended
        except Exception as error:  # noqa: BLE001 - a view is worth less than the run that it shows
            log.warning("the run is not shown any more: %s: %s", type(error).__name__, error)

    def _look_once(self) -> None:
        self._looker.run.store.hurry(time.monotonic() + _STORE_SECONDS)
        try:
            self.show(glance(self._looker.look()))
        except StoreError as error:
            log.debug("nothing is known of the run for now: %s", error)


class LiveView(Onlooker):
    """Lines at the bottom of a terminal, renewed twice a second."""

    def __init__(self, run: KnownRun, *, color: bool) -> None:
        super().__init__(run, _VIEW_SECONDS)
        self._color = color
        self.screen: Screen | None = TerminalScreen(terminal_size)

    def show(self, run: dict[str, Any]) -> None:
        self._through.show(terminal.frame(run, terminal_size().columns, color=self._color))


class PlainLines(Onlooker):
    """A line from time to time, if anything has changed."""

    def __init__(self, run: KnownRun, pause_seconds: float = _LINE_SECONDS) -> None:
        super().__init__(run, pause_seconds)
        self._said: tuple[Any, ...] = ()

    def show(self, run: dict[str, Any]) -> None:
        known = run["phase"], run["step"], run["saved_step"]
        if known != self._said:
            self._said = known
            line = f"runner: {terminal.one_line(run)}\n"
            self._through.write(STDERR, line.encode(), urgent=True)


def terminal_size(descriptor: int = STDERR) -> os.terminal_size:
    """Of the terminal that is stderr, as it is now."""
    try:
        size = os.get_terminal_size(descriptor)
    except OSError:
        return _SIZE
    return os.terminal_size((size.columns or _SIZE.columns, size.lines or _SIZE.lines))


def can_show_view(stream: Any = None) -> bool:
    """Whether a stream, stderr by default, is a terminal that can have its last lines renewed."""
    stream = sys.stderr if stream is None else stream
    name = os.environ.get("TERM", "dumb")
    encoding = str(getattr(stream, "encoding", "") or "").lower()
    return bool(stream.isatty()) and name not in ("", "dumb") and encoding.startswith("utf")


def wants_color() -> bool:
    """Whether nobody has said otherwise: https://no-color.org."""
    return not os.environ.get("NO_COLOR")


def audience(*, plain: bool) -> Callable[[KnownRun], Onlooker]:
    """Who looks on when somebody starts a run here."""
    if plain or not can_show_view():
        return PlainLines
    return lambda run: LiveView(run, color=wants_color())
