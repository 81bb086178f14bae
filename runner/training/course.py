"""The course of a run: where it is, and what happens at a boundary.

    batch · batch · batch ── boundary ── batch · … ── boundary ── validation ── end of epoch ── …

A boundary is the moment between two optimizer steps when the state is consistent. Here, and only
here, snapshots are taken and requests are obeyed. The loops in `loops` say when one is reached.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runner.board import Account, Request, Why
from runner.checkpoint.manifest import Moment
from runner.errors import CaptureError, PositionError
from runner.exitcodes import PREEMPTED
from runner.training.capture import TrainingState
from runner.training.health import Health
from runner.training.metrics import Metrics
from runner.training.occasions import Boundary, Occasions
from runner.training.preempted import Preempted
from runner.training.rhythm import SnapshotRhythm
from runner.training.saved import SavedState
from runner.training.session import Session
from runner.training.streams import Streams
from runner.training.tensors import TensorSource
from runner.training.tree import Decoder, first_difference
from runner.training.watch import OptimizerWatch
from runner.wallclock import utc_now

log = logging.getLogger(__name__)

_SPARE = 1.02  # headers, and page boundaries between files
BETWEEN_LOOPS, FIRST_STEP, TRAINING = "between loops", "first step", "training"
AFTER_TRAINING = "after training"
"""What the loop is doing, on the board: each has a rhythm of its own. The first step of a loop
starts workers, and the very first compiles; between two loops there is validation, mostly."""

_SLACK_BYTES = 256 << 10  # a state.json that grows: a history gets longer with every epoch


@dataclass
class Place:
    """Where the run is. `batch` counts the finished batches of the pass at hand, `loops` the
    loops over batches that this epoch has begun, `outer_loops` those outside of all epochs."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loops: int = 0
    outer_loops: int = 0
    in_epoch: bool = False
    stopped: str | None = None


class LoopOver(Exception):
    """The saved run had left this loop behind: there is nothing in it to do again."""


class Loop(Protocol):
    """A loop over batches or steps, as far as the course knows it."""

    ordinal: int

    def state(self) -> dict[str, Any]:
        """What is needed to come back into the middle of it."""

    def settle(self) -> bool:
        """Count the body that was left by a `break` as done: True if it ends a step."""

    def close(self) -> None:
        """Let go of what it reads from. `state` keeps answering for the place that was reached."""

    def shape(self) -> tuple[int | None, int | None]:
        """Batch size, and batches of one pass, where they are known."""


