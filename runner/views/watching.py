"""`runner status -w`: the view of a run from outside, on any machine that can read its store."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from runner.errors import StoreError
from runner.supervisor.lookup import KnownRun
from runner.views import terminal
from runner.views.live import can_show_view, terminal_size, wants_color
from runner.views.looking import Looker
from runner.views.overview import glance
from runner.views.screen import Screen

log = logging.getLogger(__name__)

_HERE_SECONDS, _ELSEWHERE_SECONDS = 1.0, 10.0
_LINE_SECONDS = 10.0
_STORE_SECONDS = 30.0  # for one look
_FINAL = ("succeeded", "failed", "stopped", "interrupted", "fenced")


def watch(run: KnownRun, *, as_json: bool) -> None:
    """Show it on stdout until it has ended: renewed on a terminal, else a line for each change."""
    on_terminal = not as_json and can_show_view(sys.stdout)
    show = _renewed() if on_terminal else _lines(as_json)
    looker = Looker(run)
    try:
        while True:
            run.store.hurry(time.monotonic() + _STORE_SECONDS)
            try:
                seen = glance(looker.look())
            except StoreError as error:
                log.warning("nothing is known of the run for now: %s", error)
            else:
                show(seen)
                if not seen["live"] and seen["phase"] in _FINAL:
                    return
            here = run.is_live()
            pause = _HERE_SECONDS if here else _ELSEWHERE_SECONDS
            time.sleep(pause if on_terminal else max(pause, _LINE_SECONDS))
    finally:
        if on_terminal:
            _write(b"\r\n")


def _renewed() -> Callable[[Mapping[str, Any]], None]:
    def size() -> Any:
        return terminal_size(sys.stdout.fileno())

    screen = Screen(size)

    def show(seen: Mapping[str, Any]) -> None:
        _write(screen.shown(terminal.frame(seen, size().columns, color=wants_color())))

    return show


def _lines(as_json: bool) -> Callable[[Mapping[str, Any]], None]:
    before: list[tuple[Any, ...]] = []

    def show(seen: Mapping[str, Any]) -> None:
        known = seen["phase"], seen["step"], seen["saved_step"], seen["attempt"]
        if before != [known]:
            before[:] = [known]
            line = json.dumps(seen) if as_json else terminal.one_line(seen)
            _write(line.encode() + b"\n")

    return show


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.flush()
