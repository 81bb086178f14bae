"""Which containers of a moment are removed: those whose maker is surely dead, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.launch import shortlived
from runner.launch.process_tree import mark_prefix, read_entry


class Engine:
    """What is asked of an engine here."""

    def __init__(self) -> None:
        self.made: dict[str, str] = {}

    def create(self, name: str, request: Mapping[str, Any]) -> str:
        self.made[name] = request["Labels"][shortlived.MAKER_LABEL]
        return name

    def labels(self, label: str) -> dict[str, str]:
        return dict(self.made)

    def remove(self, container: str) -> None:
        del self.made[container]


def test_only_those_of_the_dead_are_removed() -> None:
    engine: Any = Engine()
    own = shortlived.make(engine, "probe", {"Labels": {"a": "b"}})
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        entry = read_entry(other.pid)
        assert entry is not None
    dead = mark_prefix(entry)
    uid, namespace, mine = engine.made[own].split("/")
    pid = mine.partition("-")[0]
    engine.made |= {
        "of a dead one": f"{uid}/{namespace}/{dead}",
        "of another with our number": f"{uid}/{namespace}/{pid}-1",
        "in another namespace": f"{uid}/1/{dead}",
        "of another user": f"{os.geteuid() + 1}/{namespace}/{dead}",
        "of something else": "7",
        "of nobody": f"{uid}/{namespace}/",
    }

    shortlived.remove_left(engine)

    assert list(engine.made) == [
        own,
        "in another namespace",
        "of another user",
        "of something else",
        "of nobody",
    ]
    assert Path("/proc/self/ns/pid").stat().st_ino == int(namespace)
