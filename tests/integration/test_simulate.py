"""`runner simulate`: a spot node with real signals and kills, and what it says about them."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from nodes import PROGRAMS, Node, nodes_in

from runner import simulation
from runner.checkpoint.attempts import Ledger
from runner.errors import UsageError
from runner.simulation.plan import SpotPlan, plan_from, read_trace
from runner.simulation.report import Death, build_report
from runner.store import DirectoryStore

STEPS = 24
REPORT_KEYS = {
    *("run_id", "outcome", "exit_code", "final_step", "final_digest", "goodput_ratio", "goodput"),
    *("wall_seconds", "attempts", "results"),
}
ATTEMPT_KEYS = {
    *("attempt", "start_step", "end_step", "saved_step", "cause", "exit_code", "lost_steps"),
    *("notice_to_durable_seconds", "kill_to_first_step_seconds"),
}

Report = dict[str, Any]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report on a node that is never taken away."""
    with nodes_in(tmp_path_factory.mktemp("undisturbed")) as new:
        node = new("node")
        return simulate(node, node.training())


def simulate(node: Node, job: str, *options: str) -> Report:
    """Run it to its end; the report, which is all that stdout is."""
    done = node.run("simulate", job, "-o", "json", *options)
    report = done.json
    assert isinstance(report, dict)
    assert (done.code, report["exit_code"], report["outcome"]) == (0, 0, "succeeded"), done.err
    assert f"finished at {STEPS}" in done.err.splitlines(), "the trainer's output is with the logs"
    assert set(report) == REPORT_KEYS
    assert all(set(attempt) == ATTEMPT_KEYS for attempt in report["attempts"])
    return report


def rows(report: Report, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(attempt[key] for key in keys) for attempt in report["attempts"]]


# ---------------------------------------------------------------- what is reported


def test_an_undisturbed_run_has_one_attempt_and_nothing_to_regret(undisturbed: Report) -> None:
    (attempt,) = undisturbed["attempts"]

    assert (undisturbed["run_id"], undisturbed["final_step"]) == ("job", STEPS)
    assert len(undisturbed["final_digest"]) == 64
    assert 0 < undisturbed["goodput_ratio"] < 1
    assert 0 < undisturbed["wall_seconds"] < 60
    assert set(undisturbed["results"]) == {"val_loss", "steps"}
    assert attempt == {
        "attempt": 1,
        "start_step": 0,
        "end_step": STEPS,
        "saved_step": STEPS,
        "cause": "finished",
        "exit_code": 0,
        "lost_steps": 0,
        "notice_to_durable_seconds": None,
        "kill_to_first_step_seconds": None,
    }


def test_the_report_for_people_says_the_same(undisturbed: Report) -> None:
    text = simulation.as_text(undisturbed)

    assert f"run job: succeeded at step {STEPS}" in text
    assert "0 preemptions, 0 steps lost" in text
    assert undisturbed["final_digest"] in text
    assert "val_loss" in text


def test_a_notice_by_step_fires_once_at_just_that_step(node: Node, undisturbed: Report) -> None:
    report = simulate(node, node.training(), "--preempt", "step=13", "--preempt", "step=5")

    keys = ("start_step", "end_step", "saved_step", "cause", "exit_code", "lost_steps")
    assert rows(report, "attempt", *keys) == [
        (1, 0, 5, 5, "preemption", 75, 0),
        (2, 5, 13, 13, "preemption", 75, 0),
        (3, 13, STEPS, STEPS, "finished", 0, 0),
    ]
    assert report["final_digest"] == undisturbed["final_digest"]
    assert report["results"] == undisturbed["results"]
    first, second, last = rows(report, "notice_to_durable_seconds", "kill_to_first_step_seconds")
    for seconds_to_durable, seconds_to_step in (first, second):
        assert 0 < seconds_to_durable < 30
        assert 0 < seconds_to_step < 60
    assert last == (None, None)


def test_a_node_that_takes_its_disk_along_leaves_only_the_store(
    node: Node, undisturbed: Report
) -> None:
    options = ("--preempt", "step=7", "--lose-disk", "--run-id", "lost")

    report = simulate(node, node.training(), *options)

    assert report["run_id"] == "lost"
    assert rows(report, "start_step", "saved_step", "lost_steps") == [(0, 7, 0), (7, STEPS, 0)]
    assert report["final_digest"] == undisturbed["final_digest"]


