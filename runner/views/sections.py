"""The drawn sections of a page: the timeline, the curves, where the time went, the saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.views import charts, figures
from runner.views.elements import logged_text, outside, plain_table, section, value
from runner.views.html import Child, Html, tag
from runner.views.words import (
    count_text,
    duration_text,
    number_text,
    plain,
    ratio_text,
)

_MOST_CURVES = 12


def timeline(overview: Mapping[str, Any]) -> Html:
    lost = any(row["lost_steps"] for row in overview["attempts"])
    note = "Steps over time." + (" Where the line falls, steps were lost." if lost else "")
    drawn = figures.timeline(overview["attempts"], overview["saves"])
    return section("Timeline", note, tag("figure", drawn))


def curves(overview: Mapping[str, Any]) -> Html | None:
    found = overview["curves"]
    if not found:
        return section("What was logged", None, tag("p", "Nothing yet.", class_="nothing"))
    starts = [
        (row["attempt"], row["start_step"])
        for row in overview["attempts"][1:]
        if row["first_step_seconds"] is not None
    ]
    note = (
        "Through all attempts; a dotted line is where one began. Steps that were made again are "
        "dashed: they are not on the way that the run has kept."
    )
    drawn = []
    for number, curve in enumerate(found[:_MOST_CURVES]):
        large = number == 0
        scale = ", logarithmic scale" if figures.is_log(curve) else ""
        drawn.append(
            tag(
                "figure",
                tag("h3", outside(curve["name"])),
                tag(
                    "figcaption",
                    "last ",
                    value(overview, f"curves.{number}.last", logged_text),
                    ", lowest ",
                    value(overview, f"curves.{number}.min", number_text),
                    ", highest ",
                    value(overview, f"curves.{number}.max", number_text),
                    scale,
                ),
                figures.curve(curve, starts, large=large),
                class_="wide" if large else None,
            )
        )
    left = len(found) - _MOST_CURVES
    more = None if left <= 0 else tag("p", f"{left} more in the JSON document.", class_="nothing")
    has_again = any(trace["again"] for curve in found for trace in curve["traces"])
    keys = [("way", "kept")] + ([("again", "made again")] if has_again else [])
    keys += [("cut", "an attempt begins")] if starts else []
    legend = charts.legend(*keys)
    return section("What was logged", note, legend, tag("div", *drawn, class_="pair"), more)


def goodput(overview: Mapping[str, Any]) -> Html:
    parts = overview["goodput"]["parts"]
    if not parts:
        return section("Where the time went", None, tag("p", "Not known yet.", class_="nothing"))
    rows = [
        (
            [
                tag("span", class_=f"key {figures.part_class(part['kind'])}"),
                " ",
                figures.part_name(part["kind"]),
            ],
            value(overview, f"goodput.parts.{number}.seconds", duration_text),
            value(overview, f"goodput.parts.{number}.ratio", ratio_text),
        )
        for number, part in enumerate(parts)
        if part["seconds"] or part["kind"] == "productive"
    ]
    note: list[Child] = [
        "All of the ",
        value(overview, "goodput.wall_seconds", duration_text),
        " since the first start.",
    ]
    columns = [("", ""), ("time", "n"), ("share", "n")]
    return section(
        "Where the time went",
        note,
        figures.goodput(parts),
        plain_table(columns, rows, label="Where the time went"),
        _money(overview),
    )


def _money(overview: Mapping[str, Any]) -> Html | None:
    cost = overview["goodput"].get("cost")
    if not cost:
        return None
    told = ", ".join(f"{plain(key).replace('_', ' ')} {number_text(v)}" for key, v in cost.items())
    return tag("p", f"In money: {told}.", class_="note")


def saves(overview: Mapping[str, Any]) -> Html:
    summary = overview["save_seconds"]
    high = max((row["end_seconds"] or 0.0 for row in overview["attempts"]), default=0.0) or 1.0
    note: list[Child] = [value(overview, "save_seconds.count", count_text), " became durable. "]
    if summary["measured"]:
        note += [
            "From the copy to the last byte in the store: half of them within ",
            value(overview, "save_seconds.median", duration_text),
            ", 95 % within ",
            value(overview, "save_seconds.p95", duration_text),
            ", the slowest in ",
            value(overview, "save_seconds.max", duration_text),
            ".",
        ]
    drawn = figures.latencies(overview["saves"], overview["run"]["grace_seconds"], high)
    return section("Saves", note, tag("figure", drawn))
