"""The figures of a page, each drawn from the document of `overview`, each with its words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from runner.views import charts
from runner.views.charts import Frame, Scale, scale_for
from runner.views.html import Html, tag
from runner.views.words import count_text, duration_text, number_text, plain, ratio_text

_HEIGHT, _SMALL_HEIGHT, _RIBBON = 200.0, 150.0, 14.0
_MOST_DOTS = 1500
_DENSE = 600  # readings, from which on a thinner line shows more
_URGENT = frozenset({"preemption", "interrupt"})
_PART_NAMES = {
    "productive": "productive steps",
    "stall": "waiting for saves",
    "lost_steps": "steps made again",
    "startup": "starting up",
    "restore": "restoring",
    "draining": "saving before the end",
    "backoff": "waiting to restart",
    "waiting_for_node": "waiting for a node",
    "hang": "hanging",
    "validation": "validation",
    "other": "everything else",
}


def part_name(kind: str) -> str:
    return _PART_NAMES.get(kind, kind.replace("_", " "))


def part_class(kind: str) -> str:
    """Its colour: only names that are ours become classes."""
    return kind if kind in _PART_NAMES else "other"


# ---------------------------------------------------------------------------- the timeline


def timeline(attempts: Sequence[Mapping[str, Any]], saves: Sequence[Mapping[str, Any]]) -> Html:
    """Steps over the wall clock, attempt by attempt; below, when the trainer was training."""
    ends = [row["end_seconds"] for row in attempts if row["end_seconds"] is not None]
    if not ends:
        return charts.nothing("No attempt has got so far that there is something to draw.")
    high = max([*ends, *(save["at_seconds"] or 0.0 for save in saves)]) or 1.0
    steps = [0.0, *(float(row["end_step"]) for row in attempts)]
    frame = Frame(Scale(0.0, high), scale_for(steps, from_zero=True), _HEIGHT)
    ticks = charts.time_ticks(high)
    ways = [charts.line(_way(frame, row), "progress") for row in attempts if _has_trained(row)]
    jumps = [
        charts.line(frame.path([_end(before), _start(after)]), "jump")
        for before, after in _successive([row for row in attempts if _has_trained(row)])
    ]
    content = [
        *(_cut(frame, row) for row in attempts if _was_cut(row)),
        charts.stretched(frame, *jumps, *ways),
        *_save_dots(frame, saves),
        *(_end_dot(frame, row) for row in attempts if row["end_seconds"] is not None),
    ]
    label = (
        f"Steps over time in {len(attempts)} attempts: "
        f"{count_text(attempts[-1]['end_step'])} steps after {duration_text(high)}."
    )
    drawn = charts.chart(frame, *content, label=label, y_text=count_text, x_ticks=ticks)
    return charts.together(drawn, _ribbon(attempts, high), _timeline_legend(attempts, saves))


def _has_trained(row: Mapping[str, Any]) -> bool:
    return row["first_step_seconds"] is not None and row["end_seconds"] is not None


def _start(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["first_step_seconds"], row["start_step"]


def _end(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["end_seconds"], row["end_step"]


def _way(frame: Frame, row: Mapping[str, Any]) -> str:
    return frame.path([_start(row), _end(row)])


def _successive(
    rows: Sequence[Mapping[str, Any]],
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    return list(itertools.pairwise(rows))


def _was_cut(row: Mapping[str, Any]) -> bool:
    has_ended = row["ended_by"] not in ("running", "finished")
    return has_ended and row["end_seconds"] is not None


def _tone(ended_by: str) -> str:
    """The class for the way in which an attempt ended."""
    known = {"failure": "failure", "lost": "lost", "finished": "finished", "preemption": ""}
    return known.get(ended_by, "quiet")


def _cut(frame: Frame, row: Mapping[str, Any]) -> Html:
    return charts.upright(frame, row["end_seconds"], f"cut {_tone(row['ended_by'])}".rstrip())


def _end_dot(frame: Frame, row: Mapping[str, Any]) -> Html:
    title = (
        f"attempt {row['attempt']}: {row['ended_by']} at step {count_text(row['end_step'])} "
        f"after {duration_text(row['end_seconds'])}"
    )
    class_ = f"end {_tone(row['ended_by'])}".rstrip()
    return charts.dot(frame, row["end_seconds"], row["end_step"], class_, plain(title), 4.0)


def _save_dots(frame: Frame, saves: Sequence[Mapping[str, Any]]) -> list[Html]:
    placed = [save for save in saves if save["at_seconds"] is not None]
    every = math.ceil(len(placed) / 200) or 1
    return [
        charts.dot(
            frame,
            save["at_seconds"],
            save["step"],
            "save",
            f"saved at step {count_text(save['step'])} ({_triggers(save)})",
            2.5,
        )
        for save in placed[::-1][::every][::-1]
    ]


def _triggers(save: Mapping[str, Any]) -> str:
    return plain(", ".join(save["triggers"]) or "newest state")


def _ribbon(attempts: Sequence[Mapping[str, Any]], high: float) -> Html:
    """A strip of when it was starting up and when it was training; what is left blank was lost."""
    blocks = []
    for row in attempts:
        begin, first, end = row["begin_seconds"], row["first_step_seconds"], row["end_seconds"]
        if begin is None or end is None:
            continue
        middle = end if first is None else min(first, end)
        name = f"attempt {row['attempt']}"
        title = f"{name}: starting up for {duration_text(middle - begin)}"
        blocks.append(
            charts.bar(begin / high, (middle - begin) / high, 0, _RIBBON, "startup", title)
        )
        title = f"{name}: training for {duration_text(end - middle)}"
        blocks.append(
            charts.bar(middle / high, (end - middle) / high, 0, _RIBBON, "training", title)
        )
    axis = tag("svg", class_="axis", width=52, height=_RIBBON, aria_hidden="true")
    label = "When the trainer was starting up, training, and not there."
    plot = tag("svg", *blocks, class_="plot", height=_RIBBON, role="img", aria_label=label)
    return tag("div", axis, plot, class_="chart")


def _timeline_legend(
    attempts: Sequence[Mapping[str, Any]], saves: Sequence[Mapping[str, Any]]
) -> Html:
    ended = {row["ended_by"] for row in attempts}
    entries = [("training", "training"), ("startup", "starting up")]
    if saves:
        entries.append(("save", "saved"))
    if "preemption" in ended:
        entries.append(("cut", "preempted"))
    if ended & {"failure", "lost"}:
        entries.append(("cut failure", "failed or lost"))
    return charts.legend(*entries)


# ---------------------------------------------------------------------------- curves


def curve(drawn: Mapping[str, Any], starts: Sequence[tuple[int, int]], *, large: bool) -> Html:
    """One metric by step. `starts` are the attempts after the first, and where they began."""
    kept = [tuple(pair) for trace in drawn["traces"] for pair in trace["kept"]]
    again = [trace["again"] for trace in drawn["traces"]]
    finite = [float(y) for _, y in kept if _is_finite(y)]
    beside = [float(y) for trace in again for _, y in trace if _is_finite(y)]
    if not finite:
        return charts.nothing("No finite value was logged.")
    steps = [x for x, _ in kept] + [x for trace in again for x, _ in trace]
    scale = scale_for([*finite, *beside])
    frame = Frame(
        Scale(float(min(steps)), float(max(steps))), scale, _HEIGHT if large else _SMALL_HEIGHT
    )
    odd = [(x, y) for x, y in kept if not _is_finite(y)]
    content = [
        *(
            charts.upright(frame, step, "cut", f"attempt {attempt} began at step {step:,}")
            for attempt, step in starts
            if frame.x.low < step <= frame.x.high
        ),
        charts.stretched(
            frame,
            charts.line(_through(frame, kept), "way dense" if len(kept) > _DENSE else "way"),
            # Above the others: made again bit for bit, they would not be seen below.
            *(charts.line(_through(frame, trace), "way again") for trace in again if trace),
        ),
        *(
            charts.dot(frame, x, scale.high, "odd", f"{y} at step {x:,}", 3.5)
            for x, y in odd[:_MOST_DOTS]
        ),
    ]
    label = (
        f"{plain(drawn['name'])} by step, from {number_text(finite[0])} to "
        f"{number_text(finite[-1])}, lowest {number_text(min(finite))}"
    )
    return charts.chart(
        frame,
        *content,
        label=label,
        x_text=count_text,
        x_ticks=charts.count_ticks(frame.x, 5 if large else 4),
        y_ticks=4 if large else 3,
    )


def is_log(drawn: Mapping[str, Any]) -> bool:
    """Whether its chart has a logarithmic scale, which has to be said."""
    values = [
        float(y)
        for trace in drawn["traces"]
        for _, y in [*trace["kept"], *trace["again"]]
        if _is_finite(y)
    ]
    return scale_for(values).is_log


def _is_finite(value: float | str) -> bool:
    return not isinstance(value, str) and math.isfinite(value)


def _through(frame: Frame, readings: Sequence[Sequence[Any]]) -> str:
    """A line through the readings, in pieces where one of them is not finite."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in readings:
        if _is_finite(y):
            pieces[-1].append((float(x), float(y)))
        else:
            pieces.append([])
    # A single reading is a line of no length, which the round cap makes a dot.
    return "".join(frame.path(piece if len(piece) > 1 else piece * 2) for piece in pieces)


