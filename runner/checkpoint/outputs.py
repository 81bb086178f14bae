"""The run's own files (`run.output_dir`), kept in a store that is not on this node.

    <run>/outputs/<path>         each file, as it is
    <run>/outputs.json           which there are: size and SHA-256 of each

They are stored when an attempt ends, after its checkpoint, and brought back to a node that has
none of them. Only what has changed is moved. They are not part of a checkpoint: nothing is resumed
from them.

The folder is the script's, which may be in a container and change it at any time: no link in it is
followed, neither to read nor to write.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from runner.checkpoint.format import part_bytes_for
from runner.errors import NotFound, StoreError
from runner.regular import open_folder_below, open_regular
from runner.spool import give_to
from runner.store import Content, Part, Store, Stored

log = logging.getLogger(__name__)

_MAX_INDEX_BYTES = 64 << 20
_NAMED = 3  # files that a warning names
_IN_THE_WAY = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


@dataclass(frozen=True)
class OutputFile:
    """A stored file: its size in bytes, its SHA-256, and the modification time it had (ns)."""

    size: int
    sha256: str
    modified_ns: int


class Outputs:
    """Keeps a folder's files, at most `max_bytes` of them, below a run in a store.

    What is brought back is given to `owner`, a user and a group, if it is not to be ours.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        folder: Path,
        max_bytes: int,
        owner: tuple[int, int] | None = None,
    ) -> None:
        self._store, self._run_id = store, run_id
        self._folder, self._max_bytes, self._owner = folder, max_bytes, owner
        self._known: dict[str, OutputFile] | None = None

    def store_changed(self) -> list[str]:
        """Store what is new or has changed; the paths of what was moved.

        Where there is more than may be stored, the smallest files go first, and a warning says
        what stays behind. A file that is gone here stays in the store. Raises StoreError.
        """
        known = self._index()
        chosen = self._choose()
        moved = []
        try:
            for path, status in chosen.items():
                before = known.get(path)
                now = (status.st_size, status.st_mtime_ns)
                if before and (before.size, before.modified_ns) == now:
                    continue
                stored = self._store_file(path)
                if stored is not None:
                    known[path] = stored
                    moved.append(path)
        finally:  # what was moved before one that cannot be
            if moved:
                self._write_index(known)
        return moved

    def bring_back(self) -> list[str]:
        """Fetch what an earlier attempt has stored, where this node has nothing; the paths.

        A file that is not the one that was stored is left out, with a warning; one that an attempt
        has stored whole, and was killed before it could say so, is taken. What a kill has cut off
        on its way into the store is removed there. Raises StoreError.
        """
        try:
            self._store.sweep(f"{self._run_id}/outputs", lambda name: True)
        except StoreError as error:
            log.debug("what was cut off of the run's own files stays: %s", error)
        if self._folder.is_dir() and any(self._folder.iterdir()):
            return []
        brought = []
        for path, file in self._index().items():
            try:
                self._fetch(path, file)
            except NotFound:
                log.warning("output %s is not in the store any more", path)
            except ValueError as error:
                log.warning("output %s is not brought back: %s", path, error)
            else:
                brought.append(path)
        give_to(self._folder, self._owner)
        return brought

    # ------------------------------------------------------------------ here

    def _choose(self) -> dict[str, os.stat_result]:
        """Regular files below the folder, smallest first, as many as fit."""
        found = dict(self._files())
        chosen, left_out, total = {}, [], 0
        for path, status in sorted(found.items(), key=lambda item: (item[1].st_size, item[0])):
            if total + status.st_size > self._max_bytes:
                left_out.append(path)
                continue
            total += status.st_size
            chosen[path] = status
        if left_out:
            log.warning(
                "outputs: %d of %d files are not stored, because together they have more than the "
                "%.0f MB of outputs.max_size: %s%s",
                len(left_out),
                len(found),
                self._max_bytes / 1e6,
                ", ".join(left_out[-_NAMED:]),
                " …" if len(left_out) > _NAMED else "",
            )
        return chosen

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """A link may lead anywhere and a pipe may never end: neither is followed."""
        for folder, _, names in os.walk(self._folder):
            for name in names:
                path = Path(folder, name)
                try:
                    status = path.lstat()
                    relative = path.relative_to(self._folder).as_posix()
                    relative.encode()
                except (OSError, UnicodeEncodeError):
                    continue
                if stat.S_ISREG(status.st_mode) and _is_plain(relative):
                    yield relative, status

    # ------------------------------------------------------------------ there

    @property
    def _index_key(self) -> str:
        return f"{self._run_id}/outputs.json"

    def _key(self, path: str) -> str:
        return f"{self._run_id}/outputs/{path}"

    def _index(self) -> dict[str, OutputFile]:
        if self._known is None:
            try:
                document = json.loads(self._store.read(self._index_key, _MAX_INDEX_BYTES))
                self._known = dict(map(_read_entry, document.items()))
            except NotFound:
                self._known = {}
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                log.warning("outputs.json of %s is unusable: %s", self._run_id, error)
                self._known = {}
        return self._known

    def _write_index(self, known: Mapping[str, OutputFile]) -> None:
        document = {name: asdict(file) for name, file in sorted(known.items())}
        self._store.replace(self._index_key, json.dumps(document, indent=1).encode() + b"\n")

    def _store_file(self, path: str) -> OutputFile | None:
        """None if it is gone. One that is being written is stored as it was found."""
        whole, size = hashlib.sha256(), 0

        def parts(file: IO[bytes]) -> Iterator[Part]:
            nonlocal size
            while data := file.read(min(part_bytes, status.st_size - size)):
                size += len(data)
                whole.update(data)
                yield Part(memoryview(data))
            if size == 0:
                yield Part(memoryview(b""))

        try:
            folder = open_folder_below(self._folder, PurePosixPath(path).parent)
            try:
                descriptor = open_regular(PurePosixPath(path).name, folder=folder)
            finally:
                os.close(folder)
        except OSError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            part_bytes = part_bytes_for(status.st_size)
            self._store.put(self._key(path), Content(path, part_bytes, parts(file)))
        return OutputFile(size, whole.hexdigest(), status.st_mtime_ns)

    def _fetch(self, path: str, file: OutputFile) -> None:
        """ValueError if it is not what was stored, or if something is in its way here."""
        stored = self._store.stored(self._key(path))
        if stored.size > self._max_bytes:
            raise ValueError(f"it has {stored.size / 1e6:.0f} MB, more than outputs.max_size")
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            folder = open_folder_below(self._folder, PurePosixPath(path).parent, make=True)
            try:
                self._fetch_into(folder, path, file, stored)
            finally:
                os.close(folder)
        except OSError as error:
            if error.errno not in _IN_THE_WAY:
                raise
            raise ValueError(f"something is in its way: {error.strerror}") from error

    def _fetch_into(self, folder: int, path: str, file: OutputFile, stored: Stored) -> None:
        name = PurePosixPath(path).name
        temporary = f".{name[:64]}.{secrets.token_hex(8)}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = open_regular(temporary, flags, 0o666, folder=folder)
        try:
            with os.fdopen(descriptor, "wb") as out:
                parts, whole = [], hashlib.sha256()
                part_bytes = part_bytes_for(stored.size)
                for at in range(0, stored.size, part_bytes):
                    buffer = memoryview(bytearray(min(part_bytes, stored.size - at)))
                    self._store.fetch(self._key(path), at, buffer)
                    whole.update(buffer)
                    parts.append(hashlib.sha256(buffer).digest() if stored.digest else b"")
                    out.write(buffer)
                out.flush()
                if whole.hexdigest() == file.sha256:
                    os.utime(descriptor, ns=(file.modified_ns, file.modified_ns))
                elif stored.digest not in (whole.hexdigest(), _digest_over(parts)):
                    raise ValueError("its content is not what was stored")
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise


def _digest_over(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _read_entry(entry: tuple[str, Mapping[str, Any]]) -> tuple[str, OutputFile]:
    path, content = entry
    file = OutputFile(**content)
    numbers = type(file.size) is int and type(file.modified_ns) is int and file.size >= 0
    if not _is_plain(path) or not numbers or type(file.sha256) is not str:
        raise ValueError(f"{path!r} is no file below the folder")
    return path, file


def _is_plain(path: str) -> bool:
    """Whether a relative path stays below its folder, and can be a key."""
    parts = PurePosixPath(path).parts
    return (
        bool(parts)
        and PurePosixPath(path).as_posix() == path
        and not path.startswith("/")
        and not any(part in ("..", ".") or "\0" in part for part in parts)
    )
