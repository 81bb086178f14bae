"""The spool: the only thing that trainer and supervisor share, and all of their protocol.

    <spool>/                     0700, on memory-backed storage
      lock                       held by the supervisor for as long as it lives
      plan.json                  what the trainer needs to know of the job
      stop                       put there by `runner stop`
      stdout, stderr             pipes for what a trainer in a container prints
      rank-00000/
        lock                     held by the trainer that attached
        board                    one mapped page: progress one way, requests the other
        slot-0, slot-1           one snapshot each: the images of the checkpoint's files
        slot-0.json              marker: the slot is complete, and this is what it holds
        slot-0.claimed.json      the same, while the supervisor persists or restores from it
        restore.json             the claimed slot that the next attempt begins from
        fetch.json, fetched.json a request for a saved checkpoint, and the answer to it

A rename hands a slot over. The trainer renames a marker into place when its copy has ended, the
supervisor claims it by renaming it away, and gives it back or removes it. Before the trainer
overwrites a slot it unlinks the marker; if that is gone, the slot is claimed and it takes another.
A slot without a marker does not exist.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from runner.board import Board, blank_board
from runner.errors import SpoolError, SpoolFull, SpoolTaken

SPOOL_PREFIX = "runner-"
Owner = tuple[int, int]
"""A user and a group, by their numbers."""
_MAX_JSON_BYTES = 64 << 20
FACTS_FILE = "facts.json"  # where a checkpoint comes from, as far as only the trainer knows
_LOCK_TRIES, _LOCK_SECONDS = 5, 0.01
_SLOT_MARKER = re.compile(r"slot-([0-9])\.json")


@dataclass(frozen=True)
class Weights:
    """That of a slot only these components are to be stored, and under which number of a save."""

    save: int
    components: Sequence[str]


@dataclass(frozen=True)
class Marker:
    """A complete slot: a moment of the run (plain JSON, see `manifest.Moment`) and its images.

    `must` says that it is to be persisted whatever comes after it; with `weights`, not all of it.
    """

    slot: int
    must: bool
    moment: Mapping[str, Any]
    images: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any]
    weights: Weights | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Newest is highest."""
        return int(self.moment["attempt"]), int(self.moment["save"])


