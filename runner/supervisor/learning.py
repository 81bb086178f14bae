"""What the supervisor learns from a trainer that runs, without doing anything about it. Pure."""

from __future__ import annotations

from dataclasses import replace

from runner.supervisor.deadlines import train_until
from runner.supervisor.events import Progressed, RestoreReady, Saved
from runner.supervisor.hangs import START_UP_FACTOR, STARTING_UP
from runner.supervisor.state import Phase, State


def restored(state: State, event: RestoreReady) -> State:
    durable = event.step if event.durable is None else event.durable
    is_first = state.durable_step < 0  # what a supervisor finds at its start is nobody's progress
    return replace(
        state,
        phase=Phase.RUNNING,
        preparing=False,
        running_since=event.at,
        progress_at=event.at,
        activity="",
        rhythm=state.rhythm.anew(),
        sick_since=None,
        store_gone_since=None,
        refusals=0,
        retry_at=None,
        showing=False,
        step=event.step,
        kept_step=min(event.step, durable),
        durable_step=max(state.durable_step, event.step),
        durable_at_failure=max(state.durable_at_failure, event.step if is_first else -1),
    )


def progress(state: State, event: Progressed) -> State:
    rhythm = state.rhythm
    if state.phase is Phase.RUNNING:
        rhythm = rhythm.heard(state.activity, event.at - state.progress_at)
    return replace(
        state,
        progress_at=event.at,
        activity=event.activity,
        step=max(state.step, event.step),
        rhythm=rhythm,
    )


def work(state: State, at: float) -> State:
    """Use of the CPU is a sign of life for a script that has not begun its loop, up to a limit."""
    longest = START_UP_FACTOR * state.policy.hang_timeout_seconds
    if state.activity not in STARTING_UP or at - state.running_since >= longest:
        return state
    return replace(state, progress_at=at)


def overslept(state: State, seconds: float) -> State:
    """What the trainer did in a time in which nobody looked is not known; maybe it slept, too."""
    return replace(
        state,
        progress_at=state.progress_at + seconds,
        running_since=state.running_since + seconds,
    )


def saved(state: State, event: Saved) -> State:
    """A checkpoint is durable. An unhealthy one is no progress where healthy ones are wanted."""
    counts = event.healthy or not state.policy.restore_healthy
    emergency = event.emergency_seconds or state.emergency_seconds
    leave_at = state.leave_at
    if leave_at is not None and state.notice_at is not None and state.deadline is not None:
        leave_at = train_until(state.notice_at, state.deadline, emergency)
    return replace(
        state,
        kept_step=max(state.kept_step, event.step),
        durable_step=max(state.durable_step, event.step) if counts else state.durable_step,
        emergency_seconds=emergency,
        leave_at=leave_at,
        refusal_said_at=None,
    )
