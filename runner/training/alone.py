"""A run without a supervisor: `python train.py` saves, stops well and continues all the same.

The spool, the keeper and the store are the supervisor's own; here a thread of the training process
drives them. Against a crash of the process, or a kill, only a supervisor helps.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import torch

from runner.board import Board, Request, Why
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.keeper import Keeper
from runner.checkpoint.persist import Persister
from runner.checkpoint.provenance import collect
from runner.checkpoint.retention import Keep
from runner.errors import Fenced, RunnerError, StoreError, UsageError
from runner.exitcodes import INTERRUPTED, PREEMPTED
from runner.plan import Interval, Plan
from runner.spending import Attempt, read, so_far
from runner.spool import Spool, new_owner, spool_path
from runner.store import open_store
from runner.training.session import Session
from runner.wallclock import utc_now

log = logging.getLogger(__name__)

STORE_VARIABLE = "RUNNER_STORE"
RUN_ID_VARIABLE = "RUNNER_RUN_ID"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_POLL_SECONDS = 0.02
_RETRY_SECONDS = 1.0
_EVERY_MINUTES = 10.0


def open_alone(optimizers: Sequence[torch.optim.Optimizer]) -> Session:
    """Begin or continue the run of this script, in `RUNNER_STORE` (default: `runs`).

    The run id is `RUNNER_RUN_ID`, or the script's name. Raises SpoolTaken if it is running
    already, UsageError for a name that cannot be one, and what restoring raises.
    """
    logging.basicConfig(level=logging.INFO, format="runner: %(message)s", stream=sys.stderr)
    run_id = _run_id()
    store = open_store(str(Path(os.environ.get(STORE_VARIABLE, "runs")).resolve()))
    disk = Path(store.url) / run_id / ".slots"
    spool = Spool(spool_path(run_id, store.url), disk=disk)
    spool.open()
    ledger = Ledger(store, run_id, new_owner())
    ledger.begin({"run_id": run_id, "created_at": utc_now(), "command": sys.argv})
    record = ledger.claim(socket.gethostname())
    began = Attempt(time.monotonic())
    output_dir = Path(store.url) / run_id / "outputs"
    plan = Plan(
        run_id,
        record.attempt,
        str(output_dir),
        disk=str(disk),
        every=Interval(minutes=_EVERY_MINUTES),
    )
    facts = collect(Path.cwd(), sys.argv)
    persister = Persister(store, ledger, Keep(), lambda: facts)
    persister.sweep()
    board = spool.rank.prepare()
    keeper = Keeper(spool.rank, persister, Archive(store, run_id))
    resumption = keeper.restore()
    if resumption is not None:
        moment = resumption.moment
        ledger.update(
            resumed_from=str(moment.name),
            start_step=moment.step,
            resumed_productive_seconds=moment.productive_seconds,
        )
        log.info("run %s continues from %s in %s", run_id, moment.name, store.url)
        if "final" in moment.triggers:
            log.info("it is finished; set %s for another run", RUN_ID_VARIABLE)
    board.prepared = 1
    spool.write_plan(plan.to_json())
    session = Session(spool.path, supervised=False, optimizers=optimizers)
    session.interrupt_code = INTERRUPTED
    _Housekeeper(spool, board, keeper, ledger, began, session.leave).start()
    _listen_to_signals(board)
    return session


class _Housekeeper(threading.Thread):
    """Persists what the training loop hands over. Not a daemon: the process waits for it.

    What is done `atexit` comes after that, so `leave` waits here for the last state's copy.
    """

    def __init__(
        self,
        spool: Spool,
        board: Board,
        keeper: Keeper,
        ledger: Ledger,
        began: Attempt,
        leave: Callable[[], None],
    ) -> None:
        super().__init__(name="runner-housekeeper")
        self._began, self._leave = began, leave
        self._spool, self._board, self._keeper, self._ledger = spool, board, keeper, ledger
        self._over = threading.Event()
        self._returned = False

    def run(self) -> None:
        main = threading.main_thread()
        try:
            while main.is_alive():
                wait = _POLL_SECONDS if self._work(last=False) else _RETRY_SECONDS
                self._over.wait(wait)
            self._leave()
            self._work(last=True)
            self._end()
        except Fenced as error:
            log.error("%s; nothing more is saved", error)
            self._spool.remove()

    def _work(self, *, last: bool) -> bool:
        """One round; False if the store refuses and should be left in peace for a moment."""
        try:
            if self._board.restored and not self._returned:
                self._returned = True
                self._keeper.restored()
            self._keeper.answer()
            self._keeper.persist_due()
            if last:
                self._keeper.persist_newest(("final",) if self._board.finished else ())
        except (StoreError, OSError) as error:
            log.error("a checkpoint could not be saved: %s", error)
            return False
        return True

    def _end(self) -> None:
        asked = Request(self._board.request_kind) is Request.SAVE_AND_STOP
        preempted = asked and self._board.answered == self._board.request_number
        outcome = "succeeded" if self._board.finished else "ended"
        spent = so_far(self._began, read(self._board), time.monotonic())
        now = utc_now()
        try:
            self._ledger.update(
                ended_at=now,
                seen_at=now,
                spent=spent,
                end_step=self._board.step,
                outcome=Why(self._board.request_why).trigger if preempted else outcome,
                exit_code=PREEMPTED if preempted else None,
            )
        except RunnerError as error:
            log.warning("the attempt's record could not be closed: %s", error)
        self._spool.remove()


def _listen_to_signals(board: Board) -> None:
    """SIGTERM and SIGINT ask for a save at the next boundary; a second Ctrl-C gives up."""
    if threading.current_thread() is not threading.main_thread():
        log.warning("attached outside the main thread: signals do not save")
        return
    owner = os.getpid()

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            return  # a loader worker that was forked from here: it dies last, not first
        if signum == signal.SIGINT and board.request_number != board.answered:
            raise KeyboardInterrupt
        why = Why.INTERRUPT if signum == signal.SIGINT else Why.PREEMPTION
        board.ask(Request.SAVE_AND_STOP, why)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


def _run_id() -> str:
    given = os.environ.get(RUN_ID_VARIABLE)
    if given is not None:
        if _RUN_ID.fullmatch(given) is None:
            raise UsageError(f"{RUN_ID_VARIABLE}={given!r}: use letters, digits, '.', '_', '-'")
        return given
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(sys.argv[0] or "run").stem).strip("-._")
    return name[:63] or "run"
