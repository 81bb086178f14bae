"""Numbers and texts as people see them, and that a text from outside cannot do anything."""

from __future__ import annotations

import math

import pytest

from runner.views.words import (
    count_text,
    duration_text,
    number_text,
    plain,
    ratio_text,
    shortened,
    size_text,
)

DURATIONS = {
    None: "–",
    math.nan: "–",
    0.0: "0.00 s",
    0.0004: "0.4 ms",
    0.03: "0.03 s",
    0.994: "0.99 s",
    0.999: "1.0 s",
    4.23: "4.2 s",
    9.96: "10 s",
    59.4: "59 s",
    59.6: "1 min",
    192.0: "3 min 12 s",
    3599.7: "1 h",
    7500.0: "2 h 05 min",
    86_399.0: "1 d",
    97_200.0: "1 d 03 h",
    36_000_000.0: "416 d 16 h",
    -12.0: "-12 s",
}


@pytest.mark.parametrize(("seconds", "text"), DURATIONS.items(), ids=map(str, DURATIONS))
def test_a_duration_has_one_or_two_units(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text


def test_numbers_have_few_digits_and_no_surprises() -> None:
    values = [None, 0.0, 3.0, 1760.0, 0.012344, 13.0912, 1.5e-6, 2.5e9, math.nan, -math.inf]
    assert [number_text(value) for value in values] == [
        *("–", "0", "3", "1,760", "0.01234", "13.09", "1.5e-06", "2.5e+09", "nan", "-inf")
    ]
    assert [count_text(n) for n in (None, 0, 1_234_567)] == ["–", "0", "1,234,567"]
    assert [size_text(n) for n in (None, 0, 999, 8_120_000, 3.2e12, 5e15)] == [
        *("–", "0 bytes", "999 bytes", "8.12 MB", "3.2 TB", "5,000 TB")
    ]


def test_all_is_said_only_of_all() -> None:
    assert [ratio_text(r) for r in (None, 0, 0.00001, 0.9312, 0.99999, 1)] == [
        *("–", "0 %", "0.0 %", "93.1 %", "99.9 %", "100 %")
    ]


@pytest.mark.parametrize(
    "evil", ["\x1b[2J", "a\x07b", "\u202etxt", "a\u2028b", "\x9b31m", "\ud800"]
)
def test_what_a_terminal_would_obey_is_made_visible(evil: str) -> None:
    made = plain(f"x{evil}y")
    made.encode()
    assert made.isprintable()
    assert made[0] == "x"
    assert made[-1] == "y"


def test_other_text_stays_what_it_is() -> None:
    assert plain("val_loss/Größe ≤ 3 日本") == "val_loss/Größe ≤ 3 日本"
    assert plain("two\n lines\tone") == "two lines one"
    assert (shortened("abcdef", 4), shortened("abcd", 4)) == ("abc…", "abcd")
