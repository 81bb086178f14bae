"""When a trainer that failed is started again, and what is said when it is not. Pure."""

from __future__ import annotations

import random
import signal
from collections import Counter
from dataclasses import replace

from runner.supervisor.events import EngineAway, StoreGone
from runner.supervisor.state import Phase, Policy, State

_MAX_DOUBLINGS = 60  # of the backoff: its longest is reached long before


def backoff_seconds(policy: Policy, failures: int, starts: int) -> float:
    """The wait after so many failures in a row: doubled each time, up to the longest.

    With a seed it is between half of that and all of it, another one at each of the `starts`: runs
    that have failed together, as with their store, do not come back together.
    """
    doublings = min(failures - 1, _MAX_DOUBLINGS)
    longest = min(policy.backoff_max_seconds, policy.backoff_initial_seconds * 2.0**doublings)
    if policy.seed is None:
        return longest
    share = random.Random(f"{policy.seed} {starts}").random()
    return longest * (1 + share) / 2


def wait_for_store(state: State, event: StoreGone) -> State | None:
    """A start that found the store out of reach: it tries again later, which is no failure.

    A trainer that was launched already waits with it. None when it was waited for long enough.
    """
    at = event.at
    since = min(s for s in (at, event.since, state.store_gone_since) if s is not None)
    if at - since >= state.policy.store_timeout_seconds:
        return None
    refusals = state.refusals + 1
    wait = backoff_seconds(state.policy, refusals, state.starts + refusals)
    return replace(
        state,
        phase=Phase.BACKOFF if state.phase is Phase.STARTING else state.phase,
        preparing=False,
        store_gone_since=since,
        refusals=refusals,
        retry_at=at + wait,
    )


def wait_for_engine(state: State, event: EngineAway) -> State | None:
    """A start that found nobody at the container engine: another one comes later.

    Nobody has failed. None when it was waited for as long as a store would be.
    """
    since = event.at if state.engine_gone_since is None else state.engine_gone_since
    if event.at - since >= state.policy.store_timeout_seconds:
        return None
    refusals = state.engine_refusals + 1
    return replace(
        state,
        phase=Phase.BACKOFF,
        alive=False,
        cause=event.reason,
        engine_gone_since=since,
        engine_refusals=refusals,
        retry_at=event.at + backoff_seconds(state.policy, refusals, state.starts),
    )


def diagnosis(state: State) -> str:
    """Why a run is given up: how often it failed, of what, where, and what can be tried."""
    counted = Counter(reversed(state.causes))
    causes = ", ".join(
        cause if count == 1 else f"{cause} ({count} times)" for cause, count in counted.items()
    )
    times = "once" if state.failures == 1 else f"{state.failures} times in a row"
    reached = "no step was finished" if state.step < 1 else f"the last step was {state.step}"
    saved = "nothing is saved" if state.kept_step < 0 else f"step {state.kept_step} is saved"
    advice = [f"what the trainer printed is in {state.policy.logs}"]
    if state.sick_since is not None:
        advice.append("try a smaller learning rate, or leave out the data of that step")
    elif state.failures > 2 and state.kept_step > 0:
        advice.append("try an older checkpoint with --from STEP (`runner checkpoints ls`)")
    elif state.step < 1:
        advice.append("try the command by hand: it does not come to its first step")
    advice.append("raise restart.failures if this passes by itself; start it again to go on")
    return (
        f"given up: it failed {times} without a new step, last of {state.cause}; "
        f"causes: {causes or state.cause}; {reached}, {saved}. " + "; ".join(advice)
    )


def describe_exit(code: int) -> str:
    """How a trainer has ended, in words."""
    if code < 0:
        try:
            return f"the trainer was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"the trainer was killed by signal {-code}"
    return f"the trainer exited with code {code}"
