"""What a supervisor does next: one pure function over one frozen state.

    STARTING ─▶ RESTORING ─▶ RUNNING ─▶ DRAINING ─▶ SUCCEEDED | PREEMPTED | INTERRUPTED | STOPPED
     ▲ │           │          │ └─────▶ STOPPING ─▶ BACKOFF | FAILED    (a hang; given up)
     │ └───────────┴──────────┴───────────────────▶ BACKOFF | FAILED    (a crash; cannot be started)
     └─ BACKOFF
    STARTING, RESTORING ─▶ STOPPING                 (given up)
    STARTING, RESTORING, BACKOFF ─▶ DRAINING        (a signal; it ends well before it has begun)
    STOPPING ─▶ PREEMPTED | INTERRUPTED | STOPPED   (a signal while one that hangs is ended)
    any ─▶ FENCED                                   (a newer supervisor has the run)

The trainer is launched when the attempt is claimed: while it imports its libraries, what it begins
from is fetched and verified, and what the one before left in the slots is being made durable.
DRAINING ends well: what is in the slots is made durable, then the goal is reached. STOPPING ends
an attempt that hangs, or the run when it is given up: then its newest slot is persisted first.
Nothing here looks at a clock or touches the world; times come in with the events, in seconds of
one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from runner import exitcodes
from runner.board import Request, Why
from runner.supervisor.events import (
    Action,
    Ask,
    Claim,
    Claimed,
    Drained,
    DumpStacks,
    EndAttempt,
    Event,
    Exited,
    FencedOff,
    Hurry,
    Interrupt,
    KillTree,
    Launch,
    LaunchFailed,
    Notice,
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
    StopAsked,
    Tick,
)


class Phase(Enum):
    STARTING = "starting"
    RESTORING = "restoring"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    SUCCEEDED = "succeeded"
    PREEMPTED = "preempted"
    INTERRUPTED = "interrupted"
    STOPPED = "stopped"
    FAILED = "failed"
    FENCED = "fenced"


TERMINAL = frozenset(
    {
        Phase.SUCCEEDED,
        Phase.PREEMPTED,
        Phase.INTERRUPTED,
        Phase.STOPPED,
        Phase.FAILED,
        Phase.FENCED,
    }
)
_EXIT_CODES = {
    Phase.SUCCEEDED: exitcodes.FINISHED,
    Phase.PREEMPTED: exitcodes.PREEMPTED,
    Phase.INTERRUPTED: exitcodes.INTERRUPTED,
    Phase.STOPPED: exitcodes.INTERRUPTED,
    Phase.FENCED: exitcodes.FENCED,
}
_WHY = {
    Phase.PREEMPTED: Why.PREEMPTION,
    Phase.INTERRUPTED: Why.INTERRUPT,
    Phase.STOPPED: Why.INTERRUPT,
}
_RETRY_SECONDS = 0.5
_LAST_SAVE_SECONDS = 300.0  # that a run which has failed for good tries to save its last state
_MAX_DOUBLINGS = 60  # of the backoff: its longest is reached long before
_STACKS_SECONDS = 1.0  # between asking for the stacks of a hung trainer and killing it
_IDLE_PHASES = ("after training",)  # a test after the loop gives no signs of life


@dataclass(frozen=True)
class Policy:
    """The part of the job file that the machine obeys. All durations in seconds."""

    grace_seconds: float = 30.0
    failures: int = 5
    backoff_initial_seconds: float = 1.0
    backoff_max_seconds: float = 60.0
    hang_timeout_seconds: float = 600.0
    never: tuple[int, ...] = (2,)


# ---------------------------------------------------------------------------- the state


@dataclass(frozen=True)
class State:
    """All that a supervisor knows.

    `goal` is where DRAINING or STOPPING will end, `wish` what the last signal asked for. `again`
    says that the trainer has ended, or had its time, since the persisting at hand began.
    `preparing`: what an attempt begins from is being fetched, maybe for one that is dead by now.
    """

    policy: Policy = field(default_factory=Policy)
    phase: Phase = Phase.STARTING
    goal: Phase | None = None
    wish: Phase | None = None
    cause: str = ""
    alive: bool = False
    preparing: bool = False
    exit_code: int = 0
    failures: int = 0
    durable_step: int = -1
    durable_at_failure: int = -1
    snapshot_until: float | None = None
    deadline: float | None = None
    persisting: bool = False
    again: bool = False
    retry_at: float | None = None
    kill_at: float | None = None
    progress_at: float = 0.0
    activity: str = ""
    notice_at: float | None = None

    @property
    def go_back(self) -> int:
        """Checkpoints to pass over: one more at each start from the third at one step on."""
        return max(0, self.failures - 1)


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
            launched = replace(state, phase=Phase.RESTORING, alive=True, preparing=True)
            return launched, [Restore(state.go_back), Launch()]
        case RestoreReady() if state.phase is Phase.RESTORING:
            running = replace(
                state,
                phase=Phase.RUNNING,
                preparing=False,
                progress_at=event.at,
                activity="",
                durable_step=max(state.durable_step, event.step),
            )
            return running, []
        case RestoreReady() | PreparationFailed() if state.phase is Phase.BACKOFF:
            return replace(state, preparing=False), []
        case PreparationFailed() | LaunchFailed() if state.phase is not Phase.BACKOFF:
            return _cannot_start(replace(state, preparing=False), event)
        case Exited():
            return _on_exit(replace(state, alive=False, kill_at=None), event)
        case Progressed():
            return replace(state, progress_at=event.at, activity=event.activity), []
        case Saved():
            return replace(state, durable_step=max(state.durable_step, event.step)), []
        case Drained():
            return _on_drained(replace(state, persisting=False))
        case SaveFailed():
            return _on_save_failed(state, event)
        case Notice() | Interrupt() | StopAsked():
            return _on_signal(state, event)
        case SaveAsked() if state.phase is Phase.RUNNING:
            return state, [Ask(Request.SAVE, Why.MANUAL)]
        case StacksAsked() if state.alive:
            return state, [DumpStacks()]
        case Relayed() if state.alive:
            return state, [Relay(event.signum)]
        case Tick():
            return _on_tick(state, event.at)
    return state, []


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
            return _kill_and_persist(state)
        case Phase.STOPPING:
            return _restart_or_give_up(state, event.at, event.left_step)
        case Phase.RESTORING | Phase.RUNNING if event.code == 0:
            done = replace(state, phase=Phase.DRAINING, goal=Phase.SUCCEEDED, cause="finished")
            return _persist(done)
        case Phase.RESTORING | Phase.RUNNING:
            state = replace(state, phase=Phase.STOPPING, cause=_describe(event.code))
            if event.code in state.policy.never:
                cause = f"{state.cause}, which is never tried again"
                return _fail_for_good(replace(state, cause=cause), event.at, event.code)
            return _restart_or_give_up(state, event.at, event.left_step)
    return state, []


def _on_drained(state: State) -> Step:
    """All that could be saved is saved, unless the trainer has left something since."""
    if state.goal is None:  # nothing was to be saved before the end
        return state, []
    return _persist(state) if state.again else _finish(state)


def _on_save_failed(state: State, event: SaveFailed) -> Step:
    """What was to be saved still waits in its slot; only at the end is it asked for once more."""
    if state.phase in (Phase.DRAINING, Phase.STOPPING):
        state = replace(state, persisting=False, retry_at=event.at + _RETRY_SECONDS)
    return state, [Say(f"a checkpoint could not be saved: {event.reason}", is_error=True)]


def _restart_or_give_up(state: State, at: float, left_step: int = -1) -> Step:
    """A failure counts until a later step is reached, and saved, than at any failure before it.

    What is in the newest slot is as good as saved: it is being made durable from now on.
    """
    reached = max(state.durable_step, left_step)
    failures = 1 if reached > state.durable_at_failure else state.failures + 1
    furthest = max(state.durable_at_failure, reached)
    state = replace(state, failures=failures, durable_at_failure=furthest)
    if failures > state.policy.failures:
        stopping, actions = _fail_for_good(state, at, exitcodes.GIVEN_UP)
        times = "once" if failures == 1 else f"{failures} times in a row without a new step"
        return stopping, [Say(f"failed {times} ({state.cause}): given up", is_error=True), *actions]
    policy = state.policy
    doublings = min(failures - 1, _MAX_DOUBLINGS)
    wait = min(policy.backoff_max_seconds, policy.backoff_initial_seconds * 2**doublings)
    waiting = replace(state, phase=Phase.BACKOFF, retry_at=at + wait, kill_at=None)
    return waiting, [
        KillTree(),
        EndAttempt("failed", state.cause),
        PersistLeft(),
        Say(f"{state.cause}; failure {failures} of {policy.failures}, next start in {wait:g} s"),
    ]


def _fail_for_good(state: State, at: float, exit_code: int) -> Step:
    """Save what there is and end; a store that refuses is not waited for without end."""
    deadline = at + max(state.policy.grace_seconds, _LAST_SAVE_SECONDS)
    failed = replace(state, goal=Phase.FAILED, exit_code=exit_code, deadline=deadline)
    return _kill_and_persist(failed)


def _cannot_start(state: State, event: PreparationFailed | LaunchFailed) -> Step:
    """No trainer can run, or the one that waits for its state would wait for ever."""
    if state.goal is not None:
        # It is ending already. No trainer will come to a boundary; what is in the slots is saved.
        saving, actions = _persist(replace(state, snapshot_until=None))
        return saving, [Say(event.reason, is_error=True), *actions]
    state = replace(state, cause=event.reason)
    if isinstance(event, LaunchFailed):
        failed = replace(state, goal=Phase.FAILED, exit_code=exitcodes.USAGE)
    elif event.final:
        failed = replace(state, goal=Phase.FAILED, exit_code=exitcodes.GIVEN_UP)
    else:
        stopping = replace(state, phase=Phase.STOPPING)
        stopped, actions = _restart_or_give_up(stopping, event.at)
        return stopped, [Say(event.reason, is_error=True), *actions]
    finished, actions = _finish(failed)
    return finished, [Say(event.reason, is_error=True), *actions]


def _on_signal(state: State, event: Notice | Interrupt | StopAsked) -> Step:
    wish, cause, deadline = _wish(state, event)
    twice = isinstance(event, Interrupt) and state.wish is Phase.INTERRUPTED
    state = replace(state, wish=wish)
    match state.phase:
        case Phase.RUNNING:
            draining = replace(
                state,
                phase=Phase.DRAINING,
                goal=wish,
                cause=cause,
                notice_at=event.at,
                deadline=deadline,
                snapshot_until=_quarter(event.at, deadline),
            )
            ask = Ask(Request.SAVE_AND_STOP, _WHY[wish], deadline)
            return draining, [Say(cause), Hurry(deadline), ask]
        case Phase.DRAINING | Phase.STOPPING if twice:
            keep = state.goal is Phase.FAILED
            given_up, actions = _finish(state if keep else replace(state, goal=wish, cause=cause))
            lost = Say("interrupted twice: nothing more is saved", is_error=True)
            return given_up, [lost, *actions]
        case Phase.DRAINING | Phase.STOPPING:
            if state.deadline is not None:
                deadline = min(state.deadline, deadline)
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
    draining, actions = _kill_and_persist(over)
    return draining, [Say(cause), Hurry(deadline), *actions]


def _hurry(state: State, wish: Phase, cause: str, at: float, deadline: float) -> State:
    """It is being saved already; only the time that there is for it, and the end, change."""
    keep = state.goal in (Phase.SUCCEEDED, Phase.PREEMPTED, Phase.FAILED)
    until = state.snapshot_until
    return replace(
        state,
        goal=state.goal if keep else wish,
        cause=state.cause if keep else cause,
        notice_at=at if state.notice_at is None else state.notice_at,
        deadline=deadline,
        snapshot_until=None if until is None else min(until, _quarter(at, deadline)),
    )


def _quarter(at: float, deadline: float) -> float:
    """How long the trainer has to come to a boundary: the rest is for saving."""
    return at + (deadline - at) / 4


def _on_tick(state: State, at: float) -> Step:
    match state.phase:
        case Phase.BACKOFF if (
            state.retry_at is not None and at >= state.retry_at and not state.preparing
        ):
            fresh = replace(state, phase=Phase.STARTING, retry_at=None, cause="", goal=None)
            return fresh, [Claim()]
        case Phase.RUNNING if _hangs(state, at):
            timeout = state.policy.hang_timeout_seconds
            hung = replace(state, phase=Phase.STOPPING, cause="hang", kill_at=at + _STACKS_SECONDS)
            return hung, [
                Say(f"no progress for {timeout:g} s: stacks follow, then it is killed", True),
                DumpStacks(),
            ]
        case Phase.STOPPING | Phase.DRAINING:
            return _push_on(state, at)
    return state, []


def _push_on(state: State, at: float) -> Step:
    """Time passes while a trainer is being ended or its state saved."""
    if state.deadline is not None and at >= _last_moment(state):
        return _out_of_time(state)
    if state.kill_at is not None and at >= state.kill_at:
        return replace(state, kill_at=None), [KillTree()]
    if state.snapshot_until is not None and state.alive:
        if at < state.snapshot_until:
            return state, []
        # The trainer does not come to a boundary: the newest complete slot has to do.
        return _persist(replace(state, snapshot_until=None))
    if state.retry_at is not None and at >= state.retry_at:
        return _persist(state)
    return state, []


def _out_of_time(state: State) -> Step:
    if state.goal is Phase.SUCCEEDED and state.wish is not None:
        # Its last state is not durable, so it has to be started once more.
        state = replace(state, goal=state.wish, cause="finished, but not saved in time")
    finished, actions = _finish(state)
    late = Say("the time is over before everything was saved", is_error=True)
    return finished, [late, *actions]


def _persist(state: State) -> Step:
    """Save the newest slot; if that is being done, once more afterwards."""
    if state.persisting:
        return replace(state, again=True), []
    begun = replace(state, persisting=True, again=False, retry_at=None)
    return begun, [PersistNewest(_triggers(state))]


def _kill_and_persist(state: State) -> Step:
    stopping, actions = _persist(state)
    return stopping, [KillTree(), *actions]


def _finish(state: State) -> Step:
    goal = state.goal or Phase.FAILED
    code = state.exit_code if goal is Phase.FAILED else _EXIT_CODES[goal]
    actions: list[Action] = [KillTree()] if state.alive else []
    actions.append(EndAttempt(goal.value, state.cause))
    return replace(state, phase=goal, exit_code=code, alive=False), actions


def _hangs(state: State, at: float) -> bool:
    idle = at - state.progress_at
    return idle > state.policy.hang_timeout_seconds and state.activity not in _IDLE_PHASES


def _wish(state: State, event: Notice | Interrupt | StopAsked) -> tuple[Phase, str, float]:
    match event:
        case Notice():
            return Phase.PREEMPTED, f"preemption ({event.source})", event.deadline
        case Interrupt():
            return Phase.INTERRUPTED, "interrupt", event.at + state.policy.grace_seconds
    return Phase.STOPPED, "stop", event.at + state.policy.grace_seconds


def _last_moment(state: State) -> float:
    """When the tree must be killed at the latest, so that it is gone when the grace ends."""
    assert state.deadline is not None
    began = state.notice_at if state.notice_at is not None else state.deadline
    return state.deadline - min(1.0, (state.deadline - began) / 10)


def _triggers(state: State) -> tuple[str, ...]:
    if state.goal is Phase.SUCCEEDED:
        return ("final",)
    return (_WHY[state.goal].trigger,) if state.goal in _WHY else ()


def _describe(code: int) -> str:
    if code < 0:
        import signal

        try:
            return f"the trainer was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"the trainer was killed by signal {-code}"
    return f"the trainer exited with code {code}"
