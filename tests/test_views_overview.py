"""The document that all views draw: what follows from what was found."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from made_runs import BEGUN, finished, iso, record, records, status

from runner.checkpoint.manifest import Manifest, Moment
from runner.points import Point
from runner.saves import SaveRecord
from runner.views.facts import Details, Facts
from runner.views.overview import attempt_rows, glance, main_metric, overview


@pytest.fixture
def document() -> dict[str, Any]:
    """Made-up, and through JSON: nothing in it is outside of the standard."""
    made = overview(*finished())
    return json.loads(json.dumps(made, allow_nan=False))  # type: ignore[no-any-return]


def test_each_attempt_says_how_it_ended_and_what_was_lost(document: dict[str, Any]) -> None:
    rows = document["attempts"]
    assert [(r["ended_by"], r["start_step"], r["end_step"], r["lost_steps"]) for r in rows] == [
        ("preemption", 0, 450, 0),
        ("lost", 450, 910, 30),
        ("failure", 880, 1210, 10),
        ("finished", 1200, 1760, 0),
    ]
    assert [r["begin_seconds"] for r in rows] == [0, 150, 330, 422]
    assert rows[0]["end_to_next_step_seconds"] == 35.0
    assert document["run"]["lost_steps"] == 40
    assert (document["run"]["preemptions"], document["run"]["failures"]) == (2, 1)


def test_steps_that_were_made_again_are_marked(document: dict[str, Any]) -> None:
    (loss,) = [curve for curve in document["curves"] if curve["name"] == "train_loss"]
    again = {trace["attempt"]: [step for step, _ in trace["again"]] for trace in loss["traces"]}
    assert again[1] == again[4] == []
    assert (again[2][0], again[2][-1]) == (881, 910)
    assert (again[3][0], again[3][-1]) == (1201, 1210)
    kept = [step for trace in loss["traces"] for step, _ in trace["kept"]]
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (1, 1760)


def test_the_parts_of_the_time_add_up_to_the_whole(document: dict[str, Any]) -> None:
    goodput = document["goodput"]
    assert sum(part["seconds"] for part in goodput["parts"]) == pytest.approx(
        goodput["wall_seconds"], rel=0.01
    )
    assert sum(part["ratio"] for part in goodput["parts"]) == pytest.approx(1, rel=0.01)
    assert goodput["parts"][0]["kind"] == "productive"
    assert document["run"]["goodput_ratio"] == goodput["ratio"]
    assert document["run"]["wall_seconds"] == goodput["wall_seconds"]


def test_saves_are_summed_up_without_those_that_nobody_has_timed() -> None:
    facts, _ = finished()
    timed = [
        SaveRecord(str(n), 1, n, BEGUN + n, ("interval",), "full", 1, 0.0, n / 10)
        for n in range(1, 101)
    ]
    untimed = SaveRecord("step-000000999-a0001-s001", 1, 999, BEGUN + 999)
    weights = replace(timed[0], scope="weights", persist_seconds=99.0)

    made = overview(facts, Details(saves=[*timed, untimed, weights]))

    assert made["save_seconds"] == {
        "count": 102, "measured": 100, "median": 5.05, "p95": 9.5, "max": 10.0,
    }  # fmt: skip
    assert len(made["saves"]) == 102
    assert made["saves"][-2]["total_seconds"] is None


def live(step: int, **values: Any) -> Facts:
    """A run of one attempt that began 100 s ago and has made its first step 20 s later."""
    only = record(1, 0, 20, 0, ended_at=None, outcome=None, spent={"productive": 60.0})
    said = status(phase="running", live=True, step=step, attempt=1, epochs=10, activity="training")
    return Facts(seen_at=BEGUN + 100, status=said, records=(only,), **values)


def test_what_is_left_is_reckoned_from_the_pace_of_this_attempt() -> None:
    seen = glance(live(41, total_steps=121))
    assert seen["seconds_per_step"] == 2.0
    assert seen["eta_seconds"] == 160.0
    assert seen["progress_ratio"] == pytest.approx(41 / 121, abs=1e-6)
    assert glance(live(41))["progress_ratio"] is None
    assert glance(live(0, total_steps=121))["eta_seconds"] is None
    assert glance(live(121, total_steps=121))["progress_ratio"] == 1.0


def test_a_live_attempt_has_lost_nothing_yet() -> None:
    seen = glance(live(41))
    assert (seen["lost_steps"], seen["preemptions"], seen["failures"]) == (0, 0, 0)
    assert attempt_rows(live(41))[0]["ended_by"] == "running"


def test_headroom_is_the_grace_without_the_emergency_save() -> None:
    job = {"job": {"preemption": {"grace": "30s"}}}
    assert glance(live(5, document=job, emergency_seconds=12.5))["headroom_seconds"] == 17.5
    assert glance(live(5, document=job, emergency_seconds=42.0))["headroom_seconds"] == -12.0
    assert glance(live(5, document=job))["headroom_seconds"] is None
    assert glance(live(5, emergency_seconds=1.0))["headroom_seconds"] is None


def test_what_a_lost_attempt_has_made_since_its_save_is_lost() -> None:
    only = record(1, 0, 20, 0, ended_at=None, outcome=None, saved_step=30)
    moment = Moment(attempt=1, save=1, step=30, epoch=0, batch=3)
    facts = Facts(
        seen_at=BEGUN + 900,
        status=status(phase="lost", step=30),
        records=(only,),
        newest=Manifest("job", moment, ()),
        last_points={1: Point(1, 47, 0, BEGUN + 90, {"loss": 1.0})},
    )
    (row,) = attempt_rows(facts)
    assert (row["end_step"], row["lost_steps"], row["end_seconds"]) == (47, 17, 90.0)
    assert (glance(facts)["lost_steps"], glance(facts)["preemptions"]) == (17, 1)


def test_an_attempt_that_has_not_restored_yet_makes_nothing_lost() -> None:
    """What it begins from is written into its record later on."""
    begun = replace(record(5, 600, 0, 0), first_step_at=None, ended_at=None, outcome=None)
    facts, _ = finished()
    rows = attempt_rows(replace(facts, records=(*records()[:1], begun)))
    assert [row["lost_steps"] for row in rows] == [0, 0]


def test_a_run_without_an_attempt_is_a_run() -> None:
    empty = Facts(
        seen_at=BEGUN, status=status(phase="new", step=0, attempt=0, last_checkpoint=None)
    )
    made = json.loads(json.dumps(overview(empty, Details()), allow_nan=False))
    assert made["attempts"] == made["curves"] == made["goodput"]["parts"] == []
    assert made["run"]["wall_seconds"] is None


@pytest.mark.parametrize(
    "damaged",
    [{"job": None}, {"job": []}, {"job": {"preemption": {"grace": "soon"}}}, {"created_at": 3},
     {"job": {"cost": {"per_hour": "much"}}}, {"created_at": "yesterday"}],
)  # fmt: skip
def test_a_damaged_record_of_the_run_does_no_harm(damaged: dict[str, Any]) -> None:
    facts, details = finished()
    made = overview(replace(facts, document=damaged), details)
    assert made["run"]["grace_seconds"] is None


def test_the_training_loss_is_the_value_to_show() -> None:
    assert main_metric({"lr": 1, "val_loss": 1, "train_loss": 1}) == "train_loss"
    assert main_metric({"lr": 1, "loss_x": 1, "loss": 1}) == "loss"
    assert main_metric({"lr": 1, "accuracy": 1}) == "lr"
    assert main_metric({}) is None


def test_times_count_from_the_first_start(document: dict[str, Any]) -> None:
    assert document["run"]["started_at"] == iso(0)
    assert document["saves"][0]["at_seconds"] == pytest.approx(4 + 0.28 * 110)


def test_a_run_that_another_machine_has_goes_on() -> None:
    facts = live(41, total_steps=121)
    away = replace(facts, status={**facts.status, "live": False}, newest=None)
    assert attempt_rows(away)[0]["ended_by"] == "running"
    assert (glance(away)["lost_steps"], glance(away)["preemptions"]) == (0, 0)
