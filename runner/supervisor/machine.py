"""What a supervisor does next: one pure function over one frozen state.

    STARTING ─▶ RESTORING ─▶ RUNNING ─▶ DRAINING ─▶ SUCCEEDED | PREEMPTED | INTERRUPTED | STOPPED
     ▲ │           │          │ └─────▶ STOPPING ─▶ BACKOFF | FAILED    (a hang; ill; given up)
     │ └───────────┴──────────┴───────────────────▶ BACKOFF | FAILED    (a crash; cannot be started)
     └─ BACKOFF
    STARTING, RESTORING ─▶ STOPPING                 (given up)
    STARTING ─▶ BACKOFF, RESTORING ─▶ RESTORING     (the store is out of reach: tried again)
    RESTORING, RUNNING ─▶ BACKOFF | DRAINING        (no engine to start it: tried again, given up)
    STARTING, RESTORING ─▶ PREEMPTED                (the store stays out of reach)
    STARTING, RESTORING, BACKOFF ─▶ DRAINING        (a signal; it ends well before it has begun)
    STOPPING ─▶ PREEMPTED | INTERRUPTED | STOPPED   (a signal while one that hangs is ended)
    RUNNING ─▶ PREEMPTED                            (a deadline that this process has overslept)
    any ─▶ FENCED                                   (a newer supervisor has the run)

The trainer is launched when the attempt is claimed: while it imports its libraries, what it begins
from is fetched and verified, and what the one before left in the slots is being made durable.
After a notice with time to spare it saves and stays RUNNING until `leave_at`. DRAINING ends well:
what is in the slots is made durable, then the goal is reached. STOPPING ends an attempt that hangs,
is ill or takes all memory, or the run when it is given up: then its newest slot is persisted first.
Nothing here looks at a clock or touches the world; times come in with the events, in seconds of
one monotonic clock.
"""

from __future__ import annotations

from dataclasses import replace

from runner import exitcodes
from runner.board import Request, Why
from runner.supervisor import learning
from runner.supervisor.deadlines import (
    is_worth_staying,
    last_moment,
    patience_for_boundary,
    train_until,
)
from runner.supervisor.events import (
    Action,
    Ask,
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
    Worked,
)
from runner.supervisor.restarts import (
    backoff_seconds,
    describe_exit,
    diagnosis,
    wait_for_engine,
    wait_for_store,
)
from runner.supervisor.state import EXIT_CODES, TERMINAL, WHY, Phase, Policy, State

__all__ = ["TERMINAL", "Phase", "Policy", "State", "begin", "step"]

_RETRY_SECONDS = 0.5
_LAST_SAVE_SECONDS = 300.0  # that a run which has failed for good tries to save its last state
_SETTLE_SECONDS = 0.5  # for what a trainer writes of its own stacks
_HINT_SECONDS = 60.0  # between two saves for mere hints
_REFUSAL_SECONDS = 60.0  # between two lines on a store that goes on refusing
_CAUSES = 10  # that are remembered, for the diagnosis

Step = tuple[State, list[Action]]


def begin(policy: Policy) -> Step:
    """The first state, and what to do in it."""
    return State(policy=policy), [Claim()]


