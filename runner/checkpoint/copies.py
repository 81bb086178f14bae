"""Plain copies of a checkpoint's files outside of its store, every byte verified."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from runner.checkpoint.archive import Archive
from runner.checkpoint.format import MANIFEST_FILE
from runner.checkpoint.manifest import FileEntry, Manifest, plain_entry
from runner.errors import CheckpointCorrupt, UsageError
from runner.store import Store

READS_AHEAD = 4


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when it is full. After an error nothing is there.

    UsageError if `folder` exists and is not empty.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} is there already; name a new folder, or an empty one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_files(archive: Archive, manifest: Manifest, folder: Path) -> Manifest:
    """Copy all files into an existing folder, compressed ones plain; the manifest that is there.

    CheckpointCorrupt if a part is not the one that was saved, NotFound if the checkpoint is gone.
    """
    entries = [copy_file(archive, manifest, file, folder) for file in manifest.files]
    plain = replace(manifest, files=tuple(entries))
    (folder / MANIFEST_FILE).write_bytes(plain.to_json())
    return plain


def copy_file(archive: Archive, manifest: Manifest, file: FileEntry, folder: Path) -> FileEntry:
    """The same for one file of a checkpoint; what a manifest says of the copy."""
    target = folder / file.content_name
    if file.frames is not None:
        return _unpack(archive, manifest, file, target)
    key = f"{archive.run_id}/checkpoints/{manifest.name}/{file.name}"
    with target.open("xb") as copy, ThreadPoolExecutor(READS_AHEAD, "copy") as pool:
        for index, (part, sound) in enumerate(verified_parts(archive.store, key, file, pool)):
            if not sound:
                problem = f"part {index} of {file.name} is not the one saved"
                raise CheckpointCorrupt(manifest.name, problem)
            copy.write(part)
    return file


def _unpack(archive: Archive, manifest: Manifest, file: FileEntry, target: Path) -> FileEntry:
    """Write the plain file that a compressed one holds."""
    with target.open("xb+") as copy:
        os.posix_fallocate(copy.fileno(), 0, file.content_size)  # a full disk is told here
        memory = memoryview(mmap.mmap(copy.fileno(), file.content_size))
    archive.load_file(manifest, file, memory)
    return plain_entry(target.name, memory)


def verified_parts(
    store: Store, key: str, file: FileEntry, pool: ThreadPoolExecutor
) -> Iterator[tuple[bytearray, bool]]:
    """The parts of a file in their order, each with whether it is the one that was saved.

    A few are read ahead, and no more than that are held in memory.
    """
    starts = range(0, max(1, file.size), file.part_bytes)

    def read(index: int) -> tuple[bytearray, bool]:
        begin = starts[index]
        buffer = bytearray(min(file.part_bytes, file.size - begin))
        if buffer:
            store.fetch(key, begin, memoryview(buffer))
        return buffer, sha256(buffer).hexdigest() == file.parts[index]

    ahead = [pool.submit(read, index) for index in range(min(READS_AHEAD, len(starts)))]
    for index in range(len(starts)):
        yield ahead.pop(0).result()
        if index + READS_AHEAD < len(starts):
            ahead.append(pool.submit(read, index + READS_AHEAD))
