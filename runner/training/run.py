"""What a training script sees of its run: `attach`, once, and the object that it gives."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.board import Account
from runner.checkpoint.provenance import mask_secrets
from runner.training.capture import TrainingState
from runner.training.course import Course
from runner.training.facts import architecture, plain
from runner.training.fingerprint import fingerprint
from runner.training.kernels import settle_kernels
from runner.training.loops import BatchLoop, EpochLoop, StepLoop
from runner.training.params import all_params
from runner.training.session import SPOOL_VARIABLE, Session
from runner.training.watch import OptimizerWatch


@dataclass(frozen=True)
class ResumedFrom:
    """The checkpoint that an attempt began from."""

    step: int
    epoch: int
    triggers: tuple[str, ...]
    metrics: Mapping[str, float]


class Run:
    """One run, across all its attempts. Made by `attach`.

    `state` is the script's own dict: whatever is in it is saved and restored. `history` has one
    dict for each finished epoch. `resumed_from` is None in an attempt that begins at step 0.
    """

    def __init__(
        self, course: Course, state: dict[Any, Any], resumed_from: ResumedFrom | None
    ) -> None:
        self._course = course
        self.state = state
        self.resumed_from = resumed_from
        self.params: dict[str, Any] = all_params()

    @property
    def step(self) -> int:
        """Optimizer steps that are finished, over all attempts."""
        return self._course.place.step

    @property
    def epoch(self) -> int:
        """The epoch at hand, from 0; without `epochs`, the passes that are finished."""
        return self._course.place.epoch

    @property
    def batch(self) -> int:
        """Batches of the pass at hand that are finished: in the body, the index of its batch."""
        return self._course.place.batch

    @property
    def history(self) -> list[dict[str, Any]]:
        return self._course.metrics.history

    @property
    def run_id(self) -> str:
        return self._course.session.plan.run_id

    @property
    def attempt(self) -> int:
        return self._course.session.plan.attempt

    @property
    def output_dir(self) -> Path:
        """A directory for the script's own files; it exists.

        FileNotFoundError where the store it lies in is not mounted any more.
        """
        path = Path(self._course.session.plan.output_dir)
        path.mkdir(exist_ok=True)
        return path

    # ------------------------------------------------------------------ the loops

    def epochs(self, total: int) -> EpochLoop:
        """Epoch numbers up to `total`, beginning with the saved one.

        The end of an epoch is a boundary of its own, when the loop comes round: what was logged in
        validation belongs to the state that is saved there.
        """
        return EpochLoop(self._course, total)

    def batches(self, loader: Any, *, accumulate: int = 1, steps: int | None = None) -> BatchLoop:
        """The batches of a loader, beginning after the last finished one.

        The boundary is where the body ends, with `accumulate=k` at every k-th batch and at the
        epoch's last. With `steps=n` the loop goes on through as many passes as n steps take.
        Raises PositionError if the data is not the one that was saved with the place in it.
        """
        return BatchLoop(self._course, loader, accumulate, steps)

    def steps(self, total: int) -> StepLoop:
        """Step numbers up to `total`, for scripts whose data is part of the registered state."""
        return StepLoop(self._course, total)

    def boundary(self, **metrics: Any) -> None:
        """Mark a boundary by hand: an optimizer step has ended and the state is consistent.

        Where to go on after a restart is the script's affair: it has `run.step`.
        """
        self.log(**metrics)
        self._course.mark_boundary()

    # ------------------------------------------------------------------ what a script says

    def log(self, **metrics: Any) -> None:
        """Log floats or tensors of one element. Never waits for a device.

        CaptureError names a value that is no number.
        """
        if metrics:
            self._course.log(metrics)

    def note(self, **facts: Any) -> None:
        """Tell where checkpoints come from, for their manifests: plain values, masked if secret.

        Such as the arguments that a model was made with: `run.note(model=asdict(config))`.
        """
        for name, fact in plain(mask_secrets(facts)).items():
            self._course.session.facts.add("notes", name, fact)

    def fingerprint(self, source: Any, *, name: str = "data") -> str:
        """Which data this run sees, for the manifests: a digest by content, which is given.

        `source` is a path of a file or a folder, or holds plain values, arrays or tensors. Files
        are read once, and again only if their size or time has changed; of what DVC has noted, its
        digest is taken. Raises OSError if a path cannot be read, TypeError for other objects.
        """
        found = fingerprint(source, self.alive)
        self._course.session.facts.add("dataset", name, found)
        return str(found["digest"])

    def save(self) -> None:
        """Ask for a checkpoint at the next boundary."""
        self._course.ask_to_save()

    def stop(self, reason: str) -> None:
        """End the run early and well: the loops end at their next boundary, which is the last."""
        self._course.place.stopped = str(reason)

    @property
    def stopped(self) -> str | None:
        """Why `stop` was called, also in an earlier attempt."""
        return self._course.place.stopped

    def load(self, which: str, *, components: list[str] | None = None) -> ResumedFrom:
        """Put a saved checkpoint's components into the live objects, for a final test.

        `which` is `best`, `latest`, a step or a checkpoint's name; all components by default.
        Raises RestoreError if there is none or it does not fit, UnknownName for a component.
        """
        session = self._course.session
        try:
            saved = session.fetch(which)
            names = list(self._course.state.components) if components is None else components
            self._course.state.load(saved.document, saved.source, names)
        finally:
            session.rank.remove_fetched()  # else a whole state is held for the rest of the run
        moment = saved.moment
        return ResumedFrom(moment.step, moment.epoch, moment.triggers, moment.metrics)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what the loop is doing, for hang detection; it is no productive time."""
        board = self._course.session.board
        before, board.phase = board.phase, name
        self.alive()
        try:
            with self._course.apart():
                yield
        finally:
            board.phase = before
            self.alive()

    def alive(self) -> None:
        """A sign of life in a long stretch without boundaries."""
        self._course.session.alive()


def attach(*, state: dict[Any, Any] | None = None, **stateful: Any) -> Run:
    """Register what the run must remember, restore it if there is a checkpoint, give the run.

    Each keyword names a component: anything with `state_dict` and `load_state_dict`, or a random
    generator. `state` is a dict of the script's own plain values; it is restored in place, and is
    `run.state`. The RNGs of `random`, numpy, torch and every CUDA device are remembered always.

    Works the same with a supervisor and without one. Raises TypeError for an object that cannot
    be saved, RestoreError if the checkpoint does not fit, SpoolTaken if another process of this
    attempt has attached already.
    """
    values: dict[Any, Any] = {} if state is None else state
    training_state = TrainingState(stateful, values)
    spool = os.environ.get(SPOOL_VARIABLE)
    settle_kernels()
    watch = OptimizerWatch(stateful)
    if spool:
        session = Session(Path(spool), supervised=True, optimizers=watch.optimizers)
    else:
        from runner.training.alone import open_alone  # half of all there is to import

        session = open_alone(watch.optimizers)
    models = {name: architecture(model) for name, model in training_state.models.items()}
    session.facts.tell(model=models)
    course = Course(session, training_state, watch)
    resumed_from = None
    saved = session.saved_state()
    if saved is not None and saved.components:
        with session.accounts.during(Account.RESTORE):
            training_state.load(saved.document, saved.source, saved.components)
        session.restored()
    elif saved is not None:
        with session.accounts.during(Account.RESTORE):
            course.resume(saved)
        moment = saved.moment
        resumed_from = ResumedFrom(moment.step, moment.epoch, moment.triggers, moment.metrics)
    else:
        session.restored()
    if not course.returning:
        course.prepare_slots()
    session.board.phase = "attached"
    return Run(course, values, resumed_from)
