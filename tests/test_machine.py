"""The machine as tables of histories: events in, phase and actions and exit code out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner import exitcodes
from runner.board import Request, Why
from runner.saves import SaveRecord
from runner.supervisor.events import (
    Action,
    Ask,
    ChildEnded,
    Claim,
    Claimed,
    Drained,
    DumpStacks,
    EndAttempt,
    EngineAway,
    Event,
    Exited,
    FencedOff,
    Hint,
    Hurry,
    Interrupt,
    KillTree,
    Launch,
    LaunchFailed,
    MemoryShort,
    Notice,
    Overslept,
    Persisted,
    PersistLeft,
    PersistNewest,
    PreparationFailed,
    Progressed,
    Relay,
    Relayed,
    Restore,
    RestoreReady,
    SaveAsked,
    Saved,
    SaveFailed,
    Say,
    StacksAsked,
    StacksShown,
    StopAsked,
    StoreGone,
    Tick,
    Unhealthy,
    Validated,
    Worked,
)
from runner.supervisor.machine import TERMINAL, Phase, Policy, State, begin, step

GRACE = 30.0
POLICY = Policy(grace_seconds=GRACE, failures=5, hang_timeout_seconds=600.0)


def play(
    events: Iterable[Event], state: State | None = None, policy: Policy = POLICY
) -> tuple[State, list[Action]]:
    """Feed the events one by one; the last state, and every action but the messages."""
    performed: list[Action] = []
    if state is None:
        state, performed = begin(policy)
    for event in events:
        state, actions = step(state, event)
        performed += actions
    return state, [action for action in performed if not isinstance(action, Say)]


def sigterm(at: float, grace: float = GRACE) -> Notice:
    return Notice(at, "SIGTERM", at + grace, leave=True)


RESTORING: tuple[Event, ...] = (Claimed(0.1, 1),)
RUNNING: tuple[Event, ...] = (*RESTORING, RestoreReady(0.2, 0))
TRAINED: tuple[Event, ...] = (*RUNNING, Progressed(1.0, "training"), Saved(2.0, 10))
CRASHED: tuple[Event, ...] = (*TRAINED, Exited(3.0, 1))
NEVER_AGAIN: tuple[Event, ...] = (*TRAINED, Exited(3.0, 2))
HUNG: tuple[Event, ...] = (*TRAINED, Tick(601.1))
STAYING: tuple[Event, ...] = (*TRAINED, Notice(5.0, "aws", 125.0), Saved(5.5, 11, True, 1.0))
DRAINING: tuple[Event, ...] = (*TRAINED, sigterm(5.0))
FINISHING: tuple[Event, ...] = (*TRAINED, Exited(5.0, 0))
REFUSED: tuple[Event, ...] = tuple(  # as often as the budget allows
    event
    for at in range(0, 500, 100)
    for event in (PreparationFailed(at, "403", final=False), Tick(at + 99.0))
)

UNFINISHED = {
    Phase.STARTING: (),
    Phase.RESTORING: RESTORING,
    Phase.RUNNING: TRAINED,
    Phase.DRAINING: DRAINING,
    Phase.STOPPING: HUNG,
    Phase.BACKOFF: CRASHED,
}

START = [Claim, Restore, Launch]
ASKED = [*START, Hurry, Ask]
FAILED: list[type[Action]] = [KillTree, EndAttempt, PersistLeft]  # and it is started again

HISTORIES: dict[str, tuple[Sequence[Event], Phase, list[type[Action]], int]] = {
    # ------------------------------------------------------------ starting
    "nothing has happened": ([], Phase.STARTING, [Claim], 0),
    "the attempt is ours: its trainer imports while its state is fetched": (
        RESTORING,
        Phase.RESTORING,
        START,
        0,
    ),
    "the state is in the spool": (RUNNING, Phase.RUNNING, START, 0),
    "the store refuses the first attempt": (
        [PreparationFailed(1.0, "full", final=False)],
        Phase.BACKOFF,
        [Claim, *FAILED],
        0,
    ),
    "the store refuses every attempt": (
        [*REFUSED, PreparationFailed(500.0, "403", final=False)],
        Phase.STOPPING,  # what is in the slots is tried once more
        [Claim, *[*FAILED, Claim] * 5, PersistNewest, KillTree],
        exitcodes.GIVEN_UP,
    ),
    "the store refuses every attempt, and nothing is to be saved": (
        [*REFUSED, PreparationFailed(500.0, "403", final=False), Drained(500.1)],
        Phase.FAILED,
        [Claim, *[*FAILED, Claim] * 5, PersistNewest, KillTree, EndAttempt],
        exitcodes.GIVEN_UP,
    ),
    "the first attempt is refused for good": (
        [PreparationFailed(1.0, "the run's records are unreadable", final=True)],
        Phase.FAILED,
        [Claim, EndAttempt],
        exitcodes.GIVEN_UP,
    ),
    "the store refuses while it is restored from": (
        [*RESTORING, PreparationFailed(1.0, "timeout", final=False), Tick(1.5), Tick(2.1)],
        Phase.STARTING,
        [*START, *FAILED, Claim],
        0,
    ),
    "the store is out of reach at a start, and comes back": (
        [StoreGone(1.0, "down"), Tick(1.9), Tick(2.0), StoreGone(2.5, "down"), Tick(4.5), *RUNNING],
        Phase.RUNNING,
        [Claim, Claim, *START],
        0,
    ),
    "the store is out of reach while it is restored from: the trainer waits with it": (
        [*RESTORING, StoreGone(1.0, "down"), Tick(1.9), Tick(2.0), RestoreReady(2.5, 0)],
        Phase.RUNNING,
        [*START, Restore],
        0,
    ),
    "the store stays out of reach": (
        [StoreGone(1.0, "down"), Tick(2.0), StoreGone(1801.0, "down")],
        Phase.PREEMPTED,
        [Claim, Claim, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "the store stays out of reach, and a trainer waits for its state": (
        [*RESTORING, StoreGone(1.0, "down"), Tick(2.0), StoreGone(1801.0, "down")],
        Phase.PREEMPTED,
        [*START, Restore, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "a call of the store has not come back for too long": (
        [*RESTORING, StoreGone(1900.0, "stuck", since=100.0)],
        Phase.PREEMPTED,
        [*START, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "a trainer crashes while the store is out of reach": (
        [*RESTORING, StoreGone(1.0, "down"), Exited(1.5, 1), Tick(2.5)],
        Phase.STARTING,
        [*START, *FAILED, Claim],
        0,
    ),
    "a preemption while the store is out of reach": (
        [*RESTORING, StoreGone(1.0, "down"), sigterm(1.5), Tick(2.0), Drained(2.5)],
        Phase.PREEMPTED,
        [*START, Hurry, PersistNewest, KillTree, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "a preemption, and then the store is out of reach": (
        [*RESTORING, sigterm(1.5), StoreGone(1.6, "down"), Drained(2.5), Drained(2.6)],
        Phase.PREEMPTED,
        [*START, Hurry, PersistNewest, KillTree, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "no checkpoint verifies": (
        [*RESTORING, PreparationFailed(1.0, "none is sound", final=True)],
        Phase.FAILED,
        [*START, KillTree, EndAttempt],
        exitcodes.GIVEN_UP,
    ),
    "the command cannot be started": (
        [*RESTORING, LaunchFailed(0.15, "no such program")],
        Phase.FAILED,
        [*START, KillTree, EndAttempt],
        exitcodes.USAGE,
    ),
    "the command cannot be started, which is heard when the state is there": (
        [*RUNNING, LaunchFailed(0.3, "no such program")],
        Phase.FAILED,
        [*START, KillTree, EndAttempt],
        exitcodes.USAGE,
    ),
    "the machine has no room for one more process": (
        [*RESTORING, PreparationFailed(0.15, "EAGAIN", final=False)],
        Phase.BACKOFF,
        [*START, *FAILED],
        0,
    ),
    "the machine has no room for one more process, which is heard when the state is there": (
        [*RUNNING, PreparationFailed(0.3, "EAGAIN", final=False)],
        Phase.BACKOFF,
        [*START, *FAILED],
        0,
    ),
    "the container engine is not there, and comes back": (
        [*RESTORING, EngineAway(0.15, "gone"), RestoreReady(0.2, 0), Tick(1.2), Claimed(1.3, 2)],
        Phase.RESTORING,
        [*START, *FAILED, *START],
        0,
    ),
    "the container engine is not there, which is heard when the state is there": (
        [*RUNNING, EngineAway(10.0, "gone"), Tick(10.9), Tick(11.0)],
        Phase.STARTING,
        [*START, *FAILED, Claim],
        0,
    ),
    "the container engine stays away": (
        [
            *RUNNING,
            EngineAway(1.0, "gone"),
            Tick(2.0),
            Claimed(2.1, 2),
            RestoreReady(2.2, 0),
            EngineAway(1801.0, "gone"),
            Drained(1801.1),
        ],
        Phase.PREEMPTED,
        [*START, *FAILED, *START, Hurry, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "a preemption, and then the container engine is not there": (
        [*RESTORING, sigterm(1.5), EngineAway(1.6, "gone"), Drained(2.5), Drained(2.6)],
        Phase.PREEMPTED,
        [*START, Hurry, PersistNewest, KillTree, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "it crashes while its state is fetched": (
        [*RESTORING, Exited(0.15, 1), RestoreReady(0.2, 0), Tick(1.1), Tick(1.15)],
        Phase.STARTING,
        [*START, *FAILED, Claim],
        0,
    ),
    "it crashes while its state is fetched, which takes longer than the backoff": (
        [*RESTORING, Exited(0.15, 1), Tick(1.15), Tick(9.0)],
        Phase.BACKOFF,  # nothing new is begun before that has ended
        [*START, *FAILED],
        0,
    ),
    "it crashes while its state is fetched, which comes after the backoff": (
        [*RESTORING, Exited(0.15, 1), Tick(1.15), RestoreReady(9.0, 0), Tick(9.1)],
        Phase.STARTING,
        [*START, *FAILED, Claim],
        0,
    ),
    "it crashes while its state is fetched, which fails too": (
        [*RESTORING, Exited(0.15, 1), PreparationFailed(9.0, "503", final=False), Tick(9.1)],
        Phase.STARTING,
        [*START, *FAILED, Claim],
        0,
    ),
    "a code that is never tried again, while its state is fetched": (
        [*RESTORING, Exited(0.15, 2)],
        Phase.STOPPING,
        [*START, PersistNewest, KillTree],
        2,
    ),
    # ------------------------------------------------------------ finishing
    "it finishes": (
        [*FINISHING, Saved(5.5, 20), Drained(5.6)],
        Phase.SUCCEEDED,
        [*START, PersistNewest, EndAttempt],
        exitcodes.FINISHED,
    ),
    "it finishes while its state is fetched": (
        [*RESTORING, Exited(0.15, 0), RestoreReady(0.2, 0), Drained(0.3)],
        Phase.SUCCEEDED,
        [*START, PersistNewest, EndAttempt],
        exitcodes.FINISHED,
    ),
    "it finishes while its state is fetched, which fails": (
        [
            *RESTORING,
            Exited(0.15, 0),
            PreparationFailed(0.2, "503", final=True),
            Drained(0.3),
            Drained(0.4),
        ],
        Phase.SUCCEEDED,
        [*START, PersistNewest, PersistNewest, EndAttempt],
        exitcodes.FINISHED,
    ),
    "it finishes and the final save has to be tried again": (
        [*FINISHING, SaveFailed(5.5, "full"), Tick(5.6), Tick(6.1), Drained(7.0)],
        Phase.SUCCEEDED,
        [*START, PersistNewest, PersistNewest, EndAttempt],
        exitcodes.FINISHED,
    ),
    "a preemption while the final state is saved": (
        [*FINISHING, sigterm(5.1), Drained(6.0)],
        Phase.SUCCEEDED,
        [*START, PersistNewest, Hurry, EndAttempt],
        exitcodes.FINISHED,
    ),
    "the final state cannot be saved before the node goes": (
        [*FINISHING, sigterm(5.1), SaveFailed(5.2, "down"), Tick(34.2)],
        Phase.PREEMPTED,
        [*START, PersistNewest, Hurry, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "the final state cannot be saved and somebody presses Ctrl-C": (
        [*FINISHING, SaveFailed(5.2, "down"), Interrupt(6.0), Tick(35.1)],
        Phase.INTERRUPTED,
        [*START, PersistNewest, Hurry, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    # ------------------------------------------------------------ preemption
    "it obeys at its next boundary": (
        [*DRAINING, Exited(5.5, 75, obeyed=True), Saved(5.8, 11), Drained(5.9)],
        Phase.PREEMPTED,
        [*ASKED, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "a script that turns the end into its own exit code": (
        [*DRAINING, Exited(5.5, 1, obeyed=True), Drained(5.9)],
        Phase.PREEMPTED,
        [*ASKED, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "a script that swallows the end and exits with 0": (
        [*DRAINING, Exited(5.5, 0, obeyed=True), Drained(5.9)],
        Phase.PREEMPTED,
        [*ASKED, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "a code that is never tried again, after the notice": (
        [*DRAINING, Exited(5.5, 2), Drained(5.9)],
        Phase.PREEMPTED,
        [*ASKED, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "it crashes after the notice": (
        [*DRAINING, Exited(5.5, -11), Drained(5.9)],
        Phase.PREEMPTED,
        [*ASKED, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "it finishes by itself after the notice": (
        [*DRAINING, Exited(5.5, 0), Saved(5.6, 20), Drained(5.7)],
        Phase.SUCCEEDED,
        [*ASKED, PersistNewest, EndAttempt],
        exitcodes.FINISHED,
    ),
    "it finishes by itself after the notice, too late to be saved": (
        [*DRAINING, Exited(33.0, 0), SaveFailed(33.5, "down"), Tick(34.1)],
        Phase.PREEMPTED,
        [*ASKED, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "it ignores the request": (
        [*DRAINING, Tick(12.4), Tick(12.5), Saved(13.0, 10), Drained(13.0)],
        Phase.PREEMPTED,
        [*ASKED, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "it ignores the request and has never had a snapshot": (
        [*RUNNING, sigterm(1.0), Tick(8.5), Drained(8.6)],
        Phase.PREEMPTED,
        [*ASKED, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "it comes to its boundary while an older slot is persisted": (
        [*DRAINING, Tick(12.5), Exited(13.0, 75, obeyed=True), Drained(13.1), Drained(13.5)],
        Phase.PREEMPTED,
        [*ASKED, PersistNewest, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "persisting takes longer than the grace": (
        [*DRAINING, Tick(12.5), Tick(33.9), Tick(34.0)],
        Phase.PREEMPTED,
        [*ASKED, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "saving fails until the time is over": (
        [
            *DRAINING,
            Exited(6.0, 75, obeyed=True),
            *(event for i in range(3) for event in (SaveFailed(7.0 + i, "503"), Tick(7.5 + i))),
            Tick(34.0),
        ],
        Phase.PREEMPTED,
        [*ASKED, *[PersistNewest] * 4, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "saving fails once": (
        [*DRAINING, Exited(6.0, 75, obeyed=True), SaveFailed(7.0, "503"), Tick(7.5), Drained(8.0)],
        Phase.PREEMPTED,
        [*ASKED, PersistNewest, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "an earlier save failed just before the notice": (
        [*TRAINED, SaveFailed(4.9, "503"), sigterm(5.0), Tick(5.5), Tick(12.4)],
        Phase.DRAINING,  # the trainer has its quarter of the grace all the same
        ASKED,
        0,
    ),
    "an earlier save fails just after the notice": (
        [*DRAINING, SaveFailed(5.1, "503"), Tick(5.7), Tick(12.4), Tick(12.5)],
        Phase.DRAINING,
        [*ASKED, PersistNewest],
        0,
    ),
    "a second notice leaves less time": (
        [*TRAINED, sigterm(5.0, grace=120.0), sigterm(6.0, grace=8.0), Tick(7.9), Tick(8.0)],
        Phase.DRAINING,
        [*ASKED, Hurry, PersistNewest],
        0,
    ),
    "a second notice leaves less time, and it is used up": (
        [*TRAINED, sigterm(5.0, grace=120.0), sigterm(6.0, grace=8.0), Tick(8.0), Tick(13.1)],
        Phase.PREEMPTED,
        [*ASKED, Hurry, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "a second notice promises more time than the first": (
        [*DRAINING, sigterm(6.0, grace=600.0), Tick(12.5), Tick(34.0)],
        Phase.PREEMPTED,
        [*ASKED, Hurry, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "SIGTERM before the attempt is claimed": (
        [sigterm(0.05), Claimed(0.1, 1), Drained(0.2)],
        Phase.PREEMPTED,
        [Claim, Hurry, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "SIGTERM while what an earlier supervisor left cannot be saved": (
        [sigterm(0.05), SaveFailed(0.1, "503"), Tick(0.5), Tick(0.6), SaveFailed(0.7, "503")],
        Phase.DRAINING,
        [Claim, Hurry, PersistNewest, KillTree, PersistNewest],
        0,
    ),
    "SIGTERM while what an earlier supervisor left cannot be saved before the node goes": (
        [sigterm(0.05), SaveFailed(0.1, "503"), Tick(29.05)],
        Phase.PREEMPTED,
        [Claim, Hurry, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "SIGTERM before the attempt is claimed, which then fails": (
        [sigterm(0.05), PreparationFailed(0.1, "503", final=False), Tick(0.2)],
        Phase.DRAINING,  # what is in the slots is saved all the same
        [Claim, Hurry, PersistNewest, KillTree],
        0,
    ),
    "SIGTERM while restoring": (
        [
            *RESTORING,
            sigterm(0.15),
            Exited(0.16, -9),
            RestoreReady(0.2, 0),
            Drained(0.3),
            Drained(0.4),
        ],
        Phase.PREEMPTED,
        [*START, Hurry, PersistNewest, KillTree, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "SIGTERM while the restoring fails": (
        [*RESTORING, sigterm(0.15), PreparationFailed(0.2, "503", final=True), Drained(0.3)],
        Phase.DRAINING,
        [*START, Hurry, PersistNewest, KillTree, PersistNewest],
        0,
    ),
    "SIGTERM in the instant in which the command cannot be started": (
        [*RESTORING, sigterm(0.15), LaunchFailed(0.16, "no"), Drained(0.3), Drained(0.4)],
        Phase.PREEMPTED,
        [*START, Hurry, PersistNewest, KillTree, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "SIGTERM in that instant, when the state is there": (
        [*RUNNING, sigterm(0.3), LaunchFailed(0.31, "no such program"), Drained(0.4)],
        Phase.PREEMPTED,  # no boundary is waited for
        [*ASKED, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "SIGTERM in that instant, and what is in the slots cannot be saved at once": (
        [
            *RUNNING,
            sigterm(0.3),
            LaunchFailed(0.31, "no such program"),
            SaveFailed(0.4, "503"),
            Tick(0.8),
            Tick(0.9),
        ],
        Phase.DRAINING,
        [*ASKED, PersistNewest, PersistNewest],
        0,
    ),
    "SIGTERM between two attempts": (
        [*CRASHED, sigterm(3.1), Tick(4.0), Saved(4.5, 12), Drained(4.6)],
        Phase.PREEMPTED,
        [*START, *FAILED, Hurry, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "SIGTERM between two attempts, while what the first left cannot be saved": (
        [*CRASHED, sigterm(3.1), SaveFailed(4.0, "503"), Tick(4.4), Tick(4.5), Tick(32.1)],
        Phase.PREEMPTED,
        [*START, *FAILED, Hurry, PersistNewest, KillTree, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "SIGTERM while one that hung is killed": (
        [*HUNG, Tick(602.1), sigterm(602.2), Exited(602.3, -9), Drained(604.0)],
        Phase.PREEMPTED,
        [*START, DumpStacks, KillTree, Hurry, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "SIGTERM after a code that is never tried again": (
        [*NEVER_AGAIN, sigterm(3.5), Drained(4.0)],
        Phase.FAILED,
        [*START, PersistNewest, KillTree, Hurry, EndAttempt],
        2,
    ),
    "SIGTERM after a code that is never tried again, and the state cannot be saved": (
        [*NEVER_AGAIN, sigterm(3.5), SaveFailed(4.0, "503"), Tick(4.4), Tick(4.5), Tick(32.5)],
        Phase.FAILED,
        [*START, PersistNewest, KillTree, Hurry, PersistNewest, EndAttempt],
        2,
    ),
    # ------------------------------------------------------------ interrupt and stop
    "Ctrl-C": (
        [*TRAINED, Interrupt(5.0), Exited(5.5, 75, obeyed=True), Drained(5.9)],
        Phase.INTERRUPTED,
        [*ASKED, PersistNewest, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "Ctrl-C has the grace too": (
        [*TRAINED, Interrupt(5.0), Tick(12.5), Tick(34.0)],
        Phase.INTERRUPTED,
        [*ASKED, PersistNewest, KillTree, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "Ctrl-C twice": (
        [*TRAINED, Interrupt(5.0), Interrupt(5.5)],
        Phase.INTERRUPTED,
        [*ASKED, KillTree, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "Ctrl-C twice after a crash whose state cannot be saved": (
        [*CRASHED, SaveFailed(3.1, "503"), Interrupt(3.2), Interrupt(3.7)],
        Phase.INTERRUPTED,
        [*START, *FAILED, Hurry, PersistNewest, KillTree, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "Ctrl-C twice while one that hung is killed": (
        [*HUNG, Interrupt(601.5), Interrupt(601.6)],
        Phase.INTERRUPTED,
        [*START, DumpStacks, Hurry, KillTree, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "Ctrl-C twice after a code that is never tried again": (
        [*NEVER_AGAIN, SaveFailed(3.1, "503"), Interrupt(3.2), Interrupt(3.7)],
        Phase.FAILED,
        [*START, PersistNewest, KillTree, Hurry, EndAttempt],
        2,
    ),
    "Ctrl-C twice after SIGTERM": (
        [*DRAINING, Interrupt(5.5), Interrupt(6.0)],
        Phase.INTERRUPTED,
        [*ASKED, Hurry, KillTree, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "Ctrl-C once after SIGTERM": (
        [*DRAINING, Interrupt(5.5), Exited(6.0, 75, obeyed=True), Drained(6.5)],
        Phase.PREEMPTED,
        [*ASKED, Hurry, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "Ctrl-C twice while a finished run cannot be saved": (
        [*FINISHING, SaveFailed(5.5, "503"), Interrupt(6.0), Interrupt(6.5)],
        Phase.INTERRUPTED,
        [*START, PersistNewest, Hurry, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "Ctrl-C between two attempts": (
        [*CRASHED, Interrupt(3.1), Drained(4.0)],
        Phase.INTERRUPTED,
        [*START, *FAILED, Hurry, PersistNewest, KillTree, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "Ctrl-C while restoring": (
        [*RESTORING, Interrupt(0.15), Drained(0.2)],
        Phase.INTERRUPTED,  # its end has not been heard of yet: it is killed once more
        [*START, Hurry, PersistNewest, KillTree, KillTree, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "Ctrl-C before anything": (
        [Interrupt(0.05), Drained(0.1)],
        Phase.INTERRUPTED,
        [Claim, Hurry, PersistNewest, KillTree, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "Ctrl-C twice before anything": (
        [Interrupt(0.05), Interrupt(0.1)],
        Phase.INTERRUPTED,
        [Claim, Hurry, PersistNewest, KillTree, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "runner stop": (
        [*TRAINED, StopAsked(5.0), Exited(5.5, 75, obeyed=True), Drained(5.9)],
        Phase.STOPPED,
        [*ASKED, PersistNewest, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "runner stop before anything": (
        [StopAsked(0.05), Drained(0.1)],
        Phase.STOPPED,
        [Claim, Hurry, PersistNewest, KillTree, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "runner stop while restoring": (
        [*RESTORING, StopAsked(5.0), Exited(5.1, -9), Drained(5.2), Drained(5.3)],
        Phase.STOPPED,
        [*START, Hurry, PersistNewest, KillTree, PersistNewest, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "runner stop between two attempts": (
        [*CRASHED, StopAsked(3.1), Drained(4.0)],
        Phase.STOPPED,
        [*START, *FAILED, Hurry, PersistNewest, KillTree, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "runner stop while one that hung is killed": (
        [*HUNG, StopAsked(601.5), Tick(602.1), Exited(602.2, -9), Drained(603.0), Drained(603.1)],
        Phase.STOPPED,
        [*START, DumpStacks, Hurry, PersistNewest, KillTree, KillTree, PersistNewest, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "SIGTERM after runner stop": (
        [*TRAINED, StopAsked(5.0), sigterm(5.1), Exited(5.5, 75, obeyed=True), Drained(5.9)],
        Phase.PREEMPTED,
        [*ASKED, Hurry, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    # ------------------------------------------------------------ failures
    "it crashes, and what it left is saved beside the next start": (
        CRASHED,
        Phase.BACKOFF,
        [*START, *FAILED],
        0,
    ),
    "it crashes, and what it left is saved during the backoff": (
        [*CRASHED, Saved(3.5, 12)],
        Phase.BACKOFF,
        [*START, *FAILED],
        0,
    ),
    "the backoff is over": (
        [*CRASHED, Tick(3.9), Tick(4.0)],
        Phase.STARTING,
        [*START, *FAILED, Claim],
        0,
    ),
    "it is started again": (
        [*CRASHED, Tick(4.0), Claimed(4.1, 2), RestoreReady(4.2, 12)],
        Phase.RUNNING,
        [*START, *FAILED, *START],
        0,
    ),
    "a save that fails does not shorten the backoff": (
        [*CRASHED, SaveFailed(3.1, "503"), Tick(3.7)],
        Phase.BACKOFF,
        [*START, *FAILED],
        0,
    ),
    "what was left cannot be saved, and it is started again": (
        [*CRASHED, SaveFailed(3.9, "503"), Tick(4.0)],
        Phase.STARTING,
        [*START, *FAILED, Claim],
        0,
    ),
    "a code that is never tried again, and what it left is saved first": (
        NEVER_AGAIN,
        Phase.STOPPING,
        [*START, PersistNewest, KillTree],
        2,
    ),
    "a code that is never tried again": (
        [*NEVER_AGAIN, SaveFailed(3.5, "503"), Tick(3.9), Tick(4.0), Drained(4.5)],
        Phase.FAILED,
        [*START, PersistNewest, KillTree, PersistNewest, EndAttempt],
        2,
    ),
    "75 without having been asked is a failure like others": (
        [*TRAINED, Exited(3.0, 75)],
        Phase.BACKOFF,
        [*START, *FAILED],
        0,
    ),
    # ------------------------------------------------------------ hangs
    "just not hung": ([*TRAINED, Tick(601.0)], Phase.RUNNING, START, 0),
    "it hangs": (HUNG, Phase.STOPPING, [*START, DumpStacks], 0),
    "it hangs, and is killed when its stacks are out": (
        [*HUNG, Tick(602.0), Tick(602.1), Exited(602.2, -9)],
        Phase.BACKOFF,
        [*START, DumpStacks, KillTree, *FAILED],
        0,
    ),
    "it hangs, and nothing but its end is waited for": (
        [*HUNG, Tick(602.1), Drained(602.2), Tick(700.0)],
        Phase.STOPPING,
        [*START, DumpStacks, KillTree],
        0,
    ),
    "it hangs, and dies of the question": (
        [*HUNG, Exited(601.2, -34), Tick(602.1)],
        Phase.BACKOFF,
        [*START, DumpStacks, *FAILED],
        0,
    ),
    "it hangs before its first step": (
        [*RUNNING, Tick(600.3)],
        Phase.STOPPING,
        [*START, DumpStacks],
        0,
    ),
    "SIGTERM while the stacks come out": (
        [*HUNG, sigterm(601.5), Tick(602.1), Exited(602.2, -9), Drained(603.0), Drained(603.1)],
        Phase.PREEMPTED,
        [*START, DumpStacks, Hurry, PersistNewest, KillTree, KillTree, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "SIGTERM while one that hung does not die of SIGKILL": (
        [*HUNG, Tick(602.1), sigterm(650.0), Tick(650.02), Drained(651.0)],
        Phase.PREEMPTED,
        [*START, DumpStacks, KillTree, Hurry, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "SIGTERM while one that hung is killed, and the kill holds up everything": (
        [*HUNG, sigterm(601.5, grace=10.0), Tick(602.1), Tick(612.2)],
        Phase.PREEMPTED,
        [*START, DumpStacks, Hurry, PersistNewest, KillTree, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "it moves again and again": (
        [*TRAINED, *(Progressed(500.0 * i, "training") for i in range(1, 9)), Tick(4600.0)],
        Phase.RUNNING,
        START,
        0,
    ),
    "a test after training gives no sign of life": (
        [*TRAINED, Progressed(3.0, "after training"), Tick(9000.0)],
        Phase.RUNNING,
        START,
        0,
    ),
    "it hangs, and py-spy has shown where": (
        [*HUNG, StacksShown(601.2), Tick(601.6), Tick(601.7), Exited(601.8, -9)],
        Phase.BACKOFF,
        [*START, DumpStacks, KillTree, *FAILED],
        0,
    ),
    "stacks that were asked for end nobody": (
        [*TRAINED, StacksAsked(3.0), StacksShown(4.0), Tick(5.0)],
        Phase.RUNNING,
        [*START, DumpStacks],
        0,
    ),
    "it hangs again after the restart": (
        [
            *HUNG,
            Exited(602.2, -9),
            Tick(603.2),
            Claimed(604.0, 2),
            RestoreReady(605.0, 10),
            Tick(1204.9),
            Tick(1205.1),
        ],
        Phase.STOPPING,
        [*START, DumpStacks, *FAILED, *START, DumpStacks],
        0,
    ),
    "a busy start is no hang": (
        [*RUNNING, *(Worked(500.0 * i) for i in range(1, 7)), Tick(3590.0)],
        Phase.RUNNING,
        START,
        0,
    ),
    "a start that is busy for ever is one": (
        [*RUNNING, *(Worked(500.0 * i) for i in range(1, 9)), Tick(4101.0)],
        Phase.STOPPING,
        [*START, DumpStacks],
        0,
    ),
    "a loop that is busy without a step is one": (
        [*TRAINED, *(Worked(100.0 * i) for i in range(1, 6)), Tick(601.1)],
        Phase.STOPPING,
        [*START, DumpStacks],
        0,
    ),
    "this supervisor was frozen for an hour, and the trainer with it": (
        [*TRAINED, Overslept(3603.0, 3600.0), Tick(3603.1)],
        Phase.RUNNING,
        START,
        0,
    ),
    "this supervisor was frozen, and then the trainer hangs": (
        [*TRAINED, Overslept(3603.0, 3600.0), Tick(4200.9), Tick(4201.1)],
        Phase.STOPPING,
        [*START, DumpStacks],
        0,
    ),
    # ------------------------------------------------------------ time to go on after a notice
    "a notice with two minutes: it saves and stays": (
        STAYING,
        Phase.RUNNING,
        ASKED,
        0,
    ),
    "it stays for three quarters of the time": ([*STAYING, Tick(94.9)], Phase.RUNNING, ASKED, 0),
    "it saves again in time, and leaves": (
        [*STAYING, Tick(95.0), Exited(95.5, 75, True), Saved(96.0, 99), Drained(96.1)],
        Phase.PREEMPTED,
        [*ASKED, Ask, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "saves are slow: it leaves earlier": (
        [*STAYING, Saved(20.0, 12, True, 20.0), Tick(65.0)],
        Phase.DRAINING,
        [*ASKED, Ask],
        0,
    ),
    "no save was ever measured: half of the time is kept": (
        [*TRAINED, Notice(5.0, "aws", 125.0), Tick(64.9), Tick(65.0)],
        Phase.DRAINING,
        [*ASKED, Ask],
        0,
    ),
    "a notice with a few seconds: it leaves at once": (
        [*TRAINED, Saved(3.0, 10, True, 1.0), Notice(5.0, "aws", 15.0)],
        Phase.DRAINING,
        ASKED,
        0,
    ),
    "a save takes too long for two of them: it leaves at once": (
        [*TRAINED, Saved(3.0, 10, True, 25.0), Notice(5.0, "aws", 95.0)],
        Phase.DRAINING,
        ASKED,
        0,
    ),
    "SIGTERM while it stays": (
        [*STAYING, sigterm(20.0), Exited(20.5, 75, True), Drained(21.0)],
        Phase.PREEMPTED,
        [*ASKED, Hurry, Ask, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "Ctrl-C while it stays": (
        [*STAYING, Interrupt(20.0), Exited(20.5, 75, True), Drained(21.0)],
        Phase.INTERRUPTED,
        [*ASKED, Hurry, Ask, PersistNewest, EndAttempt],
        exitcodes.INTERRUPTED,
    ),
    "the same notice once more": (
        [*STAYING, Notice(30.0, "aws", 125.0), Tick(94.9)],
        Phase.RUNNING,
        [*ASKED, Hurry],
        0,
    ),
    "a sooner deadline while it stays": (
        [*STAYING, Notice(30.0, "aws", 60.0)],
        Phase.RUNNING,
        [*ASKED, Hurry],
        0,
    ),
    "a deadline that is near while it stays": (
        [*STAYING, Notice(30.0, "aws", 40.0)],
        Phase.DRAINING,
        [*ASKED, Hurry, Ask],
        0,
    ),
    "it finishes while it stays": (
        [*STAYING, Exited(30.0, 0), Saved(30.5, 20), Drained(30.6)],
        Phase.SUCCEEDED,
        [*ASKED, PersistNewest, EndAttempt],
        exitcodes.FINISHED,
    ),
    "it crashes while it stays": (
        [*STAYING, Exited(30.0, 1), Drained(30.6)],
        Phase.PREEMPTED,
        [*ASKED, PersistNewest, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "the supervisor was frozen until after the deadline": (
        [*STAYING, Overslept(200.0, 190.0), Tick(200.0)],
        Phase.PREEMPTED,  # maybe the node is still there: what little time is left is used
        [*ASKED, Ask, PersistNewest, KillTree, EndAttempt],
        exitcodes.PREEMPTED,
    ),
    "a hint is worth a save": ([*TRAINED, Hint(5.0, "aws")], Phase.RUNNING, [*START, Ask], 0),
    "many hints are worth one save in a minute": (
        [*TRAINED, *(Hint(5.0 + i, "aws") for i in range(0, 61, 10))],
        Phase.RUNNING,
        [*START, Ask, Ask],
        0,
    ),
    "a hint after the notice": ([*STAYING, Hint(6.0, "aws")], Phase.RUNNING, ASKED, 0),
    "a hint before anything runs": ([Hint(0.0, "aws")], Phase.STARTING, [Claim], 0),
    # ------------------------------------------------------------ metrics that are not finite
    "metrics are not finite: a warning": (
        [*TRAINED, Unhealthy(3.0, 11, 10), Tick(3.1)],
        Phase.RUNNING,
        START,
        0,
    ),
    # ------------------------------------------------------------ requests
    "a save is asked for": ([*TRAINED, SaveAsked(3.0)], Phase.RUNNING, [*START, Ask], 0),
    "a save is asked for too late": ([*DRAINING, SaveAsked(5.1)], Phase.DRAINING, ASKED, 0),
    "a save is asked for too early": ([SaveAsked(0.0)], Phase.STARTING, [Claim], 0),
    "a signal for the trainer": ([*TRAINED, Relayed(3.0, 1)], Phase.RUNNING, [*START, Relay], 0),
    "a signal for a trainer that is draining": (
        [*DRAINING, Relayed(6.0, 12)],
        Phase.DRAINING,
        [*ASKED, Relay],
        0,
    ),
    "a signal for no trainer": ([Relayed(0.0, 1)], Phase.STARTING, [Claim], 0),
    "stacks are asked for": ([*TRAINED, StacksAsked(3.0)], Phase.RUNNING, [*START, DumpStacks], 0),
}


@pytest.mark.parametrize(
    ("events", "phase", "actions", "exit_code"), HISTORIES.values(), ids=list(HISTORIES)
)
def test_a_history_ends_where_it_should(
    events: Sequence[Event], phase: Phase, actions: list[type[Action]], exit_code: int
) -> None:
    state, performed = play(events)

    assert [type(action) for action in performed] == actions
    assert state.phase is phase
    assert state.exit_code == exit_code


A_SIGNAL = {Phase.PREEMPTED, Phase.INTERRUPTED, Phase.STOPPED}
FAILURE = {Phase.BACKOFF, Phase.STOPPING, Phase.FAILED}
MOVES: dict[Phase, set[Phase]] = {  # the drawing at the top of the module
    Phase.STARTING: {Phase.RESTORING, Phase.DRAINING, Phase.PREEMPTED, *FAILURE},
    Phase.RESTORING: {Phase.RUNNING, Phase.DRAINING, Phase.PREEMPTED, *FAILURE},
    Phase.RUNNING: {Phase.DRAINING, Phase.PREEMPTED, *FAILURE},
    Phase.DRAINING: {Phase.SUCCEEDED, *A_SIGNAL},
    Phase.STOPPING: {Phase.BACKOFF, Phase.FAILED, *A_SIGNAL},
    Phase.BACKOFF: {Phase.STARTING, Phase.DRAINING},
}


def moves(events: Iterable[Event]) -> set[tuple[Phase, Phase]]:
    state, _ = begin(POLICY)
    seen = set()
    for event in events:
        before = state.phase
        state, _ = step(state, event)
        seen.add((before, state.phase))
    return {(one, other) for one, other in seen if one is not other}


def test_the_histories_make_every_move_of_the_drawing_and_no_other() -> None:
    made = set().union(*(moves(events) for events, _, _, _ in HISTORIES.values()))

    assert made == {(one, other) for one, others in MOVES.items() for other in others}


# ---------------------------------------------------------------- what is asked and saved


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (sigterm(5.0), Why.PREEMPTION),
        (Interrupt(5.0), Why.INTERRUPT),
        (StopAsked(5.0), Why.INTERRUPT),
    ],
)
def test_the_trainer_is_told_why_and_until_when(event: Event, why: Why) -> None:
    state, performed = play([*TRAINED, event, Exited(6.0, 75, obeyed=True)])

    assert performed[-3:] == [
        Hurry(35.0),
        Ask(Request.SAVE_AND_STOP, why, 35.0),
        PersistNewest((why.trigger,)),
    ]
    assert state.phase is Phase.DRAINING


HURRIES: dict[str, tuple[Sequence[Event], list[float]]] = {
    "a notice": ([*TRAINED, sigterm(5.0)], [35.0]),
    "a notice before anything": ([sigterm(5.0)], [35.0]),
    "a notice while restoring": ([*RESTORING, sigterm(5.0)], [35.0]),
    "a notice between two attempts": ([*CRASHED, sigterm(5.0)], [35.0]),
    "a notice while a hung trainer is being killed": ([*HUNG, sigterm(601.5)], [631.5]),
    "a notice after a code that is never tried again": ([*NEVER_AGAIN, sigterm(5.0)], [35.0]),
    "a notice while the final state is saved": ([*FINISHING, sigterm(6.0)], [36.0]),
    "a notice of more than the grace": ([*TRAINED, sigterm(5.0, grace=120.0)], [125.0]),
    "Ctrl-C has the grace": ([*TRAINED, Interrupt(5.0)], [35.0]),
    "runner stop has the grace": ([*TRAINED, StopAsked(5.0)], [35.0]),
    "a second notice leaves less time": ([*DRAINING, sigterm(6.0, grace=8.0)], [35.0, 14.0]),
    "a second notice promises more": ([*DRAINING, sigterm(6.0, grace=600.0)], [35.0, 35.0]),
    "Ctrl-C after a notice": ([*DRAINING, Interrupt(6.0)], [35.0, 35.0]),
    "a save is asked for": ([*TRAINED, SaveAsked(5.0)], []),
    "a crash": (CRASHED, []),
}


@pytest.mark.parametrize(("events", "deadlines"), HURRIES.values(), ids=list(HURRIES))
def test_the_store_is_told_until_when_it_may_last(
    events: Sequence[Event], deadlines: list[float]
) -> None:
    _, performed = play(events)

    assert [a.deadline for a in performed if isinstance(a, Hurry)] == deadlines


TRIGGERS = {
    "finished": (FINISHING, ("final",)),
    "finished after the notice": ([*DRAINING, Exited(6.0, 0)], ("final",)),
    "never to be tried again": (NEVER_AGAIN, ()),
    "given up": ([*REFUSED, PreparationFailed(500.0, "403", final=False)], ()),
    "a notice before anything": ([sigterm(5.0)], ("preemption",)),
    "a notice while restoring": ([*RESTORING, sigterm(5.0)], ("preemption",)),
    "Ctrl-C between two attempts": ([*CRASHED, Interrupt(5.0)], ("interrupt",)),
    "crashed after the notice": ([*DRAINING, Exited(6.0, 1)], ("preemption",)),
    "no boundary within a quarter of the grace": ([*DRAINING, Tick(12.5)], ("preemption",)),
    "tried again": (
        [*DRAINING, Exited(6.0, 1), SaveFailed(7.0, "503"), Tick(8.0)],
        ("preemption",),
    ),
    "a notice while a hung trainer is being killed": (
        [*HUNG, sigterm(601.5), Exited(602.2, -9)],
        ("preemption",),
    ),
    "a notice while what a crashed one left is saved": (
        [*CRASHED, sigterm(3.5), SaveFailed(4.0, "503"), Tick(4.5)],
        ("preemption",),
    ),
}


@pytest.mark.parametrize(("events", "triggers"), TRIGGERS.values(), ids=list(TRIGGERS))
def test_a_checkpoint_says_why_it_was_made(
    events: Sequence[Event], triggers: tuple[str, ...]
) -> None:
    _, performed = play(events)

    assert [a for a in performed if isinstance(a, PersistNewest)][-1] == PersistNewest(triggers)


ENDS: dict[str, tuple[Sequence[Event], str, str]] = {
    "it finishes": ([*FINISHING, Drained(6.0)], "succeeded", "finished"),
    "a notice": (
        [*DRAINING, Exited(6.0, 75, True), Drained(7.0)],
        "preempted",
        "preemption (SIGTERM)",
    ),
    "a notice while restoring": (
        [*RESTORING, sigterm(0.15), Drained(0.2)],
        "preempted",
        "preemption (SIGTERM)",
    ),
    "a notice while restoring, which fails": (
        [
            *RESTORING,
            sigterm(0.15),
            PreparationFailed(0.2, "503", final=True),
            Drained(0.3),
            Drained(0.4),
        ],
        "preempted",
        "preemption (SIGTERM)",
    ),
    "runner stop": (
        [*TRAINED, StopAsked(3.0), Exited(6.0, 75, True), Drained(7.0)],
        "stopped",
        "stop",
    ),
    "a code": ([*TRAINED, Exited(3.0, 3)], "failed", "the trainer exited with code 3"),
    "a code, while restoring": (
        [*RESTORING, Exited(3.0, 3)],
        "failed",
        "the trainer exited with code 3",
    ),
    "a code that is never tried again": (
        [*NEVER_AGAIN, Drained(4.0)],
        "failed",
        "the trainer exited with code 2, which is never tried again",
    ),
    "SIGKILL": ([*TRAINED, Exited(3.0, -9)], "failed", "the trainer was killed by SIGKILL"),
    "a signal without a name": (
        [*TRAINED, Exited(3.0, -35)],
        "failed",
        "the trainer was killed by signal 35",
    ),
    "a hang": ([*HUNG, Tick(602.1), Exited(602.2, -9)], "failed", "hang"),
    "no such program": (
        [*RESTORING, LaunchFailed(0.3, "no such program")],
        "failed",
        "no such program",
    ),
    "nothing to begin from": (
        [*RESTORING, PreparationFailed(0.3, "503", final=False)],
        "failed",
        "503",
    ),
}


@pytest.mark.parametrize(("events", "outcome", "cause"), ENDS.values(), ids=list(ENDS))
def test_an_attempts_record_says_how_it_ended(
    events: Sequence[Event], outcome: str, cause: str
) -> None:
    _, performed = play(events)

    ends = [action for action in performed if isinstance(action, EndAttempt)]
    assert ends == [EndAttempt(outcome, cause)]


# ---------------------------------------------------------------- the budget


def failing(at: float, *, durable: int | None = None, left: int = -1, code: int = 1) -> list[Event]:
    """One attempt, from the claim to the end of its backoff, that fails.

    `durable` is a step that it had saved, `left` the one that was in its newest slot.
    """
    saved: list[Event] = [] if durable is None else [Saved(at + 0.3, durable)]
    return [
        Claimed(at, 1),
        RestoreReady(at + 0.1, 0),
        *saved,
        Exited(at + 0.5, code, left_step=left),
        Drained(at + 0.6),  # counts where it is given up, and then only
        Tick(at + 99.0),
    ]


def failures(count: int, *, durable: int | None = None, left: int = -1) -> list[Event]:
    return [event for i in range(count) for event in failing(100.0 * i, durable=durable, left=left)]


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_the_run_is_given_up_when_the_budget_is_spent(budget: int) -> None:
    policy = Policy(failures=budget)

    almost, _ = play(failures(budget), policy=policy)
    spent, performed = play(failures(budget + 1), policy=policy)

    assert almost.phase is Phase.STARTING
    assert (spent.phase, spent.exit_code) == (Phase.FAILED, exitcodes.GIVEN_UP)
    assert [type(a) for a in performed].count(Launch) == budget + 1


@pytest.mark.parametrize(("code", "budget", "exit_code"), [(1, 0, exitcodes.GIVEN_UP), (2, 9, 2)])
def test_a_run_that_has_failed_for_good_waits_for_its_store_for_minutes_and_no_longer(
    code: int, budget: int, exit_code: int
) -> None:
    policy = Policy(failures=budget, grace_seconds=GRACE)
    refused = [e for i in range(600) for e in (SaveFailed(4.0 + i, "503"), Tick(4.6 + i))]
    history = [*TRAINED, Exited(3.0, code), *refused]

    at_300 = [event for event in history if event.at < 302.0]
    waiting, performed = play(at_300, policy=policy)
    ended, _ = play(history, policy=policy)

    assert waiting.phase is Phase.STOPPING
    assert [type(action) for action in performed].count(PersistNewest) > 250
    assert (ended.phase, ended.exit_code) == (Phase.FAILED, exit_code)


def test_a_run_is_given_up_with_70_whatever_the_trainers_code_was() -> None:
    for code in (1, 3, 70, 75, 76, 130, -9):
        state, _ = play(failing(0.0, code=code), policy=Policy(failures=0))

        assert state.exit_code == exitcodes.GIVEN_UP


def test_a_later_durable_step_makes_the_budget_whole_again() -> None:
    policy = Policy(failures=1)
    progressing = [event for i in range(9) for event in failing(100.0 * i, durable=i)]

    state, performed = play(progressing, policy=policy)

    assert state.phase is Phase.STARTING
    assert [type(a) for a in performed].count(Launch) == 9


def test_saving_the_same_step_again_is_no_progress() -> None:
    state, performed = play(failures(9, durable=10), policy=Policy(failures=2))

    assert state.phase is Phase.FAILED
    assert [type(a) for a in performed].count(Launch) == 3


def test_going_back_and_forth_over_the_same_steps_is_no_progress() -> None:
    policy = Policy(failures=3)
    steps = [10, 12, 11, 12, 9, 8]
    events = [event for i, at in enumerate(steps) for event in failing(100.0 * i, durable=at)]

    state, performed = play(events, policy=policy)

    assert state.phase is Phase.FAILED
    assert [type(a) for a in performed].count(Launch) == 5  # one at step 10, four at step 12


def test_a_later_step_in_the_newest_slot_makes_the_budget_whole_again() -> None:
    """It is made durable from the crash on: to wait for that would only take time."""
    policy = Policy(failures=1)
    progressing = [event for i in range(9) for event in failing(100.0 * i, left=i)]

    state, performed = play(progressing, policy=policy)

    assert state.phase is Phase.STARTING
    assert [type(a) for a in performed].count(Launch) == 9


def test_the_same_step_in_the_newest_slot_again_is_no_progress() -> None:
    state, performed = play(failures(9, left=10), policy=Policy(failures=2))

    assert state.phase is Phase.FAILED
    assert [type(a) for a in performed].count(Launch) == 3


def test_a_step_that_was_in_a_slot_at_one_failure_is_no_progress_when_it_is_saved() -> None:
    events = [*failing(0.0, durable=3, left=10), *failing(100.0, durable=10, left=10)]

    state, _ = play(events)

    assert state.failures == 2


@pytest.mark.parametrize("found", [0, 100])
def test_what_the_first_start_finds_is_no_progress_also_if_one_crashed_before(found: int) -> None:
    """A script that ends at once may be quicker than the look into the store."""
    crashed, _ = play([*RESTORING, Exited(0.15, 1), RestoreReady(0.2, found)])
    assert crashed.failures == 1

    again = [Tick(9.0), Claimed(9.1, 2), RestoreReady(9.2, found), Exited(9.3, 1)]
    after, _ = play(again, crashed)

    assert after.failures == 2


def test_a_failure_without_a_trainer_does_not_make_an_old_step_new() -> None:
    """The store is away in between, so what is in the slot is not durable yet."""
    crash = failing(0.0, left=10)
    refusal = [PreparationFailed(100.0, "503", final=False), Tick(199.0)]

    state, _ = play([*crash, *refusal, *failing(200.0, left=10)])

    assert state.failures == 3


def test_only_steps_past_the_furthest_are_progress() -> None:
    events = [*failing(0.0, left=10), *failing(100.0, left=7), *failing(200.0, left=9)]

    state, _ = play(events)
    further, _ = play(failing(300.0, left=11), state)

    assert (state.failures, further.failures) == (3, 1)


def test_a_store_that_refuses_uses_up_the_budget_too() -> None:
    refusals = [PreparationFailed(100.0 * i, "403", final=False) for i in range(3)]
    events = [event for refusal in refusals for event in (refusal, Tick(refusal.at + 99.0))]

    state, _ = play(events, policy=Policy(failures=2))

    assert (state.phase, state.goal) == (Phase.STOPPING, Phase.FAILED)
    over, _ = play([Drained(300.0)], state)
    assert (over.phase, over.exit_code) == (Phase.FAILED, exitcodes.GIVEN_UP)


def test_a_failure_counts_once_whatever_is_heard_of_it_later() -> None:
    """The trainer crashes while its state is fetched, and then that fails as well."""
    fetched_late = [PreparationFailed(9.0, "503", final=False), RestoreReady(9.0, 10)]

    for late in fetched_late:
        state, _ = play([*RESTORING, Exited(0.2, 1), Tick(5.0), late, Tick(9.1)])

        assert state.phase is Phase.STARTING
        assert (state.failures, state.durable_step) == (1, -1)


def test_preemptions_neither_count_as_failures_nor_as_progress() -> None:
    """The next supervisor starts with a whole budget; in this one, nothing follows a preemption."""
    before, _ = play([*failures(2), Claimed(200.0, 3), RestoreReady(200.1, 0)])

    after, _ = play([sigterm(201.0), Exited(202.0, 75, obeyed=True), Drained(203.0)], before)

    assert after.phase is Phase.PREEMPTED
    assert (after.failures, after.durable_step) == (before.failures, before.durable_step)


def test_it_is_known_when_the_next_attempt_begins_and_the_tick_at_that_moment_begins_it() -> None:
    running, _ = play(TRAINED)
    crashed, _ = step(running, Exited(3.0, 1))
    assert running.begins_at is None
    assert crashed.begins_at == crashed.retry_at == 4.0

    assert step(crashed, Tick(3.9)) == (crashed, [])
    begun, actions = step(crashed, Tick(crashed.begins_at))

    assert actions == [Claim()]
    assert begun.begins_at is None


def test_an_attempt_does_not_begin_by_time_alone_while_a_state_is_still_being_fetched() -> None:
    crashed, _ = play([*RESTORING, Exited(0.15, 1)])
    fetched, _ = step(crashed, RestoreReady(9.0, 0))

    assert crashed.begins_at is None
    assert fetched.begins_at == fetched.retry_at == 1.15


def test_the_backoff_doubles_up_to_its_longest() -> None:
    policy = Policy(failures=20, backoff_initial_seconds=1.0, backoff_max_seconds=10.0)
    state, _ = begin(policy)
    waits = []
    for i in range(7):
        state, _ = play(failing(100.0 * i)[:-1], state)
        assert state.retry_at is not None
        waits.append(state.retry_at - (100.0 * i + 0.5))
        state, _ = step(state, Tick(100.0 * i + 99.0))

    assert waits == pytest.approx([1, 2, 4, 8, 10, 10, 10])


def test_with_a_seed_the_backoff_is_between_half_of_that_and_all_and_never_the_same() -> None:
    waits: dict[int, list[float]] = {}
    for seed in (1, 2):
        state, _ = begin(Policy(failures=20, backoff_max_seconds=8.0, seed=seed))
        waits[seed] = []
        for i in range(9):
            state, _ = play(failing(100.0 * i)[:-1], state)
            assert state.retry_at is not None
            waits[seed].append(state.retry_at - (100.0 * i + 0.5))
            state, _ = step(state, Tick(100.0 * i + 99.0))

    longest = [1, 2, 4, 8, 8, 8, 8, 8, 8]
    for seed in (1, 2):
        assert all(
            most / 2 <= wait <= most for wait, most in zip(waits[seed], longest, strict=True)
        )
        assert len(set(waits[seed])) == 9
    assert not set(waits[1]) & set(waits[2])


def test_a_budget_of_thousands_is_spent_without_an_error() -> None:
    state, _ = begin(Policy(failures=5000, backoff_max_seconds=1.0))
    state, performed = play(failures(2000), state)

    assert state.phase is Phase.STARTING
    assert [type(a) for a in performed].count(Launch) == 2000


def test_from_the_third_start_at_one_step_on_each_goes_back_one_more() -> None:
    _, performed = play(failures(5))

    assert [a.go_back for a in performed if isinstance(a, Restore)] == [0, 0, 1, 2, 3]


def test_after_progress_nothing_is_gone_back_over() -> None:
    progress = [event for at in (200.0, 300.0) for event in failing(at, durable=7)]

    _, performed = play([*failures(2), *progress])

    # A new step is durable after the third start, so the fourth is the second one at that step.
    assert [a.go_back for a in performed if isinstance(a, Restore)] == [0, 0, 1, 0]


def test_codes_that_are_never_tried_again_are_the_policys() -> None:
    policy = Policy(never=(3, 4))

    for code, phase in ((2, Phase.BACKOFF), (3, Phase.FAILED), (4, Phase.FAILED)):
        state, _ = play([*TRAINED, Exited(3.0, code), Drained(4.0)], policy=policy)

        assert state.phase is phase
        assert state.exit_code == (code if phase is Phase.FAILED else 0)


# ---------------------------------------------------------------- what is said


def said(events: Iterable[Event], policy: Policy = POLICY) -> list[str]:
    """Every message of a history."""
    state, _ = begin(policy)
    messages = []
    for event in events:
        state, actions = step(state, event)
        messages += [action.message for action in actions if isinstance(action, Say)]
    return messages


AT_STEP_17 = Progressed(4.0, "training", 17)

LOSSES: dict[str, tuple[Sequence[Event], int | None]] = {
    "all is saved": (
        [
            *TRAINED,
            AT_STEP_17,
            sigterm(5.0),
            Exited(5.5, 75, True, 17, 17),
            Saved(6.0, 17),
            Drained(6.1),
        ],
        None,
    ),
    "no boundary came: an older snapshot was saved": (
        [*TRAINED, AT_STEP_17, sigterm(5.0), Tick(12.5), Saved(13.0, 15), Drained(13.0)],
        2,
    ),
    "the newest is not saved in time, the last periodic checkpoint stands": (
        [*TRAINED, AT_STEP_17, sigterm(5.0), Exited(5.5, 75, True, 17, 17), Tick(34.0)],
        7,
    ),
    "nothing was ever saved": (
        [*RUNNING, AT_STEP_17, sigterm(5.0), Tick(12.5), Tick(34.0)],
        17,
    ),
    "Ctrl-C twice": ([*TRAINED, AT_STEP_17, Interrupt(5.0), Interrupt(5.5)], 7),
    "Ctrl-C twice with nothing new since the checkpoint": (
        [*TRAINED, Progressed(4.0, "training", 10), Interrupt(5.0), Interrupt(5.5)],
        None,
    ),
    "the store had an older step than this node's slot": (
        [*RESTORING, RestoreReady(0.2, 30, 20), Interrupt(5.0), Interrupt(5.5)],
        10,
    ),
    "after going back, what was saved before does not count": (
        [
            *TRAINED,
            Saved(2.5, 40),
            Exited(3.0, 1),
            Tick(9.0),
            Claimed(9.1, 2),
            RestoreReady(9.2, 20, 40),
            Progressed(9.5, "training", 25),
            Interrupt(10.0),
            Interrupt(10.1),
        ],
        5,
    ),
    "finished, and not saved in time": (
        [*TRAINED, Exited(5.0, 0, False, 20, 20), sigterm(5.1), Tick(34.2)],
        10,
    ),
}


@pytest.mark.parametrize(("events", "lost"), LOSSES.values(), ids=list(LOSSES))
def test_it_says_at_the_end_how_many_steps_are_lost(
    events: Sequence[Event], lost: int | None
) -> None:
    told = [message for message in said(events) if "are lost" in message]

    assert len(told) == (0 if lost is None else 1)
    assert all(message.endswith(f": {lost} steps are lost") for message in told)


def test_a_run_that_is_given_up_says_what_was_tried_and_what_to_try() -> None:
    policy = Policy(failures=2, logs="`runner logs my-run`")
    crash = [*failing(0.0, durable=30, left=31), *failing(100.0, left=31)]
    hang = [Claimed(200.0, 3), RestoreReady(200.1, 30), Tick(801.0), Exited(802.0, -9, False, 31)]

    (message,) = [m for m in said([*crash, *hang], policy) if m.startswith("given up")]

    assert "it failed 3 times in a row without a new step, last of hang" in message
    assert "the trainer exited with code 1 (2 times)" in message
    assert "step 30 is saved" in message
    assert "`runner logs my-run`" in message
    assert "--from STEP" in message


def test_a_run_that_never_comes_to_a_step_is_told_to_be_tried_by_hand() -> None:
    (message,) = [m for m in said(failures(3), Policy(failures=2)) if m.startswith("given up")]

    assert "no step was finished" in message
    assert "by hand" in message


# ---------------------------------------------------------------- metrics that are not finite


HEALTHY_ONLY = Policy(failures=3, restore_healthy=True, backoff_max_seconds=1.0)


def sick_life(at: float, since: int, saved_sick: int) -> list[Event]:
    """An attempt that goes wrong at step `since` and is ended some steps later.

    `saved_sick` is what a checkpoint in between says, which is as ill as the rest.
    """
    return [
        Claimed(at, 1),
        RestoreReady(at + 0.1, 0),
        Saved(at + 0.2, saved_sick, healthy=False),
        Unhealthy(at + 0.3, since, 10),
        Tick(at + 0.4),
        Exited(at + 0.5, -9, left_step=saved_sick + 1),
        Tick(at + 99.0),
    ]


def test_a_trainer_whose_metrics_stay_bad_is_ended_and_begins_from_a_healthy_checkpoint() -> None:
    events = sick_life(0.0, since=100, saved_sick=109)

    state, performed = play(events, policy=HEALTHY_ONLY)

    assert [type(action) for action in performed] == [*START, KillTree, *FAILED, Claim]
    assert EndAttempt("failed", "metrics have not been finite since step 100") in performed
    assert state.phase is Phase.STARTING


def test_going_bad_at_one_step_again_and_again_uses_up_the_budget() -> None:
    """How far it came while it was ill is no progress, even if that is further each time."""
    events = [e for i in range(9) for e in sick_life(100.0 * i, since=100, saved_sick=110 + i)]

    state, performed = play([*events, Drained(950.0)], policy=HEALTHY_ONLY)

    assert (state.phase, state.exit_code) == (Phase.FAILED, exitcodes.GIVEN_UP)
    assert [a.go_back for a in performed if isinstance(a, Restore)] == [0, 0, 1, 2]


def test_going_bad_at_a_later_step_each_time_is_progress() -> None:
    events = [e for i in range(9) for e in sick_life(100.0 * i, since=100 + i, saved_sick=110 + i)]

    state, _ = play(events, policy=HEALTHY_ONLY)

    assert (state.phase, state.failures) == (Phase.STARTING, 1)


def test_an_unhealthy_checkpoint_counts_as_progress_where_nobody_wants_healthy_ones() -> None:
    saved = Saved(0.3, 50, healthy=False)

    either = [play([*RUNNING, saved], policy=Policy(restore_healthy=w))[0] for w in (False, True)]

    assert [state.durable_step for state in either] == [50, 0]
    assert [state.kept_step for state in either] == [50, 50]


# ---------------------------------------------------------------- hangs with a rhythm of their own


def rhythm(pause: float, count: int, activity: str = "training") -> list[Event]:
    """`count` pauses of one length, after a first step of 300 s."""
    begun = Progressed(300.0, activity)
    return [begun, *(Progressed(300.0 + pause * (i + 1), activity) for i in range(count))]


def idle_until_hung(events: Sequence[Event], policy: Policy = POLICY) -> float:
    """Seconds without progress, after this history, until it counts as a hang; in tenths."""
    state, _ = play([*RUNNING, *events], policy=policy)
    begun = state.progress_at
    for tenths in range(1, 100_000):
        state, actions = step(state, Tick(begun + tenths / 10))
        if any(isinstance(action, DumpStacks) for action in actions):
            return tenths / 10
    raise AssertionError("it never counts as hung")


LIMITS: dict[str, tuple[Sequence[Event], float]] = {
    "nothing is known: the job's limit": ([], 600.0),
    "49 pauses are too few": (rhythm(0.1, 49), 600.0),
    "50 pauses: a minute at least": (rhythm(0.1, 50), 60.0),
    "long steps: ten times as long as nearly all of them": (rhythm(20.0, 60), 200.0),
    "longer than the job's limit, if the steps are": (rhythm(100.0, 60), 1000.0),
    "another activity knows nothing of that": (
        [*rhythm(0.1, 60), Progressed(400.0, "validation")],
        600.0,
    ),
}


@pytest.mark.parametrize(("events", "seconds"), LIMITS.values(), ids=list(LIMITS))
def test_the_limit_of_a_hang_is_learned_for_each_activity(
    events: Sequence[Event], seconds: float
) -> None:
    assert idle_until_hung(events) == pytest.approx(seconds, abs=0.11)


def test_a_limit_of_less_than_a_minute_is_obeyed() -> None:
    policy = replace(POLICY, hang_timeout_seconds=9.0)

    assert idle_until_hung([Progressed(0.3 * i, "training") for i in range(1, 99)], policy) <= 9.1


def test_a_learned_limit_that_has_ended_an_attempt_is_not_believed_again() -> None:
    first = [*rhythm(0.1, 60), Tick(400.0), Exited(402.0, -9), Tick(499.0)]
    second = [Claimed(500.0, 2), RestoreReady(500.0, 0)]
    again = [Progressed(500.0 + 0.1 * i, "training") for i in range(1, 99)]

    hung, performed = play([*RUNNING, *first])
    assert hung.phase is Phase.STARTING
    assert DumpStacks() in performed
    assert idle_until_hung([*first, *second, *again]) == pytest.approx(600.0, abs=0.11)


def test_a_new_attempt_compiles_anew_and_has_the_jobs_limit() -> None:
    first = [*rhythm(0.1, 60), Exited(400.0, 1), Tick(499.0)]
    second = [Claimed(500.0, 2), RestoreReady(500.0, 0), Progressed(500.1, "training")]

    assert idle_until_hung([*first, *second]) == pytest.approx(600.0, abs=0.11)


PY_SPY = replace(POLICY, stacks_seconds=16.0)


def test_stacks_that_take_longer_than_the_grace_do_not_keep_the_newest_slot_from_being_saved() -> (
    None
):
    notice = [*HUNG, sigterm(601.5, grace=10.0)]

    _, performed = play([*notice, Tick(603.9)], policy=PY_SPY)
    assert PersistNewest not in map(type, performed)
    state, performed = play([*notice, Tick(604.0)], policy=PY_SPY)
    assert [type(action) for action in performed[-2:]] == [Hurry, PersistNewest]

    state, performed = play([Drained(604.5)], state)
    assert [type(action) for action in performed] == [KillTree, EndAttempt]
    assert state.phase is Phase.PREEMPTED


def test_a_second_notice_that_leaves_less_time_is_obeyed_while_stacks_come_out() -> None:
    notices = [sigterm(601.5, grace=60.0), sigterm(602.0, grace=4.0)]

    _, performed = play([*HUNG, *notices, Tick(603.0)], policy=PY_SPY)

    assert type(performed[-1]) is PersistNewest


def test_it_is_told_what_it_was_doing_when_it_hung() -> None:
    history = [*TRAINED, Progressed(3.0, "validation"), Tick(604.0)]

    assert any("no progress for 601 s (validation)" in message for message in said(history))


# ---------------------------------------------------------------- the end is the end


@pytest.mark.parametrize("phase", UNFINISHED, ids=lambda phase: phase.value)
def test_a_newer_supervisor_ends_it_in_every_phase(phase: Phase) -> None:
    before, _ = play(UNFINISHED[phase])
    assert before.phase is phase

    state, performed = play([FencedOff(700.0, "attempt 9 is another supervisor's")], before)

    assert (state.phase, state.exit_code) == (Phase.FENCED, exitcodes.FENCED)
    assert [type(action) for action in performed] == [KillTree]


EVENTS_OF_EACH_KIND: list[Event] = [
    Claimed(999.0, 2),
    RestoreReady(999.0, 5),
    PreparationFailed(999.0, "x", final=True),
    LaunchFailed(999.0, "x"),
    EngineAway(999.0, "x"),
    Exited(999.0, 0),
    Progressed(999.0, "training"),
    Saved(999.0, 99),
    Persisted(999.0, SaveRecord("step-000000099-a0001-s001", 1, 99, 999.0)),
    Validated(999.0, "step-000000099-a0001-s001", "valid"),
    Drained(999.0),
    SaveFailed(999.0, "x"),
    sigterm(999.0),
    Interrupt(999.0),
    StopAsked(999.0),
    SaveAsked(999.0),
    Relayed(999.0, 1),
    StacksAsked(999.0),
    StacksShown(999.0),
    Hint(999.0, "x"),
    MemoryShort(999.0, 95, 100),
    Notice(999.0, "aws", 1119.0),
    Unhealthy(999.0, 5, 10),
    Overslept(999.0, 60.0),
    Worked(999.0),
    FencedOff(999.0, "x"),
    StoreGone(999.0, "x"),
    Tick(9999.0),
    ChildEnded(999.0),
]


def test_a_store_that_is_out_of_reach_costs_no_failure_and_is_asked_less_and_less_often() -> None:
    state, _ = play([])
    waits = []
    for _ in range(9):
        state, _ = step(state, StoreGone(100.0, "down"))
        assert state.retry_at is not None
        waits.append(state.retry_at - 100.0)
        state, actions = step(state, Tick(200.0))
        assert actions == [Claim()]

    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert (state.failures, state.phase) == (0, Phase.STARTING)


def test_an_engine_that_is_away_costs_no_failure_and_no_checkpoint() -> None:
    state, _ = play([*CRASHED, Tick(4.0), Claimed(4.1, 2), RestoreReady(4.2, 10), Exited(5.0, 1)])
    assert (state.failures, state.go_back) == (2, 1)
    waits = []
    for attempt in range(3, 10):
        state, actions = step(state, Tick(100.0))
        state, actions = step(state, Claimed(100.0, attempt))
        assert actions == [Restore(1 if attempt == 3 else 0), Launch()], "it is gone back once"
        state, _ = step(state, EngineAway(100.0, "gone"))
        state, _ = step(state, RestoreReady(100.0, 5))
        assert state.begins_at is not None
        waits.append(state.begins_at - 100.0)
        state, _ = step(state, Tick(100.0 + waits[-1]))

    assert waits == [1, 2, 4, 8, 16, 32, 60]
    assert state.failures == 2
    state, _ = play([Claimed(200.0, 99), RestoreReady(200.1, 5), Exited(201.0, 1)], state)
    assert (state.failures, state.go_back) == (3, 2)


def test_a_store_that_goes_on_refusing_saves_is_spoken_of_once_a_minute_until_it_takes_one() -> (
    None
):
    state, _ = play(TRAINED)
    said = []
    for second in [*range(10, 140), 141, 142]:
        if second == 141:
            state, _ = step(state, Saved(140.5, 15))
        state, actions = step(state, SaveFailed(float(second), f"step-{second}: read-only"))
        said += [second for action in actions if isinstance(action, Say)]

    assert said == [10, 70, 130, 141]


def test_there_is_an_example_of_every_event() -> None:
    assert {type(event) for event in EVENTS_OF_EACH_KIND} == set(Event.__subclasses__())


@pytest.mark.parametrize("phase", sorted(TERMINAL, key=lambda phase: phase.value))
@pytest.mark.parametrize("event", EVENTS_OF_EACH_KIND, ids=lambda event: type(event).__name__)
def test_a_terminal_state_never_changes(phase: Phase, event: Event) -> None:
    over = replace(State(), phase=phase)

    assert step(over, event) == (over, [])


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """Any events in any order, their times in order."""
    at = 0.0
    events: list[Event] = []
    texts = st.sampled_from(["a", "b"])
    codes = st.sampled_from([0, 1, 2, 3, 75, 76, 130, -9, -15, -34])
    kinds = {
        Claimed: st.tuples(st.integers(1, 9)),
        RestoreReady: st.tuples(st.integers(0, 9)),
        PreparationFailed: st.tuples(texts, st.booleans()),
        StoreGone: st.tuples(texts),
        LaunchFailed: st.tuples(texts),
        EngineAway: st.tuples(texts),
        Exited: st.tuples(codes, st.booleans(), st.integers(-1, 9)),
        Progressed: st.tuples(st.sampled_from(["training", "after training"]), st.integers(-1, 9)),
        Saved: st.tuples(st.integers(0, 9), st.booleans(), st.sampled_from([None, 0.5, 40.0])),
        Hint: st.tuples(texts),
        Unhealthy: st.tuples(st.integers(0, 9), st.integers(1, 9)),
        Overslept: st.tuples(st.sampled_from([6.0, 3600.0])),
        Worked: st.just(()),
        MemoryShort: st.tuples(st.just(95), st.just(100), st.booleans()),
        StacksShown: st.just(()),
        Drained: st.just(()),
        SaveFailed: st.tuples(texts),
        Interrupt: st.just(()),
        StopAsked: st.just(()),
        SaveAsked: st.just(()),
        Relayed: st.tuples(st.sampled_from([1, 12])),
        StacksAsked: st.just(()),
        FencedOff: st.tuples(texts),
        Tick: st.just(()),
    }
    # Weighted so that some histories get past their first events.
    usual = [Claimed, RestoreReady, Drained, Tick, Exited, Saved]
    for _ in range(draw(st.integers(0, 40))):
        at += draw(st.sampled_from([0.0, 0.3, 1.0, 7.5, 30.0, 700.0]))
        kind = draw(st.sampled_from([*kinds, Notice, *usual, *usual, *usual]))
        if kind is Notice:
            events.append(
                Notice(
                    at,
                    "x",
                    at + draw(st.sampled_from([0.0, 2.0, 30.0, 120.0])),
                    leave=draw(st.booleans()),
                )
            )
        else:
            events.append(kind(at, *draw(kinds[kind])))
    return events


POLICIES = st.builds(
    Policy,
    failures=st.sampled_from([0, 1, 5]),
    never=st.sampled_from([(), (2,), (2, 3)]),
    hang_timeout_seconds=st.sampled_from([5.0, 600.0]),
    restore_healthy=st.booleans(),
    seed=st.sampled_from([None, 1]),
)


@given(POLICIES, histories())
def test_no_history_breaks_the_machine(policy: Policy, events: list[Event]) -> None:
    state, _ = begin(policy)
    claims, launches, persisting, preparing = 1, 0, False, False
    running = tree_may_live = unsaved = asked = False
    for event in events:
        before = state
        state, actions = step(state, event)
        kinds = [type(action) for action in actions if not isinstance(action, Say)]
        if before.phase in TERMINAL:
            assert (state, actions) == (before, [])
            continue
        if state.phase is not before.phase:
            assert state.phase in {*MOVES[before.phase], Phase.FENCED}
        if isinstance(event, Exited):
            running = False
        if isinstance(event, LaunchFailed | EngineAway):
            running = tree_may_live = False  # nothing was started
        if isinstance(event, Drained | SaveFailed):
            persisting = False
        if isinstance(event, RestoreReady | PreparationFailed | StoreGone):
            preparing = False
        for action in actions:
            match action:
                case Claim():
                    assert not preparing, "the one before is still being fetched"
                    claims += 1
                case Restore():
                    preparing = True
                case Launch():
                    assert not tree_may_live, "the tree of the one before was never killed"
                    assert launches < claims, "each start has an attempt of its own"
                    launches += 1
                    running = tree_may_live = unsaved = True
                    asked = False
                case KillTree():
                    running = tree_may_live = False
                case PersistNewest():
                    assert not persisting, "what is being persisted is not asked for twice"
                    persisting = asked = True
                case Ask(kind, _, _):
                    ends = state.deadline is not None or state.kill_at is not None
                    assert kind is Request.SAVE or ends, "it may take for ever to leave"
                case Hurry(deadline):
                    assert deadline == state.deadline
        if isinstance(event, StoreGone) and state.phase is Phase.BACKOFF:
            assert kinds == [], "nobody has failed"
        elif state.phase is Phase.BACKOFF and before.phase is not Phase.BACKOFF:
            assert kinds == FAILED, "it is killed, its end written down, what it left is saved"
            unsaved = False
        if isinstance(event, Exited) and unsaved:
            assert PersistNewest in kinds or state.again, "what it left is forgotten"
            unsaved = False
        if isinstance(event, Notice | Interrupt | StopAsked) and state.phase not in TERMINAL:
            assert kinds.count(Hurry) == 1, "the store does not hear of the deadline"
        if state.phase in TERMINAL:
            assert not running, "a trainer is left behind"
            assert state.leave_at is None
            known = {0, 2, 70, 75, 76, 130, *policy.never}
            assert state.exit_code in known
            assert (state.exit_code == 0) == (state.phase is Phase.SUCCEEDED)
        else:
            assert (state.exit_code != 0) == (state.goal is Phase.FAILED)
            assert (state.goal is None) or state.phase in (Phase.DRAINING, Phase.STOPPING)
            assert state.durable_at_failure >= before.durable_at_failure
            if state.leave_at is not None:
                assert state.phase is Phase.RUNNING, "it stays, and nothing else"
                assert state.deadline is not None
                assert state.leave_at < state.deadline, "the last save has no time"
        if before.goal is not None and state.phase in TERMINAL - {Phase.FENCED}:
            saved = isinstance(event, Drained) and not before.again
            out_of_time = isinstance(event, Tick) and before.deadline is not None
            twice = isinstance(event, Interrupt) and before.wish is Phase.INTERRUPTED
            assert saved or out_of_time or twice, "what is in the slots was being saved"
            if out_of_time:
                assert asked, "the time was over before anybody thought of the slots"
        if isinstance(event, Tick) and before.deadline is not None:
            assert event.at < before.deadline or state.phase in TERMINAL, "the grace is over"


# ---------------------------------------------------------------- memory that runs out

SHORT = MemoryShort(10.0, 950_000_000, 1_000_000_000)
URGENT = MemoryShort(11.0, 990_000_000, 1_000_000_000, urgent=True)

MEMORY: dict[str, tuple[Sequence[Event], Phase, list[type[Action]]]] = {
    "the trainer is asked to save and to leave": ([*TRAINED, SHORT], Phase.STOPPING, [*START, Ask]),
    "it has left: it is started again": (
        [*TRAINED, SHORT, Exited(12.0, 75, obeyed=True, left_step=20)],
        Phase.BACKOFF,
        [*START, Ask, *FAILED],
    ),
    "it comes to no boundary": (
        [*TRAINED, SHORT, Tick(39.9), Tick(40.0)],
        Phase.STOPPING,
        [*START, Ask, KillTree],
    ),
    "it goes on growing": ([*TRAINED, SHORT, URGENT], Phase.STOPPING, [*START, Ask, KillTree]),
    "it grows at once": ([*TRAINED, URGENT], Phase.STOPPING, [*START, KillTree]),
    "before it has its state": (
        [*RESTORING, SHORT, RestoreReady(11.0, 0)],
        Phase.BACKOFF,
        [*START, *FAILED],
    ),
    "while it is asked to end anyway": ([*DRAINING, SHORT], Phase.DRAINING, ASKED),
    "while it is asked to end, and it goes on growing": (
        [*DRAINING, URGENT],
        Phase.DRAINING,
        [*ASKED, KillTree],
    ),
    "it is asked to leave, and then the node goes: its slot does not wait for its end": (
        [*TRAINED, SHORT, sigterm(11.0), Tick(18.4), Tick(18.5), Drained(19.0)],
        Phase.PREEMPTED,
        [*START, Ask, Hurry, PersistNewest, KillTree, EndAttempt],
    ),
    "it is asked to leave, the node goes, and it obeys": (
        [*TRAINED, SHORT, sigterm(11.0), Exited(12.0, 75, obeyed=True), Drained(13.0)],
        Phase.PREEMPTED,
        [*START, Ask, Hurry, PersistNewest, KillTree, EndAttempt],
    ),
    "it is killed for its memory, and does not die before the node goes": (
        [*TRAINED, URGENT, sigterm(12.0), Tick(12.02)],
        Phase.STOPPING,
        [*START, KillTree, Hurry, PersistNewest],
    ),
    "of others, between two attempts": ([*CRASHED, SHORT], Phase.BACKOFF, [*START, *FAILED]),
}


@pytest.mark.parametrize(("events", "phase", "kinds"), MEMORY.values(), ids=MEMORY)
def test_a_trainer_is_ended_before_its_memory_is_used_up(
    events: Sequence[Event], phase: Phase, kinds: list[type[Action]]
) -> None:
    state, actions = play(events)

    assert (state.phase, [type(action) for action in actions]) == (phase, kinds)


def test_the_cause_of_a_failure_names_the_memory() -> None:
    _, actions = play([*TRAINED, SHORT, Exited(12.0, 75, obeyed=True, left_step=20)])

    assert EndAttempt("failed", "memory: used 950 MB of 1000 MB") in actions
    _, actions = play([*TRAINED, Exited(12.0, -9, left_step=20, cause="out of memory")])
    assert EndAttempt("failed", "out of memory") in actions
