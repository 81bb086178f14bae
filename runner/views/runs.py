"""The list of all runs of a store, as the first page of `runner ui` has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from runner.views.elements import chip, table
from runner.views.html import Child, Html, join, tag
from runner.views.words import MISSING, count_text, plain


def runs_body(rows: Sequence[Mapping[str, Any]]) -> Html:
    """What stands in the page; `rows` are what `runner status -o json` prints."""
    live = sum(bool(row["live"]) for row in rows)
    head = tag(
        "header",
        tag("p", "Training runs", class_="eyebrow"),
        tag("h1", f"{count_text(len(rows))} {'run' if len(rows) == 1 else 'runs'}"),
        tag("p", f"{count_text(live)} live on this machine.", class_="lead"),
    )
    if not rows:
        return join([head, tag("p", "Start one with runner submit.", class_="nothing")])
    columns = [
        ("run", ""),
        ("phase", ""),
        ("step", "n"),
        ("epoch", "n"),
        ("attempt", "n"),
        ("saved", "n"),
        ("store", "wide"),
    ]
    return join([head, table(columns, [_row(row) for row in rows], label="Runs")])


def _row(row: Mapping[str, Any]) -> Sequence[Child]:
    name = str(row["run_id"])
    epochs = f"/{count_text(row['epochs'])}" if row["epochs"] else ""
    return (
        tag("a", tag("bdi", plain(name)), href=f"/run/{quote(name, safe='')}"),
        chip(str(row["phase"])),
        count_text(row["step"]),
        MISSING if row["epoch"] is None else count_text(row["epoch"]) + epochs,
        count_text(row["attempt"]),
        count_text(row["saved_step"]),
        tag("code", tag("bdi", plain(row["store"]))),
    )
