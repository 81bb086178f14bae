"""Hand-made snapshots, slots and checkpoints, built with numpy and safetensors alone.

A snapshot's content follows from its attempt, save and step, so that a test can tell which of them
it has before it. Nothing here imports torch, and nothing uses the code that lays out real slots.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from runner.checkpoint.attempts import Ledger
from runner.checkpoint.format import FileImage
from runner.checkpoint.manifest import FileEntry, Manifest, Moment, moment_to_json
from runner.checkpoint.persist import Persister
from runner.checkpoint.retention import Keep
from runner.errors import StoreError
from runner.spool import Marker, RankSpool
from runner.store import DirectoryStore

RUN = "rul-fd001"
PAGE = 4096

# What must never become a file of a checkpoint, whoever says so.
FOREIGN_NAMES = [
    "",
    ".",
    "..",
    "../state.json",
    "a/../b",
    "a..b",
    "a/b",
    "a\\b",
    "/etc/passwd",
    "C:x",
    ".hidden",
    "-rf",
    "a b",
    "a\n",
    "a\0",
    "ä",
    "0" * 202,
    "manifest.json",
]


@dataclass(frozen=True)
class Snapshot:
    """What a trainer would leave in a slot: the moment, and the bytes of each file."""

    moment: Moment
    files: Mapping[str, bytes]

    @property
    def name(self) -> str:
        return str(self.moment.name)


def snapshot(attempt: int = 1, save: int = 1, step: int | None = None, **moment: Any) -> Snapshot:
    """A small state with two files of tensors; the step is 100 for each save unless given."""
    step = 100 * save if step is None else step
    values = np.random.default_rng([attempt, save, step])
    model = {
        "bias": values.normal(size=4).astype(np.float32),
        "weight": values.normal(size=(4, 3)).astype(np.float32),
    }
    optimizer = {
        "exp_avg": values.normal(size=(4, 3)).astype(np.float32),
        "step": np.array(step, dtype=np.int64),
    }
    state = {"version": 1, "attempt": attempt, "save": save, "step": step}
    files = {
        "model.safetensors": safetensors.numpy.save(model),
        "optimizer.safetensors": safetensors.numpy.save(optimizer),
        "state.json": json.dumps(state).encode(),
    }
    facts = {"epoch": 0, "batch": step, "created_at": "2025-11-21T05:46:00+00:00"} | moment
    return Snapshot(Moment(attempt, save, step, **facts), files)


def lay_out(files: Mapping[str, bytes]) -> tuple[list[FileImage], bytearray]:
    """The files one after another, each on a page of its own."""
    images, memory = [], bytearray()
    for name, content in files.items():
        memory.extend(bytes(-len(memory) % PAGE))
        images.append(FileImage(name, len(memory), len(content)))
        memory.extend(content)
    return images, memory


def fill(
    rank: RankSpool,
    slot: int,
    taken: Snapshot,
    *,
    must: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Marker:
    """Write a snapshot into a slot and hand it over."""
    images, memory = lay_out(taken.files)
    rank.slot_path(slot).write_bytes(memory)
    marker = Marker(
        slot, must, moment_to_json(taken.moment), [asdict(i) for i in images], facts or {}
    )
    rank.publish(marker)
    return marker


def read_slot(rank: RankSpool, marker: Marker) -> dict[str, bytes]:
    """The files that a marker says lie in its slot."""
    memory = rank.slot_path(marker.slot).read_bytes()
    return {
        image["name"]: memory[image["offset"] : image["offset"] + image["size"]]
        for image in marker.images
    }


def file_entry(name: str, content: bytes, part_bytes: int = 16 << 20) -> FileEntry:
    """What a manifest says of a file."""
    parts = [content[at : at + part_bytes] for at in range(0, len(content), part_bytes)] or [b""]
    digests = [hashlib.sha256(part).digest() for part in parts]
    hexes = tuple(digest.hex() for digest in digests)
    whole = hexes[0] if len(hexes) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()
    return FileEntry(name, len(content), part_bytes, hexes, whole)


def commit(store: DirectoryStore, taken: Snapshot, run_id: str = RUN) -> Manifest:
    """Make a snapshot a checkpoint, whoever has the run."""
    persister = Persister(store, Ledger(store, run_id, "0123456789abcdef"), Keep())
    return persister.persist(taken.moment, views(taken.files))


def views(files: Mapping[str, bytes]) -> dict[str, memoryview]:
    return {name: memoryview(content) for name, content in files.items()}


def checkpoint_folder(store: DirectoryStore, name: str, run_id: str = RUN) -> Path:
    return store.root / run_id / "checkpoints" / name


class RefusingStore:
    """A store of which the methods named in `refused` raise StoreError, as if it were away."""

    def __init__(self, store: DirectoryStore, refused: Sequence[str] = ()) -> None:
        self.store, self.url, self.root = store, store.url, store.root
        self.refused = set(refused)

    def __getattr__(self, method: str) -> Any:
        def refuse(*arguments: Any) -> Any:
            raise StoreError(f"{method} is refused")

        return refuse if method in self.refused else getattr(self.store, method)


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder where fsync costs nothing, for tests that make many checkpoints."""
    shared_memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(dir=shared_memory if shared_memory.is_dir() else None)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size, mounted on `folder`; skips the test where none can be."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)]
    try:
        subprocess.run(["mount", *options], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
