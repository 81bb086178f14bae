"""Copying a state out of a GPU while the next step computes.

    boundary                                 optimizer.step
       │ compute stream  ── forward ── backward ─┤ waits, on the device ├── update ──
       └ side stream     waits for the boundary ── copies ──────┘

Parameters and optimizer state change in `optimizer.step` alone, so they may be copied until then:
a pre-hook makes the device wait, not the host. That goes for an optimizer whose hook was called in
the step that has just ended; one that steps in a replayed CUDA graph, or inside of a wrapper, calls
none. Everything else (buffers that forward itself changes, an EMA, a user's own tensors) is copied
at the boundary. A parameter that moved although no hook was called (an EMA swapped in, `p.clamp_`)
shows in its version: such a snapshot is thrown away, and overlap is turned off for good. A write by
`p.data` shows nowhere; where they are common, after a loop and in a phase, the device waits, too.

`CopyEngine` is the seam to the device: `CudaEngine` here, and in the tests one that delays copies.
"""

from __future__ import annotations

import atexit
import functools
import logging
import mmap
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

log = logging.getLogger(__name__)

_LEAVE_SECONDS = 30.0
"""How long the end of a script waits for a copy: a device that answers no more takes for ever."""

Pair = tuple[torch.Tensor, torch.Tensor]  # where to, what


