"""One run, and all that befalls it: which events there are, and how it goes on after each."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO

from nodes import Node, Started

from runner.errors import RunnerError
from runner.exitcodes import FINISHED, INTERRUPTED, PREEMPTED

from .stores import ChaosStore

EPOCHS = 5
STEPS = 12 * EPOCHS
PACE_SECONDS = 0.03
MOST_EVENTS = 6
LONGEST_PAUSE_SECONDS = 3.0
LONGEST_OUTAGE_SECONDS = 2.0
HANG_SECONDS = 5
PATIENCE_SECONDS = 120.0


@dataclass
class History:
    """One run, from its first start to its end, and everything that befell it."""

    seed: int
    new_node: Callable[[str], Node]
    store: ChaosStore
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._node = self.new_node("node-0")
        self._supervisor: Started | None = None

    def play(self) -> Node:
        """Let it all happen; the node on which the run came to its end."""
        weighted = (
            EVENTS + [History._store_gone, History._supervisor_killed] * self.store.more_outages
        )
        events = [
            self._random.choice(weighted) for _ in range(self._random.randint(2, MOST_EVENTS))
        ]
        self._start()
        for event in events:
            self._wait()
            if self._is_over():
                break
            self.told.append(f"{event.__name__[1:]} at step {self._step()}")
            event(self)
        self._finish()
        return self._node

    def undisturbed(self) -> Node:
        """Nothing befalls it."""
        self._start()
        self._finish()
        return self._node

    # ------------------------------------------------------------------ what befalls it

    def _trainer_killed(self) -> None:
        with contextlib.suppress(OSError, ProcessLookupError):
            pid = self._node.board().pid
            if pid:
                os.kill(pid, signal.SIGKILL)

    def _preemption(self) -> None:
        if self._ended(signal.SIGTERM, PREEMPTED):
            self._start()

    def _interrupt(self) -> None:
        if self._ended(signal.SIGINT, INTERRUPTED):
            self._start()

    def _two_signals(self) -> None:
        self._current.send_signal(signal.SIGINT)
        if self._ended(signal.SIGTERM, PREEMPTED, INTERRUPTED):
            self._start()

    def _save_asked(self) -> None:
        if self._step() >= 0:  # else Python itself may be starting
            self._current.send_signal(signal.SIGUSR1)

    def _supervisor_killed(self) -> None:
        """The next one, on the same node, takes over what there is."""
        self._current.process.kill()
        self._current.wait()
        self._start()

    def _node_lost(self) -> None:
        """With its memory; the store is all that is left."""
        self._current.process.kill()
        self._current.wait()
        self._node.end()
        for spool in self._node.memory.iterdir():
            shutil.rmtree(spool)
        self._node = self.new_node(f"node-{len(self.told)}")
        self._start()

    def _newest_damaged(self) -> None:
        """A bit flips while nobody looks; the one before has to do."""
        if not self._ended(signal.SIGTERM, PREEMPTED):
            return
        manifests = self._node.manifests()
        if len(manifests) > 1:
            file = next(f for f in manifests[0].files if f.name == "model.safetensors")
            bit = 1 << self._random.randrange(8)
            self.store.damage(manifests[0], file.name, self._random.randrange(file.size), bit)
        self._start()

    def _trainer_frozen(self) -> None:
        """It hangs, as in a driver's call; the supervisor has to find that out."""
        with contextlib.suppress(OSError, ProcessLookupError):
            pid = self._node.board().pid
            if pid:
                os.kill(pid, signal.SIGSTOP)

    def _supervisor_frozen(self) -> None:
        self._current.send_signal(signal.SIGSTOP)
        self._outage()
        self._current.send_signal(signal.SIGCONT)

    def _store_gone(self) -> None:
        """Out of reach for a while."""
        if self.store.exists() and self._has_begun():
            with self.store.away(self._random):
                self._outage()

    def _has_begun(self) -> bool:
        """Wait until this supervisor has an attempt: one that finds an empty folder when it looks
        for the first time cannot know that something else belongs there. False if it has ended."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._current.process.poll() is None and time.monotonic() < deadline:
            status = self._node.spool().status() or {}
            if status.get("pid") == self._current.pid and status.get("phase") != "starting":
                return True
            time.sleep(0.01)
        return False

    def _disk_full(self) -> None:
        """The store, logs and the run's own files are on it; somebody else has filled it."""
        if not self._node.store_folder.parent.is_mount():
            return
        filler = self._node.store_folder.with_name("filler")
        with filler.open("wb", buffering=0) as file:
            self._outage(lambda: _fill(file))
        filler.unlink()

    def _outage(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """A while passes; what the supervisor or its trainer do in it is theirs."""
        deadline = time.monotonic() + self._random.uniform(0.1, LONGEST_OUTAGE_SECONDS)
        while time.monotonic() < deadline:
            meanwhile()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._current.process.wait(0.02)
                return

    # ------------------------------------------------------------------ how it goes on

    def _start(self) -> None:
        job = self._node.training(
            params={"epochs": EPOCHS, "pace": PACE_SECONDS, **self.store.params},
            checkpoint={
                "every": {"steps": 7},
                "snapshot_every": {"steps": 1},
                "slots": self._random.choice([1, 2, 3]),
                "keep": {"last": 2},
            },
            restart={
                "backoff": {"initial": "1ms", "max": "50ms"},
                "failures": 20,
                "hang_timeout": f"{HANG_SECONDS}s",
            },
            **self.store.keys,
        )
        self._supervisor = self._node.start("run", job, "--update")

    @property
    def _current(self) -> Started:
        assert self._supervisor is not None
        return self._supervisor

    def _ended(self, signum: int, *codes: int) -> bool:
        """After a signal: whether it ended as asked; False if the run was just over.

        One that comes while Python itself starts ends it before it has begun.
        """
        self._current.send_signal(signum)
        code = self._current.wait(PATIENCE_SECONDS)
        too_early = (-signal.SIGTERM, -signal.SIGINT)
        assert code in (FINISHED, *codes, *too_early), f"exit {code}:\n{self._current.err}"
        return code != FINISHED

    def _is_over(self) -> bool:
        code = self._current.process.poll()
        assert code in (None, FINISHED), f"exit {code}:\n{self._current.err}"
        return code == FINISHED

    def _wait(self) -> None:
        """Mostly for some steps, now and then for a moment: what begins is hit, too."""
        if self._random.random() < 0.3:
            deadline = time.monotonic() + self._random.uniform(0.0, LONGEST_PAUSE_SECONDS)
            target = STEPS
        else:
            deadline = time.monotonic() + PATIENCE_SECONDS
            target = max(0, self._step()) + self._random.randint(1, STEPS // 4)
        while time.monotonic() < deadline and self._step() < target:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._current.process.wait(0.002)
                return

    def _finish(self) -> None:
        code = self._current.wait(PATIENCE_SECONDS)
        assert code == FINISHED, f"exit {code}:\n{self._current.err}"

    def _step(self) -> int:
        with contextlib.suppress(OSError, RunnerError):
            return self._node.board().step
        return -1


EVENTS: list[Callable[[History], None]] = [
    History._trainer_killed,
    History._trainer_killed,
    History._preemption,
    History._preemption,
    History._interrupt,
    History._two_signals,
    History._save_asked,
    History._supervisor_killed,
    History._node_lost,
    History._newest_damaged,
    History._trainer_frozen,
    History._supervisor_frozen,
    History._store_gone,
    History._store_gone,
    History._disk_full,
    History._disk_full,
]


def _fill(file: IO[bytes]) -> None:
    """Write until there is no room."""
    with contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
