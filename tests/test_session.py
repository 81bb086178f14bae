"""The trainer's end of the spool where something is wrong: no memory, or no supervisor any more."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from waiting import wait_until

from runner.board import Request, Why
from runner.checkpoint.manifest import Moment
from runner.errors import RestoreError, SpoolFull
from runner.plan import Plan
from runner.spool import Spool
from runner.training import session as sessions
from runner.training.lifeline import Lifeline
from runner.training.preempted import Preempted
from runner.training.session import Session
from runner.training.tensors import TensorSink


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    opened = spool_in(tmp_path, tmp_path)
    yield opened
    opened.close()


def spool_in(folder: Path, tmp_path: Path) -> Spool:
    spool = Spool(folder / "spool")
    spool.open()
    spool.rank.prepare()
    spool.write_plan(Plan("run", 1, str(tmp_path / "outputs"), str(tmp_path / "disk")).to_json())
    return spool


def save(session: Session, step: int, *triggers: str, floats: int = 1000) -> bool:
    sink = TensorSink()
    sink.add(torch.full((floats,), float(step)), "model.weight")

    def moment(attempt: int, number: int) -> Moment:
        at = "2025-11-21T05:46:00+00:00"
        return Moment(attempt, number, step, 0, step, created_at=at, triggers=triggers)

    return session.save(moment, {"step": step}, sink, beside=False)


def steps(session: Session) -> list[int]:
    """Of the slots that are complete, oldest first."""
    return [int(marker.moment["step"]) for marker in session.rank.complete()]


# ---------------------------------------------------------------- memory that is full


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(mounting).returncode:
        pytest.skip("no small tmpfs can be mounted here: that takes root")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_snapshot_for_which_somebody_took_the_room_is_passed_over(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = Session(spool_in(small, tmp_path).path, supervised=False)
    session.slots.expect(65536)
    wait_until(session.slots.is_ready, what="the slots")
    assert save(session, 1)
    with contextlib.suppress(OSError), (small / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass

    with caplog.at_level(logging.ERROR):
        assert not save(session, 2)
        assert not save(session, 3, "manual")
    assert steps(session) == [1], "what there was is still there"
    assert [r.levelname for r in caplog.records] == ["ERROR"], "said once, not at every step"
    assert "make room" in caplog.text

    with pytest.raises(SpoolFull):
        save(session, 3, "final")  # a run does not end well without its last state
    (small / "filler").unlink()
    assert save(session, 4)
    assert steps(session) == [1, 4]


def test_a_first_snapshot_without_room_is_an_error(small: Path, tmp_path: Path) -> None:
    session = Session(spool_in(small, tmp_path).path, supervised=False)
    with contextlib.suppress(OSError), (small / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass

    with pytest.raises(SpoolFull):
        save(session, 1)


# ---------------------------------------------------------------- a supervisor that is dead


@pytest.fixture
def deserted(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[Session, list[int]]]:
    """A session whose supervisor has died, and the codes with which it has left: not for real."""

    def make() -> tuple[Session, list[int]]:
        left: list[int] = []

        def lifeline(*args: object) -> Lifeline:
            return Lifeline(*args, patience_seconds=0.2, leave=left.append)  # type: ignore[arg-type]

        monkeypatch.setattr(sessions, "Lifeline", lifeline)
        session = Session(spool.path, supervised=True)
        assert session.asked() is None
        spool.close()
        wait_until(lambda: session.asked() is not None, what="the session to notice")
        return session, left

    return make


Deserted = Callable[[], tuple[Session, list[int]]]


def test_a_dead_supervisor_asks_to_save_and_to_leave(deserted: Deserted) -> None:
    session, left = deserted()

    asked = session.asked()

    assert asked is not None
    assert (asked.kind, asked.why) == (Request.SAVE_AND_STOP, Why.PREEMPTION)
    session.obeyed(asked)
    assert session.asked() == asked, "and nothing else makes it good"
    wait_until(lambda: left == [75], what="its end, since no boundary has come")


def test_claims_of_a_dead_supervisor_are_void(deserted: Deserted, spool: Spool) -> None:
    session, _ = deserted()
    assert save(session, 1)
    assert save(session, 2)
    for slot in (0, 1):
        assert spool.rank.claim(slot) is not None

    assert save(session, 3, "preemption")

    assert steps(session) == [2, 3]


def test_without_a_slot_to_be_had_the_newest_one_has_to_do(deserted: Deserted) -> None:
    session, _ = deserted()
    assert save(session, 1, "manual")
    assert save(session, 2, "best")

    with pytest.raises(Preempted) as leaving:
        save(session, 3, "preemption")

    assert leaving.value.code == 75
    assert steps(session) == [1, 2], "what must be made durable is not overwritten"


def test_nothing_is_waited_for_that_only_a_supervisor_can_bring(deserted: Deserted) -> None:
    session, _ = deserted()

    with pytest.raises(RestoreError, match="the supervisor is gone"):
        session.saved_state()
    with pytest.raises(RestoreError, match="the supervisor is gone"):
        session.fetch("best")
    session.hold()
