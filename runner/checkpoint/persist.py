"""From a slot to a durable checkpoint: hash, write, commit, and only then let old ones go."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from typing import Any, NamedTuple

from runner.checkpoint import format as fmt
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.compression import CompressedFile, Compressor, Rates
from runner.checkpoint.frames import chunk_bytes_for
from runner.checkpoint.manifest import FileEntry, Manifest, Moment
from runner.checkpoint.retention import (
    Keep,
    counted_apart,
    delete_checkpoint,
    pins,
    superfluous,
)
from runner.checkpoint.validation import Verdict, read_validation
from runner.errors import (
    Abandoned,
    CheckpointCorrupt,
    NotFound,
    StoreDenied,
    StoreError,
    StoreUnfit,
)
from runner.store import Content, Part, Staging, Store

log = logging.getLogger(__name__)

_EMERGENCIES = frozenset(("preemption", "interrupt"))
_LARGE_BYTES = 64 * fmt.MEBIBYTE
_WORTH_COPYING_BYTES = fmt.MEBIBYTE


@dataclass(frozen=True)
class Timing:
    """What a save took: writing the files, with the hashing of them, and committing them."""

    upload_seconds: float = 0.0
    commit_seconds: float = 0.0
    nbytes: int = 0


NO_TIMING = Timing()


class _Twin(NamedTuple):
    """A stored file that has the content of one that is to be stored."""

    key: str
    entry: FileEntry


@dataclass
class Persister:
    """Makes snapshots durable in one run, on behalf of the supervisor that owns the ledger.

    Nobody else commits there, so it looks once which checkpoints there are and knows from then on:
    a save of an old run costs no more requests than one of a young run. `provenance` is asked at
    each save, because it is collected while the first step runs.

    With `compresses`, files with tensors are stored compressed; in an emergency (a preemption,
    an interrupt) only if it is known that the save ends sooner then. With `validates`, what is
    deleted depends on how checkpoints were validated: then it is looked, once, how each was.
    `timing` is of the last save.
    """

    store: Store
    ledger: Ledger
    keep: Keep
    provenance: Callable[[], Mapping[str, Any]] = dict
    compresses: bool = False
    validates: bool = False

    def __post_init__(self) -> None:
        self._known: dict[str, Manifest] | None = None
        self._verdicts: dict[str, Verdict] | None = None
        self._spared: frozenset[str] = frozenset()
        self._sound: set[str] = set()
        self._rates = Rates()
        self.timing = NO_TIMING

    def look_again(self) -> None:
        """Forget which checkpoints there are: something else may have changed that."""
        self._known = self._verdicts = None

    def note_verdict(self, name: str, verdict: Verdict) -> None:
        """A checkpoint was validated just now; from any thread."""
        if self._verdicts is not None:
            self._verdicts[name] = verdict

    def vouch(self, name: str) -> None:
        """A checkpoint of this run has just been verified, so files may be copied from it."""
        self._sound.add(name)

    def spare(self, names: Iterable[str]) -> None:
        """Until others are named these are not deleted: they are being validated, or wait for it.

        From any thread.
        """
        self._spared = frozenset(names)

    @property
    def count(self) -> int:
        """How many checkpoints there are, as far as it has looked."""
        return len(self._known or ())

    def persist(
        self,
        moment: Moment,
        files: Mapping[str, memoryview],
        provenance: Mapping[str, Any] | None = None,
        gives_way: Callable[[], bool] = bool,
    ) -> Manifest:
        """Commit one snapshot: files by their names. When this returns it is durable.

        A file that has the same content as in the checkpoint before is copied in the store. Where
        a copy is not compared by checksum, only from a checkpoint that was written or verified in
        this persister's life: what a disk has spoilt since long ago is not handed on for ever.

        One that is committed already is left as it is: its supervisor was killed before it could
        say so, or the store's answer was lost.

        Raises Fenced if a newer attempt has the run, StoreError if the store refuses, Abandoned
        when `gives_way` says at some part that something else is more urgent; nothing is left
        behind then, and no earlier checkpoint was touched.
        """
        if sum(map(len, files.values())) >= _LARGE_BYTES:
            self.ledger.check_fence()  # before much is moved for nothing; a commit asks always
        known = self._all_known()
        if str(moment.name) in known:
            self.timing = NO_TIMING
            return known[str(moment.name)]
        begun = time.perf_counter()
        prefix = f"{self.ledger.run_id}/checkpoints/{moment.name}"
        staging = self.store.stage(prefix, self.ledger.owner)
        try:
            is_urgent = not _EMERGENCIES.isdisjoint(moment.triggers)
            compresses = self.compresses and (not is_urgent or self._rates.compressing_ends_sooner)
            with ExitStack() as stack:
                compressor = stack.enter_context(Compressor()) if compresses else None
                entries = self._store_files(staging, moment, files, gives_way, compressor)
            written = time.perf_counter()
            facts = {**self.provenance(), **(provenance or {})}
            manifest = Manifest(self.ledger.run_id, moment, entries, facts)
            self.ledger.check_fence()
            staging.commit(fmt.MANIFEST_FILE, manifest.to_json())
        except BaseException:
            self.look_again()  # the answer to a commit may have been lost
            staging.abort()
            raise
        known[manifest.name] = manifest
        self._sound.add(manifest.name)
        committed = time.perf_counter()
        self.timing = Timing(written - begun, committed - written, manifest.nbytes)
        return manifest

    def _store_files(
        self,
        staging: Staging,
        moment: Moment,
        files: Mapping[str, memoryview],
        gives_way: Callable[[], bool],
        compressor: Compressor | None,
    ) -> tuple[FileEntry, ...]:
        """Copy what is unchanged, write the rest, all in one go."""

        def go_on() -> None:
            if gives_way():
                raise Abandoned(f"saving {moment.name} gives way to a newer state")

        entries: dict[str, FileEntry] = {}
        changed: dict[str, _PlainFile | CompressedFile] = {}
        for name, memory in files.items():
            packs = compressor is not None and len(memory) > 0 and _can_be_compressed(name)
            twin, digests = self._twin(name, memory, go_on, packs=packs)
            if twin is not None and _is_copied(staging, twin, go_on):
                entries[name] = twin.entry
            elif compressor is not None and packs:
                changed[name] = CompressedFile(name, memory, digests, compressor, go_on)
            else:
                changed[name] = _PlainFile(name, memory, digests, go_on)
        begun = time.perf_counter()
        written = staging.write([file.content for file in changed.values()])
        seconds = time.perf_counter() - begun
        for (name, file), parts in zip(changed.items(), written, strict=True):
            entries[name] = file.entry(parts)
        self._measure([entries[name] for name in changed], seconds, compressor)
        return tuple(entries[name] for name in files)

    def _measure(
        self, written: Sequence[FileEntry], seconds: float, compressor: Compressor | None
    ) -> None:
        """Learn from a save how fast the store is, and how fast the compression."""
        waited = 0.0 if compressor is None else compressor.waited_seconds
        self._rates.stored(sum(file.size for file in written), seconds - waited)
        if compressor is not None:
            packed = [file for file in written if file.frames is not None]
            sizes = sum(file.content_size for file in packed), sum(file.size for file in packed)
            self._rates.compressed(*sizes, compressor.seconds)

    def _twin(
        self, name: str, memory: memoryview, go_on: Callable[[], None], *, packs: bool
    ) -> tuple[_Twin | None, list[bytes]]:
        """The newest stored file of this name, if it has this content; the digests on the way.

        What has changed shows in its first part, mostly, and is then not read further. It must be
        stored the way that is wanted: compressed (`packs`) or plain. In haste either will do. The
        digests are those of the parts, or the chunks, in which it would be written now.
        """
        if len(memory) < _WORTH_COPYING_BYTES:
            return None, []
        for manifest in sorted(self._all_known().values(), key=_age, reverse=True):
            entry = next((file for file in manifest.files if file.content_name == name), None)
            if entry is None:
                continue
            if not (self.store.checks_copies or manifest.name in self._sound):
                return None, []
            is_packed = entry.frames is not None
            is_hasty = self.compresses and not packs and _can_be_compressed(name)
            if entry.content_size != len(memory) or not (is_packed == packs or is_hasty):
                return None, []
            cut_bytes, cut_digests = entry.cut
            if is_packed == packs and cut_bytes != _cut_bytes_for(len(memory), packs=packs):
                return None, []
            digests: list[bytes] = []
            for at, known in zip(_starts(len(memory), cut_bytes), cut_digests, strict=True):
                go_on()
                digests.append(sha256(memory[at : at + cut_bytes]).digest())
                if digests[-1].hex() != known:
                    return None, digests if is_packed == packs else []
            prefix = f"{self.ledger.run_id}/checkpoints/{manifest.name}"
            return _Twin(f"{prefix}/{entry.name}", entry), digests if is_packed == packs else []
        return None, []

    def _all_known(self) -> dict[str, Manifest]:
        if self._known is None:
            archive = Archive(self.store, self.ledger.run_id)
            self._known = {manifest.name: manifest for manifest in archive.manifests()}
        return self._known

    def _all_verdicts(self) -> dict[str, Verdict]:
        """How the checkpoints of this run were validated, by their names."""
        if self._verdicts is None:
            verdicts = {}
            for name in self._all_known() if self.validates else ():
                found = read_validation(self.store, self.ledger.run_id, name)
                if found is not None:
                    verdicts[name] = found.verdict
            self._verdicts = verdicts
        return self._verdicts

    def retain(self) -> list[str]:
        """Delete what the policy no longer keeps; the names of what went."""
        known, verdicts = self._all_known(), self._all_verdicts()
        record = self.ledger.record or self.ledger.latest()
        protected = {*self._spared, *([record.resumed_from or ""] if record else [])}

        def going() -> list[str]:
            moments = [manifest.moment for manifest in known.values()]
            groups = counted_apart(moments, self.ledger.gone_back, verdicts)
            return [
                str(moment.name)
                for group in groups
                for moment in superfluous(group, self.keep, protected, verdicts)
            ]

        if not going():
            return []
        protected |= pins(self.store, self.ledger.run_id)
        gone = going()
        for name in gone:
            files = [file.name for file in known[name].files]
            delete_checkpoint(self.store, self.ledger, name, files)
            del known[name]
        return gone

    def sweep(self) -> list[str]:
        """Remove the unfinished saves of earlier attempts; those of this one are not touched.

        And goes on with what an earlier attempt had begun to delete: files without a manifest that
        are older than a checkpoint which has one, so they are no upload in progress.
        """
        record = self.ledger.record
        if record is None:
            return []

        def is_stale(name: str) -> bool:
            staged = fmt.CheckpointName.parse(name)
            return staged is not None and staged.attempt < record.attempt

        try:
            gone = self.store.sweep(f"{self.ledger.run_id}/checkpoints", is_stale)
            known = self._all_known()
            for name in Archive(self.store, self.ledger.run_id).names():
                newer = any(manifest.moment.name > name for manifest in known.values())
                if newer and self._has_no_manifest(str(name)):
                    delete_checkpoint(self.store, self.ledger, str(name))
                    gone.append(str(name))
        except NotFound:
            return []
        except StoreError as error:
            log.warning("remains of earlier saves could not be removed: %s", error)
            return []
        return gone

    def _has_no_manifest(self, name: str) -> bool:
        try:
            Archive(self.store, self.ledger.run_id).manifest(name)
        except NotFound:
            return True
        except CheckpointCorrupt:
            return False
        return False


class _PlainFile:
    """A file as it lies in the slot, in parts, the first of which may be hashed already."""

    def __init__(
        self, name: str, memory: memoryview, digests: Sequence[bytes], go_on: Callable[[], None]
    ) -> None:
        part_bytes = fmt.part_bytes_for(len(memory))

        def parts() -> Iterator[Part]:
            for at, digest in zip_longest(_starts(len(memory), part_bytes), digests):
                go_on()
                yield Part(memory[at : at + part_bytes], digest)

        self._size = len(memory)
        self.content = Content(name, part_bytes, parts())

    def entry(self, parts: Sequence[bytes]) -> FileEntry:
        """What the manifest says of it, when the store has taken it."""
        hexed = tuple(part.hex() for part in parts)
        name, part_bytes = self.content.name, self.content.part_bytes
        return FileEntry(name, self._size, part_bytes, hexed, fmt.file_digest(parts))


def _is_copied(staging: Staging, twin: _Twin, go_on: Callable[[], None]) -> bool:
    """Copy a file in the store; False if it has to be written after all.

    Whatever may have become of the stored one, the bytes to write are here. Only what a write would
    be refused for, too, is raised.
    """
    entry = twin.entry
    try:
        digests = [*map(bytes.fromhex, entry.parts)]
        staging.copy(entry.name, twin.key, entry.size, entry.part_bytes, digests, go_on)
    except (StoreDenied, StoreUnfit):
        raise
    except StoreError as error:
        log.warning(
            "%s cannot be copied from an earlier save, it is written: %s", entry.name, error
        )
        return False
    return True


def _can_be_compressed(name: str) -> bool:
    """Whether it holds tensors, and its other name is one that a manifest may have."""
    return name.endswith(fmt.TENSOR_SUFFIX) and fmt.is_file_name(fmt.compressed_name(name))


def _cut_bytes_for(size: int, *, packs: bool) -> int:
    return chunk_bytes_for(size) if packs else fmt.part_bytes_for(size)


def _starts(size: int, part_bytes: int) -> range:
    return range(0, max(1, size), part_bytes)


def _age(manifest: Manifest) -> fmt.CheckpointName:
    return manifest.moment.name
