"""The loops of a training script: over epochs, over batches, over steps.

They are plain iterators. A body has ended when the loop asks for the next item, or when something
else is asked of the run: so a `break` costs nothing, and nothing is hidden in a `close()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.training.course import AFTER_TRAINING, BETWEEN_LOOPS, Course, LoopOver
from runner.training.loader import Pass
from runner.training.wrappers import forward_wrappers


class EpochLoop:
    """`run.epochs(total)`: the numbers of the epochs that are left, from the saved one on."""

    def __init__(self, course: Course, total: int) -> None:
        self._course, self._total = course, total
        self._begun = self._over = False
        course.session.board.epochs = total

    def __iter__(self) -> Iterator[int]:
        return self

    def __len__(self) -> int:
        return self._total

    def __next__(self) -> int:
        course, place = self._course, self._course.place
        if self._over:
            raise StopIteration
        if self._begun:
            course.leave_epoch(self._total)
        else:
            self._begun = True
            course.enter_epochs()
        stopped = place.stopped is not None and not place.in_epoch
        self._over = stopped or place.epoch >= self._total
        if self._over:
            course.leave_epochs()
            course.session.board.phase = AFTER_TRAINING
            raise StopIteration
        course.enter_epoch()
        course.session.board.phase = BETWEEN_LOOPS
        return place.epoch


class BatchLoop:
    """`run.batches(loader)`: iterate over it in each epoch, or once with `steps`."""

    def __init__(self, course: Course, loader: Any, accumulate: int, steps: int | None) -> None:
        if accumulate < 1 or (steps is not None and steps < 1):
            raise ValueError(f"run.batches(accumulate={accumulate}, steps={steps}): at least 1")
        self.course, self.loader = course, loader
        self.accumulate, self.steps = accumulate, steps

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)

    def __len__(self) -> int:
        """Batches in the loop, counted from its start, also when it is resumed."""
        return len(self.loader) if self.steps is None else self.steps * self.accumulate


class BatchIterator:
    """One loop over batches: one pass over a loader, or as many as `steps` take."""

    def __init__(self, loop: BatchLoop) -> None:
        self._loop, self._course = loop, loop.course
        self.ordinal = -1
        self._pass: Pass | None = None
        self._stream: int | None = None
        self._begun = self._over = self._pending = False
        self._delivered = 0  # batches since the start of the loop
        self._gathered = 0  # bodies that have ended since the last boundary
        self._steps = 0
        self._returning = self._forwarding = False
        self._forwarded = 0  # placeholders that were handed out

    def __iter__(self) -> Iterator[Any]:
        return self

    def __len__(self) -> int:
        return len(self._loop)

    def __next__(self) -> Any:
        if self._forwarding:  # an `islice` or `enumerate` around us is being wound forward
            self._forwarded += 1
            return None
        if self._over:
            raise StopIteration
        if not self._begun:
            self._begin()
        elif self._course.loop is not self:
            raise RuntimeError(
                "this loop over run.batches() was left, or another one was begun inside it; for "
                "validation, iterate over the plain loader"
            )
        if self._returning:
            self._arrive()
        self._body_ended()
        stopped = self._course.place.stopped is not None and self._gathered == 0
        if stopped or self._steps == self._loop.steps:
            self._end()
        return self._next_batch()

    # ------------------------------------------------------------------ what the course asks

    def state(self) -> dict[str, Any]:
        return {
            "stream": self._stream,
            "pass": None if self._pass is None else self._pass.state(),
            "delivered": self._delivered,
            "steps": self._steps,
        }

    def settle(self) -> bool:
        if self._pending:
            self._finish_body()
        self.close()
        return self._gathered > 0 and not self._course.midway()

    def close(self) -> None:
        if self._pass is not None:
            self._pass.close()

    def shape(self) -> tuple[int | None, int | None]:
        size = getattr(self._loop.loader, "batch_size", None)
        try:
            batches = len(self._loop.loader)
        except TypeError:
            batches = None
        return size if isinstance(size, int) else None, batches

    # ------------------------------------------------------------------ steps of the loop

    def _begin(self) -> None:
        self._begun = True
        course = self._course
        loader = self._loop.loader
        if not course.returning:
            self._stream, _ = course.streams.find(loader)
        try:
            saved = course.enter_loop(self)
        except LoopOver:
            self._over = True
            raise StopIteration from None
        course.begin_step()
        if saved is None:
            self._stream, _ = course.streams.find(loader)
            self._expect()
            return
        self._stream, stream = course.streams.find(loader, saved["stream"])
        if saved["pass"] is not None:
            self._pass = Pass(stream, saved["pass"])
            self._pass.open()
        self._delivered, self._steps = saved["delivered"], saved["steps"]
        self._returning = True

    def _arrive(self) -> None:
        """Be where the run was saved, and the wrappers around this loop as well.

        StopIteration if a wrapper ends on the way: whoever asks next is nearer to that place.
        """
        self._forwarding = True
        try:
            forward_wrappers(self, self._delivered, lambda: self._forwarded)
        finally:
            self._forwarding = False
        self._returning = False
        self._course.arrive()
        self._expect()

    def _expect(self) -> None:
        """Tell how many steps the run will have, if all epochs have one loop, and it is this."""
        board, place = self._course.session.board, self._course.place
        each = self._loop.steps
        if each is None:
            _, batches = self.shape()
            each = None if batches is None else -(-batches // self._loop.accumulate)
        if each is not None:
            epochs_left = board.epochs - place.epoch if place.in_epoch else 1
            board.expected_steps = max(0, place.step - self._steps + each * epochs_left)

    def _body_ended(self) -> None:
        if not self._pending:
            return
        self._finish_body()
        if self._gathered >= self._loop.accumulate and not self._course.midway():
            self._step()

    def _finish_body(self) -> None:
        assert self._pass is not None
        self._pending = False
        self._pass.finish()
        self._gathered += 1
        self._course.place.batch = self._pass.done

    def _step(self) -> None:
        self._gathered = 0
        self._steps += 1
        place = self._course.place
        over = self._steps == self._loop.steps or place.stopped is not None
        self._course.step_boundary(last=over and not place.in_epoch)

    def _next_batch(self) -> Any:
        while True:
            if self._pass is None:
                _, stream = self._course.streams.find(self._loop.loader)
                self._pass = Pass(stream)
                self._pass.open()
                self._course.place.batch = 0
            self._course.begin_step()
            try:
                batch = next(self._pass)
            except StopIteration:
                self._pass_ended()
                continue
            self._delivered += 1
            self._pending = True
            self._course.enter_body()
            return batch

    def _pass_ended(self) -> None:
        """The epoch's last batch is a boundary, whatever has been gathered until then."""
        if self._gathered and not self._course.midway():
            self._step()
        if self._loop.steps is None:
            self._end()
        assert self._pass is not None
        if self._pass.done == 0:
            raise ValueError("run.batches(steps=…) over a loader that has no batches")
        if self._steps == self._loop.steps:
            self._end()
        self._pass.close()
        self._pass = None
        self._course.leave_pass()

    def _end(self) -> None:
        self._over = True
        self.close()
        self._course.leave_loop(self)
        if self._loop.steps is not None:
            self._course.finish()
        raise StopIteration


