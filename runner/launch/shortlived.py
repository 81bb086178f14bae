"""Containers that this process needs for a moment: to look into an image, to try a function.

Whoever makes one removes it. A label says who that is, so that what a killed one has left is found
and removed at the next look, by whatever run of this user that is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.errors import EngineError
from runner.launch.engine import Engine
from runner.launch.process_tree import mark_prefix, read_entry

MAKER_LABEL = "runner.maker"
"""`UID/NAMESPACE/PID-START`: of other users, or in other namespaces, processes may not be seen."""


def make(engine: Engine, kind: str, request: Mapping[str, Any]) -> str:
    """Make a container of a request, for a moment; its id."""
    labels = {**request.get("Labels", {}), MAKER_LABEL: _scope() + _process(os.getpid())}
    return engine.create(f"runner-{kind}-{os.urandom(6).hex()}", {**request, "Labels": labels})


def remove_left(engine: Engine) -> None:
    """Remove those whose maker is dead. What cannot be removed now is so at another look."""
    scope = _scope()
    try:
        found = engine.labels(MAKER_LABEL)
    except EngineError:  # whoever needs it hears of that
        return
    for container, maker in found.items():
        pid = maker.removeprefix(scope).partition("-")[0]
        is_ours = maker.startswith(scope) and pid.isdigit()
        if is_ours and maker != scope + _process(int(pid)):
            with contextlib.suppress(EngineError):
                engine.remove(container)


def _scope() -> str:
    """Whose processes can be told to be gone: our user's, in our namespace."""
    return f"{os.geteuid()}/{Path('/proc/self/ns/pid').stat().st_ino}/"


def _process(pid: int) -> str:
    """What tells a process from all others here, also from later ones of its number."""
    entry = read_entry(pid)
    return mark_prefix(entry) if entry is not None and entry.alive else ""
