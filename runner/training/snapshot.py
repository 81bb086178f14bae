"""State → slot: the layout of a snapshot, the copy, and the hand-over.

A slot's bytes are the checkpoint's bytes: one safetensors image after another, then `state.json`.
The layout follows the tensors, so it is computed again only when one appears, goes or changes its
shape. A snapshot never goes into a slot that is claimed, nor over one that must still be persisted.
"""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from runner.checkpoint import format as fmt
from runner.checkpoint.format import FileImage, TensorRange
from runner.checkpoint.manifest import Moment, moment_to_json
from runner.errors import SpoolFull
from runner.spool import Marker, RankSpool, Weights
from runner.training.overlap import Overlap, Pair
from runner.training.slots import SlotMemory
from runner.training.tensors import TensorSink, as_bytes, place_for, spec_of

_POLL_SECONDS = 0.002


@dataclass(frozen=True)
class _Plan:
    """The layout of all tensors in a slot; `state.json` follows from `end` on."""

    signature: tuple[Any, ...]
    headers: tuple[tuple[FileImage, bytes, Mapping[str, TensorRange]], ...]
    end: int

    @classmethod
    def of(cls, signature: tuple[Any, ...]) -> _Plan:
        headers, end = [], 0
        for file, specs in signature:
            header, ranges = fmt.safetensors_header(specs)
            begin = fmt.next_image_offset(end)
            size = max([len(header), *(where.end for where in ranges.values())])
            placed = {
                name: where._replace(begin=begin + where.begin, end=begin + where.end)
                for name, where in ranges.items()
            }
            headers.append((FileImage(file, begin, size), header, placed))
            end = begin + size
        return cls(signature, tuple(headers), fmt.next_image_offset(end))


@dataclass
class _Mapped:
    """A slot with a layout in it: its headers are written, and each tensor has its place."""

    memory: mmap.mmap
    plan: _Plan
    places: tuple[torch.Tensor, ...]


