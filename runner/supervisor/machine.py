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
one monotonic clock. What an end is made of is in `ending`, what comes of failures in `failing`.
"""

from __future__ import annotations

from dataclasses import replace

from runner import exitcodes
from runner.board import Request, Why
from runner.supervisor import ending, failing, learning
from runner.supervisor.deadlines import (
    is_worth_staying,
    train_until,
)
from runner.supervisor.events import (
    Action,
    Ask,
    Claim,
    Claimed,
    Drained,
    DumpStacks,
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
from runner.supervisor.restarts import describe_exit
from runner.supervisor.state import TERMINAL, Phase, Policy, State, Step

__all__ = ["TERMINAL", "Phase", "Policy", "State", "begin", "step"]

_SETTLE_SECONDS = 0.5  # for what a trainer writes of its own stacks
_HINT_SECONDS = 60.0  # between two saves for mere hints


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
            return failing.cannot_start(replace(state, preparing=False), event)
        case EngineAway() if state.phase is not Phase.BACKOFF:
            return failing.engine_away(state, event)
        case StoreGone():
            return failing.store_gone(replace(state, preparing=False), event)
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
            return ending.drained(replace(state, persisting=False))
        case SaveFailed():
            return ending.save_failed(state, event)
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
            return failing.restart_or_give_up(
                replace(state, phase=Phase.STOPPING, cause=cause), event.at
            )
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


# ---------------------------------------------------------------------------- transitions


def _on_exit(state: State, event: Exited) -> Step:
    """The trainer is gone: whatever it left in the slots is persisted first."""
    match state.phase:
        case Phase.DRAINING:
            # How it ended makes no difference, unless it had finished before it heard of the end.
            if event.code == 0 and not event.obeyed:
                state = replace(state, goal=Phase.SUCCEEDED, cause="finished")
            return ending.persist(state)
        case Phase.STOPPING if state.goal is not None:
            return ending.persist_and_kill(state)
        case Phase.STOPPING:
            return failing.restart_or_give_up(state, event.at, event.left_step)
        case Phase.RESTORING | Phase.RUNNING if event.code == 0:
            return ending.persist(ending.draining(state, Phase.SUCCEEDED, "finished"))
        case Phase.RUNNING if state.leave_at is not None:
            # With the node about to go, it is not worth starting again here.
            return ending.persist(ending.draining(state, Phase.PREEMPTED, state.cause))
        case Phase.RESTORING | Phase.RUNNING:
            cause = event.cause or describe_exit(event.code)
            state = replace(state, phase=Phase.STOPPING, cause=cause)
            if event.code in state.policy.never:
                cause = f"{state.cause}, which is never tried again"
                return failing.fail_for_good(replace(state, cause=cause), event.at, event.code)
            return failing.restart_or_give_up(state, event.at, event.left_step)
    return state, []


def _on_signal(state: State, event: Notice | Interrupt | StopAsked) -> Step:
    wish, cause, deadline = _wish(state, event)
    twice = isinstance(event, Interrupt) and state.wish is Phase.INTERRUPTED
    if state.deadline is not None:
        deadline = min(state.deadline, deadline)
    state = replace(state, wish=wish)
    match state.phase:
        case Phase.RUNNING:
            draining, actions = ending.drain(state, event.at, wish, cause, deadline)
            return draining, [Say(cause), Hurry(deadline), *actions]
        case Phase.DRAINING | Phase.STOPPING if twice:
            keep = state.goal is Phase.FAILED
            given_up, actions = ending.finish(
                state if keep else replace(state, goal=wish, cause=cause)
            )
            refusal = Say("interrupted twice: nothing more is saved", is_error=True)
            return given_up, [refusal, *actions]
        case Phase.DRAINING | Phase.STOPPING:
            return ending.hurry(state, wish, cause, event.at, deadline), [
                Say(cause),
                Hurry(deadline),
            ]
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
    draining, actions = ending.persist_and_kill(over)
    return draining, [Say(cause), Hurry(deadline), *actions]


def _on_tick(state: State, at: float) -> Step:
    match state.phase:
        case Phase.BACKOFF if state.begins_at is not None and at >= state.begins_at:
            fresh = replace(state, phase=Phase.STARTING, retry_at=None, cause="", goal=None)
            return fresh, [Claim()]
        case Phase.RESTORING if state.retry_at is not None and at >= state.retry_at:
            again = replace(state, retry_at=None, preparing=True)
            return again, [Restore(state.go_back)]
        case Phase.RUNNING if state.leave_at is not None:
            return ending.leave_in_time(state, at)
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
            return ending.push_on(state, at)
    return state, []


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
