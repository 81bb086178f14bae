"""Plays the node: starts supervisors as a cluster would, gives notice, kills, takes the disk away.

Everything is real: `runner run` in a process of its own, SIGTERM, SIGKILL to the whole tree when
the grace is over. Only the cause is made up.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.board import Board
from runner.checkpoint.attempts import Ledger
from runner.errors import RunnerError
from runner.exitcodes import FENCED, FINISHED, INTERRUPTED, PREEMPTED, USAGE
from runner.launch.process import TrainerProcess
from runner.simulation.plan import SpotPlan
from runner.simulation.report import Death, build_report
from runner.spool import Spool, spool_path
from runner.store import Store
from runner.supervisor.assignment import GRACE_VARIABLE, HOLD_VARIABLE
from runner.supervisor.index import HOME_VARIABLE, SPOOL_ROOT_VARIABLE, files_of
from runner.supervisor.reaper import become_subreaper

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.01
_KILL_SECONDS = 30.0
_MAX_FUTILE_STARTS = 20


@dataclass
class _Outlook:
    """What is still to come of a plan."""

    plan: SpotPlan
    after: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.after, self.steps = list(self.plan.after), list(self.plan.steps)

    def seconds_until_up(self, now: float) -> float:
        """How long the cluster waits for a node."""
        return max(0.0, min(start for start, end in self.plan.up if end > now) - now)

    def is_time(self, now: float, up_until: float) -> bool:
        """Whether a notice is due by the clock; it is then spent."""
        if self.after and now >= self.after[0]:
            self.after.pop(0)
            return True
        return now >= up_until

    def stretch_end(self, now: float) -> float:
        return next((end for start, end in self.plan.up if start <= now < end), math.inf)


def simulate(
    job_file: Path,
    plan: SpotPlan,
    options: Sequence[str],
    *,
    store: Store,
    run_id: str,
    quiet_stdout: bool = False,
) -> dict[str, Any]:
    """Run a job to its end on a node like that, and report what it cost.

    `options` go to `runner run` as they are. With `quiet_stdout` the trainer's output goes to
    stderr. Nothing of the node is left afterwards, whatever happens.
    """
    become_subreaper()
    # As a supervisor's own spool: where the user says that memory is, else in /dev/shm.
    root = os.environ.get(SPOOL_ROOT_VARIABLE) or _memory_backed()
    node = Path(tempfile.mkdtemp(prefix="runner-node-", dir=root))
    command = [sys.executable, "-m", "runner", "run", str(job_file), "--run-id", run_id, *options]
    player = _Node(node, command, _Outlook(plan), store, run_id, 2 if quiet_stdout else 1)
    try:
        return player.play()
    finally:
        player.end()
        shutil.rmtree(node, ignore_errors=True)


class _Node:
    """One node after another, on this machine, for one run."""

    def __init__(
        self,
        folder: Path,
        command: list[str],
        outlook: _Outlook,
        store: Store,
        run_id: str,
        stdout: int,
    ) -> None:
        self._folder, self._command, self._outlook = folder, command, outlook
        self._store, self._run_id, self._stdout = store, run_id, stdout
        self._spool = Spool(spool_path(run_id, store.url, str(folder / "spool")))
        self._begun = time.monotonic()
        self._process: TrainerProcess | None = None
        self._deaths: list[Death] = []
        self._step = 0

    def play(self) -> dict[str, Any]:
        """Start supervisors until one of them ends the run."""
        ledger = Ledger(self._store, self._run_id, "")
        first = len(ledger.records()) + 1
        futile = 0
        while True:
            before = len(ledger.records())
            code = self._one_life()
            attempts = len(ledger.records())
            self._deaths.append(Death(attempts, time.time(), code, self._step))
            futile = futile + 1 if attempts == before else 0
            if code in (FINISHED, USAGE, FENCED, INTERRUPTED) or (code > 0 and code != PREEMPTED):
                break
            if futile > _MAX_FUTILE_STARTS:
                log.error("%d starts in a row did not begin an attempt: given up", futile)
                break
            if self._outlook.plan.lose_disk:
                shutil.rmtree(self._folder, ignore_errors=True)
        wall_seconds = time.monotonic() - self._begun
        files = files_of(self._run_id, self._store.url, self._folder / "home")
        return build_report(
            self._store, self._run_id, first, self._deaths, wall_seconds, files / "outputs"
        )

    def end(self) -> None:
        """Leave nothing running."""
        if self._process is not None:
            remaining = self._process.kill_tree(timeout_seconds=_KILL_SECONDS)
            if remaining:
                raise RunnerError(f"processes {remaining} do not die")
            self._process.close()
            self._process = None

    # ------------------------------------------------------------------ one node

    def _one_life(self) -> int:
        """From the start of a supervisor to its end, or to the end of the node; the exit code."""
        outlook = self._outlook
        wait = outlook.seconds_until_up(self._now())
        if wait:
            log.info("node: none to be had for %.1f s", wait)
            time.sleep(wait)
        up_until = outlook.stretch_end(self._now())
        process = self._start()
        killed_at: float | None = None
        while process.poll() is None:
            now = self._now()
            self._look_at_board()
            if killed_at is None and self._notice_is_due(now, up_until):
                log.info("node: notice, %g s until the kill", outlook.plan.grace_seconds)
                killed_at = now + outlook.plan.grace_seconds
                process.send_signal(15)
            if killed_at is not None and now >= killed_at:
                log.info("node: the grace is over, everything is killed")
                break
            time.sleep(_POLL_SECONDS)
        self._look_at_board()
        self.end()
        return process.poll() or 0

    def _start(self) -> TrainerProcess:
        spool_root = self._folder / "spool"
        spool_root.mkdir(parents=True, exist_ok=True, mode=0o700)
        # What it says is of the life before, whose trainer may have been waiting for a notice.
        (self._spool.rank.folder / "board").unlink(missing_ok=True)
        environment = {
            **os.environ,
            HOME_VARIABLE: str(self._folder / "home"),
            SPOOL_ROOT_VARIABLE: str(spool_root),
            GRACE_VARIABLE: str(self._outlook.plan.grace_seconds),
        }
        environment.pop(HOLD_VARIABLE, None)
        if self._outlook.steps:
            environment[HOLD_VARIABLE] = str(self._outlook.steps[0])
        self._process = TrainerProcess.start(
            self._command,
            cwd=Path.cwd(),
            env=environment,
            stdout=self._stdout,
            stderr=2,
        )
        return self._process

    def _notice_is_due(self, now: float, up_until: float) -> bool:
        if self._held():
            self._outlook.steps.pop(0)
            return True
        return self._outlook.is_time(now, up_until)

    def _held(self) -> bool:
        """Whether the trainer has reached the step of the next notice, and waits there for it."""
        board = self._board()
        return bool(self._outlook.steps) and board is not None and board.held == 1

    def _look_at_board(self) -> None:
        board = self._board()
        if board is not None:
            self._step = board.step

    def _board(self) -> Board | None:
        try:
            return Board(self._spool.rank.folder / "board")
        except (OSError, RunnerError):
            return None  # not there yet, or being replaced

    def _now(self) -> float:
        return time.monotonic() - self._begun


def _memory_backed() -> str | None:
    shared_memory = Path("/dev/shm")
    return str(shared_memory) if os.access(shared_memory, os.W_OK) else None
