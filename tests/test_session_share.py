"""Whose session it is, and what its share of the processor becomes there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.launch.process_tree import ProcessEntry
from runner.supervisor.session_share import NICENESS, SessionShare, has_session_for_itself

AUTOGROUP = Path("/proc/self/autogroup")
needs_autogroups = pytest.mark.skipif(
    not os.access(AUTOGROUP, os.W_OK), reason="this kernel has no autogroups"
)

SHELL, MAKE, OURSELVES, TRAINER = 10, 20, 30, 40


def table_of(*rows: tuple[int, int, int]) -> dict[int, ProcessEntry]:
    """Of process ids, their parents and their sessions, beside those that are always there."""
    known = ((1, 0, 1), (SHELL, 1, SHELL), (MAKE, SHELL, SHELL), (OURSELVES, MAKE, SHELL))
    return {
        pid: ProcessEntry(pid, parent, pid, session, start_ticks=pid, state="S")
        for pid, parent, session in (*known, *rows)
    }


OTHERS = {
    "nobody": ([], True),
    "what was started": ([(41, OURSELVES, SHELL), (42, 41, SHELL)], True),
    "a trainer in its own session, and its child": (
        [(TRAINER, OURSELVES, TRAINER), (41, TRAINER, TRAINER)],
        True,
    ),
    "another of the shell's jobs": ([(50, SHELL, SHELL)], False),
    "what make has started beside": ([(50, MAKE, SHELL)], False),
    "somebody whose parent is gone": ([(50, 1, SHELL)], False),
    "somebody in another session": ([(50, 1, 50)], True),
}


@pytest.mark.parametrize(("others", "ours"), OTHERS.values(), ids=OTHERS)
def test_a_session_is_ours_while_nobody_else_is_in_it(
    others: list[tuple[int, int, int]], ours: bool
) -> None:
    assert has_session_for_itself(table_of(*others), OURSELVES) is ours


def test_a_zombie_is_nobody() -> None:
    table = table_of((50, SHELL, SHELL))
    table[50] = ProcessEntry(50, SHELL, 50, SHELL, start_ticks=50, state="Z")

    assert has_session_for_itself(table, OURSELVES)


def test_a_parent_that_cannot_be_seen_ends_the_line() -> None:
    table = table_of()
    del table[1], table[SHELL]  # as in a namespace, or where /proc hides other users' processes

    assert has_session_for_itself(table, OURSELVES)


@pytest.mark.parametrize("content", ["", "/autogroup-7 nice", "/autogroup-7 nice x\n"])
def test_a_file_that_says_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    file = tmp_path / "autogroup"
    file.write_text(content)
    share = SessionShare(file)

    share.give_way()
    share.leave()

    assert file.read_text() == content


def test_without_autogroups_nothing_happens(tmp_path: Path) -> None:
    share = SessionShare(tmp_path / "autogroup")

    share.give_way()
    share.leave()

    assert list(tmp_path.iterdir()) == []


SECONDS_BETWEEN = 0.11  # two changes: the kernel refuses more of them to who has no rights

SAYS = f"""
import json, time
from pathlib import Path
from runner.supervisor.session_share import SessionShare

def niceness():
    return int(Path("{AUTOGROUP}").read_text().split()[-1])

share, said = SessionShare(), [niceness()]
for act in (share.give_way, share.take_back, share.take_back, share.give_way, share.leave):
    time.sleep({SECONDS_BETWEEN})
    act()
    said.append(niceness())
print(json.dumps(said))
"""


@needs_autogroups
def test_in_a_session_of_its_own_it_gives_way_and_takes_it_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAYS], start_new_session=True, capture_output=True, check=True
    )

    assert json.loads(done.stdout) == [0, NICENESS, 0, 0, NICENESS, 0]


@needs_autogroups
def test_who_shares_the_session_does_not_pay_for_it() -> None:
    beside = ["bash", "-c", 'sleep 60 & "$@"; code=$?; kill %1; exit $code', "bash"]
    done = subprocess.run(
        [*beside, sys.executable, "-c", SAYS],
        start_new_session=True,
        capture_output=True,
        check=True,
    )

    assert json.loads(done.stdout) == [0] * 6


@needs_autogroups
def test_a_session_that_is_nicer_stays_so() -> None:
    nicer = ["bash", "-c", f'echo 15 > {AUTOGROUP} && "$@"', "bash"]
    done = subprocess.run(
        [*nicer, sys.executable, "-c", SAYS],
        start_new_session=True,
        capture_output=True,
        check=True,
    )

    assert json.loads(done.stdout) == [15] * 6
