"""A supervisor in miniature: it takes a training script through its attempts, in this process.

    def script(life: Life) -> None:
        ...                                # builds everything anew, calls runner.attach
        life.here("body")                  # a place where the attempt may be struck

    played = Stage(folder).play(script, [Strike("body", 3), Strike("body", 1, KILL)])

Spool, ledger, keeper and store are the real ones. Each attempt finds other numbers in all random
generators, as a new process would. A preemption is asked for through the board, and the script goes
on to its next boundary. A kill is an exception in the middle of a step, whatever is torn by then:
the newest complete slot counts. With `lost` the node is gone as well, and only the store counts.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from runner import Preempted
from runner.board import Board, Request, Why
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.keeper import Keeper, Origin
from runner.checkpoint.manifest import Manifest
from runner.checkpoint.persist import Persister
from runner.checkpoint.retention import Keep
from runner.plan import Plan
from runner.spool import RankSpool, Spool, is_locked, new_owner
from runner.store import DirectoryStore
from runner.training import params, session
from runner.training.lifeline import Lifeline
from runner.training.slots import SlotMemory

RUN_ID = "run"
PREEMPT, INTERRUPT, KILL = "preempt", "interrupt", "kill"
_POLL_SECONDS = 0.002
_MOST_ATTEMPTS = 30

Script = Callable[["Life"], Any]


class Killed(BaseException):
    """The attempt is gone in the middle of whatever it was doing."""


@dataclass(frozen=True)
class Strike:
    """What befalls an attempt at its `nth` call of `life.here(point)`; any point, if empty."""

    point: str = ""
    nth: int = 1
    how: str = PREEMPT
    lost: bool = False


@dataclass
class Life:
    """One attempt, as the script and the test see it."""

    attempt: int
    board: Board
    strike: Strike | None
    facts: dict[Any, Any]
    """Shared by all attempts: what a step did must be the same whenever it is done again."""
    trace: list[Any] = field(default_factory=list)
    ended: str = "running"
    exit_code: int = 0
    result: Any = None
    _count: int = 0

    def here(self, point: str) -> None:
        """The script has come to this point."""
        if self.strike is None or self.strike.point not in ("", point):
            return
        self._count += 1
        if self._count == self.strike.nth:
            self.hit(self.strike.how)

    def hit(self, how: str) -> None:
        """Be struck here and now."""
        if how == KILL:
            raise Killed
        why = Why.INTERRUPT if how == INTERRUPT else Why.PREEMPTION
        self.board.ask(Request.SAVE_AND_STOP, why)

    def fact(self, key: Any, value: Any) -> None:
        """Note something that must be equal in every attempt that comes by here."""
        assert self.facts.setdefault(key, value) == value, f"{key}: {self.facts[key]} != {value}"


@dataclass(frozen=True)
class Played:
    """A run that has come to its end."""

    lives: list[Life]
    newest: Manifest
    digest: str
    """Of the newest checkpoint's content."""

    @property
    def result(self) -> Any:
        """What the script returned in the attempt that finished."""
        return self.lives[-1].result


