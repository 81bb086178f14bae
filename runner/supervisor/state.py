"""What a supervisor knows, as one frozen record, and the part of the job file that it obeys."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from runner import exitcodes
from runner.board import Why
from runner.supervisor.events import Action
from runner.supervisor.hangs import Rhythm


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
EXIT_CODES = {
    Phase.SUCCEEDED: exitcodes.FINISHED,
    Phase.PREEMPTED: exitcodes.PREEMPTED,
    Phase.INTERRUPTED: exitcodes.INTERRUPTED,
    Phase.STOPPED: exitcodes.INTERRUPTED,
    Phase.FENCED: exitcodes.FENCED,
}
WHY = {
    Phase.PREEMPTED: Why.PREEMPTION,
    Phase.INTERRUPTED: Why.INTERRUPT,
    Phase.STOPPED: Why.INTERRUPT,
}


@dataclass(frozen=True)
class Policy:
    """The part of the job file that the machine obeys. All durations in seconds.

    `seed` spreads the restarts of many runs that have failed for one reason; None is for none.
    `store_timeout_seconds` is how long a start waits for a store, or an engine, that is out of
    reach.
    `stacks_seconds` is what the stacks of a hung trainer may take. `logs` is where a person finds
    what the trainer printed.
    """

    grace_seconds: float = 30.0
    failures: int = 5
    backoff_initial_seconds: float = 1.0
    backoff_max_seconds: float = 60.0
    hang_timeout_seconds: float = 600.0
    store_timeout_seconds: float = 1800.0
    never: tuple[int, ...] = (2,)
    restore_healthy: bool = False
    seed: int | None = None
    stacks_seconds: float = 1.0
    logs: str = "`runner logs`"


@dataclass(frozen=True)
class State:
    """All that a supervisor knows.

    `goal` is where DRAINING or STOPPING will end, `wish` what the last signal asked for. `again`
    says that the trainer has ended, or had its time, since the persisting at hand began.
    `preparing`: what an attempt begins from is being fetched, maybe for one that is dead by now.

    `step` is how far the trainer has come, `kept_step` the newest that is durable on this way;
    `durable_step` the highest that ever was. After a notice with time to go on, `leave_at` is when
    the last save is asked for. `sick_since` is the step at which metrics ceased to be finite.
    `store_gone_since` is when a start first found the store out of reach, `refusals` how often it
    has; `refusal_said_at` is when it was last told that a save is refused, None if none is.
    `engine_gone_since` and `engine_refusals` are the same for the container engine.
    `showing`: the stacks of a hung trainer are written down, and `kill_at` waits for them.
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
    causes: tuple[str, ...] = ()
    starts: int = 0
    store_gone_since: float | None = None
    refusals: int = 0
    refusal_said_at: float | None = None
    engine_gone_since: float | None = None
    engine_refusals: int = 0
    step: int = -1
    kept_step: int = -1
    durable_step: int = -1
    durable_at_failure: int = -1
    sick_since: int | None = None
    snapshot_until: float | None = None
    deadline: float | None = None
    leave_at: float | None = None
    persisting: bool = False
    again: bool = False
    retry_at: float | None = None
    kill_at: float | None = None
    showing: bool = False
    running_since: float = 0.0
    progress_at: float = 0.0
    activity: str = ""
    rhythm: Rhythm = field(default_factory=Rhythm)
    notice_at: float | None = None
    hint_at: float | None = None
    emergency_seconds: float | None = None

    @property
    def begins_at(self) -> float | None:
        """When the next attempt begins; None where none does, or not by the mere passing of time.

        What the one before began from may still be being fetched.
        """
        return self.retry_at if self.phase is Phase.BACKOFF and not self.preparing else None

    @property
    def go_back(self) -> int:
        """Checkpoints to pass over: one more at each start from the third at one step on.

        None where the engine was not there for the start before: nobody has tried that one.
        """
        return 0 if self.engine_refusals else max(0, self.failures - 1)

    @property
    def lost_steps(self) -> int:
        """Steps that have been made and are not durable."""
        return max(0, self.step - max(0, self.kept_step))


Step = tuple[State, list[Action]]
"""The state after an event, and what is to be done."""