class StepLoop:
    """`run.steps(total)`: the numbers of the steps that are left."""

    def __init__(self, course: Course, total: int) -> None:
        self._course, self._total = course, total
        self.ordinal = -1
        self._begun = self._over = self._pending = False

    def __iter__(self) -> Iterator[int]:
        return self

    def __len__(self) -> int:
        return self._total

    def __next__(self) -> int:
        course, place = self._course, self._course.place
        if self._over:
            raise StopIteration
        if not self._begun:
            self._begin()
        elif course.loop is not self:
            raise RuntimeError("this loop over run.steps() was left for another one")
        if self._pending:
            self._pending = False
            if not course.midway():
                over = place.step + 1 >= self._total or place.stopped is not None
                course.step_boundary(last=over and not place.in_epoch)
        if place.step >= self._total or place.stopped is not None:
            self._over = True
            course.leave_loop(self)
            course.finish()
            raise StopIteration
        course.begin_step()
        self._pending = True
        course.enter_body()
        return place.step

    def state(self) -> dict[str, Any]:
        return {}

    def settle(self) -> bool:
        return self._pending and not self._course.midway()

    def close(self) -> None:
        """It holds nothing."""

    def shape(self) -> tuple[int | None, int | None]:
        return None, None

    def _begin(self) -> None:
        self._begun = True
        try:
            self._course.enter_loop(self)
        except LoopOver:
            self._over = True
            raise StopIteration from None
        if not self._course.place.in_epoch:
            self._course.session.board.expected_steps = self._total
        self._course.arrive()
