"""A run in a terminal: lines that fit, and a view that stays below all that is printed.

What a person would see is asked of an emulator, fed with the very bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pyte
import pytest
from made_runs import finished
from rich.cells import cell_len

from runner.views.overview import glance
from runner.views.screen import Screen
from runner.views.terminal import frame, one_line


def seen(**values: Any) -> dict[str, Any]:
    """A run in the middle of its way."""
    going = {
        "phase": "running", "live": True, "activity": "training", "step": 1210, "epoch": 20,
        "epochs": 30, "progress_ratio": 0.6875, "eta_seconds": 250.0, "saved_step": 1200,
        "saved_seconds_ago": 12.0, "goodput_ratio": 0.714, "wall_seconds": 562.0,
    }  # fmt: skip
    return glance(finished()[0]) | going | values


LONG = seen(step=123_456_789, total_steps=987_654_321, wall_seconds=36_000_000.0,
            eta_seconds=250_000_000.0, attempt=12_345, preemptions=12_344,
            metric="a/very/long/name/of/a/loss/that/goes/on", node="n" * 80)  # fmt: skip


def test_one_look_tells_how_it_is() -> None:
    assert frame(seen(), 80, color=False) == [
        "rul-fd001   running   epoch 20/30   attempt 4 on spot-eu-1a-7f",
        "━" * 55 + "─" * 25,
        "step 1,210/1,760   68.8 %   eta 4 min 10 s   9 min 22 s so far",
        "train_loss 0.02542",
        "2 preemptions   1 failure   40 steps lost   goodput 71.4 %",
        "saved step 1,200, 12 s ago   emergency save 0.74 s of 30 s",
    ]


@pytest.mark.parametrize("width", [200, 80, 60, 40, 20])
@pytest.mark.parametrize("run", [seen(), LONG], ids=["usual", "10,000 hours"])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(
    run: dict[str, Any], width: int
) -> None:
    lines = frame(run, width, color=False)
    assert max(map(cell_len, lines)) <= width
    if width >= 40:
        text = "\n".join(lines)
        for number in ("68.8 %", "goodput 71.4 %", "emergency save 0.74 s of 30 s"):
            assert number in text


def test_what_is_wrong_stands_out() -> None:
    no = seen(headroom_seconds=-4.0, emergency_seconds=34.0, value="nan", cause="out of memory")
    text = "\n".join(frame(no, 80, color=False))
    assert "emergency save 34 s NOT within 30 s" in text
    assert "train_loss nan" in text
    assert text.endswith("out of memory")
    assert "nothing saved yet" in "\n".join(frame(seen(last_checkpoint=None), 80, color=False))


def test_a_run_that_has_only_begun_has_its_lines() -> None:
    new = dict.fromkeys(seen()) | {
        "run_id": "job", "phase": "starting", "step": 0, "attempt": 0, "preemptions": 0,
        "failures": 0, "lost_steps": 0,
    }  # fmt: skip
    assert frame(new, 80, color=False) == [
        *("job   starting", "step 0", "0 preemptions   0 steps lost", "nothing saved yet")
    ]
    assert one_line(new) == "starting: step 0, 0 preemptions, 0 steps lost, nothing saved yet"


def test_colours_are_left_out_where_they_are_not_wanted() -> None:
    assert "\x1b" not in "".join(frame(seen(), 80, color=False))
    assert "\x1b[32m" in "".join(frame(seen(), 80, color=True))


def test_nothing_from_outside_can_make_the_terminal_do_anything() -> None:
    evil = "\x1b[2J\x1b]0;title\x07\r\n\u202e"
    run = seen(run_id=evil, metric=evil, node=evil, cause=evil, activity=evil, phase="running")
    text = "".join(frame(run, 80, color=False)) + one_line(run)
    assert text.isprintable()


# ---------------------------------------------------------------- below all that is printed


class Seen:
    """A screen, and an emulator that shows what comes out of it."""

    def __init__(self, columns: int = 40, rows: int = 10) -> None:
        self.size = os.terminal_size((columns, rows))
        self.screen = Screen(lambda: self.size)
        self._emulator = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream = pyte.ByteStream(self._emulator)

    def printed(self, data: bytes, source: int = 1) -> Seen:
        self._stream.feed(self.screen.printed(source, data))
        return self

    def shown(self, *view: str) -> Seen:
        self._stream.feed(self.screen.shown(view))
        return self

    def left(self) -> Seen:
        self._stream.feed(self.screen.left())
        return self

    @property
    def lines(self) -> Sequence[str]:
        width = self.size.columns
        above = [
            "".join(row[n].data for n in range(width)).rstrip()
            for row in self._emulator.history.top
        ]
        shown = [line.rstrip() for line in self._emulator.display]
        while shown and not shown[-1]:
            shown.pop()
        return [*above, *shown]


def test_the_view_stands_below_what_is_printed_and_is_renewed() -> None:
    terminal = Seen().printed(b"one\n").shown("view 1", "view 2")
    assert terminal.lines == ["one", "view 1", "view 2"]
    assert terminal.printed(b"two\nthree\n").lines == ["one", "two", "three", "view 1", "view 2"]
    assert terminal.shown("view 3").lines == ["one", "two", "three", "view 3"]
    assert terminal.printed(b"").lines == ["one", "two", "three", "view 3"]


def test_much_output_scrolls_and_leaves_no_trace_of_the_view() -> None:
    terminal = Seen(rows=6).shown("view 1", "view 2")
    for number in range(40):
        terminal.printed(f"line {number}\n".encode()).shown(f"view {number}", "below")
    assert terminal.lines == [*(f"line {n}" for n in range(40)), "view 39", "below"]


def test_a_line_that_is_not_finished_is_shown_above_the_view() -> None:
    terminal = Seen().shown("view").printed(b" 10 %")
    assert terminal.lines == ["10 %", "view"]
    terminal.printed(b"\r 20 %").printed(b"error: ", source=2)
    assert terminal.lines == ["20 %", "error:", "view"]
    terminal.printed(b"\r100 %\ndone\n").printed(b"no\n", source=2)
    assert terminal.lines == ["100 %", "done", "error: no", "view"]


@pytest.mark.parametrize("bar", [b"\r%d %%", b"%d %%\r"])
def test_a_progress_bar_is_printed_once(bar: bytes) -> None:
    terminal = Seen().shown("view")
    for percent in range(0, 101, 5):
        terminal.printed(bar % percent)
        assert terminal.lines == [f"{percent} %", "view"]
    assert terminal.printed(b"\n").lines == ["100 %", "view"]


def test_colours_pass_and_what_moves_the_cursor_does_not() -> None:
    terminal = Seen().shown("view")
    terminal.printed(b"a\x1b[2Ab\x1b[1mc\x1b[0m\x1b]0;t\x07\x1b[2J\x08\x07d\n")
    assert terminal.lines == ["abcd", "view"]
    sent = terminal.screen.printed(1, b"\x1b[31mred\n")
    assert b"\x1b[31mred\x1b[0m\r\n" in sent


def test_a_character_may_come_in_two_pieces() -> None:
    text = "größer\n".encode()
    assert Seen().shown("view").printed(text[:3]).printed(text[3:]).lines == ["größer", "view"]


def test_a_low_terminal_shows_as_much_as_it_has_room_for() -> None:
    terminal = Seen(rows=4).printed(b"one\n").shown(*"12345678")
    assert terminal.lines[-3:] == ["1", "2", "3"]
    assert terminal.printed(b"two\n").lines == ["one", "two", "1", "2", "3"]


def test_in_the_end_the_view_stays_and_what_was_not_finished_is_printed() -> None:
    terminal = Seen().printed(b"one\ntw").shown("view 1", "view 2").left()
    assert terminal.lines == ["one", "tw", "view 1", "view 2"]
    assert terminal.printed(b"after\n").lines == ["one", "tw", "view 1", "view 2", "after"]


def test_a_line_without_an_end_does_not_grow_without_end() -> None:
    terminal = Seen().shown("view")
    for _ in range(100):
        terminal.printed(b"x" * 1000)
    assert sum(map(len, terminal.screen._open.values())) < 40_000


def test_until_there_is_a_view_everything_passes() -> None:
    assert Seen().printed(b"one\n").printed(b"two").printed(b"\n").lines == ["one", "two"]
