"""Counters, gauges and histograms: counted, written down, taken up again, rendered."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from runner.histogram import BOUNDS_SECONDS, BUCKETS, bucket_of
from runner.supervisor.metrics import registry_of, rendered, tally_for
from runner.supervisor.tally import Tally

STORE = "s3://bucket/prefix"
NAME = "step-000001200-a0012-s007"
SAVES, FAILED = "runner_checkpoint_save_seconds", "runner_checkpoint_failures_total"


def samples(tally: Tally) -> dict[tuple[str, ...], float]:
    text = rendered(registry_of(tally), "")[0].decode()
    families = text_string_to_metric_families(text)
    return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}


def test_buckets_go_from_a_millisecond_to_ten_minutes() -> None:
    assert (BOUNDS_SECONDS[0], BOUNDS_SECONDS[-1], BUCKETS) == (0.001, 600, 19)
    assert list(BOUNDS_SECONDS) == sorted(BOUNDS_SECONDS)
    assert [bucket_of(s) for s in (0, 0.001, 0.0011, 600, 600.1)] == [0, 0, 1, 17, 18]


def test_what_can_fail_is_there_from_the_beginning() -> None:
    """An alert on an increase would miss a counter that first appears at 1."""
    found = samples(tally_for(STORE))

    assert found[FAILED, "refused", STORE] == 0
    assert found["runner_checkpoint_corrupt_total", STORE] == 0
    assert found["runner_preemptions_total", "aws"] == 0
    assert ("runner_step",) not in found  # nobody knows


def test_each_kind_is_rendered() -> None:
    tally = tally_for(STORE)
    tally.add(FAILED, 2, (STORE, "refused"))
    tally.set("runner_step", 7)
    tally.observe(SAVES, 0.2, ("total", "interval"))
    tally.observe(SAVES, 700, ("total", "interval"))
    tally.observe_many("runner_step_seconds", [1] + [0] * (BUCKETS - 1), 0.0005)
    found = samples(tally)

    assert found[FAILED, "refused", STORE] == 2
    assert found["runner_step",] == 7
    of = ("total", "interval")
    assert found[f"{SAVES}_bucket", "0.1", *of] == 0
    assert found[f"{SAVES}_bucket", "0.25", *of] == 1
    assert found[f"{SAVES}_bucket", "600", *of] == 1
    assert found[f"{SAVES}_bucket", "+Inf", *of] == 2
    assert found[f"{SAVES}_sum", *of] == pytest.approx(700.2)
    assert found["runner_step_seconds_count",] == 1


def test_an_exemplar_names_the_checkpoint() -> None:
    tally = tally_for(STORE)
    tally.observe(SAVES, 0.2, ("total", "interval"), NAME)

    content, kind = rendered(registry_of(tally), "application/openmetrics-text; version=1.0.0")

    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    found = [
        sample.exemplar
        for family in openmetrics(content.decode())
        for sample in family.samples
        if sample.exemplar is not None
    ]
    assert [(e.labels, e.value) for e in found] == [({"checkpoint": NAME}, 0.2)]


def test_counters_and_histograms_go_on_elsewhere_and_gauges_do_not() -> None:
    first, second = tally_for(STORE), tally_for(STORE)
    first.add(FAILED, 2, (STORE, "refused"))
    first.set("runner_step", 7)
    first.observe(SAVES, 0.2, ("total", "interval"))
    second.add(FAILED, 1, (STORE, "refused"))

    second.go_on_from(json.loads(json.dumps(first.to_json())))
    second.observe(SAVES, 0.3, ("total", "interval"))
    found = samples(second)

    assert found[FAILED, "refused", STORE] == 3
    assert found[f"{SAVES}_count", "total", "interval"] == 2
    assert found[f"{SAVES}_sum", "total", "interval"] == pytest.approx(0.5)
    assert ("runner_step",) not in found


@pytest.mark.parametrize(
    "document",
    [
        {"runner_unknown_total": [{"labels": [], "value": 1}]},
        {FAILED: 7},
        {FAILED: [7, {"labels": ["too few"], "value": 1}]},
        {FAILED: [{"labels": [STORE, "refused"], "value": "many"}]},
        {FAILED: [{"labels": [STORE, "refused"], "value": float("nan")}]},
        {FAILED: [{"labels": [STORE, "refused"], "value": -1}]},
        {SAVES: [{"labels": ["total", "interval"], "counts": [1, 2], "sum": 1}]},
        {SAVES: [{"labels": ["total", "interval"], "counts": ["a"] * BUCKETS, "sum": 1}]},
        {SAVES: [{"labels": ["total", "interval"], "sum": 1}]},
    ],
)
def test_what_a_store_says_that_is_no_tally_is_passed_over(document: dict[str, Any]) -> None:
    tally = tally_for(STORE)

    tally.go_on_from(document)

    assert samples(tally) == samples(tally_for(STORE))


def test_a_counter_never_goes_down() -> None:
    tally = tally_for(STORE)
    for value in (3.0, 2.0, 4.0, 1.0):
        tally.raise_to("runner_lost_steps_total", value)

    assert tally.value("runner_lost_steps_total") == 4


def test_a_metric_that_is_not_defined_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        tally_for(STORE).set("runner_stepp", 1)
