"""The listed sections of a page: checkpoints, quarantine, attempts, the job, and the foot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from runner.views.elements import day, outside, section, table, value
from runner.views.html import Child, Html, tag
from runner.views.words import (
    MISSING,
    count_text,
    duration_text,
    plain,
    size_text,
)


def checkpoints(overview: Mapping[str, Any]) -> Html:
    rows = []
    for number, row in enumerate(overview["checkpoints"]):
        at = f"checkpoints.{number}"
        rows.append(
            (
                tag("code", plain(row["name"])),
                value(overview, f"{at}.epoch", count_text),
                [tag("span", plain(trigger), class_="tag") for trigger in row["triggers"]],
                value(overview, f"{at}.bytes", size_text),
                [tag("span", plain(reason), class_="tag") for reason in row["kept_because"]]
                or MISSING,
                _soundness(row),
                day(row["created_at"]),
            )
        )
    columns = [
        ("checkpoint", ""),
        ("epoch", "n"),
        ("why it was made", ""),
        ("size", "n"),
        ("why it stays", ""),
        ("sound", ""),
        ("made", ""),
    ]
    shown = (
        table(columns, rows, label="Checkpoints")
        if rows
        else tag("p", "There is none.", class_="nothing")
    )
    return section("Checkpoints", "What is in the store now, the newest first.", shown,
                   _quarantine(overview))  # fmt: skip


def _soundness(row: Mapping[str, Any]) -> Child:
    sound, compared = row["sound"], row["compared"]
    told: list[Child] = []
    if sound is None:
        told.append(tag("span", "not looked at", class_="why"))
    elif sound:
        told.append(tag("span", "yes", title=f"compared: {plain(compared)}", class_="good-text"))
        told.append(tag("span", f" ({plain(compared)})", class_="why"))
    else:
        told += [tag("span", "NO: ", class_="bad-text"), outside(row["problem"])]
    if not row["healthy"]:
        told.append(tag("span", "; its metrics are not finite", class_="warn-text"))
    validated = row["validated"]
    if validated is not None:
        tone = "good-text" if validated == "valid" else "bad-text"
        told += ["; validation: ", tag("span", plain(validated), class_=tone)]
        reason = row["validation"]["reason"]
        told += [": ", outside(reason)] if reason else []
    return told


def _quarantine(overview: Mapping[str, Any]) -> Html | None:
    found = overview["quarantine"]
    if not found:
        return None
    rows = [(tag("code", plain(bad["name"])), outside(bad["reason"])) for bad in found]
    columns = [("checkpoint", ""), ("what is wrong", "wide")]
    return tag("div", tag("h3", "In quarantine"), table(columns, rows, label="In quarantine"))


def attempts(overview: Mapping[str, Any]) -> Html:
    rows = []
    for number, row in reversed(list(enumerate(overview["attempts"]))):
        at = f"attempts.{number}"
        tone = {"failure": "bad-text", "lost": "bad-text", "preemption": "warn-text"}
        rows.append(
            (
                value(overview, f"{at}.attempt", count_text),
                [
                    value(overview, f"{at}.start_step", count_text),
                    "–",
                    value(overview, f"{at}.end_step", count_text),
                ],
                value(overview, f"{at}.saved_step", count_text),
                value(overview, f"{at}.lost_steps", count_text),
                value(overview, f"{at}.notice_to_durable_seconds", duration_text),
                value(overview, f"{at}.end_to_next_step_seconds", duration_text),
                outside(row["node"]),
                [
                    tag("span", plain(row["ended_by"]), class_=tone.get(row["ended_by"])),
                    tag("span", ": ", outside(row["cause"]), class_="why")
                    if row["cause"] and row["ended_by"] != "finished"
                    else None,
                ],
            )
        )
    columns = [
        ("attempt", ""),
        ("steps", "n"),
        ("saved", "n"),
        ("lost", "n"),
        ("notice → durable", "n"),
        ("end → next step", "n"),
        ("node", ""),
        ("ended by", "wide"),
    ]
    return section("Attempts", None, table(columns, rows, label="Attempts"))


def job(overview: Mapping[str, Any]) -> Html:
    provenance = overview["provenance"]
    parts = [("The job as it was submitted", overview["job"])]
    if provenance:
        parts.append(("Where it comes from", provenance))
    return tag(
        "section",
        tag("h2", "The job"),
        *(
            tag("details", tag("summary", name), tag("pre", _pretty(content)))
            for name, content in parts
        ),
    )


def _pretty(content: Any) -> str:
    lines = json.dumps(content, indent=2, ensure_ascii=False).splitlines()
    return "\n".join(line[: len(line) - len(line.lstrip())] + plain(line) for line in lines)


def foot(run: Mapping[str, Any]) -> Html:
    return tag(
        "footer",
        "Run ",
        outside(run["run_id"]),
        " in ",
        tag("code", outside(run["store"])),
        ", as it was at ",
        tag("time", day(run["seen_at"]), datetime=run["seen_at"]),
        ".",
    )
