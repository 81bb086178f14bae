"""What a supervisor hears of, and what it can do about it: frozen records, and nothing else.

`Event`s come from signal handlers, from the clerk and from looking around; `machine.step` answers
them with `Action`s, which the loop carries out.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.board import Request, Why
from runner.saves import SaveRecord

# ---------------------------------------------------------------------------- events


@dataclass(frozen=True)
class Event:
    at: float


@dataclass(frozen=True)
class Claimed(Event):
    """The next attempt is this supervisor's."""

    attempt: int


@dataclass(frozen=True)
class RestoreReady(Event):
    """What the attempt begins from lies in the spool; step 0 at the start of a run.

    `durable` is the newest step that is in the store by now, -1 for none; None if it is this one.
    """

    step: int
    durable: int | None = None


@dataclass(frozen=True)
class PreparationFailed(Event):
    """The attempt could not be claimed or its state not fetched; `final` if trying is useless."""

    reason: str
    final: bool


@dataclass(frozen=True)
class StoreGone(Event):
    """The attempt could not be claimed, or its state not fetched, for the store is out of reach.

    Since then, if that is known; else since the first that is heard of it.
    """

    reason: str
    since: float | None = None


@dataclass(frozen=True)
class LaunchFailed(Event):
    """The command cannot be started at all."""

    reason: str


@dataclass(frozen=True)
class EngineAway(Event):
    """The trainer could not be started, for the container engine does not answer."""

    reason: str


@dataclass(frozen=True)
class Exited(Event):
    """The trainer is gone; negative codes are signals. `obeyed`: it was asked to stop, and did.

    `left_step` is the step of the newest complete slot, -1 if there is none; `step` the last that
    was finished. `cause` is why it failed, where more is known than its code.
    """

    code: int
    obeyed: bool = False
    left_step: int = -1
    step: int = -1
    cause: str = ""


@dataclass(frozen=True)
class Progressed(Event):
    """The trainer has moved since the last look; `activity` is what it says it is doing."""

    activity: str
    step: int = -1


@dataclass(frozen=True)
class Worked(Event):
    """The trainer's processes have used the CPU since the last look, whatever they say."""


@dataclass(frozen=True)
class Overslept(Event):
    """This supervisor itself has not run for so long: it was frozen, or its machine was."""

    seconds: float


@dataclass(frozen=True)
class Unhealthy(Event):
    """Metrics that must be finite have not been, from this step on and for so many steps."""

    since_step: int
    steps: int


@dataclass(frozen=True)
class MemoryShort(Event):
    """The cgroup's memory is nearly used up, in bytes; `urgent` if it goes on although asked."""

    used: int
    limit: int
    urgent: bool = False


@dataclass(frozen=True)
class StacksShown(Event):
    """The stacks of a trainer that hangs are in the log, as far as they can be had."""


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint became durable.

    `emergency_seconds` is what a save after a notice would take, measured by this one: the step at
    hand, the copy, the store.
    """

    step: int
    healthy: bool = True
    emergency_seconds: float | None = None


@dataclass(frozen=True)
class Validated(Event):
    """A checkpoint was tried: `valid` or `invalid`, or `unknown` if nothing can be said of it."""

    checkpoint: str
    result: str
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Persisted(Event):
    """The same of any checkpoint, for those who count: what it was, and how long it took."""

    record: SaveRecord


@dataclass(frozen=True)
class Drained(Event):
    """There is nothing newer in the slots than what is durable."""


@dataclass(frozen=True)
class SaveFailed(Event):
    """The store refused; what was to be saved is still in its slot."""

    reason: str


@dataclass(frozen=True)
class Notice(Event):
    """The node will be taken away at `deadline`. With `leave`, we are told to go at once."""

    source: str
    deadline: float
    leave: bool = False


@dataclass(frozen=True)
class Hint(Event):
    """The node may be taken away before long: worth a save, and no more."""

    source: str


@dataclass(frozen=True)
class Interrupt(Event):
    """Somebody pressed Ctrl-C."""


@dataclass(frozen=True)
class StopAsked(Event):
    """Somebody said `runner stop`."""


@dataclass(frozen=True)
class SaveAsked(Event):
    """Somebody wants a checkpoint now."""


@dataclass(frozen=True)
class StacksAsked(Event):
    """Somebody wants to see where the trainer's threads are."""


@dataclass(frozen=True)
class Relayed(Event):
    """A signal that is meant for the trainer."""

    signum: int


@dataclass(frozen=True)
class FencedOff(Event):
    """A newer attempt is another supervisor's."""

    reason: str


@dataclass(frozen=True)
class Tick(Event):
    """Time has passed."""


@dataclass(frozen=True)
class ChildEnded(Event):
    """Some child of this process has ended: it is time to look which."""


# ---------------------------------------------------------------------------- actions


class Action:
    """Something for the loop to do, in the order given."""


@dataclass(frozen=True)
class Claim(Action):
    """Begin the next attempt in the store."""


@dataclass(frozen=True)
class Restore(Action):
    """Prepare what the attempt begins from."""

    go_back: int


@dataclass(frozen=True)
class Launch(Action):
    """Start the trainer."""


@dataclass(frozen=True)
class Ask(Action):
    """Put a request on the board."""

    kind: Request
    why: Why
    deadline: float = 0.0


@dataclass(frozen=True)
class PersistNewest(Action):
    """Make the newest complete slot durable, with these triggers; answered by `Drained`."""

    triggers: tuple[str, ...]


@dataclass(frozen=True)
class PersistLeft(Action):
    """Make the newest complete slot durable while the next attempt is being prepared."""


@dataclass(frozen=True)
class Hurry(Action):
    """Tell the store that nothing may last beyond this moment."""

    deadline: float


@dataclass(frozen=True)
class DumpStacks(Action):
    """Make the trainer print where its threads are."""


@dataclass(frozen=True)
class Relay(Action):
    """Send a signal to the trainer alone."""

    signum: int


@dataclass(frozen=True)
class KillTree(Action):
    """SIGKILL to the trainer and everything it started."""


@dataclass(frozen=True)
class EndAttempt(Action):
    """Write the attempt's end into its record."""

    outcome: str
    cause: str


@dataclass(frozen=True)
class Say(Action):
    """Tell the user."""

    message: str
    is_error: bool = False
