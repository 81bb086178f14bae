"""Durations and sizes as people write them: `250ms`, `30s`, `10m`, `2h`, `1d`; `8Gi`, `500M`.

A number and one unit, nothing between or around them. Formatting is the inverse of parsing: what
`format_duration` and `format_size` write is read back as the same value.
"""

from __future__ import annotations

import re
from decimal import Decimal

# Both are valid in JSON Schema too, where `$` is the end of the text and nothing else.
DURATION_PATTERN = r"^[0-9]{1,12}(\.[0-9]{1,3})?(ms|s|m|h|d)$"
SIZE_PATTERN = r"^[0-9]{1,18}(Ki|Mi|Gi|Ti|k|K|M|G|T)?$"

# Above it, waiting functions of the platform begin to overflow; nobody means it.
LONGEST_DURATION_SECONDS = 3650 * 86_400.0
LARGEST_SIZE_BYTES = 2**63 - 1

_SECONDS = {  # largest first
    "d": Decimal(86_400),
    "h": Decimal(3_600),
    "m": Decimal(60),
    "s": Decimal(1),
    "ms": Decimal("0.001"),
}
_BYTES = {  # binary before decimal, largest first
    "Ti": 2**40,
    "Gi": 2**30,
    "Mi": 2**20,
    "Ki": 2**10,
    "T": 10**12,
    "G": 10**9,
    "M": 10**6,
    "K": 10**3,
    "k": 10**3,
}
_NUMBER_AND_UNIT = re.compile(r"([0-9.]+)([A-Za-z]*)")


def parse_duration(text: str) -> float:
    """Read a duration such as `30s` or `1.5h`, in seconds.

    Raises ValueError when it is not of that form or longer than ten years.
    """
    seconds = Decimal(0)
    if well_formed := _fits(DURATION_PATTERN, text):
        number, unit = _split(text)
        seconds = Decimal(number) * _SECONDS[unit]
    if not well_formed or seconds > LONGEST_DURATION_SECONDS:
        raise ValueError("expected a duration such as 250ms, 30s, 10m, 2h or 1d (at most 3650d)")
    return float(seconds)


def format_duration(seconds: float) -> str:
    """Write a duration in the largest unit that needs no fraction: 90.0 is `90s`, 60.0 is `1m`.

    Raises ValueError for what `parse_duration` cannot have returned (negative, or finer than a
    microsecond), because the text would stand for another value.
    """
    exact = Decimal(repr(float(seconds)))
    if exact == 0:
        return "0s"
    for unit, unit_seconds in _SECONDS.items():
        number = exact / unit_seconds
        if number == number.to_integral_value() or unit == "ms":
            text = f"{number.normalize():f}{unit}"
            if _fits(DURATION_PATTERN, text) and exact <= LONGEST_DURATION_SECONDS:
                return text
    raise ValueError(f"{seconds!r} seconds cannot be written as a duration")


def parse_size(text: str) -> int:
    """Read a size such as `8Gi` (2**30), `500M` (10**6) or `4096`, in bytes.

    Raises ValueError when it is not of that form or does not fit into 63 bits.
    """
    size_bytes = 0
    if well_formed := _fits(SIZE_PATTERN, text):
        number, unit = _split(text)
        size_bytes = int(number) * _BYTES.get(unit, 1)
    if not well_formed or size_bytes > LARGEST_SIZE_BYTES:
        raise ValueError("expected a size such as 8Gi, 512Mi, 500M or 4096 (bytes)")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Write a size in the largest unit that needs no fraction; plain bytes when there is none.

    Raises ValueError for what `parse_size` cannot have returned.
    """
    unit, unit_bytes = next(
        ((unit, n) for unit, n in _BYTES.items() if size_bytes and size_bytes % n == 0), ("", 1)
    )
    text = f"{size_bytes // unit_bytes}{unit}"
    if not _fits(SIZE_PATTERN, text) or size_bytes > LARGEST_SIZE_BYTES:
        raise ValueError(f"{size_bytes!r} bytes cannot be written as a size")
    return text


def _fits(pattern: str, text: str) -> bool:
    # Python's `$` also matches before a final newline, so the whole text is asked for.
    return re.fullmatch(pattern.removesuffix("$"), text) is not None


def _split(text: str) -> tuple[str, str]:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    assert match is not None, "asked for only after the text was found well formed"
    return match[1], match[2]
