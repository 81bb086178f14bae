"""A run's document as one HTML file: for people who would rather look than read.

The page asks for nothing: no script, no font, no image from anywhere, and its content security
policy forbids them. Every number that the document has stands in a `<data>` element with the path
to it, so that what is shown can be compared with what `-o json` prints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from runner.views import charts, figures
from runner.views.html import Child, Html, document, join, source_of, tag, verbatim
from runner.views.words import (
    MISSING,
    count_text,
    duration_text,
    number_text,
    plain,
    ratio_text,
    size_text,
    tone_of,
)

_STYLE = resources.files(__package__).joinpath("page.css").read_text("utf-8")
STYLE_SOURCE = source_of(_STYLE)
_MOST_CURVES = 12


def page(overview: Mapping[str, Any]) -> Html:
    """The whole page of one run, a file on its own."""
    policy = f"default-src 'none'; style-src '{STYLE_SOURCE}'; base-uri 'none'; form-action 'none'"
    meta = tag("meta", http_equiv="Content-Security-Policy", content=policy)
    return _document(f"{overview['run']['run_id']} · run", tag("main", body(overview)), [meta])


def live(title: str, content: Html, script: str) -> Html:
    """The same as a server shows it, which says in its headers what may run: this script."""
    return _document(title, tag("main", content), [], verbatim("script", script))


def failure(text: str) -> Html:
    """What is shown in place of a page."""
    return join([link("/", "All runs"), tag("h1", "Nothing to show"), tag("p", plain(text))])


def link(path: str, name: str) -> Html:
    return tag("p", tag("a", name, href=path), class_="eyebrow")


def _document(title: str, main: Html, head: Sequence[Html], *after: Html) -> Html:
    return document(
        tag(
            "head",
            tag("meta", charset="utf-8"),
            *head,
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="referrer", content="no-referrer"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", plain(title)),
            verbatim("style", _STYLE),
        ),
        tag("body", main, *after),
    )


def body(overview: Mapping[str, Any], *, above: Child = None) -> Html:
    """What stands in the page, section after section."""
    run = overview["run"]
    return join(
        [
            above,
            _head(run),
            _tiles(run),
            _timeline(overview),
            _curves(overview),
            _goodput(overview),
            _saves(overview),
            _checkpoints(overview),
            _attempts(overview),
            _job(overview),
            _foot(run),
        ]
    )


# ---------------------------------------------------------------------------- values


def value(document: Any, path: str, show: Callable[[Any], str]) -> Html:
    """What lies at a path of the document, as `show` writes it, and as it is."""
    found = document
    for key in path.split("."):
        found = found[int(key) if isinstance(found, list) else key]
    return tag("data", show(found), value=_machine_readable(found), data_path=path)


def _of_run(run: Mapping[str, Any], key: str, show: Callable[[Any], str]) -> Html:
    """The same of the document's `run`."""
    return value({"run": run}, f"run.{key}", show)


def _machine_readable(found: Any) -> str:
    return found if isinstance(found, str) else json.dumps(found)


def _outside(text: object) -> Html:
    """A text that is not ours: on its own, so that its direction does not turn ours round."""
    return tag("bdi", plain(text))


def table(
    columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Child]], *, label: str
) -> Html:
    """A table that becomes a list of cards where it is narrow. A column is a name and a class."""
    heads = (tag("th", name, class_=class_ or None, scope="col", role="columnheader")
             for name, class_ in columns)  # fmt: skip
    body = []
    for row in rows:
        cells = []
        for number, ((name, class_), cell) in enumerate(zip(columns, row, strict=True)):
            said = {"class_": class_ or None, "data_label": name if number else None}
            if number:
                cells.append(tag("td", cell, role="cell", **said))
            else:
                cells.append(tag("th", cell, role="rowheader", scope="row", **said))
        body.append(tag("tr", *cells, role="row"))
    return tag(
        "table",
        tag("thead", tag("tr", *heads, role="row"), role="rowgroup"),
        tag("tbody", *body, role="rowgroup"),
        class_="cards",
        role="table",
        aria_label=label,
    )


def chip(phase: str) -> Html:
    """The phase of a run in its colour."""
    return tag("span", plain(phase), class_=f"chip {tone_of(phase) or 'calm'}")


