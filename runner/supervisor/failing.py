"""What comes of a failure: another attempt after a while, or the end of the run.

Steps of `machine`. What cannot be reached, a store or a container engine, is waited for, and has
not failed.
"""

from __future__ import annotations

from dataclasses import replace

from runner import exitcodes
from runner.supervisor import ending
from runner.supervisor.events import (
    EndAttempt,
    EngineAway,
    Hurry,
    KillTree,
    LaunchFailed,
    PersistLeft,
    PreparationFailed,
    Say,
    StoreGone,
)
from runner.supervisor.restarts import (
    backoff_seconds,
    diagnosis,
    wait_for_engine,
    wait_for_store,
)
from runner.supervisor.state import Phase, State, Step

_LAST_SAVE_SECONDS = 300.0  # that a run which has failed for good tries to save its last state
_CAUSES = 10  # that are remembered, for the diagnosis


def restart_or_give_up(state: State, at: float, left_step: int = -1) -> Step:
    """A failure counts until a later step is reached, and saved, than at any failure before it.

    What is in the newest slot is as good as saved: it is being made durable from now on.
    """
    reached = max(state.durable_step, left_step)
    if state.policy.restore_healthy and state.sick_since is not None:
        # It goes back from there: what was trained since then is no progress.
        reached = min(reached, state.sick_since - 1)
    failures = 1 if reached > state.durable_at_failure else state.failures + 1
    state = replace(
        state,
        failures=failures,
        durable_at_failure=max(state.durable_at_failure, reached),
        causes=(*state.causes, state.cause)[-min(failures, _CAUSES) :],
    )
    policy = state.policy
    if failures > policy.failures:
        stopping, actions = fail_for_good(state, at, exitcodes.GIVEN_UP)
        return stopping, [Say(diagnosis(state), is_error=True), *actions]
    wait = backoff_seconds(policy, failures, state.starts)
    waiting = replace(state, phase=Phase.BACKOFF, retry_at=at + wait, kill_at=None)
    return waiting, [
        KillTree(),
        EndAttempt("failed", state.cause),
        PersistLeft(),
        Say(f"{state.cause}; failure {failures} of {policy.failures}, next start in {wait:.3g} s"),
    ]


def fail_for_good(state: State, at: float, exit_code: int) -> Step:
    """Save what there is and end; a store that refuses is not waited for without end."""
    deadline = at + max(state.policy.grace_seconds, _LAST_SAVE_SECONDS)
    failed = replace(state, goal=Phase.FAILED, exit_code=exit_code, deadline=deadline)
    return ending.persist_and_kill(failed)


def cannot_start(
    state: State, event: PreparationFailed | LaunchFailed | StoreGone | EngineAway
) -> Step:
    """No trainer can run, or the one that waits for its state would wait for ever."""
    if state.leave_at is not None:
        state = ending.draining(state, Phase.PREEMPTED, state.cause)
    if state.goal is not None:
        # It is ending already. No trainer will come to a boundary; what is in the slots is saved.
        saving, actions = ending.persist(replace(state, snapshot_until=None))
        return saving, [Say(event.reason, is_error=True), *actions]
    state = replace(state, cause=event.reason)
    if isinstance(event, LaunchFailed):
        failed = replace(state, goal=Phase.FAILED, exit_code=exitcodes.USAGE)
    elif isinstance(event, PreparationFailed) and event.final:
        failed = replace(state, goal=Phase.FAILED, exit_code=exitcodes.GIVEN_UP)
    else:
        stopping = replace(state, phase=Phase.STOPPING)
        stopped, actions = restart_or_give_up(stopping, event.at)
        return stopped, [Say(event.reason, is_error=True), *actions]
    finished, actions = ending.finish(failed)
    return finished, [Say(event.reason, is_error=True), *actions]


def store_gone(state: State, event: StoreGone) -> Step:
    """Nothing can begin, and nobody has failed."""
    if state.goal is not None:
        return cannot_start(state, event)
    if state.phase not in (Phase.STARTING, Phase.RESTORING):
        return state, []
    waiting = wait_for_store(state, event)
    if waiting is not None and waiting.retry_at is not None:
        again = f"tried again in {waiting.retry_at - event.at:.3g} s"
        return waiting, [Say(f"the store is out of reach, {again}: {event.reason}", is_error=True)]
    over = f"the store was out of reach for {state.policy.store_timeout_seconds:g} s"
    deadline = event.at + state.policy.grace_seconds
    left, actions = ending.finish(
        replace(state, goal=Phase.PREEMPTED, cause=over, deadline=deadline)
    )
    return left, [Say(f"{over}: start it again when it is there: {event.reason}", True), *actions]


def engine_away(state: State, event: EngineAway) -> Step:
    """No trainer can be started, and nobody has failed."""
    if state.phase not in (Phase.RESTORING, Phase.RUNNING) or state.leave_at is not None:
        return cannot_start(state, event)
    waiting = wait_for_engine(state, event)
    if waiting is not None and waiting.retry_at is not None:
        again = f"next start in {waiting.retry_at - event.at:.3g} s"
        return waiting, [
            KillTree(),
            EndAttempt("failed", event.reason),
            PersistLeft(),
            Say(f"{event.reason}; {again}", is_error=True),
        ]
    over = f"the container engine was out of reach for {state.policy.store_timeout_seconds:g} s"
    deadline = event.at + state.policy.grace_seconds
    left = replace(ending.draining(state, Phase.PREEMPTED, over), alive=False, deadline=deadline)
    saving, actions = ending.persist_and_kill(left)
    told = Say(f"{over}: start it again when it is there: {event.reason}", is_error=True)
    return saving, [told, Hurry(deadline), *actions]
