"""What a monitor makes of what it hears, driven by the supervisor's machine without processes."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from children import Children
from prometheus_client.parser import text_string_to_metric_families
from waiting import wait_until

from runner.checkpoint.attempts import Ledger
from runner.errors import CheckpointInvalid, SpoolFull, StoreDenied, StoreError, StoreUnfit
from runner.job import Job
from runner.spool import RankSpool
from runner.store import DirectoryStore
from runner.supervisor import machine
from runner.supervisor.assignment import Assignment
from runner.supervisor.events import (
    Claimed,
    Event,
    Exited,
    MemoryShort,
    Notice,
    PreparationFailed,
    Progressed,
    RestoreReady,
    Tick,
    Unhealthy,
)
from runner.supervisor.footprint import memory_bytes
from runner.supervisor.gauges import Sight
from runner.supervisor.happenings import CheckpointQuarantined, RemainsRemoved, SaveRefused
from runner.supervisor.monitor import Monitor
from runner.training.accounts import Accounts

STORE = "/store"


class Stand:
    """A monitor with a board and a ledger of its own."""

    def __init__(self, folder: Path) -> None:
        rank = RankSpool(folder / "rank-00000")
        rank.folder.mkdir()
        self.board = rank.prepare()
        self.ledger = Ledger(DirectoryStore(folder / "store"), "run", "owner")
        job = Job.model_validate(
            {"name": "job", "command": ["true"], "health": {"restore": "healthy"}}
        )
        sight = Sight(lambda: self.board, self.ledger, folder)
        self.monitor = Monitor(Assignment(job, "run"), STORE, sight)
        policy = machine.Policy(restore_healthy=True, backoff_initial_seconds=0.001)
        self.state, _ = machine.begin(policy)

    def play(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Claimed):
                self.ledger.claim("node")
                self.monitor.knows(self.ledger.records())
            before = self.state
            self.state, _ = machine.step(before, event)
            self.monitor.heard(event, before, self.state)

    def samples(self) -> dict[tuple[str, ...], float]:
        text = self.monitor.rendered("")[0].decode()
        families = text_string_to_metric_families(text)
        return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


RUNNING = (Claimed(1.0, 1), RestoreReady(2.0, 0), Progressed(3.0, "training", 1))
AGAIN = (Tick(1e4), Claimed(1e4 + 1, 2))

ENDS: dict[str, tuple[str, tuple[Event, ...]]] = {
    "a crash": ("crash", (Exited(4.0, 1),)),
    "a hang": ("hang", (Tick(1e3), Exited(1e3 + 2, -9))),
    "no memory, as the kernel says": ("memory", (Exited(4.0, -9, cause="out of memory"),)),
    "no memory, as the guard says": ("memory", (MemoryShort(4.0, 9, 10), Exited(5.0, 75))),
    "bad metrics": ("unhealthy", (Unhealthy(4.0, 1, 10), Exited(5.0, -9))),
    "nothing to begin from": ("preparation", (PreparationFailed(4.0, "x", final=False),)),
}


@pytest.mark.parametrize(("reason", "events"), ENDS.values(), ids=ENDS)
def test_a_restart_is_counted_under_what_ended_the_attempt_before(
    stand: Stand, reason: str, events: tuple[Event, ...]
) -> None:
    stand.play([*(RUNNING if reason != "preparation" else RUNNING[:1]), *events, *AGAIN])

    found = {k[1]: v for k, v in stand.samples().items() if k[0] == "runner_restarts_total" and v}
    assert found == {reason: 1}
    assert stand.samples()["runner_attempt",] == 2


def test_a_preemption_is_counted_once_whoever_tells_of_it(stand: Stand) -> None:
    notices = (Notice(4.0, "aws", 124.0), Notice(100.0, "SIGTERM", 130.0, leave=True))
    stand.play([*RUNNING, *notices])
    found = stand.samples()

    assert (found["runner_preemptions_total", "aws"], found["runner_preemption_lead_seconds",]) == (
        *(1, 120),
    )
    assert found["runner_preemptions_total", "SIGTERM"] == 0


def test_the_end_of_the_time_to_train_is_no_hang(stand: Stand) -> None:
    Accounts(stand.board)
    stand.play([*RUNNING, Notice(4.0, "aws", 124.0), Progressed(100.0, "training", 9)])
    stand.play([Tick(123.0)])

    assert stand.state.phase is machine.Phase.DRAINING
    assert "hang" not in stand.monitor.facts(ended=True)["spent"]


def test_metrics_begin_where_the_supervisor_before_has_ended(stand: Stand, tmp_path: Path) -> None:
    stand.monitor.tell(SaveRefused("refused"))
    stand.play(RUNNING)
    stand.ledger.update(outcome="preempted", **stand.monitor.facts(ended=True))
    (tmp_path / "second").mkdir()
    second = Stand(tmp_path / "second")
    second.ledger = Ledger(DirectoryStore(tmp_path / "store"), "run", "another")
    second.monitor = Monitor(
        Assignment(Job.model_validate({"name": "job", "command": ["true"]}), "run"),
        STORE,
        Sight(lambda: second.board, second.ledger, tmp_path),
    )
    second.monitor.tell(SaveRefused("refused"))
    second.play([Claimed(1.0, 2)])
    found = second.samples()

    assert found["runner_checkpoint_failures_total", "refused", STORE] == 2
    assert found["runner_restarts_total", "preemption"] == 1


def test_one_record_feeds_the_log_and_the_metrics(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    stand.monitor.tell(CheckpointQuarantined("step-1", "a part is missing"))
    stand.monitor.tell(RemainsRemoved(3))
    found = stand.samples()

    assert caplog.record_tuples == [
        ("runner.supervisor.happenings", logging.ERROR,
         "checkpoint step-1 is corrupt: a part is missing; it goes into quarantine"),
    ]  # fmt: skip
    assert found["runner_checkpoint_corrupt_total", STORE] == 1
    assert found["runner_retention_deleted_total", "unfinished", STORE] == 3


REFUSALS = {
    "denied": StoreDenied("s3://b", "s3:PutObject", "b"),
    "unfit": StoreUnfit("s3://b", "wrong", "choose another"),
    "refused": StoreError("out of reach"),
    "local": SpoolFull("no memory"),
    "invalid": CheckpointInvalid("slot-0", "damaged"),
}


@pytest.mark.parametrize(("reason", "error"), REFUSALS.items())
def test_a_refusal_is_told_by_the_type_of_its_error(reason: str, error: Exception) -> None:
    assert SaveRefused.by(error).reason == reason
    assert SaveRefused.by(OSError(28, "no space")).reason == "local"


def test_the_memory_of_a_process_is_its_own_and_that_of_its_children(children: Children) -> None:
    alone = memory_bytes(os.getpid())
    children.start(signal.pause)

    assert alone > 1 << 20
    wait_until(lambda: memory_bytes(os.getpid()) > alone + (1 << 20), what="a child's memory")


def test_the_memory_of_a_process_that_has_ended_is_none() -> None:
    assert memory_bytes(2**22 + 1) == 0


def test_before_an_attempt_nothing_is_known(stand: Stand) -> None:
    assert stand.monitor.facts() == {}
    assert stand.monitor.goodput() is None
    assert stand.monitor.status()["goodput"] is None
