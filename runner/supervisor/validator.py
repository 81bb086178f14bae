"""The supervisor's examiner: a thread that tries checkpoints after their commit, one at a time.

Each is read back from the store and compared with its manifest; then the job's function is called
with it, in a process that takes what is left of the machine (`trial`); then what that returned is
compared with what was logged at the save. Nothing waits for it. It gives way at once to whatever is
more urgent: a notice, a signal, the end of an attempt.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from runner.checkpoint.archive import Archive
from runner.checkpoint.keeper import marker_of
from runner.checkpoint.manifest import Manifest
from runner.checkpoint.persist import Persister
from runner.checkpoint.restore import Loaded
from runner.checkpoint.validation import (
    Tolerances,
    Validation,
    Verdict,
    judge,
    write_validation,
)
from runner.errors import Abandoned, CheckpointCorrupt, Fenced, NotFound, RunnerError
from runner.job import Job
from runner.job_validate import Validate
from runner.launch.trial import Trial
from runner.memory import available_bytes
from runner.spool import open_slot
from runner.supervisor import events
from runner.supervisor.state import Phase, State
from runner.trial_files import SLOT
from runner.wallclock import utc_now

log = logging.getLogger(__name__)

LONGEST_END_SECONDS = 120.0  # for what is left when the run has succeeded
_NICENESS = 10  # not more: a thread that is starved would keep the others from Python's lock
_LIBRARIES_BYTES = 512 << 20  # of memory, for torch and whatever the function imports
_LEAVING_SECONDS = 5.0
_LOOK_SECONDS = 0.05


def is_quiet(state: State) -> bool:
    """Whether nothing is more urgent than a validation: training goes on, or has succeeded."""
    if state.deadline is not None:
        return False
    return Phase.SUCCEEDED in (state.phase, state.goal) or state.phase is Phase.RUNNING


class Validator(threading.Thread):
    """Validates the first full checkpoint that it hears of, each n-th after, and the final one.

    One waits at most: the newest. Where nothing came of one, the next is tried.
    """

    def __init__(
        self,
        wanted: Validate,
        trial: Callable[[Path, Mapping[str, Any]], Trial],
        folder: Path,
        persister: Persister,
        post: Callable[[events.Event], None],
    ) -> None:
        super().__init__(name="validator", daemon=True)
        self._wanted, self._make_trial, self._folder = wanted, trial, folder
        self._persister, self._post = persister, post
        self._archive = Archive(
            persister.store, persister.ledger.run_id, before_part=self._go_on, at_once=1
        )
        self._since = wanted.every
        self._waiting = ""
        self._trial: Trial | None = None
        self._changed = threading.Condition()
        self._enough = threading.Event()
        self._at_work = ""
        self._is_over = self._quiet = False
        self._trains = True

    # ------------------------------------------------------------------ what the loop says

    def heard(self, event: events.Event, state: State) -> None:
        """What has happened, and where the run is now.

        A checkpoint that became durable may be due; what is under way is given up where something
        is more urgent.
        """
        saved = event.record if isinstance(event, events.Persisted) else None
        if saved is not None and saved.scope != "full":
            saved = None  # nothing is restored from it
        quiet, self._trains = is_quiet(state), state.phase is Phase.RUNNING
        with self._changed:
            self._since += saved is not None
            is_due = self._since >= self._wanted.every
            if saved is not None and (is_due or "final" in saved.triggers):
                self._waiting = saved.checkpoint
                self._spare()
            is_last = saved is not None and "final" in saved.triggers
            if not quiet or (is_last and self._at_work):
                # Beside the last one, an older one is worth nothing, and it has been slow.
                self._enough.set()
            self._quiet = quiet
            self._changed.notify()

    @property
    def pids(self) -> Collection[int]:
        """The process that it waits for itself."""
        trial = self._trial
        return () if trial is None else trial.pids

    def finish(self, may_wait: Callable[[], bool]) -> None:
        """End. What is waiting or under way may end first, while `may_wait` says so, in a bound."""
        until = time.monotonic() + min(LONGEST_END_SECONDS, self._wanted.timeout_seconds)
        while self._is_busy and time.monotonic() < until and may_wait():
            time.sleep(_LOOK_SECONDS)
        if self._is_busy:
            log.info("a validation is not finished: the run is over")
        with self._changed:
            self._is_over, self._waiting = True, ""
            self._enough.set()
            self._changed.notify()
        self.join(_LEAVING_SECONDS)

    @property
    def _is_busy(self) -> bool:
        return bool(self._at_work or self._waiting)

    # ------------------------------------------------------------------ the thread

    def run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        shutil.rmtree(self._folder, ignore_errors=True)  # of a supervisor that was killed
        while (name := self._next()) is not None:
            begun, result, reason = time.monotonic(), "unknown", ""
            try:
                validation = self._validate(name)
                result, reason = validation.verdict.value, validation.reason
            except Abandoned as error:
                log.info("%s", error)
                reason = str(error)
            except Fenced:
                return
            except NotFound as error:
                log.info("%s was deleted before it was validated", name)
                reason = str(error)
            except (RunnerError, OSError) as error:
                log.warning("nothing can be said of %s: %s", name, error)
                reason = str(error)
            finally:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._at_work = ""
                self._spare()
            if result == "unknown":
                self._since = self._wanted.every
            now = time.monotonic()
            self._post(events.Validated(now, name, result, reason, now - begun))

    def _next(self) -> str | None:
        """The checkpoint to validate, when there is one and there is time; None at the end."""
        with self._changed:
            while not self._is_over and not (self._waiting and self._quiet):
                self._changed.wait()
            if self._is_over:
                return None
            self._at_work, self._waiting = self._waiting, ""
            self._since = 0
            self._enough.clear()
            return self._at_work

    def _spare(self) -> None:
        """Where checkpoints come faster than they can be validated, none would live that long."""
        self._persister.spare(name for name in (self._at_work, self._waiting) if name)

    def _go_on(self) -> None:
        if self._enough.is_set():
            raise Abandoned("a validation gives way to what is more urgent")

    def _validate(self, name: str) -> Validation:
        """Try a checkpoint, and write down what came of it.

        Abandoned if something is more urgent; StoreError, OSError or RunnerError where nothing can
        be said.
        """
        begun = time.monotonic()
        corrupt = ""
        try:
            found = self._try(self._archive.manifest(name))
        except CheckpointCorrupt as error:
            corrupt = error.problem
            found = Validation(Verdict.INVALID, f"it is not what was saved: {corrupt}")
        validation = replace(
            found,
            entrypoint=self._wanted.entrypoint,
            seconds=round(time.monotonic() - begun, 3),
            validated_at=utc_now(),
            host=socket.gethostname(),
        )
        if not write_validation(self._archive.store, self._persister.ledger, name, validation):
            raise NotFound(name)
        self._persister.note_verdict(name, validation.verdict)
        if corrupt:
            self._put_away(name, corrupt)
        if validation.verdict is Verdict.VALID:
            log.info("%s is valid (%.1f s)", name, validation.seconds)
        else:
            log.error("%s is invalid: %s", name, validation.reason)
        return validation

    def _put_away(self, name: str, problem: str) -> None:
        """What is corrupt is never used again, and the state that it held is to be saved anew."""
        self._archive.quarantine(name, problem)
        self._persister.look_again()
        self._post(events.SaveAsked(time.monotonic()))

    def _try(self, manifest: Manifest) -> Validation:
        layout = self._archive.layout(manifest)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        needed, room = 2 * layout.nbytes + _LIBRARIES_BYTES, available_bytes(self._folder)
        if room < needed:
            raise RunnerError(f"it needs {needed / 1e6:.0f} MB, and there are {room / 1e6:.0f} MB")
        path = self._folder / SLOT
        self._archive.load_into(manifest, layout, memoryview(open_slot(path, layout.nbytes)))
        request: dict[str, Any] = {
            "entrypoint": self._wanted.entrypoint,
            "marker": asdict(marker_of(0, Loaded(manifest, layout), {})),
            "gives_way": self._trains,
        }
        self._trial = trial = self._make_trial(self._folder, request)
        try:
            trial.begin()
            answer = trial.wait(self._wanted.timeout_seconds, self._enough)
        finally:
            self._trial = None
        if answer is None:
            raise Abandoned("a validation gives way to what is more urgent")
        if answer.unusable:
            raise RunnerError(answer.unusable)
        if answer.problem or answer.metrics is None:
            return Validation(Verdict.INVALID, answer.problem)
        tolerances = Tolerances(self._wanted.tolerance, self._wanted.metrics)
        return judge(answer.metrics, manifest.moment.metrics, tolerances)


def validator_of(
    job: Job,
    trial: Callable[[Path, Mapping[str, Any]], Trial],
    folder: Path,
    persister: Persister,
    post: Callable[[events.Event], None],
) -> Validator | None:
    """The validator that a job wants, which tries with this; None if it wants none."""
    wanted = job.checkpoint.validation
    if wanted is None:
        return None
    return Validator(wanted, trial, folder, persister, post)
