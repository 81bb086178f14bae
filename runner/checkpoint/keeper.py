"""Between the spool and the store: persists slots, restores attempts, answers requests.

One keeper serves one rank. The supervisor drives it on a thread of its own; a script without a
supervisor has one inside it. Its methods are called one at a time and may take long.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from runner.checkpoint import format as fmt
from runner.checkpoint.archive import Archive
from runner.checkpoint.format import CheckpointName, FileImage
from runner.checkpoint.manifest import Manifest, Moment, moment_from_json, moment_to_json
from runner.checkpoint.persist import Persister
from runner.checkpoint.restore import Loaded, load, load_newest
from runner.errors import (
    CheckpointError,
    CheckpointInvalid,
    Fenced,
    NoValidCheckpoint,
    RunnerError,
    SpoolFull,
    StoreError,
)
from runner.memory import available_bytes, slots_that_fit
from runner.spool import Marker, RankSpool, open_slot, read_json, view_slot

log = logging.getLogger(__name__)

_NEVER = CheckpointName(-1, -1, -1)


@dataclass(frozen=True)
class Saved:
    """A snapshot that became durable: what it is, and when (`CLOCK_MONOTONIC` seconds)."""

    manifest: Manifest
    persist_seconds: float
    durable_at: float


@dataclass(frozen=True)
class Resumption:
    """What an attempt begins from."""

    moment: Moment
    slot: int
    source: str  # "slot": it was still on this node; "store": fetched and verified
    seconds: float


@dataclass(frozen=True)
class Origin:
    """A checkpoint, maybe of another run, that a run begins from: all of it, or some components."""

    archive: Archive
    which: str
    components: tuple[str, ...] = ()


class Keeper:
    """Keeps the checkpoints of one rank."""

    def __init__(
        self,
        rank: RankSpool,
        persister: Persister,
        archive: Archive,
        *,
        best: tuple[str, str] | None = None,
        prefer_healthy: bool = False,
        disk: Path | None = None,
        always_disk: bool = False,
    ) -> None:
        self._rank, self._persister, self._archive = rank, persister, archive
        self._best, self._prefer_healthy = best, prefer_healthy
        self._disk, self._always_disk = disk, always_disk
        self._durable = _NEVER
        self._restoring: Marker | None = None

    # ------------------------------------------------------------------ restoring

    def restore(
        self, go_back: int = 0, *, which: str | None = None, origin: Origin | None = None
    ) -> Resumption | None:
        """Prepare what the next attempt begins from; None if the run is at its very start.

        The newest of a complete slot on this node and the store wins; `go_back` passes over so
        many checkpoints, and over all slots. `which` names another checkpoint of this run instead;
        `origin` is what a run begins from that has none of its own yet. Raises UnknownName,
        NoValidCheckpoint, StoreError or SpoolFull.
        """
        begun = time.monotonic()
        self._rank.recover_claims()
        self._drop_foreign()
        newest = next(self._archive.manifests(), None)
        self._durable = _NEVER if newest is None else newest.moment.name
        source = "slot"
        held = None if go_back or which else self._newest_slot(self._durable)
        if held is None:
            source = "store"
            named = self._find(self._archive, which) if which else None
            # Whatever is in the slots is older, or is what the run goes back from.
            self._rank.forget()
            held = self._from_store(go_back) if named is None else self._named(named)
        if held is None and origin is not None:
            held = self._from_origin(origin)
        if held is None:
            return None
        marker, moment = held
        self._restoring = marker
        self._rank.send("restore.json", asdict(marker))
        return Resumption(moment, marker.slot, source, time.monotonic() - begun)

    def restored(self) -> None:
        """The trainer has its state: the slot that it came from may be used again."""
        if self._restoring is None:
            return
        if _is_foreign(self._restoring):
            self._rank.drop(self._restoring.slot)
        else:
            self._rank.give_back(self._restoring.slot, must=self._restoring.must)
        self._restoring = None

    def has_unsaved(self) -> bool:
        """Whether a slot holds something newer than what is durable."""
        markers = self._rank.complete()
        if self._restoring is not None and not _is_foreign(self._restoring):
            markers.append(self._restoring)
        durable = (self._durable.attempt, self._durable.save)
        return any(marker.must or marker.order > durable for marker in markers)

    def _drop_foreign(self) -> None:
        """Free the slots of another run's checkpoint that no trainer has come to take."""
        self._restoring = None
        for marker in self._rank.complete():
            if _is_foreign(marker):
                self._rank.withdraw(marker.slot)

    def _newest_slot(self, stored: CheckpointName) -> tuple[Marker, Moment] | None:
        """The newest complete slot, claimed, if it is at least as new as the store's newest."""
        for found in reversed(self._rank.complete()):
            if found.order < (stored.attempt, stored.save):
                return None
            marker = self._rank.claim(found.slot)
            if marker is None:
                continue
            try:
                moment, _, _ = self._read(marker)
            except CheckpointError as error:
                log.error("%s; it is not used", error)
                self._rank.drop(marker.slot)
                continue
            if moment.healthy or not self._prefer_healthy:
                return marker, moment
            self._rank.give_back(marker.slot, must=marker.must)
        return None

    def _from_store(self, go_back: int) -> tuple[Marker, Moment] | None:
        loaded = load_newest(
            self._archive,
            self._persister.ledger,
            self._slot_memory,
            skip=go_back,
            prefer_healthy=self._prefer_healthy,
        )
        return None if loaded is None else self._hold(loaded, {})

    def _named(self, manifest: Manifest) -> tuple[Marker, Moment]:
        loaded = load(self._archive, manifest, self._slot_memory)
        if loaded is None:
            raise NoValidCheckpoint(f"{manifest.name} is not sound and was put into quarantine")
        return self._hold(loaded, {})

    def _from_origin(self, origin: Origin) -> tuple[Marker, Moment]:
        """Begin from a checkpoint that is not this run's; it is only read."""
        manifest = self._find(origin.archive, origin.which)
        layout = origin.archive.layout(manifest)
        origin.archive.load_into(manifest, layout, self._slot_memory(layout.nbytes))
        facts = {"origin": origin.archive.run_id, "components": list(origin.components)}
        marker, moment = self._hold(Loaded(manifest, layout), facts)
        return marker, replace(moment, step=0) if origin.components else moment

    def _find(self, archive: Archive, which: str) -> Manifest:
        metric, mode = self._best or (None, "min")
        return archive.find(which, metric, mode)

    def _slot_memory(self, nbytes: int) -> memoryview:
        """Room for a checkpoint: in memory where there is enough, else on disk."""
        path = self._rank.slot_path(0)
        held = path.stat().st_size if path.exists() else 0
        room = slots_that_fit(1, nbytes, available_bytes(self._rank.folder), held)
        if self._disk is not None and (self._always_disk or not room):
            self._rank.put_on_disk(0, self._disk)
        elif not room:
            raise SpoolFull(f"there is no memory for a checkpoint of {nbytes / 1e6:.0f} MB")
        return memoryview(open_slot(path, nbytes))

    def _hold(self, loaded: Loaded, facts: Mapping[str, Any]) -> tuple[Marker, Moment]:
        marker = _marker(0, loaded, facts)
        self._rank.hold(marker)
        return marker, loaded.manifest.moment

    # ------------------------------------------------------------------ persisting

    def persist_due(self) -> list[Saved]:
        """Persist every slot that must be, oldest first.

        Raises Fenced, or StoreError with the slot given back, so that it may be tried again.
        """
        saved = []
        for marker in self._rank.complete():
            if marker.must:
                one = self._persist(marker.slot, ())
                if one is not None:
                    saved.append(one)
        return saved

    def persist_newest(self, triggers: Sequence[str]) -> Saved | None:
        """Persist the newest complete slot with these triggers added; None if it is durable."""
        if self._restoring is not None and not _is_foreign(self._restoring):
            self.restored()  # it may be the newest, and only the trainer could overwrite it
        for marker in reversed(self._rank.complete()):
            if not marker.must and marker.order <= (self._durable.attempt, self._durable.save):
                return None
            saved = self._persist(marker.slot, triggers)
            if saved is not None:
                return saved
        return None

    def _persist(self, slot: int, triggers: Sequence[str]) -> Saved | None:
        begun = time.monotonic()
        marker = self._rank.claim(slot)
        if marker is None:
            return None
        try:
            moment, images, memory = self._read(marker)
        except CheckpointError as error:
            log.error("%s; it is not persisted", error)
            self._rank.drop(slot)
            return None
        moment = replace(moment, triggers=tuple(sorted({*moment.triggers, *triggers})))
        try:
            manifest = self._persister.persist(moment, images, memory, marker.facts)
        except BaseException:
            self._rank.give_back(slot, must=True)
            raise
        durable_at = time.monotonic()
        self._durable = max(self._durable, moment.name)
        self._rank.give_back(slot)
        self._after_commit(manifest)
        return Saved(manifest, durable_at - begun, durable_at)

    def _after_commit(self, manifest: Manifest) -> None:
        """What may fail without harm to the checkpoint that is durable by now."""
        try:
            self._persister.ledger.update(committed=manifest.name, saved_step=manifest.moment.step)
            gone = self._persister.retain()
        except StoreError as error:
            log.warning("after saving %s: %s", manifest.name, error)
        else:
            for name in gone:
                log.debug("deleted %s", name)

    def _read(self, marker: Marker) -> tuple[Moment, list[FileImage], memoryview]:
        """What a marker says, checked against the slot. CheckpointInvalid if it lies."""
        where = f"slot-{marker.slot}"
        try:
            moment = moment_from_json(marker.moment)
            images = [FileImage(i["name"], i["offset"], i["size"]) for i in marker.images]
            memory = view_slot(self._rank.slot_path(marker.slot))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointInvalid(where, f"its marker is unusable: {error!s}") from error
        except RunnerError as error:
            raise CheckpointInvalid(where, str(error)) from error
        fmt.check_images(images, len(memory), where)
        for image in images:
            if image.name.endswith(fmt.TENSOR_SUFFIX):
                content = memory[image.offset : image.offset + image.size]
                fmt.read_safetensors_header(content, f"{where}/{image.name}")
        return moment, images, memory

    # ------------------------------------------------------------------ requests

    def answer(self) -> bool:
        """Answer the trainer's request for a saved checkpoint, if there is one."""
        request = self._rank.take("fetch.json")
        if request is None:
            return False
        try:
            reply = self._fetch(str(request.get("which")))
        except (RunnerError, OSError) as error:
            self._reply(request, {"error": str(error)})
            if isinstance(error, Fenced):
                raise
        else:
            self._reply(request, reply)
        return True

    def _reply(self, request: Mapping[str, Any], reply: Mapping[str, Any]) -> None:
        self._rank.send("fetched.json", {"number": request.get("number"), **reply})

    def _fetch(self, which: str) -> Mapping[str, Any]:
        self.persist_due()  # the one that is asked for may be on its way
        manifest = self._find(self._archive, which)
        path = self._rank.folder / "fetched"
        loaded = load(self._archive, manifest, lambda nbytes: memoryview(open_slot(path, nbytes)))
        if loaded is None:
            raise NoValidCheckpoint(f"{manifest.name} is not sound and was put into quarantine")
        return asdict(_marker(0, loaded, {}))


def read_restore(rank: RankSpool) -> Marker | None:
    """The trainer's side of `restore`: the slot to begin from, or None at the very start."""
    content = read_json(rank.folder / "restore.json")
    return None if content is None else Marker(**content)


def _is_foreign(marker: Marker) -> bool:
    """Whether a slot holds another run's checkpoint, whose attempts and saves mean nothing here."""
    return "origin" in marker.facts


def _marker(slot: int, loaded: Loaded, facts: Mapping[str, Any]) -> Marker:
    return Marker(
        slot=slot,
        must=False,
        moment=moment_to_json(loaded.manifest.moment),
        images=[asdict(image) for image in loaded.layout.images],
        facts=facts,
    )
