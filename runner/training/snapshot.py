"""State → slot: the layout of a snapshot, the copy, and the hand-over.

A slot's bytes are the checkpoint's bytes: one safetensors image after another, then `state.json`.
The layout follows the tensors, so it is computed again only when one appears, goes or changes its
shape. A snapshot never goes into a slot that is claimed, nor over one that must still be persisted.
"""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from runner.checkpoint import format as fmt
from runner.checkpoint.format import FileImage, TensorRange
from runner.checkpoint.manifest import Moment, moment_to_json
from runner.spool import Marker, RankSpool, open_slot
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
class _Slot:
    """One slot as the trainer has it mapped."""

    memory: mmap.mmap | None = None
    plan: _Plan | None = None
    places: tuple[torch.Tensor, ...] = ()


class SnapshotWriter:
    """Copies states into the slots of one rank. `alive` is called while it has to wait."""

    def __init__(self, rank: RankSpool, slots: int, alive: Callable[[], None]) -> None:
        self._rank, self._alive = rank, alive
        self._slots = [_Slot() for _ in range(slots)]
        self._plan: _Plan | None = None

    def take(
        self,
        moment: Moment,
        document: Mapping[str, Any],
        sink: TensorSink,
        facts: Mapping[str, Any],
    ) -> bool:
        """Copy one state and hand it over; False if it was passed over because no slot was free.

        A snapshot with triggers waits for a slot. Raises SpoolFull if memory for it cannot be had.
        """
        begun = time.monotonic()
        chosen = self._choose(must=bool(moment.triggers))
        if chosen is None:
            return False
        index, inherited = chosen
        text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
        plan = self._plan_for(sink)
        memory = self._prepare(index, plan, sink, len(text))
        with torch.no_grad():
            for place, tensor in zip(self._slots[index].places, _tensors(sink), strict=True):
                place.copy_(tensor if place.dtype == tensor.dtype else as_bytes(tensor))
        memory[plan.end : plan.end + len(text)] = text
        images = [image for image, _, _ in plan.headers]
        images.append(FileImage(fmt.STATE_FILE, plan.end, len(text)))
        moment = replace(
            moment,
            triggers=tuple(sorted({*moment.triggers, *inherited})),
            snapshot_seconds=time.monotonic() - begun,
        )
        self._rank.publish(
            Marker(
                slot=index,
                must=bool(moment.triggers),
                moment=moment_to_json(moment),
                images=[asdict(image) for image in images],
                facts=facts,
            )
        )
        return True

    def _choose(self, must: bool) -> tuple[int, tuple[str, ...]] | None:
        """A slot to overwrite, its marker withdrawn, and the triggers that go over to this save.

        First one that holds nothing, then the oldest. One that must be persisted is overwritten by
        nothing but a later save, if an interval was the only reason for it.
        """
        while True:
            complete = {marker.slot: marker for marker in self._rank.complete()}
            free = [i for i in range(len(self._slots)) if i not in complete]
            for index in [*free, *complete]:
                marker = complete.get(index)
                inherited: tuple[str, ...] = ()
                if marker is not None and marker.must:
                    inherited = tuple(marker.moment["triggers"])
                    if not must or inherited != ("interval",):
                        continue
                if index >= len(self._slots) or self._rank.is_claimed(index):
                    continue
                if self._rank.withdraw(index) or not self._rank.is_claimed(index):
                    return index, inherited
            if not must:
                return None
            self._alive()
            time.sleep(_POLL_SECONDS)

    def _plan_for(self, sink: TensorSink) -> _Plan:
        signature = tuple(
            (file, tuple(spec_of(name, tensor) for name, tensor in sink.files[file].items()))
            for file in sorted(sink.files)
        )
        if self._plan is None or self._plan.signature != signature:
            self._plan = _Plan.of(signature)
        return self._plan

    def _prepare(self, index: int, plan: _Plan, sink: TensorSink, text_bytes: int) -> mmap.mmap:
        """The slot's memory, large enough, with the headers in it and a place for each tensor."""
        slot = self._slots[index]
        needed = plan.end + text_bytes
        if slot.memory is None or len(slot.memory) < needed:
            slot.places, slot.plan = (), None
            # Room for a state.json that grows: a history gets longer with every epoch.
            slot.memory = open_slot(self._rank.slot_path(index), needed + text_bytes + (1 << 16))
        if slot.plan is not plan:
            view = memoryview(slot.memory)
            for image, header, _ in plan.headers:
                view[image.offset : image.offset + len(header)] = header
            slot.places = tuple(
                place_for(view, ranges[name], tensor)
                for image, _, ranges in plan.headers
                for name, tensor in sink.files[image.name].items()
            )
            slot.plan = plan
        return slot.memory


def _tensors(sink: TensorSink) -> Iterator[torch.Tensor]:
    for file in sorted(sink.files):
        yield from sink.files[file].values()
