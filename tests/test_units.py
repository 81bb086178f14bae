from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.units import (
    DURATION_PATTERN,
    LARGEST_SIZE_BYTES,
    LONGEST_DURATION_SECONDS,
    SIZE_PATTERN,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)

DURATIONS = {
    "250ms": 0.25,
    "30s": 30.0,
    "10m": 600.0,
    "2h": 7200.0,
    "1d": 86_400.0,
    "1.5h": 5400.0,
    "0.1s": 0.1,
    "0.001ms": 1e-6,
    "0s": 0.0,
    "3650d": LONGEST_DURATION_SECONDS,
}


@pytest.mark.parametrize(("text", "seconds"), DURATIONS.items())
def test_a_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "", "30", "s", "-1s", "+1s", "1 s", " 1s", "1s\n", "1S", "1h30m", ".5s", "1.s", "1.0001s",
        "1e3s", "1_0s", "inf", "nan", "٣s", "3651d", "999999999999h", "1w",
    ],
)  # fmt: skip
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a duration such as"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.25, "250ms"), (0.0005, "0.5ms"), (1.5, "1500ms"), (60, "1m"), (90, "90s"),
        (5400, "90m"), (86_400, "1d"), (100 * 86_400, "100d"),
    ],
)  # fmt: skip
def test_a_duration_is_written_in_the_largest_unit_without_a_fraction(
    seconds: float, text: str
) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize("seconds", [-1.0, 1 / 3, 1e-9, 1e12, math.inf, math.nan])
def test_a_duration_that_no_text_stands_for_is_not_written(seconds: float) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        format_duration(seconds)


@given(st.from_regex(DURATION_PATTERN.removesuffix("$"), fullmatch=True))
def test_every_duration_survives_being_written_and_read(text: str) -> None:
    try:
        seconds = parse_duration(text)
    except ValueError:  # longer than ten years
        return
    written = format_duration(seconds)
    assert parse_duration(written) == seconds
    assert re.search(DURATION_PATTERN, written)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("8Gi", 8 * 2**30), ("500M", 500_000_000), ("1Ki", 1024), ("1k", 1000), ("1K", 1000),
        ("2Mi", 2**21), ("3G", 3 * 10**9), ("1T", 10**12), ("1Ti", 2**40), ("4096", 4096),
        ("0", 0),
    ],
)  # fmt: skip
def test_a_size_is_read_in_bytes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        "", "8 Gi", "8GB", "8GiB", "-1", "1.5Gi", "Gi", "8gi", "8Gi\n", "0x10", "٣", "9" * 19,
        "99999999999Ti", str(LARGEST_SIZE_BYTES + 1),
    ],
)  # fmt: skip
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0"),
        (1, "1"),
        (1536, "1536"),
        (2**31, "2Gi"),
        (500_000_000, "500M"),
        (1024_000, "1000Ki"),
    ],
)
def test_a_size_is_written_in_the_largest_unit_without_a_fraction(
    size_bytes: int, text: str
) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize("size_bytes", [-1, -1024, LARGEST_SIZE_BYTES + 1])
def test_a_size_that_no_text_stands_for_is_not_written(size_bytes: int) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        format_size(size_bytes)


@given(st.from_regex(SIZE_PATTERN.removesuffix("$"), fullmatch=True))
def test_every_size_survives_being_written_and_read(text: str) -> None:
    try:
        size_bytes = parse_size(text)
    except ValueError:  # more than 63 bits
        return
    written = format_size(size_bytes)
    assert parse_size(written) == size_bytes
    assert re.search(SIZE_PATTERN, written)
