"""Trackers beside MLflow, each with its own library, without a server: two supervisors, one run.

What they have is read back from the files that they leave.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from nodes import Node
from offline_files import Logged, points_of_clearml, points_of_wandb
from waiting import wait_until

from runner.points import points_of

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
    return sorted({step for step, _, _ in points_of_wandb(path)})


def test_clearml_offline_leaves_a_session_for_each_supervisor(tmp_path: Path) -> None:
    first, second = two_attempts("clearml", tmp_path, mode="offline")
    reported = sorted(map(iterations_of_clearml, tmp_path.glob("offline/*/metrics.jsonl")))

    assert first["id"] == second["id"]
    assert reported == [[1, 2, 3], [4, 5, 6]]
    assert len(list(tmp_path.glob("offline/*.zip"))) == 2


def iterations_of_clearml(path: Path) -> list[int]:
    return [step for step, _, _ in points_of_clearml(path)]


# ---------------------------------------------------------------- whole runs

FILES = {
    "wandb": ("wandb/offline-run-*/*.wandb", points_of_wandb),
    "clearml": ("offline/*/metrics.jsonl", points_of_clearml),
}


@pytest.mark.parametrize("name", FILES)
def test_a_run_that_was_preempted_once_is_shown_whole_and_nothing_twice(
    name: str, node: Node
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"needs runner[{name}]")
    job = preempted_at_10(node, name)
    done = node.run("run", job)
    assert done.code == 0, done.err
    assert "ready at 10 in attempt 2" in done.out

    pattern, points_in = FILES[name]
    parts = sorted((node.store_folder / "job/outputs" / name).glob(pattern))
    shown = [point for part in parts for point in points_in(part)]

    assert len(parts) == 2, "one of each supervisor"
    assert sorted(shown) == logged(node)
    state = json.loads((node.store_folder / "job/tracking" / f"{name}.json").read_text())
    assert any(state["id"] in str(part.relative_to(node.store_folder)) for part in parts)
    newest, *older = (manifest.provenance.get("tracker") for manifest in node.manifests())
    assert newest == {name: state["id"]}
    assert all(ids in (None, newest) for ids in older), "those before the tracker was there"


def preempted_at_10(node: Node, name: str) -> str:
    """A job whose first supervisor has left in the middle of step 10, at a request to."""
    befalls = {"1": {"10": "wait"}}
    job = node.training(
        params={"befalls": befalls, "pace": 0.05}, tracking={name: {"mode": "offline"}}
    )
    supervisor = node.start("run", job)
    supervisor.wait_for("step 10")
    known = node.store_folder / "job/tracking" / f"{name}.json"
    wait_until(known.exists, what="the tracker's run")
    supervisor.send_signal(signal.SIGTERM)
    node.wait_until_asked()
    node.gate.touch()
    assert supervisor.wait() == 75, supervisor.err
    return job


def logged(node: Node) -> list[Logged]:
    """What the script has logged, as the run's own record has it: two values at an epoch's end."""
    stretches = sorted((node.store_folder / "job/metrics").glob("*.jsonl"))
    points = [point for path in stretches for point in points_of(path.read_bytes())]
    assert sorted({point.step for point in points}) == list(range(1, 25))
    return sorted((p.step, name, value) for p in points for name, value in p.values.items())