def section(title: str, note: Child, *content: Child) -> Html:
    about = None if note is None else tag("p", note, class_="note")
    return tag("section", tag("h2", title), about, *content)


# ---------------------------------------------------------------------------- the head


def _head(run: Mapping[str, Any]) -> Html:
    return tag(
        "header",
        tag("p", "Training run", class_="eyebrow"),
        tag("div", tag("h1", _outside(run["run_id"])), chip(run["phase"]), class_="head"),
        tag("p", _summary(run), class_="lead"),
        None
        if not run["cause"] or run["phase"] == "succeeded"
        else tag("p", _outside(run["cause"]), class_="why"),
    )


def _summary(run: Mapping[str, Any]) -> list[Child]:
    """The run in one sentence."""

    def said(count: int, one: str, many: str) -> str:
        return f"{count_text(count) if count else 'no'} {one if count == 1 else many}"

    is_over = run["phase"] in ("succeeded", "failed", "stopped", "interrupted")
    return [
        f"{plain(run['phase']).capitalize()} at step ",
        _of_run(run, "step", count_text),
        f" {'after' if is_over else 'for'} ",
        _of_run(run, "wall_seconds", duration_text),
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


def _tiles(run: Mapping[str, Any]) -> Html:
    tiles = [
        _progress_tile(run),
        _metric_tile(run),
        _tile("Goodput", _of_run(run, "goodput_ratio", ratio_text), "of the time made steps"),
        _tile(
            "Preemptions",
            _of_run(run, "preemptions", count_text),
            [
                _of_run(run, "failures", count_text),
                " failure" if run["failures"] == 1 else " failures",
            ],
        ),
        _tile(
            "Steps lost",
            _of_run(run, "lost_steps", count_text),
            "made again, or to be made again",
            "warn" if run["lost_steps"] else "",
        ),
        _checkpoint_tile(run),
        _headroom_tile(run),
        _tile(
            "Time",
            _of_run(run, "wall_seconds", duration_text),
            ["since ", tag("time", _day(run["started_at"]), datetime=run["started_at"])]
            if run["started_at"]
            else None,
        ),
    ]
    return tag("dl", *tiles, class_="tiles")


def _progress_tile(run: Mapping[str, Any]) -> Html:
    ratio = run["progress_ratio"]
    if ratio is None:
        return _tile("Step", _of_run(run, "step", count_text), "of an unknown number")
    of: list[Child] = [_of_run(run, "step", count_text)]
    if run["total_steps"]:
        of += [" of ", _of_run(run, "total_steps", count_text), " steps"]
    else:
        of.append(" steps")
    if run["eta_seconds"] is not None:
        of += [", ", _of_run(run, "eta_seconds", duration_text), " to go"]
    track = tag(
        "svg",
        tag("rect", width="100%", height=4, class_="rest"),
        tag("rect", width=f"{100 * ratio:.2f}%", height=4, class_="done"),
        class_="track",
        height=4,
        aria_hidden="true",
    )
    return _tile("Progress", [_of_run(run, "progress_ratio", ratio_text), track], of)


def _metric_tile(run: Mapping[str, Any]) -> Html:
    if run["metric"] is None:
        return _tile("Loss", MISSING, "nothing was logged")
    return _tile("Last value", _of_run(run, "value", _value_text), _outside(run["metric"]))


def _value_text(logged: float | str | None) -> str:
    return logged if isinstance(logged, str) else number_text(logged)


def _checkpoint_tile(run: Mapping[str, Any]) -> Html:
    if run["last_checkpoint"] is None:
        return _tile("Last checkpoint", "none", "nothing is durable yet", "warn")
    ago = _of_run(run, "saved_seconds_ago", duration_text)
    return _tile(
        "Last checkpoint",
        ["step ", _of_run(run, "saved_step", count_text)],
        [ago, " ago"] if run["saved_seconds_ago"] is not None else None,
    )


def _headroom_tile(run: Mapping[str, Any]) -> Html:
    headroom = run["headroom_seconds"]
    if headroom is None:
        return _tile("Emergency save", MISSING, "not measured yet")
    if headroom < 0:
        more = ["does not fit into ", _of_run(run, "grace_seconds", duration_text), " of grace"]
        return _tile(
            "Emergency save", _of_run(run, "emergency_seconds", duration_text), more, "bad"
        )
    more = [_of_run(run, "headroom_seconds", duration_text), " of the grace to spare"]
    return _tile("Emergency save", _of_run(run, "emergency_seconds", duration_text), more)


# ---------------------------------------------------------------------------- figures


def _timeline(overview: Mapping[str, Any]) -> Html:
    lost = any(row["lost_steps"] for row in overview["attempts"])
    note = "Steps over time." + (" Where the line falls, steps were lost." if lost else "")
    drawn = figures.timeline(overview["attempts"], overview["saves"])
    return section("Timeline", note, tag("figure", drawn))


def _curves(overview: Mapping[str, Any]) -> Html | None:
    curves = overview["curves"]
    if not curves:
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
    for number, curve in enumerate(curves[:_MOST_CURVES]):
        large = number == 0
        scale = ", logarithmic scale" if figures.is_log(curve) else ""
        drawn.append(
            tag(
                "figure",
                tag("h3", _outside(curve["name"])),
                tag(
                    "figcaption",
                    "last ",
                    value(overview, f"curves.{number}.last", _value_text),
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
    left = len(curves) - _MOST_CURVES
    more = None if left <= 0 else tag("p", f"{left} more in the JSON document.", class_="nothing")
    has_again = any(trace["again"] for curve in curves for trace in curve["traces"])
    keys = [("way", "kept")] + ([("again", "made again")] if has_again else [])
    keys += [("cut", "an attempt begins")] if starts else []
    legend = charts.legend(*keys)
    return section("What was logged", note, legend, tag("div", *drawn, class_="pair"), more)


def _goodput(overview: Mapping[str, Any]) -> Html:
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


def plain_table(
    columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Child]], *, label: str
) -> Html:
    """A small table that is a table at any width."""
    heads = (tag("th", name, class_=class_ or None, scope="col") for name, class_ in columns)
    lines = [
        tag(
            "tr",
            *(
                tag("td", cell, class_=class_ or None)
                for (_, class_), cell in zip(columns, row, strict=True)
            ),
        )
        for row in rows
    ]
    return tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *lines), aria_label=label)


