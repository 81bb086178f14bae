"""The supervisor: one loop that owns all changes of state.

Signal handlers, the clerk and the watcher of the spool only put events into its queue; `machine`
says what they mean; the actions are carried out here. It never imports torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

from watchdog.events import FileMovedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from runner.board import Why
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.keeper import Keeper
from runner.checkpoint.outputs import Outputs
from runner.checkpoint.persist import Persister
from runner.checkpoint.provenance import collect, keep_changes, mask_secrets
from runner.errors import EngineError, RunnerError, SpoolError
from runner.job import is_s3, job_as_submitted, resolved_command
from runner.launch.base import Launcher
from runner.notices import Watch
from runner.saves import SaveRecord
from runner.spool import Spool
from runner.store import Store
from runner.supervisor import events, index, listening, machine
from runner.supervisor.abandoned import remove_abandoned
from runner.supervisor.assignment import (
    Assignment,
    LocalFiles,
    plan_for,
    policy_for,
    variables_for,
)
from runner.supervisor.audience import Audience
from runner.supervisor.clerk import Clerk
from runner.supervisor.forecast import Forecaster
from runner.supervisor.gauges import Sight
from runner.supervisor.journal import Journal
from runner.supervisor.monitor import Monitor
from runner.supervisor.reaper import become_subreaper, reap_orphans
from runner.supervisor.recording import Recorder
from runner.supervisor.trainer import Trainer, not_started
from runner.supervisor.upkeep import policy_of
from runner.supervisor.validator import validator_of
from runner.supervisor.vitals import Vitals

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.02
_CLERK_SECONDS = 600.0  # for what is left in the end, the run's own files above all
_TIDYING_SECONDS = 0.5


class Supervisor:
    """Runs one job to its end, or to the end of this node. `run` gives the exit code."""

    def __init__(
        self,
        assignment: Assignment,
        store: Store,
        spool: Spool,
        ledger: Ledger,
        launcher: Launcher,
        audience: Audience | None = None,
    ) -> None:
        self._assignment, self._spool, self._ledger = assignment, spool, ledger
        job = assignment.job
        self._job = job
        self._events: queue.SimpleQueue[events.Event] = queue.SimpleQueue()
        self._provenance: dict[str, Any] = {}
        self._submitted = mask_secrets(job_as_submitted(job))
        self._rank = spool.rank
        self._files = LocalFiles(index.files_of(assignment.run_id, store.url))
        policy = policy_for(assignment)
        self._store = store
        self._monitor = Monitor(assignment, store.url, self._sight())
        persister = Persister(
            store,
            ledger,
            policy_of(job.checkpoint.keep),
            lambda: {"job": self._submitted, **self._provenance, **self._journal.provenance},
            compresses=job.checkpoint.compression is not None,
            validates=job.checkpoint.validation is not None,
        )
        self._keeper = self._keeper_on(persister)
        self._clerk = Clerk(
            self._rank,
            self._keeper,
            persister,
            socket.gethostname(),
            self._events.put,
            Forecaster(policy.grace_seconds, chooses_interval=job.checkpoint.every is None),
            self._outputs(store) if is_s3(store.url) else None,
            self._monitor,
        )
        self._validator = validator_of(
            job, launcher.trial, self._files.validation, persister, self._events.put
        )
        self._state, self._actions = machine.begin(policy)
        self._journal = Journal(
            assignment,
            store,
            self._rank.folder,
            ledger.check_fence,
            lambda: self._state.deadline is None,
            audience,
        )
        self._launcher = launcher
        self._trainer = Trainer(
            launcher,
            self._journal.log,
            Vitals(job.health.patience, policy.hang_timeout_seconds),
            self._rank,
            job.resources.memory_guard,
        )
        self._recorder = Recorder(self._clerk, self._rank, self._monitor, ledger)
        self._begin_at = assignment.begin_at
        self._clouds = Watch(
            job.preemption.notices,
            policy.grace_seconds,
            lambda news: self._hear(listening.event_of(news)),
        )

    def _keeper_on(self, persister: Persister) -> Keeper:
        """What saves and restores, as the job wants it."""
        checkpoint, run_id = self._job.checkpoint, self._assignment.run_id
        best = checkpoint.keep.best
        return Keeper(
            self._rank,
            persister,
            Archive(
                self._store,
                run_id,
                self._monitor.quarantined,
                before_part=lambda: self._clerk.moves(),
            ),
            best=None if best is None else (best.metric, best.mode),
            prefer_healthy=self._job.health.restore == "healthy",
            always_disk=checkpoint.slots == 0,
            on_durable=lambda step: self._clerk.durable(step),
        )

    def run(self) -> int:
        """Run until a terminal state; leave nothing of the trainer behind."""
        before = {signum: signal.signal(signum, self._on_signal) for signum in listening.SIGNALS}
        self._journal.start()
        self._monitor.start()
        become_subreaper()
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, self._on_child)
        (self._spool.path / "stop").unlink(missing_ok=True)  # meant for a supervisor before
        self._end_leftovers()
        observer = self._watch_spool()
        threading.Thread(target=self._collect_provenance, name="provenance", daemon=True).start()
        tidying = threading.Thread(target=self._remove_abandoned, name="abandoned", daemon=True)
        tidying.start()
        self._clerk.start()
        if self._validator is not None:
            self._validator.start()
        try:
            self._clouds.start()
            self._perform(self._actions)
            while self._state.phase not in machine.TERMINAL:
                self._advance(self._next_event())
        finally:
            self._monitor.leaving()
            self._end_trainer()
            fenced = self._state.phase is machine.Phase.FENCED
            saved = self._clerk.finish(self._seconds_left(), fenced=fenced)
            if self._validator is not None:
                self._validator.finish(self._is_left_alone)
            observer.stop()
            tidying.join(_TIDYING_SECONDS)
            self._journal.finish(
                self._last_saves(),
                self._seconds_left(),
                hurried=self._state.deadline is not None,
                fenced=fenced,
                ship=saved,
            )
            if saved:
                self._clerk.store_outputs()  # trackers write their last words into some
            self._leave_clouds(saved)
            self._monitor.close(self._seconds_left())
            self._launcher.leave(self._seconds_left())
            self._leave(saved)
            for signum, handler in before.items():
                signal.signal(signum, handler)
        return self._state.exit_code

    # ------------------------------------------------------------------ events

    def _next_event(self) -> events.Event:
        """The next event, or a tick after looking around."""
        self._monitor.beat()
        event: events.Event | None = None
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=self._patience_seconds())
        while event is None or isinstance(event, events.ChildEnded):  # it may end during a look
            try:
                event = self._look_around()
            except OSError as error:  # no descriptor is free, for example: it may pass
                log.debug("this look around failed: %s", error)
                event = events.Tick(time.monotonic())
        return event

    def _patience_seconds(self) -> float:
        """How long the next tick can wait: not at all where an attempt is to begin at once."""
        begins_at = self._state.begins_at
        if begins_at is None:
            return _TICK_SECONDS
        return min(_TICK_SECONDS, max(0.0, begins_at - time.monotonic()))

    def _look_around(self) -> events.Event:
        now = time.monotonic()
        if not self._clerk.is_alive():
            raise RunnerError("nothing can be saved any more, see above: start the run again")
        if self._stands_still(now):
            since = self._clerk.moved_at
            return events.StoreGone(now, "a call of it has not come back", since)
        validating = () if self._validator is None else self._validator.pids
        reap_orphans([*self._trainer.pids, *validating])
        if (self._spool.path / "stop").exists():
            (self._spool.path / "stop").unlink(missing_ok=True)
            return events.StopAsked(now)
        if not self._trainer.is_there:
            return events.Tick(now)
        self._journal.look()
        failure = self._trainer.failure()
        if failure is not None:
            return not_started(failure)
        code = self._trainer.exit_code(now, self._clerk.board)
        if code is not None:
            return self._recorder.exited(code, self._trainer.verdict)
        self._recorder.look()
        # Before the tick, which asks whether it hangs; and a trainer that always moves stops none.
        for event in self._trainer.look(now, self._clerk.board):
            self._events.put(event)
        self._events.put(events.Tick(now))
        return self._events.get()

    def _stands_still(self, now: float) -> bool:
        """Whether nothing can begin because one call of the store does not come back.

        While a trainer runs, it trains; and in an emergency there is a deadline.
        """
        state = self._state
        waits = state.phase in (machine.Phase.STARTING, machine.Phase.RESTORING)
        longest = self._policy.store_timeout_seconds
        return waits and state.retry_at is None and now - self._clerk.moved_at >= longest

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Runs between two bytecodes of the main thread: it only leaves a note."""
        now = time.monotonic()
        self._hear(listening.event_of_signal(signum, now, self._policy.grace_seconds))

    def _hear(self, event: events.Event) -> None:
        """From any thread. The loop may be waiting for the trainer's end, which must hear of it."""
        if isinstance(event, events.Notice):
            self._trainer.hurry(event.deadline)
        elif isinstance(event, events.Interrupt):
            self._trainer.hurry(event.at + self._policy.grace_seconds)
        self._events.put(event)

    def _on_child(self, signum: int, frame: FrameType | None) -> None:
        """The same, for the end of a child: a trainer that died need not wait for the next tick."""
        self._events.put(events.ChildEnded(time.monotonic()))

    @property
    def _policy(self) -> machine.Policy:
        return self._state.policy

    def _watch_spool(self) -> BaseObserver:
        """Wake the clerk when a marker is renamed into place; its own rounds are the fall-back."""
        clerk = self._clerk

        class OnMarker(FileSystemEventHandler):
            def on_moved(self, event: FileSystemEvent) -> None:
                if str(event.dest_path).endswith(".json"):
                    clerk.look()

        observer = Observer()
        try:
            observer.schedule(OnMarker(), str(self._rank.folder), event_filter=[FileMovedEvent])
            observer.start()
        except OSError as error:  # no inotify watches left
            log.debug("the spool is looked at from time to time only: %s", error)
        return observer

    # ------------------------------------------------------------------ actions

    def _advance(self, event: events.Event) -> None:
        before = self._state
        if isinstance(event, events.Claimed):
            self._journal.begin(event.attempt)
        if isinstance(event, events.RestoreReady) and before.phase is machine.Phase.RESTORING:
            self._begin_at = None  # it has begun there, so what comes after that is newer
            self._journal.start_trackers()
        if isinstance(event, events.Interrupt) and self._clerk.board is not None:
            # What a second one costs is said at once, so it must be known where the trainer is.
            board = self._clerk.board
            before, _ = machine.step(before, events.Progressed(event.at, board.phase, board.step))
        self._state, actions = machine.step(before, event)
        if isinstance(event, events.Persisted):
            self._journal.saved(event.record)
        if isinstance(event, events.Saved):
            self._recorder.saved(event.at)
        if self._state.phase is not before.phase or isinstance(event, events.Saved):
            self._publish()
        if self._validator is not None:
            self._validator.heard(event, self._state)
        self._monitor.heard(event, before, self._state)
        self._perform(actions)

    def _perform(self, actions: list[events.Action]) -> None:
        for action in actions:
            match action:
                case events.Claim():
                    self._clerk.claim()
                case events.Restore(go_back):
                    self._clerk.restore(go_back, self._begin_at, self._assignment.origin)
                case events.Launch():
                    self._launch()
                case events.Ask(kind, why, deadline):
                    self._ask(kind, why, deadline)
                case events.PersistNewest(triggers):
                    self._clerk.persist_newest(triggers)
                case events.PersistLeft():
                    self._clerk.persist_left()
                case events.Hurry(deadline):
                    self._store.hurry(deadline)
                    self._keeper.hurry(deadline)
                    self._trainer.hurry(deadline)
                case events.DumpStacks():
                    self._trainer.show_stacks(self._clerk.board, self._stacks_shown)
                case events.Relay(signum):
                    self._trainer.relay(signum, self._clerk.board)
                case events.KillTree():
                    self._end_trainer()
                case events.EndAttempt(outcome, cause):
                    if self._recorder.is_open:
                        self._journal.attempt_ended()
                        self._recorder.close(outcome, cause, self._state.notice_at)
                case events.Say(message, is_error):
                    log.log(logging.ERROR if is_error else logging.INFO, "%s", message)

    def _launch(self) -> None:
        try:
            self._start_trainer()
        except (RunnerError, OSError) as error:
            self._events.put(not_started(error))
        self._publish()

    def _start_trainer(self) -> None:
        self._end_trainer()
        self._recorder.begin()
        places = self._launcher.places
        plan = plan_for(self._assignment, self._ledger.attempt, places, self._files)
        self._spool.write_plan(plan.to_json())
        self._trainer.start(
            self._ledger.attempt, variables_for(self._assignment, self._ledger.attempt, places)
        )

    def _ask(self, kind: Any, why: Why, deadline: float) -> None:
        board = self._clerk.board
        if board is not None:
            board.ask(kind, why, int(deadline * 1e9))

    def _stacks_shown(self) -> None:
        self._events.put(events.StacksShown(time.monotonic()))

    def _end_leftovers(self) -> None:
        """Before anything begins. Where an engine fails, the first start does it, or fails."""
        try:
            for left in self._trainer.end_leftovers():
                log.warning("killed %s, left by a supervisor that is dead", left)
        except EngineError as error:
            log.warning("%s: the trainer's start will try it again", error)

    def _end_trainer(self) -> None:
        """Kill whatever is left of the attempt; it does not return before that is gone."""
        code = self._trainer.end()
        self._journal.look()
        if code is not None:
            self._events.put(self._recorder.exited(code, self._trainer.verdict))

    # ------------------------------------------------------------------ the rest

    def _sight(self) -> Sight:
        return Sight(
            board=lambda: self._clerk.board,
            ledger=self._ledger,
            spool=self._spool.path,
            pid_here=lambda pid: self._trainer.pid_here(pid),
            newest=lambda: self._journal.newest,
        )

    def _outputs(self, store: Store) -> Outputs:
        limit = self._job.outputs.max_size_bytes
        folder = self._files.outputs
        return Outputs(store, self._assignment.run_id, folder, limit, self._rank.owner)

    def _collect_provenance(self) -> None:
        facts = collect(self._job.workdir, resolved_command(self._job))
        self._provenance = {**facts, **self._launcher.provenance()}
        self._clerk.note_provenance(self._provenance)
        if self._job.provenance.diff:
            keep_changes(self._store, self._assignment.run_id, self._job.workdir)

    def _remove_abandoned(self) -> None:
        path = self._spool.path
        for name in remove_abandoned(path.parent, path):
            log.info("removed %s, which a run that is over had left", path.parent / name)

    def _last_saves(self) -> list[SaveRecord]:
        """What became durable while the loop was over already."""
        saves = []
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, events.Persisted):
                saves.append(event.record)
        return saves

    def _publish(self) -> None:
        """Let `runner status` see what this supervisor is doing. Does nothing where it cannot."""
        status = {
            "run_id": self._assignment.run_id,
            "store": self._store.url,
            "pid": os.getpid(),
            "phase": self._state.phase.value,
            "attempt": self._ledger.attempt,
            "cause": self._state.cause,
            "emergency_seconds": self._state.emergency_seconds,
            "metrics": self._monitor.address,
        }
        try:
            self._spool.publish_status(status)
        except SpoolError as error:  # memory is full, of slots for example: they come first
            log.debug("no status: %s", error)

    def _is_left_alone(self) -> bool:
        """Whether the run has succeeded, and nobody wants this process gone since then."""
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._events.get_nowait()
                self._monitor.heard(event, self._state, self._state)
                if isinstance(event, events.Notice | events.Interrupt | events.StopAsked):
                    return False
        asked = (self._spool.path / "stop").exists()
        return self._state.phase is machine.Phase.SUCCEEDED and not asked

    def _seconds_left(self) -> float:
        deadline = self._state.deadline
        if deadline is None:
            return _CLERK_SECONDS
        return max(0.2, min(_CLERK_SECONDS, deadline - time.monotonic()))

    def _leave_clouds(self, saved: bool) -> None:
        """Listen no more. A cloud that waits for it is told that this machine may go, if it may."""
        is_durable = saved and not self._keeper.has_unsaved()
        preempted = self._state.phase is machine.Phase.PREEMPTED
        if preempted and is_durable and listening.is_alone(self._spool.path):
            self._clouds.acknowledge()
        self._clouds.stop()

    def _leave(self, saved: bool) -> None:
        """Take the spool away, unless it holds what nothing else does and somebody may want."""
        fenced = self._state.phase is machine.Phase.FENCED
        if fenced or (saved and not self._keeper.has_unsaved()):
            self._spool.remove()
        else:
            log.warning("%s keeps the newest state for the next start here", self._spool.path)
            self._spool.close()