# ---------------------------------------------------------------- kills


def test_a_supervisor_that_does_not_make_it_is_killed_with_everything(
    node: Node, undisturbed: Report
) -> None:
    """The script freezes its supervisor; what the trainer had in memory is not lost."""
    job = node.training(params={"befalls": {"1": {"4": "freeze supervisor"}}})

    report = simulate(node, job, "--preempt", "step=4", "--preempt", "step=9", "--grace", "4s")

    keys = ("start_step", "end_step", "saved_step", "cause", "exit_code", "lost_steps")
    assert rows(report, *keys) == [
        (0, 4, None, "killed", -9, 1),
        (3, 9, 9, "preemption", 75, 0),
        (9, STEPS, STEPS, "finished", 0, 0),
    ]
    assert report["final_digest"] == undisturbed["final_digest"]


def test_a_kill_that_takes_the_memory_along_costs_the_steps_since_the_last_save(
    node: Node, undisturbed: Report
) -> None:
    befalls = {"2": "save", "5": "be saved", "6": "freeze supervisor"}
    job = node.training(params={"befalls": {"1": befalls}})

    report = simulate(node, job, "--preempt", "step=6", "--grace", "1s", "--lose-disk")

    keys = ("start_step", "end_step", "saved_step", "cause", "exit_code", "lost_steps")
    assert rows(report, *keys) == [
        (0, 6, 2, "killed", -9, 4),
        (2, STEPS, STEPS, "finished", 0, 0),
    ]
    assert report["final_digest"] == undisturbed["final_digest"]
    assert "1 preemptions, 4 steps lost" in simulation.as_text(report)


def test_a_script_that_blocks_through_the_grace_loses_nothing(
    node: Node, undisturbed: Report
) -> None:
    """The supervisor knows the grace of this node, though the job speaks of another."""
    job = node.training(params={"befalls": {"1": {"6": "wait"}}}, preemption={"grace": "1h"})

    report = simulate(node, job, "--preempt", "after=5s", "--grace", "4s", "--lose-disk")

    first, second = report["attempts"]
    assert (first["cause"], first["exit_code"], first["lost_steps"]) == ("preemption", 75, 0)
    # On a machine so busy that it had not come so far, there was nothing to save.
    assert first["saved_step"] in (None, first["end_step"])
    assert second["start_step"] == first["end_step"]
    assert report["final_digest"] == undisturbed["final_digest"]


# ---------------------------------------------------------------- traces


def test_a_recorded_life_is_replayed(node: Node, undisturbed: Report) -> None:
    trace = node.folder / "trace.json"
    trace.write_text(json.dumps({"metadata": {"gap_seconds": 100}, "data": [0, 1, 1, 1, 1, 0]}))
    job = node.training(params={"befalls": {"1": {"6": "wait"}}})
    options = ("--trace", str(trace), "--speedup", "100", "--grace", "4s")

    report = simulate(node, job, *options)

    first, second = report["attempts"]
    assert (first["cause"], second["cause"]) == ("preemption", "finished")
    assert report["wall_seconds"] > 6, "it was there from 1 to 5 s, and again at 6 s"
    assert report["final_digest"] == undisturbed["final_digest"]


def test_the_recorded_life_of_a_real_node_is_survived(node: Node, undisturbed: Report) -> None:
    trace = data_folder() / "spot" / "aws-us-west-2b-v100.json"
    job = node.training(params={"befalls": {"1": {"6": "wait"}}})
    options = ("--trace", str(trace), "--speedup", "8000", "--grace", "4s")

    report = simulate(node, job, *options)

    assert len(report["attempts"]) >= 2
    assert rows(report, "cause")[-1] == ("finished",)
    assert sum(lost for (lost,) in rows(report, "lost_steps")) <= len(report["attempts"])
    assert report["final_digest"] == undisturbed["final_digest"]


def data_folder() -> Path:
    """Test data is no part of the project: it lies beside the checkout, or where this says."""
    given = os.environ.get("RUNNER_TEST_DATA")
    folder = Path(given) if given else Path(__file__).parents[3] / "shared" / "data"
    if not (folder / "spot").is_dir():
        pytest.skip(f"no recorded traces in {folder}; RUNNER_TEST_DATA names another folder")
    return folder