# ---------------------------------------------------------------------------- saves, goodput


def latencies(saves: Sequence[Mapping[str, Any]], grace_seconds: float | None, high: float) -> Html:
    """How long each save took, over the wall clock."""
    measured = [
        save
        for save in saves
        if save["total_seconds"] is not None and save["at_seconds"] is not None
    ]
    if not measured:
        return charts.nothing("No save of this run was timed.")
    largest = max(save["total_seconds"] for save in measured)
    shows_grace = grace_seconds is not None and grace_seconds <= 4 * largest
    values = [save["total_seconds"] for save in measured]
    scale = scale_for([*values, *([grace_seconds] if shows_grace else [])], from_zero=True)  # type: ignore[list-item]
    frame = Frame(Scale(0.0, max(high, *(save["at_seconds"] for save in measured))), scale, 150.0)
    content = []
    if shows_grace and grace_seconds is not None:
        top = frame.top(grace_seconds)
        content.append(tag("line", x1=0, x2="100%", y1=top, y2=top, class_="limit"))
    every = math.ceil(len(measured) / _MOST_DOTS)
    drawn = [save for n, save in enumerate(measured) if n % every == 0 or _is_urgent(save)]
    content += [
        charts.dot(
            frame,
            save["at_seconds"],
            save["total_seconds"],
            "save urgent" if _is_urgent(save) else "save",
            f"step {count_text(save['step'])}, {_triggers(save)}: "
            f"{duration_text(save['total_seconds'])}",
            3.5,
        )
        for save in drawn[-_MOST_DOTS:]
    ]
    label = f"Seconds for each of {len(measured)} saves, {duration_text(largest)} at most."
    entries = [("save", "in the course of training")]
    if any(map(_is_urgent, measured)):
        entries.append(("save urgent", "after a notice"))
    if shows_grace:
        entries.append(("limit", f"grace, {duration_text(grace_seconds)}"))
    ticks = charts.time_ticks(frame.x.high)
    field = charts.chart(frame, *content, label=label, y_text=duration_text, x_ticks=ticks,
                         y_ticks=3)  # fmt: skip
    return charts.together(field, charts.legend(*entries))


def _is_urgent(save: Mapping[str, Any]) -> bool:
    return not _URGENT.isdisjoint(save["triggers"])


def goodput(parts: Sequence[Mapping[str, Any]]) -> Html:
    """All of the wall clock as one bar."""
    shares = [
        (
            part["ratio"] or 0.0,
            part_class(part["kind"]),
            (
                f"{part_name(part['kind'])}: {duration_text(part['seconds'])}, "
                f"{ratio_text(part['ratio'])}"
            ),
        )
        for part in parts
    ]
    told = ", ".join(title for _, _, title in shares)
    return charts.stacked(shares, label=f"Where the time went: {plain(told)}.")
