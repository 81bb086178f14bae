"""The checkpoints that a run has in a store: which there are, and whether they are sound.

<run>/checkpoints/step-…/        see `format`
<run>/quarantine/step-….json     why a checkpoint is not used any more; its files stay
<run>/pins/step-…                kept by hand, whatever retention says
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

from runner.checkpoint import format as fmt
from runner.checkpoint.compression import Decompression
from runner.checkpoint.format import CheckpointName, FileImage
from runner.checkpoint.latest import read_latest
from runner.checkpoint.manifest import FileEntry, Manifest
from runner.checkpoint.retention import ranked
from runner.checkpoint.validation import Validation, Verdict, read_validation
from runner.errors import CheckpointCorrupt, CheckpointInvalid, NotFound, StoreError, UnknownName
from runner.store import Store
from runner.wallclock import utc_now

log = logging.getLogger(__name__)

_MAX_MANIFEST_BYTES = 64 * fmt.MEBIBYTE
_MAX_NOTE_BYTES = 1 << 20
_READS = 2  # of a part, before what it holds counts as what is stored


@dataclass(frozen=True)
class Layout:
    """Where the files of a checkpoint go in one block of memory of `nbytes`."""

    images: tuple[FileImage, ...]
    nbytes: int


def _nothing() -> None:
    pass


def _say_quarantined(name: str, problem: str) -> None:
    log.error("checkpoint %s is corrupt: %s; it goes into quarantine", name, problem)


class Archive:
    """Reads the checkpoints of one run; the only thing it ever writes is a quarantine marker.

    `before_part` is called before each part of a file is read, and may raise to end that; so many
    parts are read at once as the store likes best, unless `at_once` says something else.
    `on_quarantine` hears of each checkpoint that is marked, and why.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        on_quarantine: Callable[[str, str], None] = _say_quarantined,
        *,
        before_part: Callable[[], None] = _nothing,
        at_once: int | None = None,
    ) -> None:
        self.store, self.run_id = store, run_id
        self._on_quarantine = on_quarantine
        self._before_part = before_part
        self._at_once = store.fetches_at_once if at_once is None else at_once

    def names(self) -> list[CheckpointName]:
        """Committed or not, newest first, without those in quarantine."""
        entries = self.store.children(f"{self.run_id}/checkpoints")
        names = [name for name in map(CheckpointName.parse, entries) if name is not None]
        bad = self.quarantined() if names else set()
        return sorted((name for name in names if str(name) not in bad), reverse=True)

    def quarantined(self) -> set[str]:
        """Names of the checkpoints that were found corrupt."""
        files = self.store.children(f"{self.run_id}/quarantine")
        return {file.removesuffix(".json") for file in files}

    def why_quarantined(self, name: str) -> str:
        """What was wrong with a checkpoint; empty if that is not known any more."""
        key = f"{self.run_id}/quarantine/{name}.json"
        try:
            note = json.loads(self.store.read(key, _MAX_NOTE_BYTES))
            return str(note["reason"])
        except (NotFound, ValueError, TypeError, KeyError, RecursionError):
            return ""

    def manifest(self, name: str) -> Manifest:
        """NotFound if there is none (so no checkpoint), CheckpointInvalid if it is unusable."""
        key = f"{self.run_id}/checkpoints/{name}/{fmt.MANIFEST_FILE}"
        try:
            data = self.store.read(key, _MAX_MANIFEST_BYTES)
        except NotFound:
            raise
        except StoreError:
            size = self.store.stored(key).size
            if size <= _MAX_MANIFEST_BYTES:
                raise
            raise CheckpointInvalid(name, f"its manifest has {size} bytes") from None
        return Manifest.from_json(data, name)

    def manifests(self) -> Iterator[Manifest]:
        """Every readable manifest, newest first."""
        for name in self.names():
            try:
                yield self.manifest(str(name))
            except (NotFound, CheckpointCorrupt):
                continue

    def newest(self) -> Manifest | None:
        """The newest one, by the hint where that is right: two reads, for those who only look."""
        latest = read_latest(self.store, self.run_id)
        if latest is not None:
            with contextlib.suppress(NotFound, CheckpointCorrupt):
                return self.manifest(latest.checkpoint)
        return next(self.manifests(), None)

    def find(self, which: str, metric: str | None = None, mode: str = "min") -> Manifest:
        """The checkpoint that a user names: `latest`, `best`, a step, or its full name.

        One that validation found invalid is not the best, unless there is no other.

        Raises UnknownName if there is no such checkpoint, CheckpointInvalid if it is unusable.
        """
        manifests = {manifest.name: manifest for manifest in self.manifests()}
        if which == "latest" and manifests:
            return next(iter(manifests.values()))
        if which == "best" and metric is not None:
            best = [
                str(m.name) for m in ranked([m.moment for m in manifests.values()], metric, mode)
            ]
            if best:
                return manifests[next((b for b in best if not self.is_invalid(b)), best[0])]
        if which.isascii() and which.isdigit():
            for manifest in manifests.values():
                if str(manifest.moment.step) == (which.lstrip("0") or "0"):
                    return manifest
        if which in manifests:
            return manifests[which]
        if CheckpointName.parse(which) in self.names():
            return self.manifest(which)
        place = f"of run {self.run_id}"
        if which == "best" and manifests:
            lacks = f"none has the metric {metric}" if metric else "the job has no keep.best"
            raise UnknownName("checkpoint", which, place=place, remedy=lacks)
        steps = [str(manifest.moment.step) for manifest in manifests.values()]
        names = [*manifests, *steps, *(("latest", "best") if manifests else ())]
        raise UnknownName("checkpoint", which, names, place)

    def validation(self, name: str) -> Validation | None:
        """What came of trying a checkpoint; None if it was not tried. One request."""
        return read_validation(self.store, self.run_id, name)

    def is_invalid(self, name: str) -> bool:
        """Whether a checkpoint was tried, and is of no use. One request."""
        found = self.validation(name)
        return found is not None and found.verdict is Verdict.INVALID

    def quarantine(self, name: str, reason: str) -> None:
        """Mark a checkpoint as not to be used; its files stay for whoever wants to look."""
        note = {"checkpoint": name, "reason": reason, "found_at": utc_now()}
        self._on_quarantine(name, reason)
        self.store.create(f"{self.run_id}/quarantine/{name}.json", json.dumps(note).encode())

    def layout(self, manifest: Manifest) -> Layout:
        """Where its files would go in a slot, after their sizes in the store were checked.

        CheckpointCorrupt if a file is missing or has another size; NotFound if the whole
        checkpoint has vanished meanwhile, which is no corruption.
        """
        images, end = [], 0
        for file in manifest.files:
            size = self._size(manifest, file)
            if size != file.size:
                raise CheckpointCorrupt(
                    manifest.name, f"{file.name} has {size} bytes instead of {file.size}"
                )
            image = FileImage(file.content_name, fmt.next_image_offset(end), file.content_size)
            images.append(image)
            end = image.offset + image.size
        return Layout(tuple(images), end)

    def load_into(self, manifest: Manifest, layout: Layout, memory: memoryview) -> None:
        """Read every file to its place, each part verified. CheckpointCorrupt names a bad part."""
        where = {image.name: image for image in layout.images}
        images = [(file, where[file.content_name]) for file in manifest.files]
        self._load(manifest, [(file, memory[i.offset : i.offset + i.size]) for file, i in images])

    def load_file(self, manifest: Manifest, file: FileEntry, memory: memoryview) -> None:
        """The same for one file, into memory of the size of its content."""
        self._load(manifest, [(file, memory)])

    def _load(self, manifest: Manifest, places: Sequence[tuple[FileEntry, memoryview]]) -> None:
        loads: list[Callable[[], None]] = []
        for file, place in places:
            frames = file.frames
            packed = None if frames is None else Decompression(file, frames, place)
            for index in range(len(file.parts)):
                if packed is None:
                    begin = index * file.part_bytes
                    part = place[begin : begin + file.part_bytes]
                    loads.append(partial(self._load_part, manifest, file, index, part))
                else:
                    loads.append(partial(self._unpack_part, manifest, file, index, packed))
        with ThreadPoolExecutor(self._at_once, "verify") as pool:
            futures = [pool.submit(load) for load in loads]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _load_part(self, manifest: Manifest, file: FileEntry, index: int, part: memoryview) -> None:
        """Read one part; once more if it is wrong, because a network may have spoilt it."""
        begin = index * file.part_bytes
        for _ in range(_READS):
            self._before_part()
            self.store.fetch(self._key(manifest, file), begin, part)
            if sha256(part).hexdigest() == file.parts[index]:
                return
        raise CheckpointCorrupt(
            manifest.name,
            f"bytes {begin} to {begin + len(part)} of {file.name} are not those saved",
        )

    def _unpack_part(
        self, manifest: Manifest, file: FileEntry, index: int, packed: Decompression
    ) -> None:
        """One part at a time is in memory on each thread; what it holds goes where it belongs."""
        begin = index * file.part_bytes
        part = memoryview(bytearray(min(file.part_bytes, file.size - begin)))
        self._load_part(manifest, file, index, part)
        try:
            packed.take(index, part)
        except ValueError as error:
            raise CheckpointCorrupt(manifest.name, str(error)) from error

    def verify(self, manifest: Manifest) -> None:
        """Read everything and compare with the manifest, in the memory of one part at a time."""
        for file in manifest.files:
            if self._size(manifest, file) != file.size:
                raise CheckpointCorrupt(manifest.name, f"{file.name} has another size")
            buffer = memoryview(bytearray(min(file.part_bytes, file.size)))
            for index in range(len(file.parts)):
                part = buffer[: min(file.part_bytes, file.size - index * file.part_bytes)]
                self._load_part(manifest, file, index, part)

    def digest(self, manifest: Manifest) -> str:
        """The digest of the content, 64 hex digits, computed from verified bytes."""
        layout = self.layout(manifest)
        memory = memoryview(bytearray(layout.nbytes))
        self.load_into(manifest, layout, memory)
        return fmt.content_digest(
            {
                image.name: memory[image.offset : image.offset + image.size]
                for image in layout.images
            }
        )

    def _size(self, manifest: Manifest, file: FileEntry) -> int:
        try:
            return self.store.stored(self._key(manifest, file)).size
        except NotFound:
            self.manifest(manifest.name)  # NotFound: deleted as a whole, manifest first
            raise CheckpointCorrupt(manifest.name, f"{file.name} is missing") from None

    def _key(self, manifest: Manifest, file: FileEntry) -> str:
        return f"{self.run_id}/checkpoints/{manifest.name}/{file.name}"
