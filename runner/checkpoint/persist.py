"""From a slot to a durable checkpoint: hash, write, commit, and only then let old ones go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from typing import Any, NamedTuple

from runner.checkpoint import format as fmt
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.manifest import FileEntry, Manifest, Moment
from runner.checkpoint.retention import Keep, delete_checkpoint, pins, superfluous
from runner.errors import Abandoned, CheckpointCorrupt, NotFound, StoreError
from runner.store import Content, Part, Staging, Store

log = logging.getLogger(__name__)

_LARGE_BYTES = 64 * fmt.MEBIBYTE
_WORTH_COPYING_BYTES = fmt.MEBIBYTE


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
    """

    store: Store
    ledger: Ledger
    keep: Keep
    provenance: Callable[[], Mapping[str, Any]] = dict

    def __post_init__(self) -> None:
        self._known: dict[str, Manifest] | None = None

    def look_again(self) -> None:
        """Forget which checkpoints there are: something else may have changed that."""
        self._known = None

    def persist(
        self,
        moment: Moment,
        files: Mapping[str, memoryview],
        provenance: Mapping[str, Any] | None = None,
        gives_way: Callable[[], bool] = bool,
    ) -> Manifest:
        """Commit one snapshot: files by their names. When this returns it is durable.

        A file that has the same content as in the checkpoint before is copied in the store.

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
            return known[str(moment.name)]
        prefix = f"{self.ledger.run_id}/checkpoints/{moment.name}"
        staging = self.store.stage(prefix, self.ledger.owner)
        try:
            entries = self._store_files(staging, moment, files, gives_way)
            facts = {**self.provenance(), **(provenance or {})}
            manifest = Manifest(self.ledger.run_id, moment, entries, facts)
            self.ledger.check_fence()
            staging.commit(fmt.MANIFEST_FILE, manifest.to_json())
        except BaseException:
            self.look_again()  # the answer to a commit may have been lost
            staging.abort()
            raise
        known[manifest.name] = manifest
        return manifest

    def _store_files(
        self,
        staging: Staging,
        moment: Moment,
        files: Mapping[str, memoryview],
        gives_way: Callable[[], bool],
    ) -> tuple[FileEntry, ...]:
        """Copy what is unchanged, write the rest, all in one go."""

        def go_on() -> None:
            if gives_way():
                raise Abandoned(f"saving {moment.name} gives way to a newer state")

        entries: dict[str, FileEntry] = {}
        changed: list[Content] = []
        for name, memory in files.items():
            twin, digests = self._twin(name, memory, go_on)
            if twin is not None and _is_copied(staging, twin, name, digests):
                entries[name] = _entry(name, len(memory), twin.entry.part_bytes, digests)
            else:
                changed.append(_content(name, memory, digests, go_on))
        for content, parts in zip(changed, staging.write(changed), strict=True):
            size = len(files[content.name])
            entries[content.name] = _entry(content.name, size, content.part_bytes, parts)
        return tuple(entries[name] for name in files)

    def _twin(
        self, name: str, memory: memoryview, go_on: Callable[[], None]
    ) -> tuple[_Twin | None, list[bytes]]:
        """The newest stored file of this name, if it has this content; the digests on the way.

        What has changed shows in its first part, mostly, and is then not read further.
        """
        part_bytes = fmt.part_bytes_for(len(memory))
        if len(memory) < _WORTH_COPYING_BYTES:
            return None, []
        for manifest in sorted(self._all_known().values(), key=_age, reverse=True):
            entry = next((file for file in manifest.files if file.name == name), None)
            if entry is None:
                continue
            digests: list[bytes] = []
            if (entry.size, entry.part_bytes) != (len(memory), part_bytes):
                return None, digests
            for at, known in zip(_starts(len(memory), part_bytes), entry.parts, strict=True):
                go_on()
                digests.append(sha256(memory[at : at + part_bytes]).digest())
                if digests[-1].hex() != known:
                    return None, digests
            prefix = f"{self.ledger.run_id}/checkpoints/{manifest.name}"
            return _Twin(f"{prefix}/{name}", entry), digests
        return None, []

    def _all_known(self) -> dict[str, Manifest]:
        if self._known is None:
            archive = Archive(self.store, self.ledger.run_id)
            self._known = {manifest.name: manifest for manifest in archive.manifests()}
        return self._known

    def retain(self) -> list[str]:
        """Delete what the policy no longer keeps; the names of what went."""
        known = self._all_known()
        moments = [manifest.moment for manifest in known.values()]
        record = self.ledger.record or self.ledger.latest()
        protected = {record.resumed_from or ""} if record else set()
        if not superfluous(moments, self.keep, protected):
            return []
        protected |= pins(self.store, self.ledger.run_id)
        gone = [str(moment.name) for moment in superfluous(moments, self.keep, protected)]
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


def _is_copied(staging: Staging, twin: _Twin, name: str, digests: Sequence[bytes]) -> bool:
    """Copy a file in the store; False if it has to be written after all."""
    try:
        staging.copy(name, twin.key, twin.entry.part_bytes, digests)
    except NotFound:  # somebody has deleted it
        return False
    return True


def _content(
    name: str, memory: memoryview, digests: Sequence[bytes], go_on: Callable[[], None]
) -> Content:
    """A file as it lies in the slot, in parts, the first of which may be hashed already."""
    part_bytes = fmt.part_bytes_for(len(memory))

    def parts() -> Iterator[Part]:
        for at, digest in zip_longest(_starts(len(memory), part_bytes), digests):
            go_on()
            yield Part(memory[at : at + part_bytes], digest)

    return Content(name, part_bytes, parts())


def _starts(size: int, part_bytes: int) -> range:
    return range(0, max(1, size), part_bytes)


def _entry(name: str, size: int, part_bytes: int, digests: Sequence[bytes]) -> FileEntry:
    hexed = tuple(digest.hex() for digest in digests)
    return FileEntry(name, size, part_bytes, hexed, fmt.file_digest(digests))


def _age(manifest: Manifest) -> fmt.CheckpointName:
    return manifest.moment.name
