"""The head of a page: the run in a line, and what matters most as tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.views.elements import chip, day, logged_text, of_run, outside
from runner.views.html import Child, Html, tag
from runner.views.words import (
    MISSING,
    count_text,
    duration_text,
    plain,
    ratio_text,
)


def head(run: Mapping[str, Any]) -> Html:
    return tag(
        "header",
        tag("p", "Training run", class_="eyebrow"),
        tag("div", tag("h1", outside(run["run_id"])), chip(run["phase"]), class_="head"),
        tag("p", _summary(run), class_="lead"),
        None
        if not run["cause"] or run["phase"] == "succeeded"
        else tag("p", outside(run["cause"]), class_="why"),
    )


def _summary(run: Mapping[str, Any]) -> list[Child]:
    """The run in one sentence."""

    def said(count: int, one: str, many: str) -> str:
        return f"{count_text(count) if count else 'no'} {one if count == 1 else many}"

    is_over = run["phase"] in ("succeeded", "failed", "stopped", "interrupted")
    return [
        f"{plain(run['phase']).capitalize()} at step ",
        of_run(run, "step", count_text),
        f" {'after' if is_over else 'for'} ",
        of_run(run, "wall_seconds", duration_text),
        f", in {said(run['attempt'], 'attempt', 'attempts')}: ",
        f"{said(run['preemptions'], 'preemption', 'preemptions')}, ",
        f"{said(run['failures'], 'failure', 'failures')}, ",
        f"{said(run['lost_steps'], 'step', 'steps')} lost.",
    ]


def _tile(name: str, content: Child, more: Child = None, tone: str = "") -> Html:
    return tag(
        "div",
        tag("dt", name),
        tag("dd", content, class_=tone or None),
        None if more is None else tag("dd", more, class_=f"more {tone}".rstrip()),
    )


def tiles(run: Mapping[str, Any]) -> Html:
    tiles = [
        _progress_tile(run),
        _metric_tile(run),
        _tile("Goodput", of_run(run, "goodput_ratio", ratio_text), "of the time made steps"),
        _tile(
            "Preemptions",
            of_run(run, "preemptions", count_text),
            [
                of_run(run, "failures", count_text),
                " failure" if run["failures"] == 1 else " failures",
            ],
        ),
        _tile(
            "Steps lost",
            of_run(run, "lost_steps", count_text),
            "made again, or to be made again",
            "warn" if run["lost_steps"] else "",
        ),
        _checkpoint_tile(run),
        _headroom_tile(run),
        _tile(
            "Time",
            of_run(run, "wall_seconds", duration_text),
            ["since ", tag("time", day(run["started_at"]), datetime=run["started_at"])]
            if run["started_at"]
            else None,
        ),
    ]
    return tag("dl", *tiles, class_="tiles")


def _progress_tile(run: Mapping[str, Any]) -> Html:
    ratio = run["progress_ratio"]
    if ratio is None:
        return _tile("Step", of_run(run, "step", count_text), "of an unknown number")
    of: list[Child] = [of_run(run, "step", count_text)]
    if run["total_steps"]:
        of += [" of ", of_run(run, "total_steps", count_text), " steps"]
    else:
        of.append(" steps")
    if run["eta_seconds"] is not None:
        of += [", ", of_run(run, "eta_seconds", duration_text), " to go"]
    track = tag(
        "svg",
        tag("rect", width="100%", height=4, class_="rest"),
        tag("rect", width=f"{100 * ratio:.2f}%", height=4, class_="done"),
        class_="track",
        height=4,
        aria_hidden="true",
    )
    return _tile("Progress", [of_run(run, "progress_ratio", ratio_text), track], of)


def _metric_tile(run: Mapping[str, Any]) -> Html:
    if run["metric"] is None:
        return _tile("Loss", MISSING, "nothing was logged")
    return _tile("Last value", of_run(run, "value", logged_text), outside(run["metric"]))


def _checkpoint_tile(run: Mapping[str, Any]) -> Html:
    if run["last_checkpoint"] is None:
        return _tile("Last checkpoint", "none", "nothing is durable yet", "warn")
    ago = of_run(run, "saved_seconds_ago", duration_text)
    return _tile(
        "Last checkpoint",
        ["step ", of_run(run, "saved_step", count_text)],
        [ago, " ago"] if run["saved_seconds_ago"] is not None else None,
    )


def _headroom_tile(run: Mapping[str, Any]) -> Html:
    headroom = run["headroom_seconds"]
    if headroom is None:
        return _tile("Emergency save", MISSING, "not measured yet")
    if headroom < 0:
        more = ["does not fit into ", of_run(run, "grace_seconds", duration_text), " of grace"]
        return _tile("Emergency save", of_run(run, "emergency_seconds", duration_text), more, "bad")
    more = [of_run(run, "headroom_seconds", duration_text), " of the grace to spare"]
    return _tile("Emergency save", of_run(run, "emergency_seconds", duration_text), more)
