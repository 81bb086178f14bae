"""Which checkpoint a run continues from, and bringing it, verified, into memory.

The newest that is sound wins, but for those that the run has gone back from, and those that
validation found invalid: they are passed over, and tried when nothing else is sound. A corrupt one
is marked in `quarantine/` and the one before it is tried; a store that refuses or times out proves
nothing and is an error. If the run has committed checkpoints and none of them verifies, that is an
error too: it never starts anew in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from runner.checkpoint.archive import Archive, Layout
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.format import CheckpointName
from runner.checkpoint.manifest import Manifest
from runner.errors import CheckpointCorrupt, NotFound, NoValidCheckpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint in memory. `passed_over` names newer ones that were gone back from."""

    manifest: Manifest
    layout: Layout
    passed_over: tuple[str, ...] = ()


def load_newest(
    archive: Archive,
    ledger: Ledger,
    allocate: Callable[[int], memoryview],
    *,
    skip: int = 0,
    before: CheckpointName | None = None,
    gone_back: Collection[str] = (),
    prefer_healthy: bool = False,
) -> Loaded | None:
    """Lay the newest sound checkpoint into memory that `allocate(nbytes)` gives.

    `skip` goes back by so many, or, where it is known, to what comes `before` the one that did not
    lead on (never past the oldest); if there is no sound one as old as that, a newer one has to do.
    Those in `gone_back` are not counted, and are tried late; those that validation found invalid,
    last of all. None if the run has never committed one. Raises NoValidCheckpoint, StoreError, or
    what `allocate` raises.
    """
    full = [m for m in _readable(archive) if m.moment.scope == "full"]
    trusted = [m for m in full if m.name not in gone_back] or full
    wanted = [m for m in trusted if m.moment.healthy and prefer_healthy] or trusted
    last_resort = [m for m in trusted if m not in wanted]
    last_resort += [m for m in full if m not in trusted]
    if skip and before is not None:
        skip = sum(manifest.moment.name >= before for manifest in wanted)
    candidates = [*wanted[skip:], *reversed(wanted[:skip]), *last_resort]
    for manifest in _invalid_last(archive, candidates):
        if not manifest.moment.healthy:
            log.warning("%s holds metrics that are not finite", manifest.name)
        loaded = load(archive, manifest, allocate)
        if loaded is not None:
            newer = full[: full.index(manifest)] if skip else []
            return replace(loaded, passed_over=tuple(m.name for m in newer))
    committed = [record.committed for record in ledger.records() if record.committed]
    if committed or archive.quarantined():
        raise NoValidCheckpoint(
            f"run {archive.run_id} has saved checkpoints (the last was "
            f"{committed[-1] if committed else 'quarantined'}), and none of them is sound; look at "
            f"{archive.store.url}/{archive.run_id}/quarantine, or start a new run with --new"
        )
    return None


def load(
    archive: Archive, manifest: Manifest, allocate: Callable[[int], memoryview]
) -> Loaded | None:
    """Lay this checkpoint into memory; None, and quarantine, if it is corrupt or has vanished."""
    try:
        layout = archive.layout(manifest)
        archive.load_into(manifest, layout, allocate(layout.nbytes))
    except CheckpointCorrupt as error:
        archive.quarantine(manifest.name, error.problem)
        return None
    except NotFound as error:
        log.warning("%s has been deleted meanwhile (%s)", manifest.name, error)
        return None
    return Loaded(manifest, layout)


def _invalid_last(archive: Archive, manifests: Iterable[Manifest]) -> Iterator[Manifest]:
    """Look at each, when its turn comes, whether validation found it invalid."""
    invalid = []
    for manifest in manifests:
        if archive.is_invalid(manifest.name):
            log.warning("%s is passed over: validation found it invalid", manifest.name)
            invalid.append(manifest)
        else:
            yield manifest
    yield from invalid


def _readable(archive: Archive) -> list[Manifest]:
    """Manifests newest first; one that cannot be read puts its checkpoint into quarantine."""
    manifests = []
    for name in archive.names():
        try:
            manifests.append(archive.manifest(str(name)))
        except CheckpointCorrupt as error:
            archive.quarantine(str(name), error.problem)
        except NotFound:
            log.warning("%s has no manifest, so it is no checkpoint", name)
    return manifests
