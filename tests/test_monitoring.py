"""Alerts, dashboard and documentation: made from the table of metrics, tried with Prometheus."""

from __future__ import annotations

import http.client
import json
import re
import runpy
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from nodes import Node
from waiting import wait_until

from runner.supervisor.goodput import BADPUT
from runner.supervisor.metrics import METRICS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "k8s" / "monitoring"
GENERATE = runpy.run_path(str(FOLDER / "generate.py"))
RULES = yaml.safe_load((FOLDER / "rules.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]

# What section 8 of the design promises; names are public.
PROMISED = {
    "runner_checkpoint_save_seconds": ("phase", "trigger"),
    "runner_checkpoint_stall_seconds": (),
    "runner_checkpoint_bytes": (),
    "runner_checkpoint_last_success_timestamp_seconds": ("store",),
    "runner_checkpoint_failures_total": ("store", "reason"),
    "runner_checkpoint_corrupt_total": ("store",),
    "runner_retention_deleted_total": ("store", "reason"),
    "runner_restore_seconds": ("phase",),
    "runner_preemptions_total": ("source",),
    "runner_preemption_lead_seconds": (),
    "runner_grace_headroom_seconds": (),
    "runner_restarts_total": ("reason",),
    "runner_lost_steps_total": (),
    "runner_step": (),
    "runner_epoch": (),
    "runner_step_seconds": (),
    "runner_goodput_ratio": (),
    "runner_badput_seconds_total": ("kind",),
    "runner_trainer_memory_bytes": (),
    "runner_store_throughput_bytes_per_second": ("store", "direction"),
}

needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="needs Prometheus: the Debian package `prometheus`",
)


# The table


def test_every_promised_metric_is_there_with_its_labels() -> None:
    labels = {metric.name: metric.labels for metric in METRICS}

    assert {name: labels.get(name) for name in PROMISED} == PROMISED


def test_names_follow_the_rules() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"runner_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.kind != "histogram" or metric.name.endswith("_seconds")
        assert ("run_id" in metric.labels) == (metric.name == "runner_run_info")


def test_the_documentation_has_every_metric_and_every_kind_of_badput() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()

    assert set(re.findall(r"^\| `(runner_\w+)` \|", text, re.M)) == {m.name for m in METRICS}
    assert [kind for kind in BADPUT if f"| `{kind}` |" not in text] == []


# What is made of it


@pytest.mark.parametrize("name", ["prometheusrule.yaml", "dashboard.json"])
def test_what_is_made_is_up_to_date(name: str) -> None:
    assert (FOLDER / name).read_text() == GENERATE["contents"]()[name], "run generate.py"


def test_the_rule_object_holds_the_plain_rules() -> None:
    made = yaml.safe_load((FOLDER / "prometheusrule.yaml").read_text())

    assert (made["kind"], made["spec"]) == ("PrometheusRule", RULES)


@pytest.mark.parametrize(
    "expression",
    [
        "rate(runner_stepp[5m])",
        "runner_step_bucket{le='1'} > runner_step_count",
        'runner_step{store="a"}',
        'sum(runner_restarts_total{kind="crash"})',
    ],
)
def test_a_name_that_there_is_not_is_found(expression: str) -> None:
    with pytest.raises(ValueError, match="runner_"):
        GENERATE["check_names"]([expression])


def test_a_dashboard_shows_every_metric_once_it_is_defined() -> None:
    text = (FOLDER / "dashboard.json").read_text()
    hidden = {"runner_attempt_start_timestamp_seconds", "runner_grace_seconds"}

    missing = [m.name for m in METRICS if m.name not in text and m.name not in hidden]

    assert missing == []


def test_panels_of_the_dashboard_do_not_lie_on_each_other() -> None:
    board = json.loads((FOLDER / "dashboard.json").read_text())
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


# Alerts


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: str(alert["alert"]))
def test_every_alert_has_a_paragraph_in_the_runbook(alert: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    file, _, anchor = alert["annotations"]["runbook"].partition("#")

    assert file == "docs/runbook.md"
    assert anchor == alert["alert"].lower()
    paragraph = text.partition(f"## {alert['alert']}\n")[2].partition("\n## ")[0]
    assert len(paragraph) > 200


@needs_prometheus
def test_the_rules_are_good_ones_and_fire_when_they_should() -> None:
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_every_query_of_the_dashboard_is_promql(tmp_path: Path) -> None:
    """As rules, which promtool can read."""
    board = json.loads((FOLDER / "dashboard.json").read_text())
    texts = [t["expr"] for p in board["panels"] for t in p.get("targets", ())]
    texts += [a["expr"] for a in board["annotations"]["list"]]
    plain = [re.sub(r"\$__(rate_)?interval", "5m", text) for text in texts]
    rules = [{"record": f"q{n}", "expr": text} for n, text in enumerate(plain)]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))

    done = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


# A real Prometheus


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Starts one that scrapes an address with our rules; gives its own address."""
    started: list[subprocess.Popen[bytes]] = []

    def start(target: str) -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        # Minutes are too long for a test: only how long a condition must hold is shortened.
        rules = re.sub(r"^( *for:) .*$", r"\1 0s", (FOLDER / "rules.yaml").read_text(), flags=re.M)
        (tmp_path / "rules.yaml").write_text(rules)
        document = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(tmp_path / "rules.yaml")],
            "scrape_configs": [
                {"job_name": "runner", "static_configs": [{"targets": [target]}]},
            ],
        }
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(document))
        with (tmp_path / "prometheus.log").open("wb") as output:
            started.append(
                subprocess.Popen(
                    [
                        "prometheus",
                        f"--config.file={tmp_path / 'prometheus.yml'}",
                        f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                        f"--web.listen-address={address}",
                    ],
                    stdout=output,
                    stderr=output,
                )
            )
        return address

    yield start
    for process in started:
        process.terminate()
        process.wait(30)


def ask(address: str, path: str) -> Any:
    """What its API answers; None while it does not."""
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", f"/api/v1/{path}")
        reply = connection.getresponse()
        return json.loads(reply.read())["data"] if reply.status == 200 else None
    except OSError:
        return None
    finally:
        connection.close()


@needs_prometheus
def test_a_prometheus_that_scrapes_a_run_raises_the_alarm(
    node: Node, prometheus: Callable[[str], str]
) -> None:
    """A grace that no save can keep; and a script that comes to no boundary for its next save."""
    job = node.training(
        params={"pace": 0.01, "befalls": {"1": {"1": "save", "6": "wait"}}},
        metrics={"port": 0},
        checkpoint={"every": {"minutes": 0.01}, "snapshot_every": {"steps": 1}},
        preemption={"grace": "1ms"},
    )
    supervisor = node.start("run", job)
    supervisor.wait_for("step 6")
    target = node.spool().status()["metrics"]
    address = prometheus(target)

    def firing() -> set[str]:
        alerts = (ask(address, "alerts") or {}).get("alerts", [])
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    expected = {"RunnerEmergencySaveTooSlow", "RunnerCheckpointOverdue"}
    wait_until(lambda: expected <= firing(), 60, f"{expected}, not only {firing()}")
    exemplars = f"query_exemplars?query={quote('runner_checkpoint_save_seconds_bucket')}"
    found = ask(address, f"query?query={quote('runner_step')}")["result"]

    assert [float(series["value"][1]) for series in found] == [5]
    assert firing() == expected
    assert ask(address, f"{exemplars}&start=0&end=9999999999") is not None
    [health] = ask(address, "targets")["activeTargets"]
    assert (health["health"], health["lastError"]) == ("up", "")
    node.gate.touch()
    assert supervisor.wait() == 0
