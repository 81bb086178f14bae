"""What is seen of a trainer that lives, on a board of its own and a clock of the test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_until

from runner.board import Board, blank_board
from runner.launch.cpu import session_seconds
from runner.supervisor.events import Event, Overslept, Progressed, Unhealthy, Worked
from runner.supervisor.vitals import Vitals


@pytest.fixture
def board(tmp_path: Path) -> Board:
    path = tmp_path / "board"
    path.write_bytes(blank_board())
    return Board(path)


def look(vitals: Vitals, now: float, board: Board | None) -> list[Event]:
    return vitals.look(now, board, lambda: 0.0)


def test_progress_is_told_once_with_what_it_is_doing(board: Board) -> None:
    vitals = Vitals(10, 600.0)
    board.phase, board.step, board.progress = "training", 7, 1

    assert look(vitals, 1.0, board) == [Progressed(1.0, "training", 7)]
    assert look(vitals, 1.1, board) == []
    board.progress += 1
    board.step = 8
    assert look(vitals, 1.2, board) == [Progressed(1.2, "training", 8)]
    board.phase = "validation"
    assert look(vitals, 1.3, board) == [Progressed(1.3, "validation", 8)]


def test_a_heartbeat_without_progress_is_none(board: Board) -> None:
    vitals = Vitals(10, 600.0)
    board.phase = "training"
    look(vitals, 1.0, board)

    board.heartbeat_ns += 10**9

    assert look(vitals, 2.0, board) == []


def test_bad_metrics_are_told_when_patience_is_over_and_once_for_each_time(board: Board) -> None:
    vitals = Vitals(10, 600.0)
    board.phase = "training"
    look(vitals, 0.0, board)
    told = []
    for now, (since, steps) in enumerate(
        [(0, 0), (6, 1), (6, 9), (6, 10), (6, 11), (0, 0), (31, 4), (31, 12), (41, 12)], 1
    ):
        board.sick_since, board.sick_steps = since, steps
        told += look(vitals, float(now), board)

    assert told == [Unhealthy(4.0, 5, 10), Unhealthy(8.0, 30, 12), Unhealthy(9.0, 40, 12)]


def test_a_supervisor_that_has_overslept_says_so_before_all_else(board: Board) -> None:
    vitals = Vitals(10, 600.0)
    look(vitals, 1.0, board)
    board.progress += 1

    first, second = look(vitals, 61.0, board)

    assert first == Overslept(61.0, 60.0)
    assert isinstance(second, Progressed)
    vitals.attempt_begins()
    assert not any(isinstance(event, Overslept) for event in look(vitals, 200.0, board))


def test_before_there_is_a_board_nothing_is_seen() -> None:
    assert look(Vitals(10, 600.0), 1.0, None) == []


SPINS = "print('ready', flush=True)\nwhile True: pass"
WAITS = "print('ready', flush=True)\ninput()"


@pytest.mark.parametrize(("program", "works"), [(SPINS, True), (WAITS, False)])
@pytest.mark.parametrize("phase", ["", "attached", "training"])
def test_use_of_the_cpu_counts_until_the_loop_begins(
    board: Board, program: str, works: bool, phase: str
) -> None:
    """A whole second of the CPU, in a session of its own; the test's clock says five."""
    vitals = Vitals(10, 600.0)
    board.phase = phase
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        vitals.look(0.0, board, lambda: session_seconds(child.pid))
        if works:
            before = session_seconds(child.pid)
            wait_until(lambda: session_seconds(child.pid) >= before + 0.6, 60, "its use of the CPU")
        seen = vitals.look(5.0, board, lambda: session_seconds(child.pid))
        child.kill()

    assert [event for event in seen if isinstance(event, Worked)] == (
        [Worked(5.0)] if works and phase != "training" else []
    )


def test_only_a_sessions_own_processes_are_counted() -> None:
    assert session_seconds(1 << 30) == 0.0
    assert session_seconds(os.getsid(0)) > 0.0
