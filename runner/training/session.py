"""The trainer's end of the spool: the board, the slots, and what the supervisor asks for."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from runner.board import Account, Board, Request, Why
from runner.checkpoint.manifest import Moment
from runner.errors import RestoreError, SpoolFull
from runner.exitcodes import PREEMPTED
from runner.plan import Plan
from runner.points import Point, PointWriter
from runner.spool import Marker, RankSpool, Weights, read_json
from runner.training.accounts import Accounts
from runner.training.facts import Facts
from runner.training.lifeline import Lifeline
from runner.training.overlap import Overlap, engine_for_this_machine
from runner.training.preempted import Preempted
from runner.training.saved import SavedState, open_saved
from runner.training.slots import SlotMemory
from runner.training.snapshot import SnapshotWriter
from runner.training.tensors import TensorSink

log = logging.getLogger(__name__)

SPOOL_VARIABLE = "RUNNER_SPOOL"
_POLL_SECONDS = 0.001
_COMPLAINT_SECONDS = 60.0


@dataclass(frozen=True)
class Asked:
    """A request that has not been obeyed yet."""

    number: int
    kind: Request
    why: Why


class _Complaints:
    """Says that a snapshot was passed over, from time to time only.

    Hooks of optimizers, which outlive a session, lead to this: it must hold none of it.
    """

    def __init__(self) -> None:
        self._next_at = 0.0

    def __call__(self, error: Exception) -> None:
        """Somebody else has filled the memory since: training goes on, and so does the log."""
        now = time.monotonic()
        if now >= self._next_at:
            self._next_at = now + _COMPLAINT_SECONDS
            advice = "; make room there" if isinstance(error, SpoolFull) else ""
            log.error("a snapshot is passed over: %s%s", str(error), advice)  # keeps no frames


class Session:
    """One attempt, as the trainer sees it. It holds the rank's lock for as long as it lives."""

    def __init__(
        self,
        spool: Path,
        *,
        supervised: bool,
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        self.plan = Plan.from_json(read_json(spool / "plan.json"))
        disk = Path(self.plan.disk) if self.plan.disk else spool / "disk"
        mounted = Path(self.plan.disk_here) if self.plan.disk_here else None
        self.rank = RankSpool(spool / "rank-00000", disk=disk, disk_here=mounted)
        self._lock: IO[bytes] = self.rank.lock()
        self.board = Board(self.rank.folder / "board")
        self.board.pid = os.getpid()
        self.accounts = Accounts(self.board)
        self._lifeline: Lifeline | None = None
        self._points = PointWriter(self.rank.folder, self.plan.attempt) if supervised else None
        self.slots = SlotMemory(self.rank, self.plan.slots)
        self._pass_over = _Complaints()
        self._overlap = Overlap(
            engine_for_this_machine(),
            optimizers,
            enabled=self.plan.overlap,
            complain=self._pass_over,
        )
        self._writer = SnapshotWriter(self.rank, self.slots, self._overlap, self._wait_for_slot)
        self.facts = Facts(self.rank)
        self._saves = 0
        self._fetches = 0
        self.interrupt_code = PREEMPTED
        if supervised:
            self._lifeline = Lifeline(spool, self.board)
            weakref.finalize(self, self._lifeline.close).atexit = False
            _leave_signals_to_the_supervisor()
            # The supervisor's way to ask where the threads of a hung trainer are.
            faulthandler.register(signal.SIGRTMIN, all_threads=True)

    # ------------------------------------------------------------------ progress

    def alive(self) -> None:
        """A sign of life."""
        self.board.heartbeat_ns = time.monotonic_ns()
        self.board.progress += 1

    def asked(self) -> Asked | None:
        """What the supervisor asks for, if it has not been obeyed yet.

        A supervisor that is dead would have asked for this: to save, and to leave.
        """
        number = self.board.request_number
        if number == self.board.answered:
            if self._deserted:
                return Asked(number, Request.SAVE_AND_STOP, Why.PREEMPTION)
            return None
        return Asked(number, Request(self.board.request_kind), Why(self.board.request_why))

    def obeyed(self, asked: Asked) -> None:
        self.board.answered = asked.number

    def hold(self) -> None:
        """Wait at this boundary until something is asked for, or nobody is left to ask."""
        self.board.held = 1
        while self.asked() is None:
            self.board.heartbeat_ns = time.monotonic_ns()
            time.sleep(_POLL_SECONDS)
        self.board.held = 0

    def emit(self, points: Sequence[Point]) -> None:
        """Hand logged values to the supervisor; nobody wants them without one."""
        if self._points is not None:
            self._points.write(b"".join(point.to_line() for point in points))

    # ------------------------------------------------------------------ states

    def save(
        self,
        moment: Callable[[int, int], Moment],
        document: Mapping[str, Any],
        sink: TensorSink,
        *,
        beside: bool,
        weights: Sequence[str] = (),
    ) -> bool:
        """Copy a state into a slot; `moment(attempt, save)` says what it is of.

        With `beside`, the copy out of a GPU may go on beside the next step. With `weights`, only
        these components are to be stored: they have a number of their own, before the state's, so
        that all of it may still be stored as well.
        """
        alone = Weights(self._saves + 1, list(weights)) if weights else None
        save = self._saves + (1 if alone is None else 2)
        numbered = moment(self.plan.attempt, save)
        try:
            with self._saving():
                taken = self._writer.take(
                    numbered, document, sink, {}, beside=beside, weights=alone
                )
        except SpoolFull as error:
            if not self._saves or "final" in numbered.triggers:
                raise  # not even the first one fits; or the run would end without its last state
            self._pass_over(error)
            return False
        if taken:
            self._saves = save
        return taken

    def pass_boundary(self) -> None:
        """The next step begins: what its optimizers do not announce is not theirs alone."""
        self._overlap.pass_boundary()

    def seal(self) -> None:
        """The script may change anything now: what is being copied comes first, on the device."""
        self._overlap.seal()

    def leave(self) -> None:
        """The script has ended: wait until its last state is handed over, if that can be."""
        self._overlap.leave()

    def saved_state(self) -> SavedState | None:
        """What this attempt begins from; None at the very start of a run.

        The supervisor fetches it while this process imports torch and builds the model: waits
        until it is there.
        """
        with self.accounts.during(Account.RESTORE):
            while not self.board.prepared:
                self._must_have_supervisor("there is nothing to begin from")
                self.board.heartbeat_ns = time.monotonic_ns()
                time.sleep(_POLL_SECONDS)
        marker = self.rank.read_restore()
        if marker is None:
            return None
        return open_saved(self.rank.slot_path(marker.slot), marker)

    def restored(self) -> None:
        """The state is in place: the slot that it came from may be used again."""
        (self.rank.folder / "restore.json").unlink(missing_ok=True)
        self.board.restored = 1

    def fetch(self, which: str) -> SavedState:
        """Have a saved checkpoint brought into the spool. RestoreError says why it cannot be."""
        self._fetches += 1
        self.rank.send("fetch.json", {"number": self._fetches, "which": which})
        while (reply := self.rank.take("fetched.json")) is None or (
            reply.get("number") != self._fetches
        ):
            self._must_have_supervisor(f"checkpoint {which!r}")
            self.alive()
            time.sleep(_POLL_SECONDS)
        if "error" in reply:
            raise RestoreError(f"checkpoint {which!r}: {reply['error']}")
        del reply["number"]
        return open_saved(self.rank.fetched_path, Marker(**reply))

    def _must_have_supervisor(self, what: str) -> None:
        if self._deserted:
            raise RestoreError(f"{what}: the supervisor is gone")

    # ------------------------------------------------------------------ a supervisor that is dead

    @property
    def _deserted(self) -> bool:
        return self._lifeline is not None and self._lifeline.is_cut

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        if self._lifeline is None:
            yield
            return
        self._lifeline.saving = True
        try:
            yield
        finally:
            self._lifeline.saving = False

    def _wait_for_slot(self) -> None:
        """Every slot is claimed, or holds what must be persisted first: a sign of life.

        A supervisor that is dead persists nothing, and its claims are void. If no slot can be had
        even so, the newest one has to do.
        """
        self.alive()
        if not self._deserted:
            return
        if not self.rank.claimed():
            raise Preempted(Why.PREEMPTION.trigger)
        self.rank.recover_claims()


def _leave_signals_to_the_supervisor() -> None:
    """A Ctrl-C or a kill of the group reaches everybody; only the supervisor may act on it.

    Loader workers inherit this, so that they do not die before the state is saved.
    """
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
