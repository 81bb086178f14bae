"""Writes what is made from other files: the PrometheusRule, and the Grafana dashboard.

    python k8s/monitoring/generate.py            # writes prometheusrule.yaml and dashboard.json
    python k8s/monitoring/generate.py --check    # exits with 1 if they are not what it would write

A panel names metrics and labels; both are looked up in the table of all metrics, and a name that is
not there is an error: nothing that is renamed leaves an empty panel behind.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from runner.supervisor.metrics import METRICS

FOLDER = Path(__file__).parent
RULES, RULE_OBJECT, DASHBOARD = "rules.yaml", "prometheusrule.yaml", "dashboard.json"

KNOWN = {metric.name: metric for metric in METRICS}
_METRIC = re.compile(r"\brunner_[a-z_]+\b")
_OF_RUN = 'instance=~"$instance"'
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SECONDS, _BYTES, _SHARE, _COUNT = "s", "bytes", "percentunit", "short"


@dataclass(frozen=True)
class Query:
    """One PromQL expression and how its series are called. `RUN` in it selects the instances."""

    expression: str
    legend: str = ""

    @property
    def text(self) -> str:
        return self.expression.replace("RUN", _OF_RUN)


@dataclass(frozen=True)
class Panel:
    """A panel of the dashboard: 24 columns make a row."""

    title: str
    says: str
    queries: tuple[Query, ...]
    unit: str = _COUNT
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    thresholds: tuple[tuple[float | None, str], ...] = ()


def quantiles(name: str, by: str = "", where: str = "") -> tuple[Query, ...]:
    """The median and the 99th percentile of a histogram, and of each of its series `by` a label."""
    labels, selector = f"le{', ' + by if by else ''}", f"RUN{where}"
    rate = f"sum by ({labels}) (rate({name}_bucket{{{selector}}}[$__rate_interval]))"
    suffix = f" {{{{{by}}}}}" if by else ""
    return (
        Query(f"histogram_quantile(0.5, {rate})", f"median{suffix}"),
        Query(f"histogram_quantile(0.99, {rate})", f"99 %{suffix}"),
    )


OVERVIEW = (
    Panel("Phase", "What the supervisor is doing.",
          (Query("runner_phase{RUN} == 1", "{{instance}} {{phase}}"),),
          kind="state-timeline", width=16, height=6),
    Panel("Goodput", "Share of all time since the first submit that went into steps that count.",
          (Query("runner_goodput_ratio{RUN}", "{{instance}}"),),
          unit=_SHARE, kind="gauge", width=4, height=6,
          thresholds=((None, "red"), (0.5, "orange"), (0.8, "green"))),
    Panel("Headroom", "What the grace leaves after an emergency save. Below 0 it does not fit.",
          (Query("runner_grace_headroom_seconds{RUN}", "{{instance}}"),),
          unit=_SECONDS, kind="stat", width=4, height=6,
          thresholds=((None, "red"), (0, "green"))),
)  # fmt: skip

TRAINING = (
    Panel("Step", "Finished optimizer steps: it falls back where steps were lost.",
          (Query("runner_step{RUN}", "{{instance}}"),)),
    Panel("Epoch", "The epoch at hand, of all.",
          (Query("runner_epoch{RUN}", "epoch"), Query("runner_epochs{RUN}", "of"))),
    Panel("Logged values", "The newest of each name: losses above all.",
          (Query("runner_train_metric{RUN}", "{{name}}"),)),
    Panel("Step time", "From one boundary to the next.", quantiles("runner_step_seconds"),
          unit=_SECONDS),
    Panel("Memory of the trainer", "Private memory of its processes, without the slots.",
          (Query("runner_trainer_memory_bytes{RUN}", "{{instance}}"),), unit=_BYTES),
    Panel("Spool", "Its file system: slots, and what else lies there.",
          (Query("runner_spool_size_bytes{RUN}", "size"),
           Query("runner_spool_free_bytes{RUN}", "free")), unit=_BYTES),
)  # fmt: skip

LIVES = (
    Panel("Attempts", "Number of the attempt at hand.",
          (Query("runner_attempt{RUN}", "{{instance}}"),)),
    Panel("Restarts", "By what ended the attempt before.",
          (Query("sum by (reason) (increase(runner_restarts_total{RUN}[$__rate_interval])) > 0",
                 "{{reason}}"),), stacked=True),
    Panel("Preemptions", "Notices, by who gave them, and how long before the kill.",
          (Query("sum by (source) (runner_preemptions_total{RUN})", "{{source}}"),
           Query("runner_preemption_lead_seconds{RUN}", "seconds before"))),
    Panel("Failures without progress", "In a row, and how many are tried again.",
          (Query("runner_failures_without_progress{RUN}", "failures"),
           Query("runner_failures_limit{RUN}", "limit"))),
    Panel("Restores", "Fetched and verified, put into place, and in all.",
          quantiles("runner_restore_seconds", "phase"), unit=_SECONDS),
    Panel("Lost steps", "That had to be made again.",
          (Query("runner_lost_steps_total{RUN}", "{{instance}}"),)),
)  # fmt: skip

SAVING = (
    Panel("Age of the newest durable checkpoint", "What a kill without notice would cost now.",
          (Query("time() - runner_checkpoint_last_success_timestamp_seconds{RUN}", "age"),
           Query("runner_checkpoint_interval_seconds{RUN}", "interval")), unit=_SECONDS),
    Panel("Saves", "From the copy to the commit.",
          quantiles("runner_checkpoint_save_seconds", "phase"), unit=_SECONDS),
    Panel("Stalls", "What the training loop waits at a boundary with a snapshot.",
          quantiles("runner_checkpoint_stall_seconds"), unit=_SECONDS),
    Panel("Emergency saves", "From the copy to the commit, after a notice.",
          quantiles("runner_checkpoint_save_seconds", "phase",
                    ', phase="total", trigger="preemption"'), unit=_SECONDS),
    Panel("Size", "Of the newest checkpoint.",
          (Query("runner_checkpoint_bytes{RUN}", "{{instance}}"),), unit=_BYTES),
    Panel("Throughput of the store", "Of the last save, and of the last restore.",
          (Query("runner_store_throughput_bytes_per_second{RUN}", "{{direction}}"),),
          unit="Bps"),
    Panel("Failures of saves", "By reason.",
          (Query("sum by (reason) (increase(runner_checkpoint_failures_total{RUN}"
                 "[$__rate_interval])) > 0", "{{reason}}"),
           Query("runner_checkpoint_corrupt_total{RUN}", "corrupt")), stacked=True),
    Panel("Retention", "Checkpoints that are kept, and that were let go.",
          (Query("runner_checkpoints{RUN}", "kept"),
           Query("runner_retention_deleted_total{RUN}", "deleted, {{reason}}"))),
    Panel("Validation", "Checkpoints that were loaded and tried, by what came of it.",
          (Query("sum by (result) (runner_checkpoint_validations_total{RUN})", "{{result}}"),)),
)  # fmt: skip

TIME = (
    Panel("Where the time goes", "Each second of the wall clock, by what it goes into.",
          (Query("sum by (kind) (rate(runner_badput_seconds_total{RUN}[$__rate_interval]))",
                 "{{kind}}"),
           Query("sum(rate(runner_productive_seconds_total{RUN}[$__rate_interval]))",
                 "productive")),
          unit=_SHARE, stacked=True, width=16),
    Panel("Badput in all", "Since the first submit.",
          (Query("sum by (kind) (runner_badput_seconds_total{RUN})", "{{kind}}"),),
          unit=_SECONDS, kind="bargauge"),
)  # fmt: skip

ROWS = {
    "Now": OVERVIEW,
    "Training": TRAINING,
    "Attempts and preemptions": LIVES,
    "Checkpoints": SAVING,
    "Goodput": TIME,
}


def check_names(expressions: Sequence[str]) -> None:
    """ValueError if an expression names a metric, or a label of one, that there is not."""
    for expression in expressions:
        for name in _METRIC.findall(expression):
            base = re.sub(r"_(bucket|count|sum)$", "", name)
            metric = KNOWN.get(name) or KNOWN.get(base)
            if metric is None:
                raise ValueError(f"there is no metric {name}, used in {expression}")
            if name != metric.name and metric.kind != "histogram":
                raise ValueError(f"{metric.name} is no histogram, used in {expression}")
            own = {*metric.labels, "le", "instance", "job"}
            selectors = re.findall(rf"{name}\{{([^}}]*)\}}", expression)
            used = {u for s in selectors for u in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", s)}
            if used - own:
                raise ValueError(f"{metric.name} has no label {sorted(used - own)}: {expression}")


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(_row(len(panels) + 1, title, y))
        x, y, tallest = 0, y + 1, 0
        for panel in row:
            if x + panel.width > 24:
                x, y, tallest = 0, y + tallest, 0
            check_names([query.text for query in panel.queries])
            panels.append(_panel(len(panels) + 1, panel, x, y))
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return {
        "uid": "runner",
        "title": "runner",
        "description": "Runs of runner: made by k8s/monitoring/generate.py, not by hand.",
        "tags": ["runner"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "",
        "templating": {"list": _variables()},
        "annotations": {"list": [_preemptions()]},
        "panels": panels,
    }


def _variables() -> list[dict[str, Any]]:
    find = 'label_values(runner_run_info{run_id=~"$run"}, instance)'
    check_names(["runner_run_info{run_id=~'x'}"])
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        _query_variable("run", "Run", "label_values(runner_run_info, run_id)"),
        _query_variable("instance", "Instance", find),
    ]


def _query_variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "sort": 1,
    }


def _preemptions() -> dict[str, Any]:
    expression = Query("changes(runner_attempt{RUN}[$__interval]) > 0").text
    check_names([expression])
    return {
        "name": "New attempts",
        "datasource": _DATASOURCE,
        "enable": True,
        "iconColor": "orange",
        "expr": expression,
        "titleFormat": "attempt",
    }


def _row(number: int, title: str, y: int) -> dict[str, Any]:
    at = {"x": 0, "y": y, "w": 24, "h": 1}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": at}


def _panel(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _DATASOURCE,
            "expr": query.text,
            "legendFormat": query.legend,
            "exemplar": "_bucket" in query.expression,
        }
        for index, query in enumerate(panel.queries)
    ]
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.stacked:
        defaults["custom"] = {"stacking": {"mode": "normal"}, "fillOpacity": 60}
    if panel.thresholds:
        steps = [{"value": value, "color": color} for value, color in panel.thresholds]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        defaults["color"] = {"mode": "thresholds"}
    if panel.unit == _SHARE and panel.kind == "gauge":
        defaults |= {"min": 0, "max": 1}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.says,
        "datasource": _DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": targets,
    }


def rule_object() -> dict[str, Any]:
    """The PrometheusRule with the plain rules in it."""
    rules = yaml.safe_load((FOLDER / RULES).read_text())
    check_names([rule["expr"] for group in rules["groups"] for rule in group["rules"]])
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "runner", "labels": {"app.kubernetes.io/part-of": "runner"}},
        "spec": rules,
    }


def contents() -> dict[str, str]:
    """The files, by name."""
    made = f"# Made from {RULES} by {Path(__file__).name}: change it there.\n"
    return {
        RULE_OBJECT: made + yaml.safe_dump(rule_object(), sort_keys=False, width=100),
        DASHBOARD: json.dumps(dashboard(), indent=1) + "\n",
    }


def main() -> int:
    checks = sys.argv[1:] == ["--check"]
    stale = 0
    for name, content in contents().items():
        path = FOLDER / name
        if checks and (not path.exists() or path.read_text() != content):
            print(f"{path} is not what is made now; run {Path(__file__).name}", file=sys.stderr)
            stale = 1
        elif not checks:
            path.write_text(content)
    return stale


if __name__ == "__main__":
    sys.exit(main())