class RankSpool:
    """The part of the spool that belongs to one rank. Both sides use it, each its own verbs.

    `owner` is whom all in it is to belong to, where that is another user than we are: a trainer in
    a container. `disk_here` is how a trainer sees the folder into which slots on disk are linked,
    where that has another name for it.
    """

    def __init__(
        self, folder: Path, owner: Owner | None = None, disk_here: Path | None = None
    ) -> None:
        self.folder, self.owner, self._disk_here = folder, owner, disk_here

    def slot_path(self, slot: int) -> Path:
        path = self.folder / f"slot-{slot}"
        if self._disk_here is not None and path.is_symlink():
            return self._disk_here / path.readlink().name
        return path

    def open_slot(self, path: Path, nbytes: int) -> mmap.mmap:
        """Map a slot for writing, as `open_slot` does; a new one belongs to the owner."""
        memory = open_slot(path, nbytes)
        if self.owner is not None:
            os.chown(path, *self.owner)
        return memory

    def put_on_disk(self, slot: int, disk: Path) -> bool:
        """Let a slot be a file in `disk`, where memory is too short for it. Its content is lost.

        False, and nothing is done, while the supervisor has it claimed.
        """
        path = self.folder / f"slot-{slot}"
        if path.is_symlink():
            return True
        if self.is_claimed(slot):
            return False
        (self._disk_here or disk).mkdir(mode=0o700, exist_ok=True)
        give_to(disk, self.owner)
        target = disk / f"{self.folder.parent.name}-{self.folder.name}-slot-{slot}"
        self.withdraw(slot)
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        return True

    def remove_disk_slots(self) -> None:
        """Delete the files that slots on disk are."""
        for path in self.folder.glob("slot-?"):
            if path.is_symlink():
                path.readlink().unlink(missing_ok=True)

    # ------------------------------------------------------------------ the trainer's side

    def lock(self) -> IO[bytes]:
        """Take the rank for this process. SpoolTaken if another one has attached."""
        return _locked(self.folder / "lock") or _raise(
            SpoolTaken(
                f"another process has attached to {self.folder}; a script that is started by a "
                "training script must run with RUNNER_SPOOL unset"
            )
        )

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

    # ------------------------------------------------------------------ the supervisor's side

    def prepare(self) -> Board:
        """Begin an attempt: a new board, no leftovers but complete slots."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        for name in ("restore.json", "fetch.json", "fetched.json"):
            (self.folder / name).unlink(missing_ok=True)
        path = self.folder / "board"
        # A new file: a process that still has the old one mapped writes into nothing.
        _replace(path, blank_board(), self.owner)
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
        _replace(self.folder / name, _dump(content), self.owner)

    def read(self, name: str) -> dict[str, Any]:
        """A message that stays; empty if there is none."""
        return read_json(self.folder / name) or {}

    def take(self, name: str) -> dict[str, Any] | None:
        """Read a message and remove it."""
        message = read_json(self.folder / name)
        if message is not None:
            (self.folder / name).unlink(missing_ok=True)
        return message


class Spool:
    """The whole spool of one run on this node, as the supervisor has it.

    With an `owner`, the trainer is another user: the rank's part is given to that one, and the
    folder around it stays ours.
    """

    def __init__(self, path: Path, owner: Owner | None = None) -> None:
        self.path, self.owner = path, owner
        self._lock: IO[bytes] | None = None

    @property
    def rank(self) -> RankSpool:
        return RankSpool(self.path / "rank-00000", self.owner)

    def open(self) -> None:
        """Create it or take over what is there. SpoolTaken if a living supervisor has it."""
        for _ in range(_LOCK_TRIES):
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
            lock = _locked(self.path / "lock")
            if lock is not None and _is_at(lock, self.path / "lock"):
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
        _replace(self.path / "plan.json", _dump(plan), self.owner)

    def publish_status(self, status: Mapping[str, Any]) -> None:
        """Show others on this machine what the supervisor is doing."""
        _replace(self.path / "status.json", _dump(status))

    def status(self) -> dict[str, Any] | None:
        """What a living supervisor has published; None if none lives."""
        if self._lock is None and not is_locked(self.path / "lock"):
            return None
        return read_json(self.path / "status.json")

    def ask_to_stop(self) -> None:
        """Ask the supervisor to save and end."""
        _replace(self.path / "stop", b"")

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


# ---------------------------------------------------------------------------- slots


def open_slot(path: Path, nbytes: int) -> mmap.mmap:
    """Map a slot of at least `nbytes`, its memory reserved before it is used.

    Without the reservation a tmpfs that is full answers a store into the mapping with SIGBUS.
    Raises SpoolFull if there is no room; a slot that was there keeps its content then.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        size = max(os.fstat(descriptor).st_size, nbytes, 1)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
                raise
            raise SpoolFull(
                f"{path.parent} has no room for a slot of {nbytes / 1e6:.1f} MB"
            ) from error
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def view_slot(path: Path) -> memoryview:
    """Map a slot for reading. SpoolError if it is not there or is empty."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    except (OSError, ValueError) as error:
        raise SpoolError(f"{path} cannot be read: {error}") from error


# ---------------------------------------------------------------------------- small files


def read_marker(path: Path) -> Marker | None:
    """A marker, or None if it is gone or is not one."""
    content = read_json(path)
    if content is None:
        return None
    try:
        marker = Marker(
            slot=int(content["slot"]),
            must=bool(content["must"]),
            moment=dict(content["moment"]),
            images=list(content["images"]),
            facts=dict(content["facts"]),
            weights=_weights(content.get("weights")),
        )
        _ = marker.order
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return marker


def _weights(content: Mapping[str, Any] | None) -> Weights | None:
    if content is None:
        return None
    return Weights(int(content["save"]), [str(name) for name in content["components"]])


def read_json(path: Path) -> dict[str, Any] | None:
    """A small JSON object, or None if there is none."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _dump(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode()


def give_to(folder: Path, owner: Owner | None) -> None:
    """Let a folder with all that is in it belong to somebody else. Links are not followed."""
    if owner is None or not folder.exists():
        return
    os.chown(folder, *owner, follow_symlinks=False)
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                os.chown(Path(parent, name), *owner, follow_symlinks=False)


def _replace(path: Path, content: bytes, owner: Owner | None = None) -> None:
    """Put a whole file in place at once. It lives no longer than the node: no fsync."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        if owner is not None:
            os.chown(temporary, *owner)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpoolFull(f"{path.parent} is full") from error
        raise SpoolError(f"{path} cannot be written: {error.strerror}") from error


def _locked(path: Path) -> IO[bytes] | None:
    """The file, locked for as long as it is open; None if another process has the lock."""
    try:
        file = path.open("ab")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SpoolError(f"{path} cannot be opened: {error.strerror}") from error
    for attempt in range(_LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if attempt < _LOCK_TRIES - 1:
                time.sleep(_LOCK_SECONDS)  # `is_locked` may be looking just now
        else:
            return file
    file.close()
    return None


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one that its path names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def is_locked(path: Path) -> bool:
    """Whether a living process has this lock. Takes nothing for longer than it looks."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _raise(error: SpoolError) -> IO[bytes]:
    raise error
