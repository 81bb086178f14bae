"""Spools that nobody will come back for: found by their owner and their lock, and removed.

A supervisor that is killed leaves its spool in memory. The next one of the same run on this node
takes it over; if there is none, it would stay until the machine is switched off.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import time
from pathlib import Path

from runner.board import Board
from runner.errors import SpoolError
from runner.spool import SPOOL_PREFIX, RankSpool, Spool, is_locked

log = logging.getLogger(__name__)

_KEPT_SECONDS = 24 * 3600
_GONE = ".gone-"


def remove_abandoned(root: Path, own: Path, now: float | None = None) -> list[str]:
    """Remove this user's spools below `root` that nobody uses, but for `own`; their names.

    One that holds a state which was never saved is kept for a day: its run may be continued here.
    `now` is a time of day in seconds.
    """
    removed = []
    for path in sorted(root.glob(f"{SPOOL_PREFIX}{os.geteuid()}-*")):
        if path == own or not _is_own_directory(path):
            continue
        if is_locked(path / "rank-00000" / "lock") or _may_be_continued(path, now or time.time()):
            continue
        if _remove(path):
            removed.append(path.name)
    for path in root.glob(f"{_GONE}{SPOOL_PREFIX}{os.geteuid()}-*"):  # by one that was killed at it
        if _is_own_directory(path):
            shutil.rmtree(path, ignore_errors=True)
    return removed


def _is_own_directory(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _may_be_continued(path: Path, now: float) -> bool:
    rank = RankSpool(path / "rank-00000")
    try:
        rank_is_old = now - rank.folder.stat().st_mtime > _KEPT_SECONDS
        durable_step = Board(rank.folder / "board").persisted_step - 1
    except (OSError, SpoolError):
        return False  # no trainer has ever begun there
    if rank_is_old:
        return False
    markers = [*rank.complete(), *rank.claimed()]
    return any(marker.must or int(marker.moment["step"]) > durable_step for marker in markers)


def _remove(path: Path) -> bool:
    """Take it out of the way at once, then delete it; False if a supervisor has it."""
    spool = Spool(path)
    try:
        spool.open()
    except SpoolError:
        return False
    gone = path.with_name(f"{_GONE}{path.name}")
    try:
        spool.rank.remove_disk_slots()
        path.rename(gone)
    except OSError as error:
        log.warning("%s is of no use and cannot be removed: %s", path, error)
        return False
    finally:
        spool.close()
    shutil.rmtree(gone, ignore_errors=True)
    return True
