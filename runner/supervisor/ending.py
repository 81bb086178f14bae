"""How a run ends, or an attempt whose state is to be kept: asked for, saved, over.

Steps of `machine`, of whichever kind the end is. The newest slot is made durable first, and never
later than the last moment of a deadline.
"""

from __future__ import annotations

from dataclasses import replace

from runner.board import Request
from runner.supervisor.deadlines import last_moment, patience_for_boundary
from runner.supervisor.events import (
    Action,
    Ask,
    EndAttempt,
    KillTree,
    PersistNewest,
    SaveFailed,
    Say,
)
from runner.supervisor.state import EXIT_CODES, WHY, Phase, State, Step

_RETRY_SECONDS = 0.5
_REFUSAL_SECONDS = 60.0  # between two lines on a store that goes on refusing


def drain(state: State, at: float, goal: Phase, cause: str, deadline: float) -> Step:
    """Ask for a last state, and then make it durable."""
    asked = replace(
        state,
        phase=Phase.DRAINING,
        goal=goal,
        cause=cause,
        notice_at=at,
        deadline=deadline,
        leave_at=None,
        snapshot_until=patience_for_boundary(at, deadline),
    )
    return asked, [Ask(Request.SAVE_AND_STOP, WHY[goal], deadline)]


def draining(state: State, goal: Phase, cause: str) -> State:
    """No trainer is left to ask: what is in the slots is the last that there will be."""
    return replace(state, phase=Phase.DRAINING, goal=goal, cause=cause, leave_at=None)


def drained(state: State) -> Step:
    """All that could be saved is saved, unless the trainer has left something since."""
    if state.goal is None:  # nothing was to be saved before the end
        return state, []
    return persist(state) if state.again else finish(state)


def save_failed(state: State, event: SaveFailed) -> Step:
    """What was to be saved still waits in its slot; only at the end is it asked for once more.

    A store that goes on refusing, save after save, is spoken of from time to time only.
    """
    if state.phase in (Phase.DRAINING, Phase.STOPPING):
        state = replace(state, persisting=False, retry_at=event.at + _RETRY_SECONDS)
    said_at = state.refusal_said_at
    if said_at is not None and event.at < said_at + _REFUSAL_SECONDS:
        return state, []
    state = replace(state, refusal_said_at=event.at)
    return state, [Say(f"a checkpoint could not be saved: {event.reason}", is_error=True)]


def hurry(state: State, wish: Phase, cause: str, at: float, deadline: float) -> State:
    """It is being ended or saved already; only the time that there is for it, and the end, change.

    One that hangs, or has been asked to leave, may not be gone in that time: its newest slot is not
    kept waiting for its end. One that SIGKILL has not ended is not waited for at all.
    """
    keep = state.goal in (Phase.SUCCEEDED, Phase.PREEMPTED, Phase.FAILED)
    until, patience = state.snapshot_until, patience_for_boundary(at, deadline)
    if state.phase is Phase.STOPPING and state.goal is None:
        until = at if state.kill_at is None else patience
    return replace(
        state,
        goal=state.goal if keep else wish,
        cause=state.cause if keep else cause,
        notice_at=at if state.notice_at is None else state.notice_at,
        deadline=deadline,
        snapshot_until=None if until is None else min(until, patience),
    )


def leave_in_time(state: State, at: float) -> Step:
    """The last save of a node that has been given notice, when its time has come."""
    assert state.leave_at is not None
    assert state.deadline is not None
    if at < state.leave_at:
        return state, []
    leaving, actions = drain(state, at, Phase.PREEMPTED, state.cause, state.deadline)
    if at >= state.deadline:  # this supervisor has overslept it
        over, more = out_of_time(leaving)
        return over, [*actions, *more]
    return leaving, [Say(f"{state.cause}: the time to train is over"), *actions]


def push_on(state: State, at: float) -> Step:
    """Time passes while a trainer is being ended or its state saved."""
    if state.deadline is not None and at >= _last_moment(state):
        return out_of_time(state)
    if state.kill_at is not None and at >= state.kill_at:
        state = replace(state, kill_at=None)
        if state.snapshot_until is None:
            return state, [KillTree()]
        # The node goes: what it has left is saved beside its end, which may take long.
        saving, actions = persist(replace(state, snapshot_until=None))
        return saving, [*actions, KillTree()]
    if state.snapshot_until is not None and state.alive:
        if at < state.snapshot_until:
            return state, []
        # The trainer does not come to a boundary: the newest complete slot has to do.
        return persist(replace(state, snapshot_until=None))
    if state.retry_at is not None and at >= state.retry_at:
        return persist(state)
    return state, []


def out_of_time(state: State) -> Step:
    """End now, whatever is saved by then."""
    saving: list[Action] = []
    if state.snapshot_until is not None and state.alive:  # held up for all of the grace
        state, saving = persist(replace(state, snapshot_until=None))
    if state.goal is Phase.SUCCEEDED and state.wish is not None:
        # Its last state is not durable, so it has to be started once more.
        state = replace(state, goal=state.wish, cause="finished, but not saved in time")
    finished, actions = finish(state)
    late = Say("the time is over before everything was saved", is_error=True)
    return finished, [late, *saving, *actions]


def persist(state: State) -> Step:
    """Save the newest slot; if that is being done, once more afterwards."""
    if state.persisting:
        return replace(state, again=True), []
    begun = replace(state, persisting=True, again=False, retry_at=None)
    return begun, [PersistNewest(_triggers(state))]


def persist_and_kill(state: State) -> Step:
    """The kill may last, and makes no difference to what is saved: its trainer is dead, or waits.

    What it should have left after all is saved when its end is heard of.
    """
    stopping, actions = persist(state)
    return stopping, [*actions, KillTree()]


def finish(state: State) -> Step:
    """The terminal state, and what is left to be done and said."""
    goal = state.goal or Phase.FAILED
    code = state.exit_code if goal is Phase.FAILED else EXIT_CODES[goal]
    actions: list[Action] = [KillTree()] if state.alive else []
    if goal in WHY and state.lost_steps:
        actions.insert(0, Say(_loss(state), is_error=True))
    actions.append(EndAttempt(goal.value, state.cause))
    return replace(state, phase=goal, exit_code=code, alive=False), actions


def _loss(state: State) -> str:
    """What is not durable in the end; on this machine, a slot may still hold it."""
    at = f"the trainer was at step {state.step}"
    lost = "1 step is lost" if state.lost_steps == 1 else f"{state.lost_steps} steps are lost"
    if state.kept_step < 0:
        return f"{at} and nothing is durable: {lost}"
    return f"{at} and step {state.kept_step} is durable: {lost}"


def _last_moment(state: State) -> float:
    assert state.deadline is not None
    began = state.notice_at if state.notice_at is not None else state.deadline
    return last_moment(began, state.deadline)


def _triggers(state: State) -> tuple[str, ...]:
    if state.goal is Phase.SUCCEEDED:
        return ("final",)
    return (WHY[state.goal].trigger,) if state.goal in WHY else ()
