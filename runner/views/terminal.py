"""A run in a terminal: a few lines that flow into whatever width there is, or a single plain one.

The lines are made of fields, and a field is never broken: a narrow terminal gets more lines, not
half numbers. Nothing that comes from outside can make the terminal do anything. Colours are left
out where `NO_COLOR` says so (https://no-color.org); the bar can be read without.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from runner.views.words import (
    count_text,
    duration_text,
    number_text,
    plain,
    ratio_text,
    shortened,
    tone_of,
)

_GAP = "   "
_WIDEST = 100
_LONGEST_NAME = 24
_STYLES = {"good": "green", "warn": "yellow", "bad": "bold red"}


def frame(run: Mapping[str, Any], width: int, *, color: bool = True) -> list[str]:
    """The lines of a look at a run, each at most as wide as the terminal, with their colours."""
    width = max(10, min(width, _WIDEST))
    lines = [*flow(_title(run), width)]
    ratio = run["progress_ratio"]
    if ratio is not None:
        lines.append(_bar(ratio, width))
    lines += [*flow(_progress(run), width), *flow(_standing(run), width)]
    lines += flow(_safety(run), width)
    if run["cause"] and run["phase"] != "succeeded":
        lines.append(Text(shortened(plain(run["cause"]), width), style="dim"))
    return rendered(lines, width, color=color)


def one_line(run: Mapping[str, Any]) -> str:
    """The same in one plain line, for a file or a terminal that can do nothing else."""
    fields = [field.plain for field in [*_progress(run), *_standing(run), *_safety(run)]]
    phase = plain(run["phase"])
    if run["phase"] == "running" and run["activity"] not in (None, "training"):
        phase += f" ({plain(run['activity'])})"
    return f"{phase}: {', '.join(fields)}"


def rendered(lines: Iterable[Text], width: int, *, color: bool) -> list[str]:
    """As the terminal takes it: escape sequences for the colours, and nothing else."""
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    for line in lines:
        console.print(line, no_wrap=True, overflow="ellipsis", crop=True, soft_wrap=False)
    return out.getvalue().splitlines()


def flow(fields: Iterable[Text], width: int) -> list[Text]:
    """Fields side by side as far as they fit, then on the next line."""
    lines: list[Text] = []
    for field in fields:
        if lines and lines[-1].cell_len + len(_GAP) + field.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], _GAP, field)
        else:
            lines.append(field)
    return lines


# ---------------------------------------------------------------------------- the fields


def _title(run: Mapping[str, Any]) -> list[Text]:
    phase = plain(run["phase"])
    activity = run["activity"] if run["phase"] == "running" else None
    if activity and activity not in (phase, "training"):
        phase += f" · {plain(activity)}"
    fields = [
        Text(plain(run["run_id"]), style="bold"),
        Text(phase, style=_STYLES.get(tone_of(run["phase"]), "")),
    ]
    if run["epoch"] is not None:
        of = f"/{count_text(run['epochs'])}" if run["epochs"] else ""
        fields.append(Text(f"epoch {count_text(run['epoch'])}{of}"))
    if run["attempt"]:
        where = f" on {shortened(plain(run['node']), _LONGEST_NAME)}" if run["node"] else ""
        fields.append(Text(f"attempt {count_text(run['attempt'])}{where}", style="dim"))
    return fields


def _bar(ratio: float, width: int) -> Text:
    done = max(0, min(width, round(ratio * width)))
    return Text.assemble(("━" * done, "green"), ("─" * (width - done), "dim"))


def _progress(run: Mapping[str, Any]) -> list[Text]:
    of = f"/{count_text(run['total_steps'])}" if run["total_steps"] else ""
    fields = [Text(f"step {count_text(run['step'])}{of}")]
    if run["progress_ratio"] is not None:
        fields.append(Text(ratio_text(run["progress_ratio"]), style="bold"))
    if run["eta_seconds"] is not None:
        fields.append(Text(f"eta {duration_text(run['eta_seconds'])}"))
    if run["wall_seconds"] is not None:
        fields.append(Text(f"{duration_text(run['wall_seconds'])} so far", style="dim"))
    if run["metric"] is not None:
        name = shortened(plain(run["metric"]), _LONGEST_NAME)
        logged = run["value"]
        is_odd = isinstance(logged, str)  # nan, inf
        shown = logged if isinstance(logged, str) else number_text(logged)
        fields.append(Text.assemble(f"{name} ", (shown, "bold red" if is_odd else "bold")))
    return fields


def _standing(run: Mapping[str, Any]) -> list[Text]:
    def count(number: int, one: str, style: str = "") -> Text:
        return Text(f"{count_text(number)} {one}{'' if number == 1 else 's'}", style=style)

    fields = [count(run["preemptions"], "preemption")]
    if run["failures"]:
        fields.append(count(run["failures"], "failure", "red"))
    lost = run["lost_steps"]
    fields.append(Text(f"{count_text(lost)} steps lost", style="yellow" if lost else ""))
    if run["goodput_ratio"] is not None:
        fields.append(Text(f"goodput {ratio_text(run['goodput_ratio'])}"))
    return fields


def _safety(run: Mapping[str, Any]) -> list[Text]:
    """What a kill at this moment would cost, and whether there is time enough for the last save."""
    fields = []
    if run["last_checkpoint"] is None:
        fields.append(Text("nothing saved yet", style="yellow"))
    else:
        ago = run["saved_seconds_ago"]
        when = "" if ago is None else f", {duration_text(max(0.0, ago))} ago"
        fields.append(Text(f"saved step {count_text(run['saved_step'])}{when}"))
    headroom, grace = run["headroom_seconds"], run["grace_seconds"]
    if headroom is not None:
        emergency = duration_text(run["emergency_seconds"])
        if headroom >= 0:
            fields.append(Text(f"emergency save {emergency} of {duration_text(grace)}"))
        else:
            fields.append(
                Text(
                    f"emergency save {emergency} NOT within {duration_text(grace)}",
                    style="bold red",
                )
            )
    return fields