class CopyEngine(Protocol):
    """What a device can do for a copy. Tickets are the device's own."""

    def handles(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lives on the device."""

    def register(self, memory: mmap.mmap) -> None:
        """Page-lock host memory, so that the device can write to it by itself."""

    def unregister(self, memory: mmap.mmap) -> None:
        """Let go of host memory, page-locked or not."""

    def copy_now(self, pairs: Sequence[Pair]) -> None:
        """Copy, and return when it is done."""

    def copy_beside(self, pairs: Sequence[Pair]) -> Any:
        """Begin to copy what the compute stream has made so far; a ticket for the end of it."""

    def hold_compute(self, ticket: Any) -> None:
        """Make what is computed from now on wait, on the device, for the end of a copy."""

    def wait(self, ticket: Any) -> None:
        """Wait on the host for the end of a copy."""


class CudaEngine:
    """CUDA streams and events, and `cudaHostRegister`."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._registered: dict[int, mmap.mmap] = {}

    def handles(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    def register(self, memory: mmap.mmap) -> None:
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        if address in self._registered:
            return
        status = torch.cuda.cudart().cudaHostRegister(address, len(memory), 0)  # type: ignore[no-untyped-call]
        if int(status) == 0:
            self._registered[address] = memory  # keeps it mapped for as long as it is locked
        else:
            log.warning("a slot cannot be page-locked (%s): copies will be slower", status)

    def unregister(self, memory: mmap.mmap) -> None:
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        if self._registered.pop(address, None) is not None:
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]

    def copy_now(self, pairs: Sequence[Pair]) -> None:
        for place, tensor in pairs:
            place.copy_(tensor, non_blocking=True)
        for device in {tensor.device for _, tensor in pairs}:
            torch.cuda.current_stream(device).synchronize()

    def copy_beside(self, pairs: Sequence[Pair]) -> list[torch.cuda.Event]:
        events = []
        for device in {tensor.device for _, tensor in pairs}:
            side = self._streams.get(device)
            if side is None:
                side = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for place, tensor in pairs:
                    if tensor.device == device:
                        place.copy_(tensor, non_blocking=True)
                        tensor.record_stream(side)  # its memory is not given away meanwhile
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(side)
            events.append(event)
        return events

    def hold_compute(self, ticket: list[torch.cuda.Event]) -> None:
        for event in ticket:
            torch.cuda.current_stream(event.device).wait_event(event)

    def wait(self, ticket: list[torch.cuda.Event]) -> None:
        for event in ticket:
            event.synchronize()


class _Flight:
    """One snapshot whose copy has begun and not ended."""

    def __init__(self, tensors: Sequence[torch.Tensor], publish: Callable[[], None]) -> None:
        self.tensors, self.publish = tensors, publish
        self.versions = [tensor._version for tensor in tensors]
        self.ticket: Any = None
        self.sealed = False  # what is computed from then on waits; until then nothing may move
        self.torn = False
        self.over = threading.Event()

    def has_moved(self) -> bool:
        return any(
            tensor._version != version
            for tensor, version in zip(self.tensors, self.versions, strict=True)
        )


def land_at_exit(reference: weakref.ref[Overlap]) -> None:
    """The interpreter ends, and its daemon threads are about to stop where they are."""
    overlap = reference()
    if overlap is not None:
        overlap.leave()


def _complain(error: Exception) -> None:
    log.error("a snapshot is passed over: %s", error)


def _work(todo: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """What the thread does. Between two landings it keeps nothing of a run alive."""
    while (work := todo.get()) is not None:
        work()
        del work


class Overlap:
    """Copies beside the computation, for the tensors of the watched optimizers.

    `complain` is told, on another thread, why one that had been begun could not be handed over.
    """

    def __init__(
        self,
        engine: CopyEngine,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        enabled: bool,
        complain: Callable[[Exception], None] = _complain,
    ) -> None:
        self.engine, self._complain = engine, complain
        self.enabled = enabled and bool(optimizers)
        self._flight: _Flight | None = None
        self._lock = threading.Lock()
        self._landings: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._hooked: set[torch.optim.Optimizer] = set()
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._before_step)

    @property
    def in_flight(self) -> bool:
        return self._flight is not None and not self._flight.over.is_set()

    def land(self) -> None:
        """Wait until no copy is under way."""
        if self._flight is not None:
            self._flight.over.wait()
            self._flight = None

    def has_landed(self, seconds: float) -> bool:
        """Whether no copy is under way, after so many seconds at most."""
        flight, thread = self._flight, self._thread
        if flight is None or thread is None or not thread.is_alive():  # a child that was forked
            return True
        return flight.over.wait(seconds)

    def leave(self) -> None:
        """The script has ended: wait for the copy that is under way, but not for ever."""
        if not self.has_landed(_LEAVE_SECONDS):
            log.error("a copy does not come to its end: the last snapshot is lost")

    def copy(self, pairs: Iterable[Pair], publish: Callable[[], None], *, beside: bool) -> None:
        """Copy all pairs, then `publish`: before this returns, or when the device has finished.

        With `beside` False, or where overlap is off, nothing is left to be done later.
        """
        later: list[Pair] = []
        now: list[Pair] = []
        owned = self._owned() if beside and self.enabled else set()
        host: list[Pair] = []
        for place, tensor in pairs:
            if not self.engine.handles(tensor):
                host.append((place, tensor))
            elif tensor.untyped_storage().data_ptr() in owned:
                later.append((place, tensor))
            else:
                now.append((place, tensor))
        flight = None
        if later:
            flight = _Flight([tensor for _, tensor in later], publish)
            flight.ticket = self.engine.copy_beside(later)
        self.engine.copy_now(now)
        for place, tensor in host:
            place.copy_(tensor)
        if flight is None:
            publish()
        else:
            self._take_off(flight)

    def _take_off(self, flight: _Flight) -> None:
        self._flight = flight
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._landings,), name="snapshots", daemon=True
            )
            self._thread.start()
            atexit.register(land_at_exit, weakref.ref(self))
            weakref.finalize(self, self._landings.put, None).atexit = False
        self._landings.put(functools.partial(self._land, flight))

    def _land(self, flight: _Flight) -> None:
        try:
            self.engine.wait(flight.ticket)
            with self._lock:
                if not flight.sealed:
                    flight.torn = flight.torn or flight.has_moved()
                torn = flight.torn
            if torn:
                self._turn_off()
            else:
                flight.publish()
        except Exception as error:  # noqa: BLE001 - a full spool, a device's fault: not the last one
            self._complain(error)
        finally:
            flight.over.set()

    def pass_boundary(self) -> None:
        """What is copied from now on is of a later boundary."""
        self._hooked.clear()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._hooked.add(optimizer)
        self.seal()

    def seal(self) -> None:
        """What is being copied is about to be changed: let the device finish with it first."""
        flight = self._flight
        if flight is None or flight.over.is_set():
            return
        with self._lock:
            if flight.sealed:
                return  # what is computed from the first step on waits already
            flight.torn = flight.torn or flight.has_moved()
            flight.sealed = True
        self.engine.hold_compute(flight.ticket)

    def _turn_off(self) -> None:
        if self.enabled:
            self.enabled = False
            log.warning(
                "parameters changed between two steps without their optimizer: a snapshot was "
                "thrown away, and from now on the loop waits for each copy"
            )

    def _owned(self) -> set[int]:
        """Storages of what changes in `optimizer.step` alone, and not without its hook."""
        owned = set()
        for optimizer in self._hooked:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    owned.add(parameter.untyped_storage().data_ptr())
                    for value in optimizer.state.get(parameter, {}).values():
                        if isinstance(value, torch.Tensor):
                            owned.add(value.untyped_storage().data_ptr())
        return owned


class HostEngine:
    """For states without a device: everything is on the host, and copied there and then."""

    def handles(self, tensor: torch.Tensor) -> bool:
        return False

    def register(self, memory: mmap.mmap) -> None:
        """Nothing to lock."""

    def unregister(self, memory: mmap.mmap) -> None:
        """Nothing is locked."""

    def copy_now(self, pairs: Sequence[Pair]) -> None:
        assert not pairs

    def copy_beside(self, pairs: Sequence[Pair]) -> Any:
        raise AssertionError("nothing is on a device")

    def hold_compute(self, ticket: Any) -> None:
        """Nothing is under way."""

    def wait(self, ticket: Any) -> None:
        """Nothing is under way."""


def engine_for_this_machine() -> CopyEngine:
    """CUDA where there is a device, the host alone elsewhere."""
    return CudaEngine() if torch.cuda.is_available() else HostEngine()
