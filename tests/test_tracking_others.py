"""Trackers beside MLflow, each with its own library, without a server: two supervisors, one run."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# In a process of its own, as in earnest: these libraries start threads and leave hooks behind.
PROGRAM = """
import json, os, sys
from pathlib import Path
from runner.tracking.base import About, Reading, Shown
from runner.tracking.sender import tracker_named
name, folder = sys.argv[1], Path(sys.argv[2])
settings, known, begin = map(json.loads, sys.argv[3:])
about = About("run", "the key", "job", settings, folder, folder, {"lr": "0.1"}, {"runner.a": "b"})
tracker = tracker_named(name)
run_id = tracker.begin(about, known)
sent = dict(tracker.sent())
steps = range(begin, begin + 3)
tracker.log([Reading("loss", 1 / step, step, 0, 1e9 + step) for step in steps])
tracker.note({"runner.attempt": str(begin)})
tracker.show(Shown("step-1", 1, "/x/run/checkpoints/step-1", {"step": 1}))
tracker.end("preempted" if known is None else "succeeded")
print(json.dumps({"id": run_id, "sent": sent}), flush=True)
os._exit(0)  # as the sender does
"""


def attempt(
    name: str, folder: Path, settings: dict[str, str], known: str | None, begin: int
) -> Any:
    words = [name, str(folder), *map(json.dumps, (settings, known, begin))]
    out = folder / f"out-{begin}"  # a pipe would be held open by what the libraries start
    with out.open("wb") as stream:
        subprocess.run(
            [sys.executable, "-c", PROGRAM, *words],
            stdout=stream,
            stderr=stream,
            cwd=folder,
            check=False,
        )
    lines = out.read_text().splitlines()
    answers = [line for line in lines if line.startswith('{"id"')]
    assert answers, lines
    return json.loads(answers[-1])


def two_attempts(name: str, folder: Path, **settings: str) -> tuple[Any, Any]:
    if find_spec(name) is None:
        pytest.skip(f"needs runner[{name}]")
    first = attempt(name, folder, settings, None, 1)
    return first, attempt(name, folder, settings, first["id"], 4)


def test_wandb_offline_leaves_parts_of_one_run(tmp_path: Path) -> None:
    first, second = two_attempts("wandb", tmp_path, mode="offline")
    parts = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))

    assert first["id"] == second["id"]
    assert [path.name for path in parts] == [f"run-{first['id']}.wandb"] * 2
    assert [steps_of_wandb(path) for path in parts] == [[1, 2, 3], [4, 5, 6]]


def steps_of_wandb(path: Path) -> list[int]:
    """A header of 7 bytes, then records as LevelDB's logs have them: checksum, length, type."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, steps = path.read_bytes(), 7, []
    while at < len(data):
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        assert kind == 1, "it fits into one block"
        record = Record()
        record.ParseFromString(data[at + 7 : at + 7 + length])
        if record.WhichOneof("record_type") == "history":
            steps.append(record.history.step.num)
        at += 7 + length
    return steps


def test_clearml_offline_leaves_a_session_for_each_supervisor(tmp_path: Path) -> None:
    first, second = two_attempts("clearml", tmp_path, mode="offline")
    reported = sorted(map(iterations_of_clearml, tmp_path.glob("offline/*/metrics.jsonl")))

    assert first["id"] == second["id"]
    assert reported == [[1, 2, 3], [4, 5, 6]]
    assert len(list(tmp_path.glob("offline/*.zip"))) == 2


def iterations_of_clearml(path: Path) -> list[int]:
    events = [event for line in path.read_text().splitlines() for event in json.loads(line)]
    return [event["iter"] for event in events if event.get("metric") == "loss"]
