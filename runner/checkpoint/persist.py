"""From a slot to a durable checkpoint: hash, write, commit, and only then let old ones go."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.checkpoint import format as fmt
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.format import FileImage
from runner.checkpoint.manifest import FileEntry, Manifest, Moment
from runner.checkpoint.retention import Keep, delete_checkpoint, pins, superfluous
from runner.errors import CheckpointCorrupt, NotFound, StoreError
from runner.store import Content, Part, Store

log = logging.getLogger(__name__)


@dataclass
class Persister:
    """Makes snapshots durable in one run, on behalf of the supervisor that owns the ledger.

    `provenance` is asked at each save, because it is collected while the first step runs.
    """

    store: Store
    ledger: Ledger
    keep: Keep
    provenance: Callable[[], Mapping[str, Any]] = dict

    def persist(
        self,
        moment: Moment,
        images: Sequence[FileImage],
        slot: memoryview,
        provenance: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Commit one snapshot. When this returns it is durable.

        One that is committed already is left as it is: its supervisor was killed before it could
        say so, or the store's answer was lost.

        Raises Fenced if a newer attempt has the run, StoreError if the store refuses; nothing is
        left behind then, and no earlier checkpoint was touched.
        """
        self.ledger.check_fence()
        with contextlib.suppress(NotFound, CheckpointCorrupt):
            return Archive(self.store, self.ledger.run_id).manifest(str(moment.name))
        prefix = f"{self.ledger.run_id}/checkpoints/{moment.name}"
        staging = self.store.stage(prefix, self.ledger.owner)
        try:
            contents = [_content(image, slot) for image in images]
            digests = staging.write(contents)
            files = tuple(map(_entry, images, contents, digests))
            facts = {**self.provenance(), **(provenance or {})}
            manifest = Manifest(self.ledger.run_id, moment, files, facts)
            self.ledger.check_fence()
            staging.commit(fmt.MANIFEST_FILE, manifest.to_json())
        except BaseException:
            staging.abort()
            raise
        return manifest

    def retain(self) -> list[str]:
        """Delete what the policy no longer keeps; the names of what went.

        Goes on with what an earlier call had begun to delete, too: files without a manifest that
        are older than a checkpoint which has one, so they are no upload in progress.
        """
        archive = Archive(self.store, self.ledger.run_id)
        moments, remains = [], []
        for name in archive.names():
            try:
                moments.append(archive.manifest(str(name)).moment)
            except NotFound:
                remains += [str(name)] if moments else []
            except CheckpointCorrupt:
                continue
        protected = pins(self.store, self.ledger.run_id)
        newest = self.ledger.latest()
        if newest is not None and newest.resumed_from is not None:
            protected.add(newest.resumed_from)
        old = [str(moment.name) for moment in superfluous(moments, self.keep, protected)]
        for gone in [*old, *remains]:
            delete_checkpoint(self.store, self.ledger, gone)
        return [*old, *remains]

    def sweep(self) -> list[str]:
        """Remove the unfinished saves of earlier attempts; those of this one are not touched."""
        record = self.ledger.record
        if record is None:
            return []

        def is_stale(name: str) -> bool:
            staged = fmt.CheckpointName.parse(name)
            return staged is not None and staged.attempt < record.attempt

        try:
            return self.store.sweep(f"{self.ledger.run_id}/checkpoints", is_stale)
        except NotFound:
            return []
        except StoreError as error:
            log.warning("remains of earlier saves could not be removed: %s", error)
            return []


def _content(image: FileImage, slot: memoryview) -> Content:
    """A file as it lies in the slot, in parts."""
    part_bytes = fmt.part_bytes_for(image.size)
    starts = range(0, max(1, image.size), part_bytes)
    inside = slot[image.offset : image.offset + image.size]
    return Content(image.name, part_bytes, [Part(inside[at : at + part_bytes]) for at in starts])


def _entry(image: FileImage, content: Content, digests: Sequence[bytes]) -> FileEntry:
    hexed = tuple(digest.hex() for digest in digests)
    return FileEntry(image.name, image.size, content.part_bytes, hexed, fmt.file_digest(digests))
