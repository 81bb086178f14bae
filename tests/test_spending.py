"""What one attempt's time went into, from made-up accounts and from a board."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from runner.board import Account, Board
from runner.spending import NOTHING, Attempt, Meter, Reading, in_all, read, so_far
from runner.spool import RankSpool
from runner.training.accounts import Accounts

BEGUN = 100.0
TRAINED = {"startup": 2.0, "restore": 1.0, "productive": 20.0, "stall": 2.0, "validation": 5.0}
# Attached 3 s after the begin, so 33 s of it are told by the closed accounts and what was before.


def some(spent: Mapping[str, float]) -> dict[str, float]:
    return {kind: round(seconds, 6) for kind, seconds in spent.items() if seconds}


def test_before_attach_all_is_startup() -> None:
    assert some(so_far(Attempt(BEGUN), NOTHING, 104.0)) == {"startup": 4}


def test_an_open_stretch_counts_as_what_it_is() -> None:
    reading = Reading(TRAINED, "validation", 133.0)

    assert some(so_far(Attempt(BEGUN), reading, 135.5)) == {
        **TRAINED, "startup": 5, "validation": 7.5,
    }  # fmt: skip


@dataclass(frozen=True)
class End:
    attempt: Attempt
    reading: Reading
    expected: dict[str, float]
    at: float = 140.0


OPEN_STEP = Reading(TRAINED, "productive", 133.0)
KNOWN = {**TRAINED, "startup": 5.0}

ENDS = {
    "killed in a step: it is cut off": End(Attempt(BEGUN), OPEN_STEP, {**KNOWN, "lost_steps": 7.0}),
    "killed in a validation": End(
        Attempt(BEGUN), Reading(TRAINED, "validation", 133.0), {**KNOWN, "validation": 12.0}
    ),
    "killed before it attached": End(Attempt(BEGUN), NOTHING, {"startup": 40.0}),
    "hung in a step from 134 on": End(
        Attempt(BEGUN).hangs(134.0), OPEN_STEP, {**KNOWN, "lost_steps": 1.0, "hang": 6.0}
    ),
    "hung before it attached": End(
        Attempt(BEGUN).hangs(110.0), NOTHING, {"startup": 10.0, "hang": 30.0}
    ),
    "asked in a step, which ended at 136 with a snapshot until 137": End(
        Attempt(BEGUN).asked_to_end(134.0, OPEN_STEP),
        Reading({**TRAINED, "productive": 23.0}, "stall", 136.0),
        {**KNOWN, "productive": 23.0, "draining": 4.0},
    ),
    "asked in a step, which never ended": End(
        Attempt(BEGUN).asked_to_end(134.0, OPEN_STEP),
        OPEN_STEP,
        {**KNOWN, "lost_steps": 1.0, "draining": 6.0},
    ),
    "asked before it attached": End(
        Attempt(BEGUN).asked_to_end(101.0, NOTHING), NOTHING, {"startup": 1.0, "draining": 39.0}
    ),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_an_attempt_that_is_over_is_split_completely(end: End) -> None:
    spent = in_all(end.attempt, end.reading, end.at)

    assert some(spent) == end.expected
    assert sum(spent.values()) == pytest.approx(end.at - BEGUN)


def test_only_the_first_wish_for_its_end_counts() -> None:
    first = Attempt(BEGUN).asked_to_end(134.0, OPEN_STEP)

    assert first.asked_to_end(139.0, OPEN_STEP) == first


# A trainer's accounts on a real board


@pytest.fixture
def board(tmp_path: Path) -> Board:
    rank = RankSpool(tmp_path / "rank-00000")
    rank.folder.mkdir()
    return rank.prepare()


def test_a_board_that_nobody_has_attached_to_says_nothing(board: Board) -> None:
    assert read(board).open_since is None
    assert read(None) == NOTHING


def test_accounts_are_read_while_they_are_written(board: Board) -> None:
    accounts = Accounts(board)
    begun = time.monotonic()
    with accounts.during(Account.RESTORE):
        assert read(board).open_kind == "restore"
    accounts.enter(Account.PRODUCTIVE)
    stretch = accounts.enter(Account.STALL)
    reading = read(board)

    assert reading.closed["productive"] == pytest.approx(stretch, abs=2e-6)
    assert accounts.seconds(Account.PRODUCTIVE) == stretch
    assert (reading.open_kind, reading.open_since) == ("stall", pytest.approx(begun, abs=5))
    assert read(board) == reading


def test_a_meter_follows_an_attempt_to_its_end(board: Board) -> None:
    meter = Meter(lambda: board)
    assert meter.now() == {}
    begun = time.monotonic()
    meter.begin(begun)
    accounts = Accounts(board)
    accounts.enter(Account.PRODUCTIVE)
    accounts.enter(Account.VALIDATION)

    running = meter.now()
    meter.asked_to_end(time.monotonic())
    end = time.monotonic()
    ended = meter.end(end)

    assert set(running) == {"startup", "restore", "productive", "stall", "validation"}
    assert sum(ended.values()) == pytest.approx(end - begun, abs=1e-3)
    assert meter.now() == ended
