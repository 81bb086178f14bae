"""The board: words that are never torn, requests, and a phase in a word."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from children import Children
from waiting import wait_until

from runner import board as module
from runner.board import Board, Request, Why
from runner.errors import SpoolError
from runner.spool import RankSpool

LARGEST = 2**64 - 1


@pytest.fixture
def rank(tmp_path: Path) -> RankSpool:
    rank = RankSpool(tmp_path / "rank-00000")
    rank.folder.mkdir()
    return rank


WORDS = {name: word._index for name, word in vars(Board).items() if isinstance(word, module._Word)}


def test_every_field_has_a_word_of_its_own_in_the_block_of_its_writer() -> None:
    supervisors = {
        "request_number", "request_kind", "request_why", "deadline_ns", "supervisor_pid",
        "supervisor_ns", "persisted_step", "interval_ms", "prepared",
    }  # fmt: skip

    assert len(set(WORDS.values())) == len(WORDS)
    assert {name for name, index in WORDS.items() if index >= 64} == supervisors
    assert min(WORDS.values()) >= 2  # the first ones say what it is
    starts = sorted(d._index for d in vars(Board).values() if isinstance(d, module._Durations))
    ends = [start + module._Durations.WORDS for start in starts]
    assert max(WORDS.values()) < starts[0]
    following = [*starts[1:], module._PHASE_AT // 8]
    assert all(end <= start for end, start in zip(ends, following, strict=True))
    assert module._PHASE_AT + module._PHASE_BYTES <= module._BOARD_BYTES


def test_a_field_is_eight_aligned_bytes(rank: RankSpool) -> None:
    board = rank.prepare()
    for number, name in enumerate(WORDS):
        setattr(board, name, LARGEST - number)

    raw = (rank.folder / "board").read_bytes()

    assert len(raw) == 4096
    for number, (name, index) in enumerate(WORDS.items()):
        assert int.from_bytes(raw[8 * index : 8 * index + 8], sys.byteorder) == LARGEST - number
        assert getattr(board, name) == LARGEST - number


def test_what_one_process_writes_the_other_sees_and_never_torn(
    rank: RankSpool, children: Children
) -> None:
    board = rank.prepare()

    def trainer() -> None:
        own = Board(rank.folder / "board")
        own.pid = os.getpid()
        while own.request_number == 0:
            own.step = 0
            own.step = LARGEST
        own.answered = own.request_number

    child = children.start(trainer)
    wait_until(lambda: board.pid == child, what="the trainer's pid on the board")
    seen = {board.step for _ in range(200_000)}
    number = board.ask(Request.SAVE_AND_STOP, Why.PREEMPTION, deadline_ns=123)

    wait_until(lambda: board.answered == number, what="the answer")
    assert children.exit_code(child) == 0
    assert seen <= {0, LARGEST}


def test_a_request_gets_the_next_number(rank: RankSpool) -> None:
    board = rank.prepare()

    assert board.ask(Request.SAVE, Why.MANUAL) == 1
    assert board.ask(Request.SAVE_AND_STOP, Why.INTERRUPT, 77) == 2

    other = Board(rank.folder / "board")
    assert (other.request_number, other.deadline_ns) == (2, 77)
    assert Request(other.request_kind) is Request.SAVE_AND_STOP
    assert Why(other.request_why).trigger == "interrupt"


def test_the_number_of_a_request_is_written_last(
    rank: RankSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = rank.prepare()
    written: list[int] = []
    words = board.words

    class Words:
        def __getitem__(self, index: int) -> int:
            return words[index]

        def __setitem__(self, index: int, value: int) -> None:
            written.append(index)
            words[index] = value

    monkeypatch.setattr(board, "words", Words())
    board.ask(Request.SAVE, Why.MANUAL, 5)

    assert written[-1] == WORDS["request_number"]
    assert set(written[:-1]) == {WORDS[n] for n in ("request_kind", "request_why", "deadline_ns")}


@pytest.mark.parametrize(
    ("phase", "read"),
    [("", ""), ("validation", "validation"), ("épreuve", "épreuve"), ("x" * 100, "x" * 63)],
)
def test_a_phase_is_a_short_text(rank: RankSpool, phase: str, read: str) -> None:
    board = rank.prepare()
    board.phase = "something longer"

    board.phase = phase

    assert Board(rank.folder / "board").phase == read


def test_a_stale_trainer_writes_into_nothing(rank: RankSpool) -> None:
    stale = rank.prepare()
    stale.step = 5
    fresh = rank.prepare()
    assert fresh.step == 0

    stale.step = 6
    stale.phase = "training"
    stale.answered = 3

    assert (fresh.step, fresh.answered, fresh.phase) == (0, 0, "")
    assert Board(rank.folder / "board").step == 0


@pytest.mark.parametrize(
    "content", [b"", b"x", bytes(4096), bytes(8192), (7).to_bytes(8, "little") + bytes(4088)]
)
def test_what_is_no_board_is_refused(rank: RankSpool, content: bytes) -> None:
    (rank.folder / "board").write_bytes(content)

    with pytest.raises(SpoolError):
        Board(rank.folder / "board")


def test_durations_are_counted_in_buckets_on_the_board(rank: RankSpool) -> None:
    board = rank.prepare()
    for seconds in (0.0005, 0.001, 0.0011, 700.0):
        board.stalls.observe(seconds)

    counts, total = Board(rank.folder / "board").stalls.read()

    assert (counts[0], counts[1], counts[-1], sum(counts)) == (2, 1, 1, 4)
    assert total == pytest.approx(700.0026)
    assert board.steps.read() == ([0] * len(counts), 0)
