"""The part of the spool that belongs to one rank, which both sides use, each its own verbs."""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from runner.board import Board, blank_board
from runner.errors import SpoolFull, SpoolTaken
from runner.spool.files import Owner, dump, give_to, locked, put, read_json
from runner.spool.slots import Marker, open_slot, read_marker

FACTS_FILE = "facts.json"  # where a checkpoint comes from, as far as only the trainer knows
ALL_SLOTS = range(10)  # a job has 8 in memory at most, so one on disk has a place beside them
_FETCHED = "fetched"
_SLOT_MARKER = re.compile(r"slot-([0-9])\.json")


class RankSpool:
    """The part of the spool that belongs to one rank. Both sides use it, each its own verbs.

    `owner` is whom all in it is to belong to, where that is another user than we are: a trainer in
    a container. Slots on disk are files in `disk`; `disk_here` is how a trainer sees that folder,
    where it has another name there.
    """

    def __init__(
        self,
        folder: Path,
        owner: Owner | None = None,
        disk: Path | None = None,
        disk_here: Path | None = None,
    ) -> None:
        self.folder, self.owner = folder, owner
        self.disk, self._disk_here = disk, disk_here or disk

    def slot_path(self, slot: int) -> Path:
        """Where a slot's content is. That it is on disk is said by a link, and where by us.

        The other side can let a link lead to any file.
        """
        return self._place(f"slot-{slot}")

    @property
    def fetched_path(self) -> Path:
        """Where the content of a checkpoint is that the trainer has asked for, as for a slot."""
        return self._place(_FETCHED)

    def _place(self, name: str) -> Path:
        path = self.folder / name
        if self._disk_here is not None and path.is_symlink():
            return self._disk_here / self._name_on_disk(name)
        return path

    def _name_on_disk(self, name: str) -> str:
        """The same on both sides, which may call the spool by other names."""
        return f"{self.folder.name}-{name}"

    def open_slot(self, path: Path, nbytes: int) -> mmap.mmap:
        """Map a slot for writing, as `open_slot` does; a new one belongs to the owner."""
        return open_slot(path, nbytes, self.owner)

    def slots(self) -> list[int]:
        """Those that there are, whatever is in them."""
        return [slot for slot in ALL_SLOTS if os.path.lexists(self.folder / f"slot-{slot}")]

    def is_on_disk(self, slot: int) -> bool:
        return (self.folder / f"slot-{slot}").is_symlink()

    def memory_of(self, slot: int) -> int:
        """The bytes that a slot has in memory; 0 if it is on disk, or there is none."""
        try:
            status = (self.folder / f"slot-{slot}").lstat()
        except OSError:
            return 0
        return status.st_size if stat.S_ISREG(status.st_mode) else 0

    def put_on_disk(self, slot: int) -> bool:
        """Let a slot be a file in `disk`, where memory is too short for it. Its content is lost.

        False, and nothing is done, while the supervisor has it claimed, or where there is no disk.
        Raises SpoolFull where not even the link can be made.
        """
        if self.is_on_disk(slot):
            return True
        if self.disk is None or self.is_claimed(slot):
            return False
        self.withdraw(slot)
        self._link_to_disk(f"slot-{slot}", self.disk)
        return True

    def put_fetched_on_disk(self) -> None:
        """The same for what the trainer has asked for; nothing is done where there is no disk."""
        if self.disk is not None and not (self.folder / _FETCHED).is_symlink():
            self._link_to_disk(_FETCHED, self.disk)

    def _link_to_disk(self, name: str, disk: Path) -> None:
        path = self.folder / name
        (self._disk_here or disk).mkdir(mode=0o700, exist_ok=True)
        give_to(disk, self.owner)
        path.unlink(missing_ok=True)
        try:
            path.symlink_to(disk / self._name_on_disk(name))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise SpoolFull(f"{self.folder} is full") from error

    def remove_slot(self, slot: int) -> bool:
        """Give back what a slot takes, in memory or on disk, with all that it holds.

        False, and nothing is done, while the supervisor has it claimed.
        """
        if not self.withdraw(slot) and self.is_claimed(slot):
            return False
        self.slot_path(slot).unlink(missing_ok=True)
        (self.folder / f"slot-{slot}").unlink(missing_ok=True)
        return True

    def remove_disk_slots(self) -> None:
        """Delete the files that slots on disk are.

        Who does not know the disk, long after the run, asks the link; one to what has no such name
        is none of ours, and what it leads to is left alone.
        """
        for name in (*(f"slot-{slot}" for slot in ALL_SLOTS), _FETCHED):
            path, on_disk = self.folder / name, self._name_on_disk(name)
            if not path.is_symlink():
                continue
            target = path.readlink() if self.disk is None else self.disk / on_disk
            if target.name == on_disk:
                target.unlink(missing_ok=True)

    def remove_fetched(self) -> None:
        """Give back what was fetched for the trainer; who has it mapped keeps it until then."""
        self.fetched_path.unlink(missing_ok=True)
        (self.folder / _FETCHED).unlink(missing_ok=True)

    # ------------------------------------------------------------------ the trainer's side

    def lock(self) -> IO[bytes]:
        """Take the rank for this process. SpoolTaken if another one has attached."""
        lock = locked(self.folder / "lock")
        if lock is None:
            raise SpoolTaken(
                f"another process has attached to {self.folder}; a script that is started by a "
                "training script must run with RUNNER_SPOOL unset"
            )
        return lock

    def publish(self, marker: Marker) -> None:
        """Hand a slot over: from now on it is complete."""
        self._put(f"slot-{marker.slot}.json", asdict(marker))

    def withdraw(self, slot: int) -> bool:
        """Take a slot's marker back before overwriting it; False if there was none to take."""
        try:
            (self.folder / f"slot-{slot}.json").unlink()
        except FileNotFoundError:
            return False
        return True

    def is_claimed(self, slot: int) -> bool:
        return (self.folder / f"slot-{slot}.claimed.json").exists()

    def read_restore(self) -> Marker | None:
        """The slot to begin from, or None at the very start of a run."""
        return read_marker(self.folder / "restore.json")

    # ------------------------------------------------------------------ the supervisor's side

    def prepare(self) -> Board:
        """Begin an attempt: a new board, no leftovers but complete slots."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        for name in ("restore.json", "fetch.json", "fetched.json"):
            (self.folder / name).unlink(missing_ok=True)
        self.remove_fetched()
        path = self.folder / "board"
        # A new file: a process that still has the old one mapped writes into nothing.
        put(path, blank_board(), self.owner)
        return Board(path)

    def complete(self) -> list[Marker]:
        """Markers of all complete slots that nobody has claimed, oldest first."""
        markers = []
        for path in self.folder.glob("slot-?.json"):
            match = _SLOT_MARKER.fullmatch(path.name)
            marker = read_marker(path) if match else None
            if match and marker is not None and marker.slot == int(match.group(1)):
                markers.append(marker)
        return sorted(markers, key=lambda marker: marker.order)

    def claim(self, slot: int) -> Marker | None:
        """Take a complete slot, so that it is not overwritten; None if it was just withdrawn."""
        claimed = self.folder / f"slot-{slot}.claimed.json"
        try:
            (self.folder / f"slot-{slot}.json").rename(claimed)
        except FileNotFoundError:
            return None
        marker = read_marker(claimed)
        if marker is None:
            claimed.unlink(missing_ok=True)
        return marker

    def give_back(self, slot: int, *, must: bool = False) -> None:
        """End a claim: the slot is complete again; `must` says whether it is still to be persisted.

        Where memory is so short that not even a marker can be written, a slot that was persisted
        is dropped instead, and one that is still to be persisted is what it was before the claim.
        """
        claimed = self.folder / f"slot-{slot}.claimed.json"
        marker = read_marker(claimed)
        if marker is None:
            claimed.unlink(missing_ok=True)
            return
        if marker.must != must:
            try:
                self._put(claimed.name, asdict(marker) | {"must": must})
            except SpoolFull:
                if marker.must:
                    self.drop(slot)
                    return
        claimed.rename(self.folder / f"slot-{slot}.json")

    def hold(self, marker: Marker) -> None:
        """Make a slot that the supervisor has filled complete, and claimed from the start."""
        self._put(f"slot-{marker.slot}.claimed.json", asdict(marker))

    def forget(self) -> None:
        """Give up every complete slot: what they hold is not to be continued from."""
        for marker in self.complete():
            self.withdraw(marker.slot)

    def drop(self, slot: int) -> None:
        """End a claim: the slot is free."""
        (self.folder / f"slot-{slot}.claimed.json").unlink(missing_ok=True)

    def claimed(self) -> list[Marker]:
        """Markers of the slots that are claimed, by whomever."""
        paths = self.folder.glob("slot-[0-9].claimed.json")
        return [marker for marker in map(read_marker, paths) if marker is not None]

    def recover_claims(self, held: Collection[int] = ()) -> None:
        """Give back what a supervisor that is dead by now had claimed; `held` are its heir's."""
        for path in self.folder.glob("slot-[0-9].claimed.json"):
            slot = int(path.name[5])
            if slot not in held:
                marker = read_marker(path)
                self.give_back(slot, must=marker is not None and marker.must)

    # ------------------------------------------------------------------ messages

    def send(self, name: str, content: Mapping[str, Any]) -> None:
        """Leave a message: a small JSON file that appears all at once."""
        self._put(name, content)

    def _put(self, name: str, content: Mapping[str, Any]) -> None:
        put(self.folder / name, dump(content), self.owner)

    def read(self, name: str) -> dict[str, Any]:
        """A message that stays; empty if there is none."""
        return read_json(self.folder / name) or {}

    def take(self, name: str) -> dict[str, Any] | None:
        """Read a message and remove it."""
        message = read_json(self.folder / name)
        if message is not None:
            (self.folder / name).unlink(missing_ok=True)
        return message
