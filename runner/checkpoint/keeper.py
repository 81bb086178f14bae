"""Between the spool and the store: persists slots, restores attempts, answers requests.

One keeper serves one rank. The supervisor drives it on threads of its own; a script without a
supervisor has one inside it. Its methods may take long. Saving may go on beside the rest: only
one save at a time, and what it is made from may be restored from meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from runner.checkpoint import format as fmt
from runner.checkpoint.archive import Archive
from runner.checkpoint.claims import Claims
from runner.checkpoint.format import CheckpointName, FileImage
from runner.checkpoint.manifest import Manifest, Moment, moment_from_json, moment_to_json
from runner.checkpoint.persist import NO_TIMING, Persister, Timing
from runner.checkpoint.restore import Loaded, load, load_newest
from runner.checkpoint.urgency import Upload, worth_abandoning
from runner.checkpoint.weights import weights_alone
from runner.errors import (
    Abandoned,
    CheckpointError,
    CheckpointInvalid,
    Fenced,
    NoValidCheckpoint,
    RunnerError,
    SpoolFull,
    StoreError,
    UsageError,
)
from runner.memory import available_bytes, slots_that_fit
from runner.spool import FACTS_FILE, Marker, RankSpool, is_cut_short, view_slot

log = logging.getLogger(__name__)

_NEVER = CheckpointName(-1, -1, -1)


@dataclass(frozen=True)
class Saved:
    """A snapshot that became durable: what it is, and when (`CLOCK_MONOTONIC` seconds).

    `deleted` names the checkpoints that were let go for it, `kept` is how many there are now.
    """

    manifest: Manifest
    persist_seconds: float
    durable_at: float
    timing: Timing = NO_TIMING
    deleted: tuple[str, ...] = ()
    kept: int = 1


@dataclass(frozen=True)
class Resumption:
    """What an attempt begins from."""

    moment: Moment
    slot: int
    source: str  # "slot": it was still on this node; "store": fetched and verified
    seconds: float
    nbytes: int = 0


@dataclass(frozen=True)
class Origin:
    """A checkpoint, maybe of another run, that a run begins from: all of it, or some components."""

    archive: Archive
    which: str
    components: tuple[str, ...] = ()


class Keeper:
    """Keeps the checkpoints of one rank.

    `on_durable` hears of the step of each full state as soon as it is in the store, and before
    older ones are deleted for it, from the thread that saves.
    """

    def __init__(
        self,
        rank: RankSpool,
        persister: Persister,
        archive: Archive,
        *,
        best: tuple[str, str] | None = None,
        prefer_healthy: bool = False,
        always_disk: bool = False,
        on_durable: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._rank, self._persister, self._archive = rank, persister, archive
        self._best, self._prefer_healthy = best, prefer_healthy
        self._always_disk = always_disk
        self._on_durable = on_durable
        self._claims = Claims(rank)
        self._durable = _NEVER
        self._restoring: Marker | None = None
        self._begun_from: CheckpointName | None = None
        self._saving = threading.RLock()
        self._awaited: tuple[int, int] | None = None
        self._awaited_bytes = 0
        self._deadline: float | None = None
        self._bytes_per_second: float | None = None

    # ------------------------------------------------------------------ restoring

    def restore(
        self, go_back: int = 0, *, which: str | None = None, origin: Origin | None = None
    ) -> Resumption | None:
        """Prepare what the next attempt begins from; None if the run is at its very start.

        The newest of a complete slot on this node and the store wins; `go_back` passes over so
        many checkpoints, and over all slots; or, if this keeper has restored before, over what it
        restored then, and all that came of it; what the run has gone back from once counts no more,
        in this attempt and in all that follow. `which` names another checkpoint of this run
        instead; `origin` is what a run begins from that has none of its own yet. Raises
        UnknownName, NoValidCheckpoint, StoreError or SpoolFull.
        """
        begun = time.monotonic()
        self._let_go()
        self._persister.look_again()
        self._claims.recover()
        self._drop_foreign()
        gone_back = self._persister.ledger.look_for_gone_back()
        full = (m for m in self._archive.manifests() if m.moment.scope == "full")
        newest = next((m for m in full if m.name not in gone_back), None)
        stored = _NEVER if newest is None else newest.moment.name
        source = "slot"
        held = None if go_back or which else self._newest_slot(stored)
        if held is None:
            source = "store"
            named = self._find(self._archive, which) if which else None
            with self._saving:  # what is being saved is not overwritten
                self.persist_due()
                # Whatever else is in the slots is older, or is what the run goes back from.
                self._rank.forget()
                self._durable = stored
                held = self._from_store(go_back) if named is None else self._named(named)
                if held is None and origin is not None:
                    held = self._from_origin(origin)
        else:
            self._durable = max(self._durable, stored)
        if held is None:
            return None
        marker, moment = held
        self._restoring = marker
        self._begun_from = None if is_foreign(marker) else moment.name
        self._rank.send("restore.json", asdict(marker))
        seconds = time.monotonic() - begun
        return Resumption(moment, marker.slot, source, seconds, _nbytes(marker))

    def restored(self) -> None:
        """The trainer has its state: the slot that it came from may be used again."""
        self._let_go()

    def has_unsaved(self) -> bool:
        """Whether a slot holds something newer than what is durable."""
        durable = (self._durable.attempt, self._durable.save)
        return any(marker.must or marker.order > durable for marker in self._own_slots())

    def _let_go(self) -> None:
        """End the claim on what was restored from, or was to be."""
        marker, self._restoring = self._restoring, None
        if marker is not None and is_foreign(marker):
            self._claims.drop(marker.slot)
        elif marker is not None:
            self._claims.release(marker.slot)

    def _drop_foreign(self) -> None:
        """Free the slots of another run's checkpoint that no trainer has come to take."""
        for marker in self._rank.complete():
            if is_foreign(marker):
                self._rank.withdraw(marker.slot)

    def _newest_slot(self, stored: CheckpointName) -> tuple[Marker, Moment] | None:
        """The newest complete slot, claimed, if it is at least as new as the store's newest."""
        for found in reversed(self._claims.complete()):
            if found.order < (stored.attempt, stored.save):
                return None
            marker = self._claims.take(found.slot)
            if marker is None:
                continue
            try:
                moment, _ = self._read(marker)
            except CheckpointError as error:
                log.error("%s; it is not used", error)
                self._claims.drop(marker.slot)
                continue
            name = str(moment.name)
            avoided = name in self._persister.ledger.gone_back or self._archive.is_invalid(name)
            if not avoided and (moment.healthy or not self._prefer_healthy):
                return marker, moment
            self._claims.release(marker.slot)
        return None

    def _from_store(self, go_back: int) -> tuple[Marker, Moment] | None:
        loaded = load_newest(
            self._archive,
            self._persister.ledger,
            self._slot_memory,
            skip=go_back,
            before=self._begun_from,
            gone_back=self._persister.ledger.gone_back,
            prefer_healthy=self._prefer_healthy,
        )
        if loaded is None:
            return None
        self._persister.vouch(loaded.manifest.name)
        if loaded.passed_over:
            # Before anything begins from the older one: else it would be forgotten by a kill.
            self._persister.ledger.went_back(loaded.passed_over)
            log.warning("going back from %s", ", ".join(reversed(loaded.passed_over)))
        return self._hold(loaded, {})

    def _named(self, manifest: Manifest) -> tuple[Marker, Moment]:
        if manifest.moment.scope != "full":
            raise UsageError(
                f"{manifest.name} has the weights alone, and a run needs its full state: load from "
                "it in the script with run.load(), or begin a new run with --components"
            )
        loaded = load(self._archive, manifest, self._slot_memory)
        if loaded is None:
            raise NoValidCheckpoint(f"{manifest.name} is not sound and was put into quarantine")
        self._persister.vouch(manifest.name)
        return self._hold(loaded, {})

    def _from_origin(self, origin: Origin) -> tuple[Marker, Moment]:
        """Begin from a checkpoint that is not this run's; it is only read."""
        manifest = self._find(origin.archive, origin.which)
        layout = origin.archive.layout(manifest)
        origin.archive.load_into(manifest, layout, self._slot_memory(layout.nbytes))
        facts = {"origin": origin.archive.run_id, "components": list(origin.components)}
        marker, moment = self._hold(Loaded(manifest, layout), facts)
        if origin.components:  # a run of its own, which begins at step 0
            moment = replace(moment, step=0, productive_seconds=0.0)
        return marker, moment

    def _find(self, archive: Archive, which: str) -> Manifest:
        metric, mode = self._best or (None, "min")
        return archive.find(which, metric, mode)

    def _slot_memory(self, nbytes: int) -> memoryview:
        """Room for a checkpoint: in memory where there is enough, else on disk."""
        path = self._rank.slot_path(0)
        if self._goes_to_disk(nbytes, path.stat().st_size if path.exists() else 0):
            self._rank.put_on_disk(0)
        return memoryview(self._rank.open_slot(self._rank.slot_path(0), nbytes))

    def _fetched_memory(self, nbytes: int) -> memoryview:
        """The same for one that the trainer has asked for."""
        if self._goes_to_disk(nbytes):
            self._rank.put_fetched_on_disk()
        return memoryview(self._rank.open_slot(self._rank.fetched_path, nbytes))

    def _goes_to_disk(self, nbytes: int, held: int = 0) -> bool:
        """Asked before anything is reserved: a reservation past a cgroup's limit is a kill."""
        room = slots_that_fit(1, nbytes, available_bytes(self._rank.folder), held)
        if self._rank.disk is None and not room:
            raise SpoolFull(f"there is no memory for a checkpoint of {nbytes / 1e6:.0f} MB")
        return self._rank.disk is not None and (self._always_disk or not room)

    def _hold(self, loaded: Loaded, facts: Mapping[str, Any]) -> tuple[Marker, Moment]:
        marker = marker_of(0, loaded, facts)
        self._claims.hold(marker)
        return marker, loaded.manifest.moment

    # ------------------------------------------------------------------ persisting

    def hurry(self, deadline: float) -> None:
        """This node will be gone at that moment of the monotonic clock."""
        self._deadline = deadline

    @property
    def durable_step(self) -> int:
        """The step of the newest checkpoint in the store, -1 if there is none."""
        return self._durable.step

    def persist_due(self) -> list[Saved]:
        """Persist every slot that must be, oldest first, until a newer one is waited for.

        Raises Fenced, or StoreError with the slot given back, so that it may be tried again.
        """
        saved: list[Saved] = []
        with self._saving:
            for marker in self._claims.complete():
                if not marker.must or self._gives_way(marker):
                    continue
                try:
                    one = self._persist(marker.slot, ())
                except Abandoned as error:
                    log.info("%s", error)
                    break
                if one is not None:
                    saved.append(one)
        return saved

    def persist_newest(self, triggers: Sequence[str]) -> Saved | None:
        """Persist the newest complete slot with these triggers added; None if it is durable.

        An older one that is being persisted is abandoned, and waits in its slot; but it goes first
        if a deadline leaves no time for the newer one.
        """
        complete = self._own_slots()
        if complete:
            self._awaited_bytes = _nbytes(complete[-1])
            self._awaited = complete[-1].order
        try:
            with self._saving:
                for marker in reversed(self._own_slots()):  # what was waited for may be saved
                    if not marker.must and marker.order <= self._durable[:2]:
                        return None
                    saved = self._persist(marker.slot, triggers, newest=True)
                    if saved is not None:
                        return saved
                    self._awaited = None  # it is not to be had: an older one does not wait for it
        except Abandoned as error:
            log.info("%s", error)
        finally:
            self._awaited = None
        return None

    def _own_slots(self) -> list[Marker]:
        return [marker for marker in self._claims.complete() if not is_foreign(marker)]

    def _gives_way(self, marker: Marker, on_its_way: Upload | None = None) -> bool:
        """Whether a newer state than this one is waited for, and can be had in time."""
        awaited, deadline = self._awaited, self._deadline
        if awaited is None or marker.order >= awaited:
            return False
        if on_its_way is None:
            return True
        left = None if deadline is None else deadline - time.monotonic()
        return worth_abandoning(on_its_way, self._awaited_bytes, left, self._bytes_per_second)

    def _watch(self, marker: Marker, files: Mapping[str, memoryview]) -> Callable[[], bool]:
        """What the persister asks before each part: whether to give way. It tells how far it is.

        CheckpointInvalid where somebody has cut the slot meanwhile: to read on would be our end.
        """
        begun, nbytes, parts = time.monotonic(), sum(map(len, files.values())), 0
        all_parts = sum(-(-len(f) // fmt.part_bytes_for(len(f))) for f in files.values()) or 1

        def gives_way() -> bool:
            nonlocal parts
            given = nbytes * min(parts, all_parts) // all_parts
            parts += 1
            way = self._gives_way(marker, Upload(nbytes, given, time.monotonic() - begun))
            if any(map(is_cut_short, files.values())):
                raise CheckpointInvalid(f"slot-{marker.slot}", "it was cut short while it was read")
            return way

        return gives_way

    def _persist(self, slot: int, triggers: Sequence[str], *, newest: bool = False) -> Saved | None:
        """Persist a slot: all of it, or its weights alone if that is what it is for."""
        begun = time.monotonic()
        marker = self._claims.take(slot)
        if marker is None:
            return None
        try:
            moment, files = self._read(marker)
        except CheckpointError as error:
            log.error("%s; it is not persisted", error)
            self._claims.drop(slot)
            return None
        moment = replace(moment, triggers=tuple(sorted({*moment.triggers, *triggers})))
        if marker.weights is not None and not newest:
            moment = replace(
                moment, save=marker.weights.save, scope="weights", triggers=("interval",)
            )
            files = weights_alone(files, marker.weights.components)
        try:
            facts = {**self._rank.read(FACTS_FILE), **marker.facts}
            manifest = self._persister.persist(moment, files, facts, self._watch(marker, files))
        except CheckpointInvalid as error:
            log.error("%s; it is not persisted", error)
            self._claims.drop(slot)
            return None
        except BaseException:
            self._claims.release(slot, must=True)
            raise
        durable_at = time.monotonic()
        self._bytes_per_second = sum(map(len, files.values())) / max(durable_at - begun, 1e-3)
        if moment.scope == "full":
            self._durable = max(self._durable, moment.name)
            self._on_durable(moment.step)
        self._claims.release(slot, must=False)
        gone = self._after_commit(manifest)
        persister, seconds = self._persister, durable_at - begun
        return Saved(manifest, seconds, durable_at, persister.timing, gone, persister.count)

    def _after_commit(self, manifest: Manifest) -> tuple[str, ...]:
        """What may fail without harm to the checkpoint that is durable by now; what was deleted."""
        moment = manifest.moment
        try:
            self._persister.ledger.committed(manifest.name, moment.step, moment.productive_seconds)
            gone = self._persister.retain()
        except StoreError as error:
            log.warning("after saving %s: %s", manifest.name, error)
            return ()
        for name in gone:
            log.debug("deleted %s", name)
        return tuple(gone)

    def _read(self, marker: Marker) -> tuple[Moment, dict[str, memoryview]]:
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
        files = {i.name: memory[i.offset : i.offset + i.size] for i in images}
        for name, content in files.items():
            if name.endswith(fmt.TENSOR_SUFFIX):
                fmt.read_safetensors_header(content, f"{where}/{name}")
        return moment, files

    # ------------------------------------------------------------------ requests

    def answer(self) -> list[Saved]:
        """Answer the trainer's request for a saved checkpoint, if there is one.

        Gives what had to be saved for it: the one that is asked for may be on its way.
        """
        request = self._rank.take("fetch.json")
        if request is None:
            return []
        saved: list[Saved] = []
        try:
            saved = self.persist_due()
            reply = self._fetch(str(request.get("which")))
        except (RunnerError, OSError) as error:
            self._reply(request, {"error": str(error)})
            if isinstance(error, Fenced):
                raise
        else:
            self._reply(request, reply)
        return saved

    def _reply(self, request: Mapping[str, Any], reply: Mapping[str, Any]) -> None:
        self._rank.send("fetched.json", {"number": request.get("number"), **reply})

    def _fetch(self, which: str) -> Mapping[str, Any]:
        manifest = self._find(self._archive, which)
        self._rank.remove_fetched()  # of a trainer that ended before it had loaded it
        try:
            loaded = load(self._archive, manifest, self._fetched_memory)
        except BaseException:
            self._rank.remove_fetched()
            raise
        if loaded is None:
            self._rank.remove_fetched()
            self._persister.look_again()
            raise NoValidCheckpoint(f"{manifest.name} is not sound and was put into quarantine")
        return asdict(marker_of(0, loaded, {}))


def is_foreign(marker: Marker) -> bool:
    """Whether a slot holds another run's checkpoint, whose attempts and saves mean nothing here."""
    return "origin" in marker.facts


def _nbytes(marker: Marker) -> int:
    """What its files take, as far as it can be read: whether it is sound is asked later."""
    sizes = (image.get("size") for image in marker.images if isinstance(image, Mapping))
    return sum(size for size in sizes if isinstance(size, int))


def marker_of(slot: int, loaded: Loaded, facts: Mapping[str, Any]) -> Marker:
    """How what was loaded lies in a slot."""
    return Marker(
        slot=slot,
        must=False,
        moment=moment_to_json(loaded.manifest.moment),
        images=[asdict(image) for image in loaded.layout.images],
        facts=facts,
    )
