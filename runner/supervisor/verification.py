"""Whether a saved checkpoint is sound, file by file: as the store says, or by reading it.

S3 keeps a checksum of every object and calculates it itself, so comparing that with the manifest
moves no byte. A directory keeps none: there everything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from runner.checkpoint.archive import Archive
from runner.checkpoint.copies import READS_AHEAD, verified_parts
from runner.checkpoint.format import MANIFEST_FILE
from runner.checkpoint.manifest import FileEntry, Manifest
from runner.errors import CheckpointCorrupt, NotFound
from runner.store import Store

ALL_BYTES = "size, all bytes"
CHECKSUM = "size, the store's checksum"
ITSELF = "its own digest"
PRESENCE = "presence"


@dataclass(frozen=True)
class FileVerdict:
    """One file of a checkpoint: what was compared with the manifest, and what is wrong if it is."""

    name: str
    size: int
    compared: str
    problem: str = ""

    @property
    def sound(self) -> bool:
        return not self.problem


@dataclass(frozen=True)
class CheckpointVerdict:
    """All files of a checkpoint; it is sound if they all are."""

    name: str
    files: tuple[FileVerdict, ...]

    @property
    def problem(self) -> str:
        return "; ".join(f"{file.name} {file.problem}" for file in self.files if not file.sound)


def verify(archive: Archive, manifest: Manifest, *, deep: bool = False) -> list[FileVerdict]:
    """Compare every file with the manifest, which has been read and so is sound itself.

    `deep` reads every byte even where the store has checksums. StoreError if the store is out of
    reach, which proves nothing about the files; NotFound if the checkpoint has been deleted
    meanwhile.
    """
    size = len(manifest.to_json())
    verdicts = [FileVerdict(MANIFEST_FILE, size, ITSELF)]
    with ThreadPoolExecutor(READS_AHEAD, "verify") as pool:
        for file in manifest.files:
            key = f"{archive.run_id}/checkpoints/{manifest.name}/{file.name}"
            verdicts.append(_verdict(archive.store, key, file, pool, deep=deep))
    if any(verdict.compared == PRESENCE for verdict in verdicts):
        archive.manifest(manifest.name)  # NotFound: deleted as a whole, manifest first
    return verdicts


def verify_found(
    archive: Archive, find: Callable[[], Manifest], *, deep: bool = False
) -> CheckpointVerdict:
    """The verdict on what `find` finds; its manifest may be what is wrong. NotFound if none is."""
    try:
        manifest = find()
    except CheckpointCorrupt as error:
        unusable = FileVerdict(MANIFEST_FILE, 0, ITSELF, error.problem)
        return CheckpointVerdict(error.checkpoint, (unusable,))
    return CheckpointVerdict(manifest.name, tuple(verify(archive, manifest, deep=deep)))


def verify_all(archive: Archive, *, deep: bool = False) -> Iterator[CheckpointVerdict]:
    """Every checkpoint of a run, newest first. One that is being written is none yet."""
    found_any = False
    for name in map(str, archive.names()):
        try:
            verdict = verify_found(archive, partial(archive.manifest, name), deep=deep)
        except NotFound:
            if not found_any:
                continue  # newer than all that are committed: it may be on its way
            missing = FileVerdict(MANIFEST_FILE, 0, PRESENCE, "is missing")
            verdict = CheckpointVerdict(name, (missing,))
        found_any = True
        yield verdict


def _verdict(
    store: Store, key: str, file: FileEntry, pool: ThreadPoolExecutor, *, deep: bool
) -> FileVerdict:
    try:
        stored = store.stored(key)
    except NotFound:
        return FileVerdict(file.name, file.size, PRESENCE, "is missing")
    if stored.size != file.size:
        problem = f"has {stored.size} bytes instead of {file.size}"
        return FileVerdict(file.name, file.size, "size", problem)
    if stored.digest is not None and not deep:
        problem = "" if stored.digest == file.digest else "has another checksum in the store"
        return FileVerdict(file.name, file.size, CHECKSUM, problem)
    bad = [
        str(index)
        for index, (_, sound) in enumerate(verified_parts(store, key, file, pool))
        if not sound
    ]
    problem = f"has other bytes than those saved in part {', '.join(bad)}" if bad else ""
    return FileVerdict(file.name, file.size, ALL_BYTES, problem)