def step(state: State, event: Event) -> Step:
    """The next state and what to do. A terminal state never changes."""
    if state.phase in TERMINAL:
        return state, []
    match event:
        case FencedOff():
            return replace(state, phase=Phase.FENCED, exit_code=exitcodes.FENCED), [
                Say(event.reason, is_error=True),
                KillTree(),
            ]
        case Claimed() if state.phase is Phase.STARTING:
            launched = replace(
                state, phase=Phase.RESTORING, alive=True, preparing=True, starts=state.starts + 1
            )
            return launched, [Restore(state.go_back), Launch()]
        case RestoreReady() if state.phase is Phase.RESTORING:
            return learning.restored(state, event), []
        case RestoreReady() | PreparationFailed() | StoreGone() if state.phase is Phase.BACKOFF:
            return replace(state, preparing=False), []
        case PreparationFailed() | LaunchFailed() if state.phase is not Phase.BACKOFF:
            return _cannot_start(replace(state, preparing=False), event)
        case EngineAway() if state.phase is not Phase.BACKOFF:
            return _on_engine_away(state, event)
        case StoreGone():
            return _on_store_gone(replace(state, preparing=False), event)
        case Exited():
            gone = replace(
                state,
                alive=False,
                kill_at=None,
                step=max(state.step, event.step),
                engine_gone_since=None,
                engine_refusals=0,
            )
            return _on_exit(gone, event)
        case Progressed():
            return learning.progress(state, event), []
        case Worked() if state.phase is Phase.RUNNING:
            return learning.work(state, event.at), []
        case Overslept():
            return learning.overslept(state, event.seconds), []
        case Unhealthy() if state.phase is Phase.RUNNING:
            return _on_unhealthy(state, event)
        case MemoryShort() if state.alive:
            return _on_memory_short(state, event)
        case StacksShown() if state.showing and state.kill_at is not None:
            soon = event.at + _SETTLE_SECONDS
            return replace(state, kill_at=min(state.kill_at, soon)), []
        case Saved():
            return learning.saved(state, event), []
        case Drained():
            return _on_drained(replace(state, persisting=False))
        case SaveFailed():
            return _on_save_failed(state, event)
        case Notice() if state.phase is Phase.RUNNING and not event.leave:
            return _on_notice(state, event)
        case Notice() | Interrupt() | StopAsked():
            return _on_signal(state, event)
        case Hint() if state.phase is Phase.RUNNING:
            return _on_hint(state, event)
        case SaveAsked() if state.phase is Phase.RUNNING:
            return state, [Ask(Request.SAVE, Why.MANUAL)]
        case StacksAsked() if state.alive:
            return state, [DumpStacks()]
        case Relayed() if state.alive:
            return state, [Relay(event.signum)]
        case Tick():
            return _on_tick(state, event.at)
    return state, []


# ---------------------------------------------------------------------------- a trainer that runs


def _on_unhealthy(state: State, event: Unhealthy) -> Step:
    sick = replace(state, sick_since=event.since_step)
    problem = f"metrics have not been finite since step {event.since_step}"
    if not state.policy.restore_healthy or state.leave_at is not None:
        return sick, [Say(f"{problem}, for {event.steps} steps", is_error=True)]
    stopping = replace(sick, phase=Phase.STOPPING, cause=problem, kill_at=event.at)
    return stopping, [
        Say(f"{problem}, for {event.steps} steps: back to the newest healthy checkpoint", True)
    ]


def _on_memory_short(state: State, event: MemoryShort) -> Step:
    """The trainer saves and leaves, before the kernel ends it and maybe this supervisor too."""
    cause = f"memory: used {event.used / 1e6:.0f} MB of {event.limit / 1e6:.0f} MB"
    match state.phase:
        case Phase.RUNNING if not event.urgent and state.leave_at is None:
            until = event.at + state.policy.grace_seconds
            stopping = replace(state, phase=Phase.STOPPING, cause=cause, kill_at=until)
            return stopping, [
                Say(f"{cause}: the trainer is asked to save and to leave", is_error=True),
                Ask(Request.SAVE_AND_STOP, Why.INTERVAL, until),
            ]
        case Phase.RESTORING:
            return _restart_or_give_up(replace(state, phase=Phase.STOPPING, cause=cause), event.at)
        case Phase.RUNNING if state.leave_at is None:
            state = replace(state, phase=Phase.STOPPING, cause=cause)
        case _ if not event.urgent:
            return state, []
    killed = Say(f"{cause}: the trainer is killed, its newest snapshot stays", is_error=True)
    return replace(state, kill_at=None), [killed, KillTree()]


def _on_hint(state: State, event: Hint) -> Step:
    recently = state.hint_at is not None and event.at - state.hint_at < _HINT_SECONDS
    if recently or state.leave_at is not None:
        return state, []
    return replace(state, hint_at=event.at), [
        Say(f"the node may be taken away soon ({event.source}): the state is saved"),
        Ask(Request.SAVE, Why.PREEMPTION),
    ]


