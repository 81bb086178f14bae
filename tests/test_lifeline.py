"""How a trainer knows that its supervisor is dead, and that a frozen one is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import Children
from waiting import wait_until

from runner.board import Board
from runner.spool import Spool
from runner.training import lifeline as module
from runner.training.lifeline import Lifeline


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool")
    spool.open()
    spool.rank.prepare()
    yield spool
    spool.close()


def board_of(spool: Spool) -> Board:
    return Board(spool.rank.folder / "board")


class Ending:
    """Where the process would have ended: with which codes, and when."""

    def __init__(self) -> None:
        self.codes: list[int] = []

    def __call__(self, code: int) -> None:
        self.codes.append(code)


def test_a_supervisor_that_has_its_lock_is_alive_however_long_it_was_not_awake(
    spool: Spool,
) -> None:
    lifeline = Lifeline(spool.path, board_of(spool), leave=Ending())

    assert not lifeline.look()  # it has never been awake
    spool.close()
    assert lifeline.look()
    lifeline.close()


def test_a_supervisor_that_was_awake_just_now_is_not_asked_about(spool: Spool) -> None:
    board = board_of(spool)
    spool.close()
    board.supervisor_ns = time.monotonic_ns()
    lifeline = Lifeline(spool.path, board, leave=Ending())

    assert not lifeline.look()
    board.supervisor_ns = time.monotonic_ns() - int(1.1e9)
    assert lifeline.look()
    lifeline.close()


def test_it_is_noticed_within_seconds_and_the_process_left_after_some_more(spool: Spool) -> None:
    ending = Ending()
    lifeline = Lifeline(spool.path, board_of(spool), patience_seconds=0.3, leave=ending)

    spool.close()
    wait_until(lambda: lifeline.is_cut, 5, "it to be noticed")
    begun = time.monotonic()
    wait_until(lambda: ending.codes == [75], what="the end")

    assert time.monotonic() - begun >= 0.2


def test_a_snapshot_that_is_being_copied_is_waited_for_but_not_for_ever(spool: Spool) -> None:
    ending = Ending()
    lifeline = Lifeline(spool.path, board_of(spool), patience_seconds=0.3, leave=ending)
    lifeline.saving = True
    spool.close()
    wait_until(lambda: lifeline.is_cut, 5, "it to be noticed")
    begun = time.monotonic()

    wait_until(lambda: ending.codes == [75], what="the end")

    assert 0.5 < time.monotonic() - begun < 5


def test_one_that_is_closed_ends_nothing(spool: Spool) -> None:
    ending = Ending()
    lifeline = Lifeline(spool.path, board_of(spool), patience_seconds=0.0, leave=ending)

    lifeline.close()
    spool.close()

    wait_until(lambda: not lifeline.is_watching, what="its thread to end")
    assert ending.codes == []


PRINTS_ON = """
import os, sys, time
from pathlib import Path
from runner.board import Board
from runner.training.lifeline import Lifeline

spool = Path(sys.argv[1])
lifeline = Lifeline(spool, Board(spool / "rank-00000" / "board"))
print("ready", flush=True)
while not lifeline.is_cut:
    print("x" * 10_000, flush=True)
for _ in range(100):
    print("y" * 10_000, flush=True)
Path(sys.argv[2]).write_text("it could print to the end")
"""


@pytest.mark.parametrize("whose", ["the supervisor's", "somebody's"])
def test_what_is_printed_after_the_supervisors_death_breaks_no_pipe(
    spool: Spool, tmp_path: Path, whose: str
) -> None:
    """With the pipe full, and a writer waiting in it. One to somebody else breaks as ever."""
    board_of(spool).supervisor_pid = os.getpid() if whose == "the supervisor's" else os.getppid()
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS_ON, str(spool.path), str(tmp_path / "done")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"ready\n"

    spool.close()
    process.stdout.close()

    code = process.wait(30)
    assert (tmp_path / "done").exists() == (whose == "the supervisor's"), process.stderr.read()
    assert code == (0 if whose == "the supervisor's" else 1)
    process.stderr.close()


def test_a_supervisor_that_cannot_be_seen_is_no_error(tmp_path: Path) -> None:
    assert module._pipes_to(0, tmp_path) == {}


def test_pipes_with_a_name_in_the_spool_are_the_supervisors_who_cannot_be_seen(
    tmp_path: Path, children: Children
) -> None:
    """As in a container."""
    own, other = tmp_path / "stdout", tmp_path / "other" / "stderr"
    other.parent.mkdir()
    readers = []
    for path in (own, other):
        os.mkfifo(path)
        readers.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))

    def trainer() -> None:
        for path, target in ((own, 1), (other, 2)):
            os.dup2(os.open(path, os.O_WRONLY), target)
        assert list(module._pipes_to(0, tmp_path)) == [1]

    assert children.exit_code(children.start(trainer)) == 0
    for reader in readers:
        os.close(reader)