TRACES = {
    "never there": ([0, 0], ((20.0, math.inf),)),
    "there from the start": ([1, 1], ((0.0, math.inf),)),
    "lost once": ([1, 0, 2, 1], ((0.0, 10.0), (20.0, math.inf))),
    "lost at the end": ([0, 3, 0], ((10.0, 20.0), (30.0, math.inf))),
}


@pytest.mark.parametrize(("data", "stretches"), TRACES.values(), ids=list(TRACES))
def test_a_trace_is_read_as_the_stretches_in_which_the_node_is_there(
    tmp_path: Path, data: list[int], stretches: tuple[tuple[float, float], ...]
) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"metadata": {"gap_seconds": 30}, "data": data}))

    assert read_trace(path, speedup=3.0) == stretches


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"metadata": {"gap_seconds": 30}}',
        '{"metadata": {"gap_seconds": 30}, "data": []}',
        '{"metadata": {"gap_seconds": 0}, "data": [1]}',
        '{"metadata": {"gap_seconds": NaN}, "data": [1]}',
        '{"metadata": {"gap_seconds": 30}, "data": [1, -1]}',
        '{"metadata": {"gap_seconds": 30}, "data": [true]}',
        '{"metadata": {"gap_seconds": 30}, "data": 1}',
        '{"metadata": {"gap_seconds": "x"}, "data": [1]}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_trace_that_is_none_is_the_users_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(content)

    with pytest.raises(UsageError, match=r"trace\.json: not a recorded spot trace"):
        read_trace(path, speedup=1.0)


def test_a_plan_has_its_notices_in_order() -> None:
    given = ["step=150", "after=1m", "step=20", "after=500ms"]

    plan = plan_from(30.0, given, lose_disk=True, trace=None, speedup=1.0)

    assert plan == SpotPlan(30.0, after=(0.5, 60.0), steps=(20, 150), lose_disk=True)


# ---------------------------------------------------------------- how it ends


def test_a_node_that_is_gone_before_an_attempt_began_changes_no_earlier_one(
    tmp_path: Path,
) -> None:
    """Three supervisors, of which the second was taken away in its first moments."""
    store = DirectoryStore(tmp_path)
    for owner in ("first", "third"):
        Ledger(store, "job", owner).claim("node")
    deaths = [Death(1, 10.0, -9, 7), Death(1, 12.0, -15, 7), Death(2, 20.0, 0, 9)]

    report = build_report(store, "job", 1, deaths, wall_seconds=20.0)

    assert rows(report, "attempt", "end_step", "exit_code") == [(1, 7, -9), (2, 9, 0)]


@pytest.mark.parametrize(("command", "code"), [("exit 9", 70), ("exit 2", 2)])
def test_a_run_that_fails_is_reported_too(node: Node, command: str, code: int) -> None:
    job = node.job("bash", "-c", command, restart={"failures": 0})

    done = node.run("simulate", job, "-o", "json")

    assert (done.code, done.json["exit_code"], done.json["outcome"]) == (code, code, "failed")
    assert (done.json["final_step"], done.json["final_digest"]) == (0, None)
    assert [attempt["exit_code"] for attempt in done.json["attempts"]] == [code]


def test_each_simulation_is_a_run_of_its_own(node: Node) -> None:
    job = node.job("true")

    reports = [node.run("simulate", job, "-o", "json").json for _ in range(2)]

    assert [report["run_id"] for report in reports] == ["job", "job-2"]
    text = node.run("simulate", node.job("echo", "from the trainer"))
    assert text.code == 0
    assert text.out.startswith("from the trainer\n")
    assert "run job-3: succeeded" in text.out


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_whoever_is_tired_of_it_leaves_nothing_behind(
    node: Node, signum: signal.Signals, code: int
) -> None:
    """The node, its supervisor, the trainer and what that has started: all are gone."""
    job = node.job("python", str(PROGRAMS / "ignores_sigterm.py"))
    simulating = node.start("simulate", job, "-o", "json")
    simulating.wait_for("ready", where="err")
    assert len(node.processes()) == 5

    simulating.send_signal(signum)

    assert simulating.wait() == code
    assert simulating.out == ""
    assert "Traceback" not in simulating.err
    assert node.processes() == []
