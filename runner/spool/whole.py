"""The whole spool of one run on this node, as the supervisor has it."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from runner.errors import SpoolError, SpoolTaken
from runner.spool.files import (
    LOCK_TRIES,
    Owner,
    dump,
    give_to,
    is_at,
    is_locked,
    locked,
    put,
    read_json,
)
from runner.spool.rank import RankSpool

SPOOL_PREFIX = "runner-"


class Spool:
    """The whole spool of one run on this node, as the supervisor has it.

    With an `owner`, the trainer is another user: the rank's part is given to that one, and the
    folder around it stays ours. `disk` is where slots go that memory is too short for.
    """

    def __init__(self, path: Path, owner: Owner | None = None, disk: Path | None = None) -> None:
        self.path, self.owner, self._disk = path, owner, disk
        self._lock: IO[bytes] | None = None

    @property
    def rank(self) -> RankSpool:
        return RankSpool(self.path / "rank-00000", self.owner, self._disk)

    def open(self) -> None:
        """Create it or take over what is there. SpoolTaken if a living supervisor has it."""
        for _ in range(LOCK_TRIES):
            try:
                self._create()
            except OSError as error:
                vanished = isinstance(error, FileNotFoundError | FileExistsError)
                if vanished and (self.path.is_dir() or not os.path.lexists(self.path)):
                    continue
                raise SpoolError(
                    f"{self.path} cannot be made: {error.strerror}; set RUNNER_SPOOL_ROOT to a "
                    "directory in memory that can be written"
                ) from error
            lock = locked(self.path / "lock")
            if lock is not None and is_at(lock, self.path / "lock"):
                self._lock = lock
                self.rank.folder.mkdir(mode=0o700, exist_ok=True)
                give_to(self.rank.folder, self.owner)
                return
            if lock is None and self.path.exists():
                break
            # Another supervisor has just taken it out of the way, as one that nobody came for.
        raise SpoolTaken(f"{self.path} is in use by another supervisor on this host")

    def _create(self) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self.path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise SpoolError(f"{self.path} belongs to somebody else; set RUNNER_SPOOL_ROOT")
        # Who is not ours gets through to the files whose names are known: the rank's and the pipes.
        self.path.chmod(0o700 if self.owner is None else 0o711)

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Tell the trainer what it must know of the job."""
        put(self.path / "plan.json", dump(plan), self.owner)

    def publish_status(self, status: Mapping[str, Any]) -> None:
        """Show others on this machine what the supervisor is doing."""
        put(self.path / "status.json", dump(status))

    def status(self) -> dict[str, Any] | None:
        """What a living supervisor has published; None if none lives."""
        if self._lock is None and not is_locked(self.path / "lock"):
            return None
        return read_json(self.path / "status.json")

    def ask_to_stop(self) -> None:
        """Ask the supervisor to save and end."""
        put(self.path / "stop", b"")

    def remove(self) -> None:
        """Delete it with everything in it."""
        self.rank.remove_disk_slots()
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def new_owner() -> str:
    """A name for a supervisor that no other one has."""
    return secrets.token_hex(8)


def spool_path(run_id: str, store_url: str, root: str | None = None) -> Path:
    """Where the spool of a run is on this node: the same for each of its supervisors.

    `root` is memory-backed; the default is /dev/shm, and the temporary folder where there is none.
    """
    if root is None:
        shared_memory = Path("/dev/shm")
        usable = shared_memory.is_dir() and os.access(shared_memory, os.W_OK)
        root = str(shared_memory) if usable else tempfile.gettempdir()
    where = hashlib.sha256(store_url.encode()).hexdigest()[:8]
    return Path(root) / f"{SPOOL_PREFIX}{os.geteuid()}-{run_id}-{where}"