def _saves(overview: Mapping[str, Any]) -> Html:
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


# ---------------------------------------------------------------------------- tables


def _checkpoints(overview: Mapping[str, Any]) -> Html:
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
                _day(row["created_at"]),
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
        told += [tag("span", "NO: ", class_="bad-text"), _outside(row["problem"])]
    if not row["healthy"]:
        told.append(tag("span", "; its metrics are not finite", class_="warn-text"))
    validated = row["validated"]
    if validated is not None:
        tone = "good-text" if validated == "valid" else "bad-text"
        told += ["; validation: ", tag("span", plain(validated), class_=tone)]
        reason = row["validation"]["reason"]
        told += [": ", _outside(reason)] if reason else []
    return told


def _quarantine(overview: Mapping[str, Any]) -> Html | None:
    found = overview["quarantine"]
    if not found:
        return None
    rows = [(tag("code", plain(bad["name"])), _outside(bad["reason"])) for bad in found]
    columns = [("checkpoint", ""), ("what is wrong", "wide")]
    return tag("div", tag("h3", "In quarantine"), table(columns, rows, label="In quarantine"))


def _attempts(overview: Mapping[str, Any]) -> Html:
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
                _outside(row["node"]),
                [
                    tag("span", plain(row["ended_by"]), class_=tone.get(row["ended_by"])),
                    tag("span", ": ", _outside(row["cause"]), class_="why")
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


def _job(overview: Mapping[str, Any]) -> Html:
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


def _foot(run: Mapping[str, Any]) -> Html:
    return tag(
        "footer",
        "Run ",
        _outside(run["run_id"]),
        " in ",
        tag("code", _outside(run["store"])),
        ", as it was at ",
        tag("time", _day(run["seen_at"]), datetime=run["seen_at"]),
        ".",
    )


def _day(at: str | None) -> str:
    """`2026-11-21 10:00:01 UTC`."""
    return MISSING if not at else f"{at[:19].replace('T', ' ')} UTC"
