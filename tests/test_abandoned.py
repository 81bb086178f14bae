"""Spools that nobody will come back for are removed, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from slots import fill, snapshot

from runner.errors import SpoolTaken
from runner.spool import Spool, open_slot
from runner.supervisor.abandoned import remove_abandoned

DAY = 24 * 3600.0
NAME = f"runner-{os.geteuid()}-job-0123abcd"


def left_behind(root: Path, name: str = NAME, *, step: int | None = None, durable: int = 0) -> Path:
    """A spool as a killed supervisor leaves it: with a slot of this step, or none."""
    spool = Spool(root / name)
    spool.open()
    board = spool.rank.prepare()
    if step is not None:
        fill(spool.rank, 0, snapshot(step=step))
        board.persisted_step = durable + 1
    spool.close()
    return spool.path


def test_a_spool_in_which_everything_is_saved_is_removed(tmp_path: Path) -> None:
    path = left_behind(tmp_path, step=100, durable=100)

    assert remove_abandoned(tmp_path, tmp_path / "own") == [path.name]
    assert list(tmp_path.iterdir()) == []


def test_a_spool_without_a_state_is_removed(tmp_path: Path) -> None:
    path = left_behind(tmp_path)

    assert remove_abandoned(tmp_path, tmp_path / "own") == [path.name]


@pytest.mark.parametrize("claimed", [False, True])
def test_a_state_that_was_never_saved_is_kept_for_a_day(tmp_path: Path, claimed: bool) -> None:
    path = left_behind(tmp_path, step=100, durable=99)
    if claimed:
        Spool(path).rank.claim(0)

    assert remove_abandoned(tmp_path, tmp_path / "own") == []
    assert remove_abandoned(tmp_path, tmp_path / "own", now=time.time() + DAY + 60) == [path.name]


def test_the_supervisors_own_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    own = left_behind(tmp_path)
    other = Spool(tmp_path / f"{NAME}-other")
    other.open()

    assert remove_abandoned(tmp_path, own) == []
    assert own.is_dir()
    assert other.path.is_dir()


def test_a_spool_whose_trainer_lives_stays(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    trainer = Spool(path).rank.lock()

    assert remove_abandoned(tmp_path, tmp_path / "own") == []
    trainer.close()
    assert remove_abandoned(tmp_path, tmp_path / "own") == [path.name]


def test_nothing_that_is_not_this_users_spool_is_touched(tmp_path: Path) -> None:
    elsewhere = left_behind(tmp_path / "elsewhere")
    (tmp_path / NAME).symlink_to(elsewhere)
    (tmp_path / f"{NAME}-file").write_text("not a directory")
    (tmp_path / f"runner-{os.geteuid() + 1}-job-0123abcd").mkdir()
    (tmp_path / "something").mkdir()
    before = sorted(tmp_path.rglob("*"))

    assert remove_abandoned(tmp_path, tmp_path / "own") == []
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_what_belongs_to_another_user_is_not_touched(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    os.chown(path, 65534, 65534)

    assert remove_abandoned(tmp_path, tmp_path / "own") == []
    assert path.is_dir()


def test_a_slot_on_disk_goes_with_its_spool(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    rank = Spool(path, disk=tmp_path / "disk").rank
    rank.put_on_disk(0)
    open_slot(rank.slot_path(0), 4096)

    assert remove_abandoned(tmp_path, tmp_path / "own") == [path.name]
    assert list((tmp_path / "disk").iterdir()) == []


def test_what_a_killed_remover_had_begun_is_finished(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    path.rename(tmp_path / f".gone-{path.name}")

    remove_abandoned(tmp_path, tmp_path / "own")

    assert list(tmp_path.iterdir()) == []


def test_a_supervisor_that_starts_meanwhile_gets_a_spool_of_its_own(tmp_path: Path) -> None:
    """Whoever of the two comes first: the supervisor never has one that is being removed."""
    begin = threading.Barrier(2)

    def remove() -> None:
        begin.wait()
        remove_abandoned(tmp_path, tmp_path / "own")

    taken = 0
    for _ in range(50):
        left_behind(tmp_path)
        remover = threading.Thread(target=remove)
        remover.start()
        spool = Spool(tmp_path / NAME)
        begin.wait()
        try:
            spool.open()
        except SpoolTaken:  # the remover had the lock for an instant, five times over
            taken += 1
        else:
            remover.join()
            assert (tmp_path / NAME / "lock").exists()
            assert spool.rank.folder.is_dir()
        remover.join()
        spool.close()
    assert taken < 5


def test_a_supervisor_removes_what_others_left_when_it_starts(tmp_path: Path) -> None:
    abandoned = left_behind(tmp_path / "memory")
    job = tmp_path / "job.yaml"
    job.write_text("name: fresh\ncommand: ['true']\n")
    environment = {**os.environ, "RUNNER_SPOOL_ROOT": str(tmp_path / "memory")}

    done = subprocess.run(
        [sys.executable, "-m", "runner", "run", str(job)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert f"removed {abandoned}" in done.stderr
    assert not abandoned.exists()
