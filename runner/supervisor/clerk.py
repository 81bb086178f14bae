"""The supervisor's second thread: everything that takes long, one thing after another.

It talks to the store and copies slots; the loop never waits for it. What comes of a task goes back
as an event. Between tasks it answers the trainer, and has a third thread persist the slots that
must be: one that gives way to the trainer, and that an attempt can begin beside.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

from runner.board import Board
from runner.checkpoint.attempts import AttemptRecord, Ledger
from runner.checkpoint.keeper import Keeper, Origin, Resumption, Saved
from runner.checkpoint.outputs import Outputs
from runner.checkpoint.persist import Persister
from runner.errors import Fenced, NoValidCheckpoint, RunnerError, StoreError, UsageError, is_outage
from runner.saves import SaveRecord
from runner.spool import RankSpool
from runner.supervisor import events
from runner.supervisor.courteous import Courteous
from runner.supervisor.forecast import EmergencySave, Forecaster
from runner.supervisor.happenings import (
    CheckpointSaved,
    Happening,
    RemainsRemoved,
    SaveRefused,
    StateFetched,
)

log = logging.getLogger(__name__)

_ROUND_SECONDS = 0.2
_RETRY_SECONDS = 1.0
_CATCH_UP_SECONDS = 10.0  # in the end, for a record that the store refuses
Task = Callable[[], None]


class Listener(Protocol):
    """Whoever wants to know what the clerk has done."""

    def tell(self, happening: Happening) -> None:
        """Something has happened."""

    def knows(self, records: Sequence[AttemptRecord]) -> None:
        """These are all attempts until now, the one that begins last."""


class Clerk(threading.Thread):
    """Runs tasks in order. `post` takes events from any thread."""

    def __init__(
        self,
        rank: RankSpool,
        keeper: Keeper,
        persister: Persister,
        node: str,
        post: Callable[[events.Event], None],
        forecaster: Forecaster,
        outputs: Outputs | None,
        listener: Listener,
    ) -> None:
        super().__init__(name="clerk", daemon=True)
        self._rank, self._keeper, self._persister = rank, keeper, persister
        self._ledger: Ledger = persister.ledger
        self._node, self._post, self._forecaster = node, post, forecaster
        self._outputs, self._listener = outputs, listener
        self._courteous = Courteous[list[Saved]]("persist")
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._over = threading.Event()
        self._catch_up_seconds = _CATCH_UP_SECONDS
        self._savings: list[Future[list[Saved]]] = []
        self._leave_store_until = 0.0
        self._over_for_good: dict[int, AttemptRecord] = {}
        self._returned = False
        self.board: Board | None = None
        self.moved_at = time.monotonic()
        """When it was last seen that it does not stand still in one call."""

    # ------------------------------------------------------------------ what the loop asks

    def moves(self) -> None:
        """Something has come back from the store. From any thread."""
        self.moved_at = time.monotonic()

    def durable(self, step: int) -> None:
        """The state of this step is in the store. From any thread."""
        if self.board is not None:
            self.board.persisted_step = step + 1

    def claim(self) -> None:
        """Begin the next attempt, with a new board: `Claimed`."""
        self._tasks.put(self._claim)

    def restore(self, go_back: int, which: str | None, origin: Origin | None) -> None:
        """Prepare what it begins from, and let the trainer have it: `RestoreReady`."""
        self._tasks.put(lambda: self._restore(go_back, which, origin))

    def persist_newest(self, triggers: tuple[str, ...]) -> None:
        """Save what is in the slots: `Saved` if there was something, then `Drained`."""
        self._tasks.put(lambda: self._persist_newest(triggers))

    def persist_left(self) -> None:
        """Save what the last trainer left in the slots, beside whatever else is to be done."""
        self._tasks.put(lambda: self._save_beside(self._save_left))

    def record(self, **changes: Any) -> None:
        """Change the attempt's record."""
        self._tasks.put(lambda: self._record(changes))

    def note_provenance(self, facts: dict[str, Any]) -> None:
        """Write into `run.json` where the run comes from, if it has only just begun."""
        self._tasks.put(lambda: self._note_provenance(facts))

    def look(self) -> None:
        """Something has changed in the spool."""
        self._tasks.put(None)

    def finish(self, timeout_seconds: float, *, fenced: bool) -> bool:
        """Do what is left, the run's own files last, and end; whether that succeeded in time."""
        if fenced:
            self._outputs = None
            self._catch_up_seconds = 0.0
        self._over.set()
        self._tasks.put(None)
        self.join(timeout_seconds)
        return not self.is_alive()

    def store_outputs(self) -> None:
        """Store what has changed of the run's own files since, after `finish` has succeeded."""
        self._store_outputs()

    # ------------------------------------------------------------------ the thread

    def run(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=_ROUND_SECONDS)
            except queue.Empty:
                task = None
            self.moves()
            try:
                if task is not None:
                    task()
                elif self._over.is_set():
                    self._courteous.finish()
                    self._collect()
                    self._catch_up()
                    self._store_outputs()
                    return
                else:
                    self._look_round()
            except Fenced as error:
                self._post(events.FencedOff(time.monotonic(), str(error)))

    def _claim(self) -> None:
        try:
            record = self._ledger.claim(self._node)
            if self.board is None:  # later on, what is unfinished is being saved just now
                self._listener.tell(RemainsRemoved(len(self._persister.sweep())))
            self.board = self._rank.prepare()
            self._returned = False
        except (RunnerError, OSError) as error:
            self._post(_not_prepared(error))
        else:
            self._post(events.Claimed(time.monotonic(), record.attempt))

    def _restore(self, go_back: int, which: str | None, origin: Origin | None) -> None:
        self._bring_outputs_back()
        try:
            records = self._attempts()
            self._listener.knows(records)
            self._forecaster.attempt_begins(records)
            resumption = self._keeper.restore(go_back, which=which, origin=origin)
            self._describe(resumption)
            self._set_interval()
        except (NoValidCheckpoint, UsageError) as error:
            self._post(events.PreparationFailed(time.monotonic(), str(error), final=True))
        except (RunnerError, OSError) as error:
            self._post(_not_prepared(error))
        else:
            step = 0 if resumption is None else resumption.moment.step
            if self.board is not None:
                self.board.prepared = 1
            self._post(events.RestoreReady(time.monotonic(), step, self._keeper.durable_step))

    def _attempts(self) -> list[AttemptRecord]:
        """All until now. Those that are over do not change and are read once, so that the
        five-hundredth restart takes no longer than the first."""
        records = self._ledger.records(self._over_for_good)
        self._over_for_good = {
            record.attempt: record for record in records[:-1] if record.outcome is not None
        }
        return records

    def _describe(self, resumption: Resumption | None) -> None:
        if resumption is None:
            return
        moment = resumption.moment
        record = self._ledger.update(
            resumed_from=str(moment.name),
            start_step=moment.step,
            resumed_productive_seconds=moment.productive_seconds,
        )
        self._listener.tell(StateFetched(record.attempt, resumption))

    def _persist_newest(self, triggers: tuple[str, ...]) -> None:
        try:
            if self._ledger.record is not None:
                newest = self._keeper.persist_newest(triggers)
                for saved in [*self._keeper.persist_due(), newest]:
                    if saved is not None:
                        self._announce(saved)
                wait(self._savings)
                self._collect()
            elif self._keeper.has_unsaved():  # nor will it be: this task comes after the claim
                log.error("the run could not be claimed, so what is in the slots stays there")
        except Fenced:
            raise
        except (RunnerError, OSError) as error:
            self._refused(error)
        else:
            self._post(events.Drained(time.monotonic()))

    def _look_round(self) -> None:
        if self.board is not None and self.board.restored and not self._returned:
            self._returned = True
            self._keeper.restored()
        self._collect()
        if time.monotonic() < self._leave_store_until:
            return
        try:
            if not self._savings:
                self._save_beside(self._keeper.persist_due)
            for saved in self._keeper.answer():
                self._announce(saved)
        except Fenced:
            raise
        except (RunnerError, OSError) as error:
            self._store_refuses(error)

    # ------------------------------------------------------------------ saving beside the rest

    def _save_beside(self, save: Callable[[], list[Saved]]) -> None:
        """Save where it disturbs the trainer least; the clerk is woken when that is done."""
        saving = self._courteous.submit(save)
        self._savings.append(saving)
        saving.add_done_callback(lambda _: self._tasks.put(self._collect))

    def _save_left(self) -> list[Saved]:
        saved = self._keeper.persist_newest(())
        self._store_outputs()
        return [] if saved is None else [saved]

    def _collect(self) -> None:
        """Tell what came of the savings that have ended."""
        while self._savings and self._savings[0].done():
            saving = self._savings.pop(0)
            try:
                for saved in saving.result():
                    self._announce(saved)
            except Fenced:
                raise
            except (RunnerError, OSError) as error:
                self._store_refuses(error)

    def _store_refuses(self, error: Exception) -> None:
        self._leave_store_until = time.monotonic() + _RETRY_SECONDS
        self._refused(error)

    def _refused(self, error: Exception) -> None:
        self._listener.tell(SaveRefused.by(error))
        self._post(events.SaveFailed(time.monotonic(), str(error)))

    def _announce(self, saved: Saved) -> None:
        moment = saved.manifest.moment
        self._listener.tell(CheckpointSaved(saved))
        self._post(events.Persisted(saved.durable_at, record_of(saved)))
        if moment.scope != "full":
            return  # nothing can be resumed from it, and it says nothing of an emergency save
        step_seconds = 0.0 if self.board is None else self.board.step_us / 1e6
        save = EmergencySave(step_seconds, moment.snapshot_seconds, saved.persist_seconds)
        self._post(events.Saved(saved.durable_at, moment.step, moment.healthy, save.total_seconds))
        if self.board is None:
            return
        verdict = self._forecaster.saved(save)
        if verdict is not None:
            log.log(logging.INFO if self._forecaster.fits else logging.WARNING, "%s", verdict)
        self._set_interval()

    def _set_interval(self) -> None:
        """Tell the trainer how often to save, where the job leaves that to us."""
        seconds, sentence = self._forecaster.interval()
        if sentence is not None:
            log.info("%s", sentence)
        if self.board is not None:
            self.board.interval_ms = int(1e3 * seconds)

    def _note_provenance(self, facts: dict[str, Any]) -> None:
        try:
            document = self._ledger.run()
            if document is not None and "provenance" not in document:
                self._ledger.amend({**document, "provenance": facts})
        except StoreError as error:
            log.warning("run.json could not be completed: %s", error)

    def _bring_outputs_back(self) -> None:
        try:
            brought = [] if self._outputs is None else self._outputs.bring_back()
        except (StoreError, OSError) as error:
            log.warning("the run's own files could not be brought back: %s", error)
        else:
            if brought:
                log.info("brought back %d files that the run has written before", len(brought))

    def _store_outputs(self) -> None:
        if self._outputs is None:
            return
        try:
            self._ledger.check_fence()  # the node that has the run now may have stored newer ones
            moved = self._outputs.store_changed()
        except (StoreError, OSError, Fenced) as error:
            log.warning("the run's own files could not be stored: %s", error)
        else:
            if moved:
                log.info("stored %d files that the run has written", len(moved))

    def _catch_up(self) -> None:
        """How the attempt has ended belongs into its record, also if a disk is full for a while.

        Without that, a run that has finished would be taken for one that was lost.
        """
        until = time.monotonic() + self._catch_up_seconds
        while time.monotonic() < until:
            try:
                self._ledger.catch_up()
            except StoreError:
                time.sleep(_ROUND_SECONDS)
            else:
                return

    def _record(self, changes: dict[str, Any]) -> None:
        try:
            self._ledger.update(**changes)
        except StoreError as error:
            log.warning("the attempt's record could not be written: %s", error)


def record_of(saved: Saved) -> SaveRecord:
    """The line that is kept of a save. It has just become durable."""
    moment = saved.manifest.moment
    return SaveRecord(
        checkpoint=saved.manifest.name,
        attempt=moment.attempt,
        step=moment.step,
        time=time.time() - (time.monotonic() - saved.durable_at),
        triggers=moment.triggers,
        scope=moment.scope,
        nbytes=saved.manifest.nbytes,
        snapshot_seconds=moment.snapshot_seconds,
        persist_seconds=saved.persist_seconds,
    )


def _not_prepared(error: Exception) -> events.Event:
    if is_outage(error):
        return events.StoreGone(time.monotonic(), str(error))
    return events.PreparationFailed(time.monotonic(), str(error), final=False)