class SnapshotWriter:
    """Copies states into the slots of one rank. `alive` is called while it has to wait."""

    def __init__(
        self, rank: RankSpool, slots: SlotMemory, overlap: Overlap, alive: Callable[[], None]
    ) -> None:
        self._rank, self._slots, self._overlap, self._alive = rank, slots, overlap, alive
        self._mapped: dict[int, _Mapped] = {}
        self._plan: _Plan | None = None

    def take(
        self,
        moment: Moment,
        document: Mapping[str, Any],
        sink: TensorSink,
        facts: Mapping[str, Any],
        *,
        beside: bool,
        weights: Weights | None = None,
    ) -> bool:
        """Copy one state and hand it over; False if it was passed over because no slot was free.

        A snapshot with triggers, or for its `weights`, waits for a slot. With `beside`, what a GPU
        can copy beside the next step is handed over later. Raises SpoolFull if there is room for
        it neither in memory nor on disk.
        """
        begun = time.monotonic()
        must = bool(moment.triggers) or weights is not None
        if not must and (
            self._slots.on_disk or self._overlap.in_flight or not self._slots.is_ready()
        ):
            return False
        self._overlap.land()
        text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
        plan = self._plan_for(sink)
        chosen = self._room_for(plan.end + len(text), must=must, full=weights is None)
        if chosen is None:
            return False
        index, inherited = chosen
        slot = self._map(index, plan, sink, len(text))
        slot.memory[plan.end : plan.end + len(text)] = text
        images = [image for image, _, _ in plan.headers]
        images.append(FileImage(fmt.STATE_FILE, plan.end, len(text)))
        triggers = tuple(sorted({*moment.triggers, *inherited}))

        def publish() -> None:
            taken = replace(moment, triggers=triggers, snapshot_seconds=time.monotonic() - begun)
            self._rank.publish(
                Marker(
                    slot=index,
                    must=must,
                    moment=moment_to_json(taken),
                    images=[asdict(image) for image in images],
                    facts=facts,
                    weights=weights if not triggers else None,
                )
            )
            self._shed()  # what was the newest until now may be one too many

        with torch.no_grad():
            self._overlap.copy(_pairs(slot.places, sink), publish, beside=beside)
        return True

    def _room_for(
        self, nbytes: int, *, must: bool, full: bool
    ) -> tuple[int, tuple[str, ...]] | None:
        """A slot; on disk, if memory that was there when the plan was made is there no more."""
        try:
            return self._choose(nbytes, must=must, full=full)
        except SpoolFull as error:
            if not self._slots.retreat_to_disk(error):
                raise
            return self._choose(nbytes, must=must, full=full) if must else None

    def _choose(self, nbytes: int, *, must: bool, full: bool) -> tuple[int, tuple[str, ...]] | None:
        """A slot to overwrite, its marker withdrawn, and the triggers that go over to this save.

        First one that holds nothing, then the oldest. One that must be persisted is overwritten by
        nothing but a later `full` save, if an interval was the only reason for it; that save takes
        it first, so that a store that is out of reach leaves a slot for the newest state. Its
        memory is had before its marker goes: where there is no room, what it holds stays complete.
        What is not in the plan any more is given back before anything grows.
        """
        passed_on: tuple[str, ...] = ()
        while True:
            self._slots.plan_for(nbytes)
            complete = {marker.slot: marker for marker in self._rank.complete()}
            free = [i for i in sorted(self._slots.planned) if i not in complete]
            due = {i: tuple(m.moment["triggers"]) for i, m in complete.items() if m.must}
            outdated = [i for i in due if must and full and due[i] == ("interval",)]
            unneeded = [i for i in complete if i not in due]
            for index in self._shed(outdated):
                passed_on += due.get(index, ())
            for index in [*free, *outdated, *unneeded]:
                if index not in self._slots.planned or self._rank.is_claimed(index):
                    continue
                if not self._slots.has_room(index, nbytes):
                    continue
                self._slots.get(index, nbytes)
                if self._rank.withdraw(index) or not self._rank.is_claimed(index):
                    return index, (*passed_on, *due.get(index, ()))
            if not must:
                return None
            self._alive()
            time.sleep(_POLL_SECONDS)

    def _shed(self, outdated: Collection[int] = ()) -> list[int]:
        """Give back slots that are too many: their memory is had when nobody has it mapped."""
        gone = self._slots.shed(outdated)
        for memory in self._slots.dropped():
            self._mapped = {i: m for i, m in self._mapped.items() if m.memory is not memory}
            self._overlap.engine.unregister(memory)
        return gone

    def _plan_for(self, sink: TensorSink) -> _Plan:
        signature = tuple(
            (file, tuple(spec_of(name, tensor) for name, tensor in sink.files[file].items()))
            for file in sorted(sink.files)
        )
        if self._plan is None or self._plan.signature != signature:
            self._plan = _Plan.of(signature)
        return self._plan

    def _map(self, index: int, plan: _Plan, sink: TensorSink, text_bytes: int) -> _Mapped:
        """The slot with this layout in it."""
        needed = plan.end + text_bytes
        memory = self._slots.get(index, needed)
        mapped = self._mapped.get(index)
        if mapped is not None and mapped.plan is plan and mapped.memory is memory:
            return mapped
        view = memoryview(memory)
        for image, header, _ in plan.headers:
            view[image.offset : image.offset + len(header)] = header
        places = tuple(
            place_for(view, ranges[name], tensor)
            for image, _, ranges in plan.headers
            for name, tensor in sink.files[image.name].items()
        )
        self._overlap.engine.register(memory)
        mapped = self._mapped[index] = _Mapped(memory, plan, places)
        return mapped


def _pairs(places: Sequence[torch.Tensor], sink: TensorSink) -> Iterator[Pair]:
    """Where each tensor goes; one whose dtype the format lacks goes as bytes."""
    tensors = (tensor for file in sorted(sink.files) for tensor in sink.files[file].values())
    for place, tensor in zip(places, tensors, strict=True):
        yield place, tensor if place.dtype == tensor.dtype else as_bytes(tensor)