def _on_notice(state: State, event: Notice) -> Step:
    """The node will go. If that is far off: save, train on, and save again in time."""
    begun = event.at if state.notice_at is None else state.notice_at
    deadline = event.deadline if state.deadline is None else min(state.deadline, event.deadline)
    leave_at = train_until(begun, deadline, state.emergency_seconds)
    if not is_worth_staying(event.at, leave_at, state.emergency_seconds):
        return _on_signal(state, event)
    staying = replace(
        state,
        wish=Phase.PREEMPTED,
        cause=f"preemption ({event.source})",
        notice_at=begun,
        deadline=deadline,
        leave_at=leave_at,
    )
    actions: list[Action] = [Hurry(deadline)]
    if state.leave_at is None:
        left = f"{deadline - event.at:.0f} s are left"
        plan = f"the state is saved now, and once more in about {leave_at - event.at:.0f} s"
        actions.insert(0, Say(f"{staying.cause}: {left}; {plan}"))
        actions.append(Ask(Request.SAVE, Why.PREEMPTION, deadline))
    return staying, actions


def _drain(state: State, at: float, goal: Phase, cause: str, deadline: float) -> Step:
    """Ask for a last state, and then make it durable."""
    draining = replace(
        state,
        phase=Phase.DRAINING,
        goal=goal,
        cause=cause,
        notice_at=at,
        deadline=deadline,
        leave_at=None,
        snapshot_until=patience_for_boundary(at, deadline),
    )
    return draining, [Ask(Request.SAVE_AND_STOP, WHY[goal], deadline)]


# ---------------------------------------------------------------------------- transitions


def _on_exit(state: State, event: Exited) -> Step:
    """The trainer is gone: whatever it left in the slots is persisted first."""
    match state.phase:
        case Phase.DRAINING:
            # How it ended makes no difference, unless it had finished before it heard of the end.
            if event.code == 0 and not event.obeyed:
                state = replace(state, goal=Phase.SUCCEEDED, cause="finished")
            return _persist(state)
        case Phase.STOPPING if state.goal is not None:
            return _persist_and_kill(state)
        case Phase.STOPPING:
            return _restart_or_give_up(state, event.at, event.left_step)
        case Phase.RESTORING | Phase.RUNNING if event.code == 0:
            return _persist(_draining(state, Phase.SUCCEEDED, "finished"))
        case Phase.RUNNING if state.leave_at is not None:
            # With the node about to go, it is not worth starting again here.
            return _persist(_draining(state, Phase.PREEMPTED, state.cause))
        case Phase.RESTORING | Phase.RUNNING:
            cause = event.cause or describe_exit(event.code)
            state = replace(state, phase=Phase.STOPPING, cause=cause)
            if event.code in state.policy.never:
                cause = f"{state.cause}, which is never tried again"
                return _fail_for_good(replace(state, cause=cause), event.at, event.code)
            return _restart_or_give_up(state, event.at, event.left_step)
    return state, []


def _draining(state: State, goal: Phase, cause: str) -> State:
    """No trainer is left to ask: what is in the slots is the last that there will be."""
    return replace(state, phase=Phase.DRAINING, goal=goal, cause=cause, leave_at=None)


def _on_drained(state: State) -> Step:
    """All that could be saved is saved, unless the trainer has left something since."""
    if state.goal is None:  # nothing was to be saved before the end
        return state, []
    return _persist(state) if state.again else _finish(state)


def _on_save_failed(state: State, event: SaveFailed) -> Step:
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


def _restart_or_give_up(state: State, at: float, left_step: int = -1) -> Step:
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
        stopping, actions = _fail_for_good(state, at, exitcodes.GIVEN_UP)
        return stopping, [Say(diagnosis(state), is_error=True), *actions]
    wait = backoff_seconds(policy, failures, state.starts)
    waiting = replace(state, phase=Phase.BACKOFF, retry_at=at + wait, kill_at=None)
    return waiting, [
        KillTree(),
        EndAttempt("failed", state.cause),
        PersistLeft(),
        Say(f"{state.cause}; failure {failures} of {policy.failures}, next start in {wait:.3g} s"),
    ]


def _fail_for_good(state: State, at: float, exit_code: int) -> Step:
    """Save what there is and end; a store that refuses is not waited for without end."""
    deadline = at + max(state.policy.grace_seconds, _LAST_SAVE_SECONDS)
    failed = replace(state, goal=Phase.FAILED, exit_code=exit_code, deadline=deadline)
    return _persist_and_kill(failed)