class Stage:
    """A node and a store on which one run is played. `options` are those of the plan."""

    def __init__(self, folder: Path, *, keep: int = 1000, **options: Any) -> None:
        _settle_garbage()
        torch.set_num_threads(1)
        self.params: dict[str, Any] = {}
        self.origin: Origin | None = None
        self.options = {"snapshot_steps": 1, **options}
        self.folder = folder
        self.store = DirectoryStore(folder / "store")
        self.spool = Spool(folder / "spool", disk=folder / "disk")
        self.spool.open()
        self.ledger = Ledger(self.store, RUN_ID, new_owner())
        self.persister = Persister(self.store, self.ledger, Keep(last=keep))
        self.archive = Archive(self.store, RUN_ID)
        self.facts: dict[Any, Any] = {}
        self.lives: list[Life] = []

    @property
    def rank(self) -> RankSpool:
        return self.spool.rank

    def play(self, script: Script, strikes: Sequence[Strike] = ()) -> Played:
        """Attempt after attempt, one strike for each, until the script has come to its end."""
        todo = list(strikes)
        while len(self.lives) < _MOST_ATTEMPTS:
            life = self.live(script, todo.pop(0) if todo else None)
            if life.ended == "finished":
                newest = self.newest()
                return Played(self.lives, newest, self.archive.digest(newest))
        raise AssertionError(f"not finished after {_MOST_ATTEMPTS} attempts")

    def live(self, script: Script, strike: Strike | None = None) -> Life:
        """One attempt. What the script raises of its own comes through."""
        record = self.ledger.claim("node")
        board = self.rank.prepare()
        best = self.options.get("best")
        keeper = Keeper(
            self.rank,
            self.persister,
            self.archive,
            best=None if best is None else (best.metric, best.mode),
        )
        resumption = keeper.restore(origin=self.origin)
        if resumption is not None and self.archive.names():
            self.ledger.update(resumed_from=str(resumption.moment.name))
        board.prepared = 1
        plan = Plan(
            RUN_ID,
            record.attempt,
            str(self.folder / "outputs"),
            disk=str(self.folder / "disk"),
            **self.options,
        )
        self.spool.write_plan(plan.to_json())
        life = Life(record.attempt, board, strike, self.facts)
        self.lives.append(life)
        with _new_process(self.spool.path, self.params, record.attempt), _persisting(keeper, board):
            _call(script, life)
        gc.collect()
        assert not is_locked(self.rank.folder / "lock"), "the attempt is over and holds its lock"
        if strike is not None and strike.lost and life.ended != "finished":
            self.rank.forget()
        elif life.ended != "killed":
            keeper.persist_newest(())
        return life

    def newest(self) -> Manifest:
        return self.archive.manifest(str(self.archive.names()[0]))

    def manifests(self) -> list[Manifest]:
        """All checkpoints, oldest first."""
        return list(reversed(list(self.archive.manifests())))

    def state(self, manifest: Manifest | None = None) -> dict[str, Any]:
        """The content of a checkpoint's state.json, as it is written; by default of the newest."""
        content: dict[str, Any] = json.loads(self.file("state.json", manifest).read_bytes())
        return content

    def file(self, name: str, manifest: Manifest | None = None) -> Path:
        """One file of a checkpoint; by default of the newest."""
        newest = self.newest() if manifest is None else manifest
        return self.store.root / RUN_ID / "checkpoints" / newest.name / name


def _call(script: Script, life: Life) -> None:
    """In a function of its own, so that nothing here refers to what the attempt leaves behind."""
    try:
        life.result = script(life)
        life.ended = "finished"
    except Preempted as error:
        life.ended, life.exit_code = "preempted", int(error.code or 0)
    except Killed:
        life.ended = "killed"


@contextlib.contextmanager
def _new_process(spool: Path, given: dict[str, Any], attempt: int) -> Iterator[None]:
    """The surroundings of a new process; what `attach` changes in this one is put back after it."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    environment = {"RUNNER_SPOOL": str(spool), "RUNNER_PARAMS": json.dumps(given)}
    expect = SlotMemory.expect

    def expect_and_wait(slots: SlotMemory, nbytes: int) -> None:
        expect(slots, nbytes)
        while not slots.is_ready():  # steps here are so short that they would all be over before
            time.sleep(_POLL_SECONDS)

    lifelines: list[Lifeline] = []

    def lifeline(*arguments: Any) -> Lifeline:
        lifelines.append(Lifeline(*arguments))
        return lifelines[-1]

    random.seed(f"attempt {attempt}")
    np.random.seed(attempt)
    torch.manual_seed(1000 + attempt)
    try:
        with (
            mock.patch.dict(os.environ, environment),
            mock.patch.object(SlotMemory, "expect", expect_and_wait),
            mock.patch.object(session, "Lifeline", lifeline),
            mock.patch.object(params, "_defaults", {}),
        ):
            yield
    finally:
        for one in lifelines:  # this process does not end with the attempt
            one.close()
        faulthandler.unregister(signal.SIGRTMIN)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _persisting(keeper: Keeper, board: Board) -> Iterator[None]:
    """The supervisor's side, on a thread: persists, answers, and takes the restored slot back."""
    over = threading.Event()
    failures: list[Exception] = []

    def work() -> None:
        returned = False
        while not over.wait(_POLL_SECONDS):
            if board.restored and not returned:
                returned = True
                keeper.restored()
            keeper.answer()
            keeper.persist_due()

    def guarded() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - raised where the test sees it
            failures.append(error)

    thread = threading.Thread(target=guarded, name="harness")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failures:
        raise failures[0]
    if board.restored:
        keeper.restored()
    keeper.persist_due()


def _settle_garbage() -> None:
    """Let later collections pass over what is there by now: torch alone takes them 0.2 s."""
    gc.collect()
    gc.freeze()
