"""Numbers as people read them: few digits, one unit, never wider than they have to be.

What comes from outside (names of metrics, causes, hosts) is made harmless for a terminal here: no
control character of it is ever printed.
"""

from __future__ import annotations

import itertools
import math
import unicodedata

MISSING = "–"
_TONES = {
    **dict.fromkeys(("succeeded", "running"), "good"),
    **dict.fromkeys(("failed", "lost", "fenced"), "bad"),
    **dict.fromkeys(("preempted", "draining", "stopping", "backoff"), "warn"),
}
_STEPS_OF_TIME = (("d", 86_400), ("h", 3_600), ("min", 60))
# Those that turn the direction of a text round: https://unicode.org/reports/tr9/
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")


def duration_text(seconds: float | None) -> str:
    """`0.03 s`, `4.2 s`, `48 s`, `3 min 12 s`, `2 h 05 min`, `416 d 16 h`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 0:
        return f"-{duration_text(-seconds)}"
    if seconds < 0.995:
        return f"{seconds:.2f} s" if seconds >= 0.0095 or not seconds else f"{seconds * 1e3:.2g} ms"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    units = [*_STEPS_OF_TIME, ("s", 1)]
    for (large, many), (small, few) in itertools.pairwise(units):
        whole = round(seconds / few) * few
        if whole >= many:
            rest = whole % many // few
            return f"{whole // many:,} {large}" + (f" {rest:02d} {small}" if rest else "")
    return f"{seconds:.0f} s"


def count_text(count: float | None) -> str:
    """`1,760`."""
    return MISSING if count is None else f"{count:,.0f}"


def number_text(value: float | None) -> str:
    """Four digits that count: `0.01234`, `13.09`, `1.5e-06`, `nan`."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.4g}"


def ratio_text(ratio: float | None) -> str:
    """`93.1 %`; 100 % only if it is nothing less."""
    if ratio is None:
        return MISSING
    percent = 100 * ratio
    if 99.95 <= percent < 100:
        return "99.9 %"
    return f"{percent:.0f} %" if percent in (0, 100) else f"{percent:.1f} %"


def size_text(nbytes: float | None) -> str:
    """`8.1 MB`, in decimal units, as throughputs have them."""
    if nbytes is None:
        return MISSING
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(nbytes) < 999.5 or unit == "TB":
            break
        nbytes /= 1000
    return f"{nbytes:,.0f} {unit}" if nbytes >= 99.5 or unit == "bytes" else f"{nbytes:.3g} {unit}"


def plain(text: object) -> str:
    """A text from outside without anything that a terminal would obey, on one line."""
    return "".join(
        character if _is_harmless(character) else "\ufffd"
        for character in " ".join(str(text).split())
    )


def _is_harmless(character: str) -> bool:
    category = unicodedata.category(character)
    return category not in ("Cc", "Cs", "Zl", "Zp") and character not in _DIRECTIONS


def shortened(text: str, width: int) -> str:
    """The text in so many columns at most; what is cut off leaves a mark."""
    return text if len(text) <= width else f"{text[: max(0, width - 1)]}…"


def tone_of(phase: str) -> str:
    """Whether a phase is `good`, worth a warning (`warn`), `bad`, or none of these (empty)."""
    return _TONES.get(phase, "")