class Course:
    """Owns the place in the run and everything that is saved beside the components."""

    def __init__(self, session: Session, state: TrainingState, watch: OptimizerWatch) -> None:
        self.session, self.state, self.watch = session, state, watch
        self.place = Place()
        self.metrics = Metrics(
            Health(session.plan.is_health_metric), session.emit, session.plan.attempt
        )
        self.streams = Streams(state.generators)
        self.loop: Loop | None = None
        self.in_body = False
        self._occasions = Occasions(session.plan)
        self._rhythm = SnapshotRhythm(session.plan.snapshot_steps)
        self._accounts = session.accounts
        self._lap: float | None = None
        self._productive_before = 0.0
        self._held = self._has_copied = False
        self._warned_midway = False
        self._carries_gradients = False  # over the last body's end, for want of a step
        self._saved: SavedState | None = None
        self._source: TensorSource | None = None
        self._saved_loop: dict[str, Any] | None = None
        self._inside = False  # an epoch has begun in this process
        self._loops_passed = 0  # on the way back: loops that the saved run had left behind

    def prepare_slots(self) -> None:
        """Have memory for the snapshots touched while the script goes on."""
        try:
            document, sink = self.state.encode({})
        except CaptureError:
            return  # the first snapshot will say so
        tensors = (t for file in sink.files.values() for t in file.values())
        held = sum(tensor.nbytes for tensor in tensors) + len(json.dumps(document))
        self.session.slots.expect(int(_SPARE * (held + self.watch.bytes_to_come())) + _SLACK_BYTES)

    # ------------------------------------------------------------------ coming back

    def resume(self, saved: SavedState) -> None:
        """Take over the saved state at `attach`, before any loop has begun."""
        source = saved.source.anew()  # what it hands out must not be kept until `arrive`
        progress = Decoder(source.own).decode(saved.document["progress"])
        self.state.restore(saved.document, source, final=False)
        self._source = source.anew()
        self.place = Place(**progress["place"])
        self._load_metrics(progress)
        self._occasions.best = progress["best"]
        self.streams.load_state(progress["streams"])
        self._saved_loop = progress["loop"]
        self._productive_before = saved.moment.productive_seconds
        self._saved = saved
        self._show()

    @property
    def returning(self) -> bool:
        """Whether the loops are still on their way back to the saved place."""
        return self._saved is not None

    def arrive(self) -> None:
        """The loop is back at the saved place: put the state in place for good.

        The script has run its own code since `attach`, at least the top of an epoch a second time:
        it may have drawn random numbers, stepped a scheduler, switched a mode, logged. What was
        saved is what counts.
        """
        saved, self._saved = self._saved, None
        self._saved_loop = None
        if saved is None:
            return
        now, _ = self.state.encode({})
        for part in ("components", "state"):
            change = first_difference(saved.document[part], now[part], part)
            if change is not None:
                log.warning("changed between attach() and the loop, and put back: %s", change)
        source = self._source or saved.source.anew()
        self._source = None
        with self._accounts.during(Account.RESTORE):
            self.state.restore(saved.document, source, final=True)
        self._load_metrics(Decoder(source.own).decode(saved.document["progress"]))
        self.session.restored()
        self.session.alive()
        self.prepare_slots()  # not beside the restore: both are bound by the same memory

    def _load_metrics(self, progress: Mapping[str, Any]) -> None:
        self.metrics.load_state(progress["metrics"])
        if progress["loop"] is None:  # between epochs: what was logged is of the one before
            self.metrics.next_state()

    def enter_loop(self, loop: Loop) -> dict[str, Any] | None:
        """A loop begins: what it resumes from, None if it begins at its start.

        Raises LoopOver if the saved run had left this loop behind.
        """
        counted = self._leave_loop()
        self.session.board.phase = FIRST_STEP
        if self._saved is not None and self._return_into(loop):
            return self._saved_loop
        loop.ordinal = self._loops_begun()
        if self._inside:
            self.place.loops += 1
        else:
            self.place.outer_loops += 1
        self.loop = loop
        if counted:
            self._boundary(step_end=True)
        return None

    def _return_into(self, loop: Loop) -> bool:
        """A loop begins on the way back: whether it is the saved one.

        LoopOver if it comes before; False if the run was saved in no loop, and this is a new one.
        """
        self._arrive_if_in_no_loop()
        if self._saved is None:
            return False
        if self._inside == self.place.in_epoch:
            loop.ordinal = self._loops_passed
            if self._saved_loop is not None and loop.ordinal == self._saved_loop["ordinal"]:
                self.loop = loop
                return True
            self._loops_passed += 1
            self._arrive_if_in_no_loop()
        raise LoopOver

    def _arrive_if_in_no_loop(self) -> None:
        """Arrive if the run was saved in no loop, and those that it had left are passed."""
        there = self._inside == self.place.in_epoch and self._loops_passed >= self._loops_begun()
        if self._saved_loop is None and there:
            self.arrive()

    def _loops_begun(self) -> int:
        return self.place.loops if self._inside else self.place.outer_loops

    def enter_epochs(self) -> None:
        """A loop over epochs begins; an epoch that was left by a `break` has ended."""
        if self._saved is None and self.place.in_epoch:
            self.leave_epoch(self.place.epoch + 2)

    def enter_epoch(self) -> None:
        """An epoch begins, or goes on where it was saved."""
        self._inside = True
        if not self.place.in_epoch:
            self.place.in_epoch, self.place.loops = True, 0
        self.streams.begin_epoch()
        self._arrive_if_in_no_loop()

    def leave_epoch(self, total: int) -> None:
        """An epoch has ended, validation included: a boundary of its own.

        PositionError if the run was saved inside of a loop that the epoch did not come by.
        """
        if self._saved is not None:
            raise PositionError(
                f"the run was saved in loop {self.place.loops} of epoch {self.place.epoch}, and "
                f"this time the epoch had {self._loops_passed} loops over run.batches() or "
                "run.steps(); whether there is a loop must not depend on what it changes"
            )
        step_end = self._leave_loop()
        self._inside = self.place.in_epoch = False
        self._end_epoch()
        self.place.loops = 0
        last = self.place.epoch >= total or self.place.stopped is not None
        if last or not self._carries_gradients:
            self._boundary(last=last, step_end=step_end, epoch_end=True)
        self.metrics.next_state()

    def leave_epochs(self) -> None:
        """A loop over epochs has none left. A run that was saved behind it goes on there."""
        self._arrive_if_in_no_loop()
        if self._saved is None:
            self.finish()

    def finish(self) -> None:
        """The last boundary has been passed, in this attempt or before."""
        if not self.place.in_epoch:
            self.session.board.finished = 1

    def leave_pass(self) -> None:
        """A loop without epochs has been through its data once."""
        if not self.place.in_epoch:
            self._end_epoch()
            if not self._carries_gradients:
                self._boundary(epoch_end=True)

    def leave_loop(self, loop: Loop) -> None:
        """A loop has come to its end.

        Its last state goes into a slot, whatever the rhythm: a script that breaks out of its epochs
        and ends has nothing newer, and what it leaves must not depend on how fast it was.
        """
        self._end_lap()
        self.session.seal()
        self.session.board.phase = BETWEEN_LOOPS if self.place.in_epoch else AFTER_TRAINING
        if self.loop is loop:
            if self._rhythm.is_behind and not self._carries_gradients and not self.in_body:
                with self._stalled():
                    self._snapshot(set(), beside=False)
            self.loop = None
            self.in_body = False

    def _leave_loop(self) -> bool:
        """Leave a loop that was left by a `break`: True if its last body counts as a step."""
        loop, self.loop = self.loop, None
        self._end_lap()
        self.session.seal()
        if loop is None or not loop.settle():
            return False
        self.place.step += 1
        return True

    def _end_epoch(self) -> None:
        place = self.place
        self.metrics.end_epoch(place.epoch, place.step, self.watch.learning_rate())
        place.epoch += 1
        place.batch = 0

    # ------------------------------------------------------------------ boundaries

    def begin_step(self) -> None:
        """A step begins: what follows counts as productive until the boundary."""
        if self._lap is None:
            self._lap = time.monotonic()
            self._accounts.enter(Account.PRODUCTIVE)

    def _end_lap(self) -> None:
        """No step has begun; what is done between two loops is validation, mostly."""
        if self._lap is not None:
            self._lap = None
            self._accounts.enter(Account.VALIDATION)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """What the script does meanwhile is no part of a step, wherever in the loop it stands."""
        self.session.seal()
        began = self._accounts.current is not Account.STARTUP
        with self._accounts.during(Account.VALIDATION if began else Account.STARTUP):
            yield

    @contextlib.contextmanager
    def _stalled(self) -> Iterator[None]:
        """The loop waits for us; how long is counted where it was for a snapshot."""
        before = self._accounts.current
        self._accounts.enter(Account.STALL)
        self._has_copied = False
        yield
        seconds = self._accounts.enter(before)
        if self._has_copied:
            self.session.board.stalls.observe(seconds)

    def enter_body(self) -> None:
        """A batch goes out to the script."""
        self.in_body = True
        self.metrics.next_state()

    def midway(self) -> bool:
        """Whether this is no boundary after all, because gradients are half gathered."""
        self._carries_gradients = self.watch.midway()
        if not self._carries_gradients:
            return False
        if not self._warned_midway:
            self._warned_midway = True
            log.warning(
                "no optimizer has stepped and there are gradients: this is not a boundary, the "
                "next step is; say run.batches(loader, accumulate=k) if you accumulate gradients"
            )
        return True

    def step_boundary(self, *, last: bool = False) -> None:
        """An optimizer step has ended. Raises Preempted after the snapshot, if asked to."""
        self.place.step += 1
        self._boundary(last=last, step_end=True)

    def mark_boundary(self) -> None:
        """The script marks a boundary by hand."""
        if self.in_body:
            raise RuntimeError(
                "run.boundary() inside run.batches() or run.steps(): there the boundary is where "
                "the body of the loop ends"
            )
        if self._saved is not None:  # in place since `attach`; the script has trained on from it
            self._saved = self._saved_loop = self._source = None
            self.session.restored()
            self.prepare_slots()
        self.begin_step()  # from the second boundary on it is known how long a step takes
        self.step_boundary()
        self.metrics.next_state()

    def log(self, values: dict[str, Any]) -> None:
        """Take metrics in: in the loop's body they are of the step that it makes."""
        step = self.place.step + 1 if self.in_body else self.place.step
        self.metrics.log(values, in_body=self.in_body, step=step, epoch=self.place.epoch)

    def ask_to_save(self) -> None:
        self._occasions.ask()

    def _boundary(
        self, *, last: bool = False, step_end: bool = False, epoch_end: bool = False
    ) -> None:
        if self._lap is not None:
            seconds = time.monotonic() - self._lap
            self.session.board.step_us = int(1e6 * seconds)
            self._rhythm.stepped(seconds)
            if step_end:
                self.session.board.steps.observe(seconds)
        with self._stalled():
            place = self.place
            self._pause(Boundary(place.step, place.epoch, last, step_end, epoch_end))
        if self._lap is not None:
            self._lap = time.monotonic()

    def _pause(self, boundary: Boundary) -> None:
        """Show where the run is, take a snapshot where one is due, and obey."""
        self.in_body = False
        self.watch.settled()
        board, plan = self.session.board, self.session.plan
        if boundary.step_end and board.first_step_ns == 0:
            board.first_step_ns = time.monotonic_ns()
        if boundary.step_end and board.phase == FIRST_STEP:
            board.phase = TRAINING
        self._show()
        hold = plan.hold_at_step
        if hold is not None and not self._held and self.place.step >= hold:
            self._held = True
            self.session.hold()
        asked = self.session.asked()
        triggers = self._occasions.triggers(boundary, self.metrics.fresh_value, board.interval_ms)
        if asked is not None:
            triggers.add(asked.why.trigger)
        weights = self.state.modules if self._occasions.weights_are_due(boundary) else []
        if triggers or weights or self._rhythm.is_due(epoch_end=boundary.epoch_end):
            # At an epoch's end a script may put other weights in place without any hook's knowing.
            # What may have to be thrown away must not be all that came of a reason to save.
            beside = not (boundary.epoch_end or boundary.last or triggers or weights)
            self._snapshot(triggers, beside=beside, weights=[] if triggers else weights)
        self.session.pass_boundary()
        self.metrics.settle()
        self._show_health()
        board.finished = int(
            boundary.last
        )  # another loop may follow the one that seemed to be the last
        if asked is not None:
            self.session.obeyed(asked)
            if asked.kind is Request.SAVE_AND_STOP:
                if self.loop is not None:
                    self.loop.close()  # workers end now, not when the garbage is collected
                interrupt = asked.why is Why.INTERRUPT
                code = self.session.interrupt_code if interrupt else PREEMPTED
                raise Preempted(asked.why.trigger, code)

    def _snapshot(self, triggers: set[str], *, beside: bool, weights: Sequence[str] = ()) -> None:
        begun = time.monotonic()
        document, sink = self.state.encode(self._progress())
        fresh, place = self.metrics.fresh(), self.place
        batch_size, batches = (None, None) if self.loop is None else self.loop.shape()

        def moment(attempt: int, save: int) -> Moment:
            return Moment(
                attempt=attempt,
                save=save,
                step=place.step,
                epoch=place.epoch,
                batch=place.batch,
                batch_size=batch_size,
                batches_per_epoch=batches,
                triggers=tuple(sorted(triggers)),
                metrics=fresh,
                healthy=self.metrics.health.since is None,
                created_at=utc_now(),
                productive_seconds=self._productive_before
                + self._accounts.seconds(Account.PRODUCTIVE),
            )

        if self.session.save(moment, document, sink, beside=beside, weights=weights):
            self._has_copied = True
            self._rhythm.copied(time.monotonic() - begun)
            self._occasions.saved(triggers, weights=bool(weights))
        else:
            self._occasions.passed_over(triggers)

    def _progress(self) -> Mapping[str, Any]:
        loop = None
        if self.loop is not None:
            loop = {"ordinal": self.loop.ordinal, **self.loop.state()}
        return {
            "place": dict(vars(self.place)),
            "metrics": self.metrics.state(),
            "best": self._occasions.best,
            "streams": self.streams.state(),
            "loop": loop,
        }

    def _show(self) -> None:
        board = self.session.board
        board.step, board.epoch, board.batch = self.place.step, self.place.epoch, self.place.batch
        self.session.alive()

    def _show_health(self) -> None:
        """Since when metrics are not finite; the supervisor reads the first word first."""
        board, health = self.session.board, self.metrics.health
        board.sick_steps = health.steps
        board.sick_since = 0 if health.since is None else health.since + 1
