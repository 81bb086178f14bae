"""Where the time of real runs went: preempted, crashed, hung, on two nodes."""

from __future__ import annotations

import http.client
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nodes import Node, nodes_in
from prometheus_client.parser import text_string_to_metric_families
from waiting import wait_until

from runner.checkpoint.attempts import AttemptRecord
from runner.supervisor.goodput import Goodput, goodput_of
from runner.wallclock import parse_time

PACE = 0.05
STEPS = 24
HANG_SECONDS = 5.0
BACKOFF_SECONDS = 0.8


@dataclass
class Told:
    """What a run has left: its records, its split, and the metrics of its last supervisor."""

    records: list[AttemptRecord]
    goodput: Goodput
    samples: dict[tuple[str, ...], float]
    status: dict[str, Any]
    pause_seconds: float
    validated_seconds: float

    def spent(self, kind: str) -> float:
        return self.goodput.badput_seconds[kind]


def get(address: str, path: str) -> bytes:
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


def samples_of(content: bytes) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(content.decode())
    return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}


def job_on(node: Node, **keys: Any) -> str:
    """It crashes in step 5, hangs in step 9, and is preempted in step 16."""
    return node.training(
        params={
            "pace": PACE,
            "befalls": {
                "1": {"5": "raise"},
                "2": {"9": "hang"},
                "3": {"12": "validate", "16": "wait"},
                "4": {"22": "wait"},
            },
        },
        checkpoint={"every": {"steps": 4}, "snapshot_every": {"steps": 2}},
        restart={
            "backoff": {"initial": f"{BACKOFF_SECONDS}s", "max": f"{BACKOFF_SECONDS}s"},
            "hang_timeout": f"{HANG_SECONDS}s",
        },
        metrics={"port": 0},
        cost={"per_hour": 3600.0},
        **keys,
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    folder: Path = tmp_path_factory.mktemp("spending")
    with nodes_in(folder) as new_node:
        yield play(new_node)


def play(new_node: Callable[[str], Node]) -> Told:
    first = new_node("first")
    supervisor = first.start("run", job_on(first))
    supervisor.wait_for("validating")
    validating = time.monotonic()
    wait_until(lambda: time.monotonic() - validating > 1.0, what="a validation of a second")
    first.gate.touch()
    validated_seconds = time.monotonic() - validating
    supervisor.wait_for("step 15", times=1)
    first.gate.unlink()
    supervisor.wait_for("step 16")
    supervisor.send_signal(signal.SIGTERM)
    first.wait_until_asked()
    first.gate.touch()
    assert supervisor.wait() == 75
    gone = time.monotonic()
    second = new_node("second")
    wait_until(lambda: time.monotonic() - gone > 1.0, what="a second without a node")
    pause_seconds = time.monotonic() - gone
    supervisor = second.start("run", job_on(second), "--update")
    supervisor.wait_for("step 22")
    address = second.spool().status()["metrics"]

    def saved() -> dict[tuple[str, ...], float] | None:
        found = samples_of(get(address, "/metrics"))
        return found if ("runner_grace_headroom_seconds",) in found else None

    samples = wait_until(saved, 30, "the save of step 20")
    assert samples is not None
    status = json.loads(get(address, "/status.json"))
    second.gate.touch()
    assert supervisor.wait() == 0
    records = second.records()
    goodput = goodput_of(records, time.time(), per_hour=3600.0)
    return Told(records, goodput, samples, status, pause_seconds, validated_seconds)


def test_it_went_as_it_was_meant_to(told: Told) -> None:
    causes = [(record.outcome, record.start_step) for record in told.records]

    assert causes == [("failed", 0), ("failed", 4), ("preempted", 8), ("succeeded", 16)]


def test_every_attempt_adds_up(told: Told) -> None:
    for record in told.records:
        begun, ended = parse_time(record.started_at), parse_time(record.ended_at)
        assert begun is not None
        assert ended is not None
        assert sum(record.spent.values()) == pytest.approx(ended - begun, abs=0.15), record


def test_the_parts_add_up_to_the_wall_clock_within_one_percent(told: Told) -> None:
    goodput = told.goodput
    begun, ended = parse_time(told.records[0].started_at), parse_time(told.records[-1].ended_at)
    assert begun is not None
    assert ended is not None

    total = goodput.productive_seconds + sum(goodput.badput_seconds.values())

    assert goodput.wall_seconds == pytest.approx(ended - begun, rel=0.01)
    assert total == pytest.approx(goodput.wall_seconds, rel=0.01)


def test_each_kind_is_what_it_should_be(told: Told) -> None:
    # All 24 steps count once, and each has taken at least its pace; the two gates were in steps.
    assert told.goodput.productive_seconds > STEPS * PACE
    assert told.validated_seconds <= told.spent("validation") < told.validated_seconds + 10
    assert HANG_SECONDS <= told.spent("hang") < HANG_SECONDS + 8
    assert 0.5 * 2 * BACKOFF_SECONDS <= told.spent("backoff") < 2 * BACKOFF_SECONDS + 3
    # Python itself has to start before a node's first attempt begins.
    assert told.pause_seconds <= told.spent("waiting_for_node") < told.pause_seconds + 10
    assert told.spent("startup") > 4 * 0.3  # four times torch is imported
    assert told.spent("restore") > 0
    assert told.spent("stall") > 0
    assert told.spent("draining") > 0


def test_what_was_lost_is_what_was_made_again(told: Told) -> None:
    # The crash in step 5 and the hang in step 9 cut those steps off; no finished one was lost.
    assert told.goodput.lost_steps == 0
    # A crash takes as long as Python needs to end.
    assert PACE / 2 < told.spent("lost_steps") < 15


def test_it_is_told_in_money(told: Told) -> None:
    cost = told.goodput.cost()
    assert cost is not None
    node_seconds = told.goodput.wall_seconds - told.spent("waiting_for_node")

    assert cost["spent"] == pytest.approx(node_seconds, abs=0.01)
    assert cost["lost"] == pytest.approx(node_seconds - told.goodput.productive_seconds, abs=0.01)
    assert cost["saved"] > (4 + 8 + 16) * PACE


def test_metrics_go_on_across_attempts_supervisors_and_nodes(told: Told) -> None:
    seen = told.samples

    assert seen["runner_restarts_total", "crash"] == 1
    assert seen["runner_restarts_total", "hang"] == 1
    assert seen["runner_restarts_total", "preemption"] == 1
    assert seen["runner_preemptions_total", "SIGTERM"] == 1
    assert seen["runner_attempt",] == 4
    assert seen["runner_step_seconds_count",] == 21  # of 22, as the last one has not ended
    assert seen["runner_checkpoint_stall_seconds_count",] >= 8
    saves = {k: value for k, value in seen.items() if k[0].endswith("save_seconds_count")}
    assert seen["runner_checkpoint_save_seconds_count", "total", "preemption"] == 1
    assert sum(value for labels, value in saves.items() if "total" in labels) >= 4
    assert seen["runner_restore_seconds_count", "fetch"] == 3
    assert seen["runner_restore_seconds_count", "load"] == 3
    assert seen["runner_badput_seconds_total", "hang"] >= HANG_SECONDS
    assert seen["runner_badput_seconds_total", "waiting_for_node"] >= told.pause_seconds
    assert 0 < seen["runner_goodput_ratio",] < 1
    assert seen["runner_grace_headroom_seconds",] < 30
    assert seen["runner_trainer_memory_bytes",] > 10e6
    assert seen["runner_train_metric", "train_loss"] > 0
    assert seen["runner_spool_free_bytes",] > 0


def test_the_last_scrape_is_in_the_store(told: Told) -> None:
    last = told.records[-1].metrics

    [[row]] = [last["runner_step_seconds"]]
    assert sum(row["counts"]) == STEPS
    reasons = {tuple(r["labels"]): r["value"] for r in last["runner_restarts_total"]}
    assert reasons["crash",] == 1
    assert "runner_goodput_ratio" not in last  # a gauge: it is computed anew


def test_the_status_has_the_same_split(told: Told) -> None:
    goodput = told.status["goodput"]

    assert goodput["lost_steps"] == 0
    assert goodput["badput_seconds"]["hang"] == pytest.approx(told.spent("hang"), abs=0.01)
    assert told.status["headroom_seconds"] > 0
    assert told.status["values"]["train_loss"] > 0