def _cannot_start(
    state: State, event: PreparationFailed | LaunchFailed | StoreGone | EngineAway
) -> Step:
    """No trainer can run, or the one that waits for its state would wait for ever."""
    if state.leave_at is not None:
        state = _draining(state, Phase.PREEMPTED, state.cause)
    if state.goal is not None:
        # It is ending already. No trainer will come to a boundary; what is in the slots is saved.
        saving, actions = _persist(replace(state, snapshot_until=None))
        return saving, [Say(event.reason, is_error=True), *actions]
    state = replace(state, cause=event.reason)
    if isinstance(event, LaunchFailed):
        failed = replace(state, goal=Phase.FAILED, exit_code=exitcodes.USAGE)
    elif isinstance(event, PreparationFailed) and event.final:
        failed = replace(state, goal=Phase.FAILED, exit_code=exitcodes.GIVEN_UP)
    else:
        stopping = replace(state, phase=Phase.STOPPING)
        stopped, actions = _restart_or_give_up(stopping, event.at)
        return stopped, [Say(event.reason, is_error=True), *actions]
    finished, actions = _finish(failed)
    return finished, [Say(event.reason, is_error=True), *actions]


def _on_store_gone(state: State, event: StoreGone) -> Step:
    """Nothing can begin, and nobody has failed."""
    if state.goal is not None:
        return _cannot_start(state, event)
    if state.phase not in (Phase.STARTING, Phase.RESTORING):
        return state, []
    waiting = wait_for_store(state, event)
    if waiting is not None and waiting.retry_at is not None:
        again = f"tried again in {waiting.retry_at - event.at:.3g} s"
        return waiting, [Say(f"the store is out of reach, {again}: {event.reason}", is_error=True)]
    over = f"the store was out of reach for {state.policy.store_timeout_seconds:g} s"
    deadline = event.at + state.policy.grace_seconds
    left, actions = _finish(replace(state, goal=Phase.PREEMPTED, cause=over, deadline=deadline))
    return left, [Say(f"{over}: start it again when it is there: {event.reason}", True), *actions]


def _on_engine_away(state: State, event: EngineAway) -> Step:
    """No trainer can be started, and nobody has failed."""
    if state.phase not in (Phase.RESTORING, Phase.RUNNING) or state.leave_at is not None:
        return _cannot_start(state, event)
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
    ending = replace(_draining(state, Phase.PREEMPTED, over), alive=False, deadline=deadline)
    saving, actions = _persist_and_kill(ending)
    told = Say(f"{over}: start it again when it is there: {event.reason}", is_error=True)
    return saving, [told, Hurry(deadline), *actions]


def _on_signal(state: State, event: Notice | Interrupt | StopAsked) -> Step:
    wish, cause, deadline = _wish(state, event)
    twice = isinstance(event, Interrupt) and state.wish is Phase.INTERRUPTED
    if state.deadline is not None:
        deadline = min(state.deadline, deadline)
    state = replace(state, wish=wish)
    match state.phase:
        case Phase.RUNNING:
            draining, actions = _drain(state, event.at, wish, cause, deadline)
            return draining, [Say(cause), Hurry(deadline), *actions]
        case Phase.DRAINING | Phase.STOPPING if twice:
            keep = state.goal is Phase.FAILED
            given_up, actions = _finish(state if keep else replace(state, goal=wish, cause=cause))
            refusal = Say("interrupted twice: nothing more is saved", is_error=True)
            return given_up, [refusal, *actions]
        case Phase.DRAINING | Phase.STOPPING:
            return _hurry(state, wish, cause, event.at, deadline), [Say(cause), Hurry(deadline)]
    # No trainer has begun: only what an earlier one left in the slots is to be saved.
    over = replace(
        state,
        phase=Phase.DRAINING,
        goal=wish,
        cause=cause,
        notice_at=event.at,
        deadline=deadline,
        retry_at=None,
    )
    draining, actions = _persist_and_kill(over)
    return draining, [Say(cause), Hurry(deadline), *actions]


def _hurry(state: State, wish: Phase, cause: str, at: float, deadline: float) -> State:
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


