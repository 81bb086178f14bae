"""Charts as SVG, drawn here and not in the browser: there is no script in a page.

A chart is as wide as the page leaves it. Lines are stretched to that width, their strokes are not;
everything with a shape of its own (dots, marks, text) is placed in percent and keeps its size, so a
telephone shows the same chart with the same letters. Every chart has its facts in words, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from runner.views.html import Html, join, tag
from runner.views.words import duration_text, number_text

_WIDE = 1000.0  # units across, in the parts that are stretched
_ABOVE, _BELOW = 10.0, 24.0  # pixels for half a letter, and for the labels of the x axis
_AXIS_PIXELS = 52
_WORTH_A_LOG_SCALE = 30.0
_MOST_TICKS = 12
_TICK_TIMES = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200,
               86400, 172800, 604800, 1209600, 2592000, 7776000, 15552000, 31536000)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """From values to a share of the axis, 0 to 1."""

    low: float
    high: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self._bent(self.low), self._bent(self.high), self._bent(value)
        return 0.5 if high <= low else min(1.0, max(0.0, (at - low) / (high - low)))

    def ticks(self, most: int) -> list[float]:
        """Round numbers on it."""
        return _decades(self.low, self.high, most) if self.is_log else _round_numbers(self, most)

    def _bent(self, value: float) -> float:
        return math.log10(value) if self.is_log else value


def scale_for(values: Iterable[float], *, from_zero: bool = False) -> Scale:
    """One that shows all of the values, logarithmic where they differ by magnitudes."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if low > 0 and high / low >= _WORTH_A_LOG_SCALE:
        return Scale(low / 1.15, high * 1.15, is_log=True)
    if from_zero:
        low = min(0.0, low)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(0.0 if from_zero and low >= 0 else low - margin, high + margin)


@dataclass(frozen=True)
class Frame:
    """The field of a chart: both scales, and its height in pixels."""

    x: Scale
    y: Scale
    height: float

    @property
    def full_height(self) -> float:
        return self.height + _ABOVE + _BELOW

    def left(self, value: float) -> str:
        """Where a value lies on the x axis, for shapes that keep their size."""
        return f"{100 * self.x(value):.3f}%"

    def top(self, value: float) -> float:
        """Pixels from the top."""
        return round(_ABOVE + (1 - self.y(value)) * self.height, 1)

    def path(self, points: Iterable[tuple[float, float]], *, moves: str = "M") -> str:
        """The way through these points, in the units of `stretched`."""
        steps = [f"{_WIDE * self.x(x):.1f} {self.top(y):.1f}" for x, y in points]
        return f"{moves}{'L'.join(steps)}" if steps else ""


def line(path: str, class_: str) -> Html:
    return tag("path", d=path, class_=class_, vector_effect="non-scaling-stroke")


def stretched(frame: Frame, *lines: Html) -> Html:
    """Lines, as wide as the chart is."""
    return tag(
        "svg",
        *lines,
        class_="stretched",
        width="100%",
        height=frame.full_height,
        viewBox=f"0 0 {_WIDE:.0f} {frame.full_height:.0f}",
        preserveAspectRatio="none",
    )


def dot(frame: Frame, x: float, y: float, class_: str, title: str, radius: float = 3.0) -> Html:
    return tag(
        "circle",
        tag("title", title),
        cx=frame.left(x),
        cy=frame.top(y),
        r=radius,
        class_=class_,
    )


def upright(frame: Frame, x: float, class_: str, title: str | None = None) -> Html:
    """A line from the top of the field to its bottom."""
    at = frame.left(x)
    return tag(
        "line",
        None if title is None else tag("title", title),
        x1=at,
        x2=at,
        y1=_ABOVE,
        y2=_ABOVE + frame.height,
        class_=class_,
    )


def bar(x: float, width: float, top: float, height: float, class_: str, title: str) -> Html:
    """A block; `x` and `width` are shares of the chart."""
    return tag(
        "rect",
        tag("title", title),
        x=f"{100 * x:.3f}%",
        y=top,
        width=f"{100 * max(0.0, width):.3f}%",
        height=height,
        class_=class_,
    )


def chart(
    frame: Frame,
    *content: Html,
    label: str,
    y_text: Callable[[float], str] = number_text,
    x_text: Callable[[float], str] = duration_text,
    x_ticks: Sequence[float],
    y_ticks: int = 4,
) -> Html:
    """The field with its axes; `label` says in words what is to be seen."""
    heights = [(value, frame.top(value)) for value in frame.y.ticks(y_ticks)]
    bottom = _ABOVE + frame.height
    axis = tag(
        "svg",
        *(
            tag(
                "text",
                y_text(value) if value else "0",
                x=_AXIS_PIXELS - 8,
                y=top + 4,
                text_anchor="end",
            )
            for value, top in heights
        ),
        class_="axis",
        width=_AXIS_PIXELS,
        height=frame.full_height,
        aria_hidden="true",
    )
    grid = [tag("line", x1=0, x2="100%", y1=top, y2=top, class_="grid") for _, top in heights]
    base = tag("line", x1=0, x2="100%", y1=bottom, y2=bottom, class_="base")
    marks = [
        tag(
            "text",
            x_text(value) if value else "0",
            x=frame.left(value),
            y=bottom + 17,
            text_anchor=_anchor(frame.x(value)),
        )
        for value in x_ticks
    ]
    plot = tag(
        "svg",
        *grid,
        base,
        *content,
        *marks,
        class_="plot",
        height=frame.full_height,
        role="img",
        aria_label=label,
    )
    return tag("div", axis, plot, class_="chart")


def stacked(parts: Sequence[tuple[float, str, str]], *, label: str, height: float = 28) -> Html:
    """One bar; `parts` are shares that add up to 1, with a class and a title each."""
    at, blocks = 0.0, []
    for share, class_, title in parts:
        blocks.append(bar(at, share, 0, height, class_, title))
        at += share
    return tag("svg", *blocks, class_="stacked", height=height, role="img", aria_label=label)


def time_ticks(high: float, most: int = 5) -> list[float]:
    """Round times from 0 on, in seconds."""
    step = next((step for step in _TICK_TIMES if high / step <= most), None)
    step = step or 31536000 * math.ceil(high / 31536000 / most)
    if high / step < 1:  # shorter than the shortest of them
        return [0.0, high]
    return [step * number for number in range(int(high / step + 1e-9) + 1)]


def count_ticks(scale: Scale, most: int = 5) -> list[float]:
    """Whole numbers."""
    return sorted({float(round(tick)) for tick in _round_numbers(scale, most)})


def _anchor(share: float) -> str:
    return "start" if share < 0.04 else "end" if share > 0.94 else "middle"


def _round_numbers(scale: Scale, most: int) -> list[float]:
    span = scale.high - scale.low
    if span <= 0:
        return [scale.low]
    raw = span / most
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw)
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    if last <= first and most < _MOST_TICKS:  # one alone is no scale
        return _round_numbers(scale, most + 1)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _decades(low: float, high: float, most: int) -> list[float]:
    for factors in ((1, 2, 5), (1, 3), (1,)):
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(ticks) <= most + 1:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


def legend(*entries: tuple[str, str]) -> Html:
    """What the colours are: a class and a name each."""
    return tag(
        "ul",
        *(tag("li", tag("span", class_=f"key {class_}"), name) for class_, name in entries),
        class_="legend",
    )


def nothing(text: str) -> Html:
    """What stands where a chart has nothing to show."""
    return tag("p", text, class_="nothing")


def together(*parts: Html) -> Html:
    return join(parts)
