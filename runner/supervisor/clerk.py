"""The supervisor's second thread: everything that takes long, one thing after another.

It talks to the store and copies slots; the loop never waits for it. What comes of a task goes back
as an event. Between tasks it persists the slots that must be and answers the trainer.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from runner.checkpoint.attempts import Ledger
from runner.checkpoint.keeper import Keeper, Origin, Resumption, Saved
from runner.checkpoint.persist import Persister
from runner.errors import Fenced, NoValidCheckpoint, RunnerError, StoreError, UsageError
from runner.spool import Board, RankSpool
from runner.supervisor import machine

log = logging.getLogger(__name__)

_ROUND_SECONDS = 0.2
_RETRY_SECONDS = 1.0
Task = Callable[[], None]


class Clerk(threading.Thread):
    """Runs tasks in order. `post` takes events from any thread."""

    def __init__(
        self,
        rank: RankSpool,
        keeper: Keeper,
        persister: Persister,
        node: str,
        post: Callable[[machine.Event], None],
        on_saved: Callable[[Saved], None],
    ) -> None:
        super().__init__(name="clerk", daemon=True)
        self._rank, self._keeper, self._persister = rank, keeper, persister
        self._ledger: Ledger = persister.ledger
        self._node, self._post, self._on_saved = node, post, on_saved
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._over = threading.Event()
        self._leave_store_until = 0.0
        self._returned = False
        self.board: Board | None = None

    # ------------------------------------------------------------------ what the loop asks

    def claim(self) -> None:
        """Begin the next attempt: `Claimed`."""
        self._tasks.put(self._claim)

    def restore(self, go_back: int, which: str | None, origin: Origin | None) -> None:
        """Prepare what it begins from: `RestoreReady`."""
        self._tasks.put(lambda: self._restore(go_back, which, origin))

    def persist_newest(self, triggers: tuple[str, ...]) -> None:
        """Save what is in the slots: `Saved` if there was something, then `Drained`."""
        self._tasks.put(lambda: self._persist_newest(triggers))

    def record(self, **changes: Any) -> None:
        """Change the attempt's record."""
        self._tasks.put(lambda: self._record(changes))

    def note_provenance(self, facts: dict[str, Any]) -> None:
        """Write into `run.json` where the run comes from, if it has only just begun."""
        self._tasks.put(lambda: self._note_provenance(facts))

    def look(self) -> None:
        """Something has changed in the spool."""
        self._tasks.put(None)

    def finish(self, timeout_seconds: float) -> bool:
        """Do what is left and end; whether that succeeded in time."""
        self._over.set()
        self._tasks.put(None)
        self.join(timeout_seconds)
        return not self.is_alive()

    # ------------------------------------------------------------------ the thread

    def run(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=_ROUND_SECONDS)
            except queue.Empty:
                task = None
            try:
                if task is not None:
                    task()
                elif self._over.is_set():
                    return
                else:
                    self._look_round()
            except Fenced as error:
                self._post(machine.FencedOff(time.monotonic(), str(error)))

    def _claim(self) -> None:
        try:
            record = self._ledger.claim(self._node)
            self._persister.sweep()
        except StoreError as error:
            self._post(machine.PreparationFailed(time.monotonic(), str(error), final=False))
        else:
            self._post(machine.Claimed(time.monotonic(), record.attempt))

    def _restore(self, go_back: int, which: str | None, origin: Origin | None) -> None:
        try:
            self.board = self._rank.prepare()
            self._returned = False
            resumption = self._keeper.restore(go_back, which=which, origin=origin)
            self._describe(resumption)
        except (NoValidCheckpoint, UsageError) as error:
            self._post(machine.PreparationFailed(time.monotonic(), str(error), final=True))
        except (RunnerError, OSError) as error:
            self._post(machine.PreparationFailed(time.monotonic(), str(error), final=False))
        else:
            step = 0 if resumption is None else resumption.moment.step
            self._post(machine.RestoreReady(time.monotonic(), step))

    def _describe(self, resumption: Resumption | None) -> None:
        if resumption is None:
            return
        moment = resumption.moment
        name = str(moment.name)
        self._ledger.update(resumed_from=name, start_step=moment.step)
        where = "this node's memory" if resumption.source == "slot" else "the store"
        log.info(
            "attempt %d begins at step %d, from %s in %s",
            self._ledger.record.attempt if self._ledger.record else 0,
            moment.step,
            name,
            where,
        )

    def _persist_newest(self, triggers: tuple[str, ...]) -> None:
        try:
            newest = self._keeper.persist_newest(triggers)
            for saved in [*self._keeper.persist_due(), newest]:
                if saved is not None:
                    self._announce(saved)
        except (StoreError, OSError) as error:
            self._post(machine.SaveFailed(time.monotonic(), str(error)))
        else:
            self._post(machine.Drained(time.monotonic()))

    def _look_round(self) -> None:
        if self.board is not None and self.board.restored and not self._returned:
            self._returned = True
            self._keeper.restored()
        if time.monotonic() < self._leave_store_until:
            return
        try:
            for saved in self._keeper.persist_due():
                self._announce(saved)
            self._keeper.answer()
        except (StoreError, OSError) as error:
            self._leave_store_until = time.monotonic() + _RETRY_SECONDS
            self._post(machine.SaveFailed(time.monotonic(), str(error)))

    def _announce(self, saved: Saved) -> None:
        if self.board is not None:
            self.board.persisted_step = saved.manifest.moment.step + 1
        self._on_saved(saved)
        self._post(machine.Saved(saved.durable_at, saved.manifest.moment.step))

    def _note_provenance(self, facts: dict[str, Any]) -> None:
        try:
            document = self._ledger.run()
            if document is not None and "provenance" not in document:
                self._ledger.amend({**document, "provenance": facts})
        except StoreError as error:
            log.warning("run.json could not be completed: %s", error)

    def _record(self, changes: dict[str, Any]) -> None:
        try:
            self._ledger.update(**changes)
        except StoreError as error:
            log.warning("the attempt's record could not be written: %s", error)