def _on_tick(state: State, at: float) -> Step:
    match state.phase:
        case Phase.BACKOFF if state.begins_at is not None and at >= state.begins_at:
            fresh = replace(state, phase=Phase.STARTING, retry_at=None, cause="", goal=None)
            return fresh, [Claim()]
        case Phase.RESTORING if state.retry_at is not None and at >= state.retry_at:
            again = replace(state, retry_at=None, preparing=True)
            return again, [Restore(state.go_back)]
        case Phase.RUNNING if state.leave_at is not None:
            return _leave_in_time(state, at)
        case Phase.RUNNING if _hangs(state, at):
            idle, doing = at - state.progress_at, state.activity or "before attach()"
            hung = replace(
                state,
                phase=Phase.STOPPING,
                cause="hang",
                kill_at=at + state.policy.stacks_seconds,
                showing=True,
                rhythm=state.rhythm.ended(state.activity),
            )
            return hung, [
                Say(
                    f"no progress for {idle:.3g} s ({doing}): stacks follow, then it is killed",
                    True,
                ),
                DumpStacks(),
            ]
        case Phase.STOPPING | Phase.DRAINING:
            return _push_on(state, at)
    return state, []


def _leave_in_time(state: State, at: float) -> Step:
    """The last save of a node that has been given notice, when its time has come."""
    assert state.leave_at is not None
    assert state.deadline is not None
    if at < state.leave_at:
        return state, []
    draining, actions = _drain(state, at, Phase.PREEMPTED, state.cause, state.deadline)
    if at >= state.deadline:  # this supervisor has overslept it
        over, more = _out_of_time(draining)
        return over, [*actions, *more]
    return draining, [Say(f"{state.cause}: the time to train is over"), *actions]


def _push_on(state: State, at: float) -> Step:
    """Time passes while a trainer is being ended or its state saved."""
    if state.deadline is not None and at >= _last_moment(state):
        return _out_of_time(state)
    if state.kill_at is not None and at >= state.kill_at:
        state = replace(state, kill_at=None)
        if state.snapshot_until is None:
            return state, [KillTree()]
        # The node goes: what it has left is saved beside its end, which may take long.
        saving, actions = _persist(replace(state, snapshot_until=None))
        return saving, [*actions, KillTree()]
    if state.snapshot_until is not None and state.alive:
        if at < state.snapshot_until:
            return state, []
        # The trainer does not come to a boundary: the newest complete slot has to do.
        return _persist(replace(state, snapshot_until=None))
    if state.retry_at is not None and at >= state.retry_at:
        return _persist(state)
    return state, []


def _out_of_time(state: State) -> Step:
    saving: list[Action] = []
    if state.snapshot_until is not None and state.alive:  # held up for all of the grace
        state, saving = _persist(replace(state, snapshot_until=None))
    if state.goal is Phase.SUCCEEDED and state.wish is not None:
        # Its last state is not durable, so it has to be started once more.
        state = replace(state, goal=state.wish, cause="finished, but not saved in time")
    finished, actions = _finish(state)
    late = Say("the time is over before everything was saved", is_error=True)
    return finished, [late, *saving, *actions]


def _persist(state: State) -> Step:
    """Save the newest slot; if that is being done, once more afterwards."""
    if state.persisting:
        return replace(state, again=True), []
    begun = replace(state, persisting=True, again=False, retry_at=None)
    return begun, [PersistNewest(_triggers(state))]


def _persist_and_kill(state: State) -> Step:
    """The kill may last, and makes no difference to what is saved: its trainer is dead, or waits.

    What it should have left after all is saved when its end is heard of.
    """
    stopping, actions = _persist(state)
    return stopping, [*actions, KillTree()]


def _finish(state: State) -> Step:
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


def _hangs(state: State, at: float) -> bool:
    limit = state.rhythm.limit_seconds(state.activity, state.policy.hang_timeout_seconds)
    return limit is not None and at - state.progress_at > limit


def _wish(state: State, event: Notice | Interrupt | StopAsked) -> tuple[Phase, str, float]:
    match event:
        case Notice():
            return Phase.PREEMPTED, f"preemption ({event.source})", event.deadline
        case Interrupt():
            return Phase.INTERRUPTED, "interrupt", event.at + state.policy.grace_seconds
    return Phase.STOPPED, "stop", event.at + state.policy.grace_seconds


def _last_moment(state: State) -> float:
    assert state.deadline is not None
    began = state.notice_at if state.notice_at is not None else state.deadline
    return last_moment(began, state.deadline)


def _triggers(state: State) -> tuple[str, ...]:
    if state.goal is Phase.SUCCEEDED:
        return ("final",)
    return (WHY[state.goal].trigger,) if state.goal in WHY else ()
