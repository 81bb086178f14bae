"""A hostile week in seconds: what befalls a run is drawn, and in the end nothing may be lost.

    python -m tests.chaos [--histories N] [--seed S]

Each history is a run with real processes on nodes that come and go. A seed that fails is printed;
with `--histories 1 --seed S` it is drawn again. When it is time for what depends on the machine, so
a history is a place to look, not a proof.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).parent))

from nodes import Node, Started, nodes_in

from runner.checkpoint.attempts import AttemptRecord
from runner.errors import RunnerError
from runner.exitcodes import FINISHED, INTERRUPTED, PREEMPTED

EPOCHS = 5
STEPS = 12 * EPOCHS
PACE_SECONDS = 0.03
MOST_EVENTS = 6
LONGEST_PAUSE_SECONDS = 3.0
LONGEST_OUTAGE_SECONDS = 2.0
HANG_SECONDS = 5
DISK_BYTES = 64 << 20
PATIENCE_SECONDS = 120.0


@dataclass
class History:
    """One run, from its first start to its end, and everything that befell it."""

    seed: int
    new_node: Callable[[str], Node]
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._node = self.new_node("node-0")
        self._supervisor: Started | None = None

    def play(self) -> Node:
        """Let it all happen; the node on which the run came to its end."""
        events = [self._random.choice(EVENTS) for _ in range(self._random.randint(2, MOST_EVENTS))]
        self._start()
        for event in events:
            self._wait()
            if self._is_over():
                break
            self.told.append(f"{event.__name__[1:]} at step {self._step()}")
            event(self)
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
            path = self._node.checkpoint(manifests[0]) / "model.safetensors"
            content = bytearray(path.read_bytes())
            content[self._random.randrange(len(content))] ^= 1 << self._random.randrange(8)
            path.write_bytes(content)
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
        """Its file system is unmounted for a while; nothing may be written where it was."""
        store = self._node.store_folder
        if not store.exists() or not self._has_begun():
            return
        away = store.rename(store.with_name("unmounted"))
        store.mkdir()
        self._outage()
        strays = list(store.rglob("*"))
        assert not strays, f"written into a mount point with nothing mounted on it: {strays}"
        shutil.rmtree(store)
        away.rename(store)

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
            params={"epochs": EPOCHS, "pace": PACE_SECONDS},
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


# ---------------------------------------------------------------------------- what must be true


def check(history: History, node: Node, undisturbed: str) -> None:
    """AssertionError says what was lost, left behind, or does not add up."""
    assert node.digest() == undisturbed, "it ended with other bits than an undisturbed run"
    newest = node.newest()
    assert (newest.moment.step, newest.moment.epoch) == (STEPS, EPOCHS)
    run = node.store_folder / "job"
    strays = list(run.rglob(".tmp-*"))
    assert not strays, f"left in the store: {strays}"
    _check_journal(node.records())


def _check_journal(records: list[AttemptRecord]) -> None:
    numbers = [record.attempt for record in records]
    assert numbers == list(range(1, len(numbers) + 1)), f"attempts {numbers}"
    assert records[-1].outcome == "succeeded", records[-1]
    for record in records:
        end = record.end_step
        assert end is None or end >= record.start_step, record
        assert record.start_step <= STEPS
    for record, following in pairwise(records):
        if record.outcome is not None:  # else its supervisor was killed, and could not write
            reached = max(record.start_step, record.end_step or 0, record.saved_step or 0)
            assert following.start_step <= reached, f"from nowhere: {following} after {record}"


def _fill(file: IO[bytes]) -> None:
    """Write until there is no room."""
    with contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A small file system of its own, where one may be mounted: only then can it be filled."""
    with tempfile.TemporaryDirectory(prefix="runner-chaos-") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder]
        is_mounted = os.geteuid() == 0 and not subprocess.run(mount, capture_output=True).returncode
        try:
            yield Path(folder)
        finally:
            if is_mounted:
                subprocess.run(["umount", "--lazy", folder], check=True)


def undisturbed_digest() -> str:
    """What every history has to end with."""
    with _folder() as folder, nodes_in(folder) as new_node:
        history = History(0, new_node)
        history._start()
        history._finish()
        return history._node.digest()


def play(seed: int, undisturbed: str) -> list[str]:
    """Draw and check one history; what befell it. Nothing of it may be left in the end."""
    with _folder() as folder, nodes_in(folder) as new_node:
        history = History(seed, new_node)
        try:
            check(history, history.play(), undisturbed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {'; '.join(history.told)}: {error}") from error
        return history.told


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--histories", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1, help="of the first history")
    options = parser.parse_args()
    undisturbed = undisturbed_digest()
    kinds: Counter[str] = Counter()
    for seed in range(options.seed, options.seed + options.histories):
        told = play(seed, undisturbed)
        kinds.update(event.split(" at ")[0] for event in told)
        print(f"seed {seed}: {'; '.join(told) or 'nothing'}", flush=True)
    print(f"{options.histories} histories, all with the bits of an undisturbed run:")
    for kind, count in kinds.most_common():
        print(f"  {count:4}  {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
