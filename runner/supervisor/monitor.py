"""What a live run tells to whoever asks: it listens to the supervisor and answers over HTTP.

The loop says when it comes round and what its machine made of each event; the clerk tells of what
it has done. That goes into the log and into the metrics. Everything else is looked up when it is
asked for, on the endpoint's own threads: a run that nobody looks at pays next to nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http.client import HTTPException
from typing import Any

from prometheus_client import CollectorRegistry, pushadd_to_gateway

from runner import __version__
from runner.checkpoint.attempts import AttemptRecord
from runner.spending import Meter
from runner.supervisor import metrics
from runner.supervisor.assignment import Assignment, policy_for
from runner.supervisor.counting import Counting
from runner.supervisor.endpoint import Endpoint, Pulse, Sources
from runner.supervisor.events import (
    Claimed,
    Event,
    Exited,
    MemoryShort,
    Notice,
    Progressed,
    Saved,
    Tick,
    Unhealthy,
    Validated,
)
from runner.supervisor.gauges import Gauges, Sight
from runner.supervisor.goodput import Goodput, goodput_of
from runner.supervisor.happenings import (
    CheckpointQuarantined,
    Happening,
    Noticed,
    Restarted,
    write_down,
)
from runner.supervisor.state import Phase, State
from runner.wallclock import utc_now

log = logging.getLogger(__name__)

_PUSH_SECONDS = 5.0
_WRITE_SECONDS = 60.0  # between two times that the attempt's record is brought up to date
_ENDING = (Phase.STOPPING, Phase.DRAINING, Phase.BACKOFF)
_AFTER = {"preempted": "preemption", None: "lost", "failed": "crash"}  # else somebody stopped it


class Monitor:
    """One for a supervisor's life: `start`, then `beat` and `heard`, `leaving`, and `close`."""

    def __init__(self, assignment: Assignment, store_url: str, sight: Sight) -> None:
        self._assignment, self._sight = assignment, sight
        self._pulse, self._meter = Pulse(), Meter(sight.board)
        self._state = State(policy=policy_for(assignment))
        self._earlier: Sequence[AttemptRecord] = ()
        self._known = 0  # the attempt before which all records are known
        self._goodput: Goodput | None = None
        self._reason: str | None = None
        self._noticed = False
        self._written_at = 0.0
        self._tally = metrics.tally_for(store_url)
        self._counting = Counting(self._tally, store_url)
        self._gauges = Gauges(self._tally, assignment.job, sight)
        self._registry: CollectorRegistry = metrics.registry_of(self._tally)
        job = assignment.job
        labels = (assignment.run_id, job.name, store_url, job.launcher, __version__)
        self._tally.set("runner_run_info", 1, labels)
        self._endpoint = (
            Endpoint(
                job.metrics.host,
                job.metrics.port,
                self._pulse,
                Sources(metrics=self.rendered, status=self.status),
            )
            if job.metrics.is_served
            else None
        )

    @property
    def address(self) -> str | None:
        """Where it is listened, as `host:port`."""
        return None if self._endpoint is None else self._endpoint.address

    def start(self) -> None:
        """Listen, before anything that may take long."""
        if self._endpoint is not None:
            self._endpoint.start()

    def beat(self) -> None:
        """The loop has come round."""
        self._pulse.beat()

    def leaving(self) -> None:
        """The loop is over."""
        self._pulse.over()

    def close(self, seconds_left: float) -> None:
        """Answer no more. A Pushgateway gets the last word, if there is time for it."""
        gateway = self._assignment.job.metrics.pushgateway
        if gateway is not None:
            self._push(gateway, min(_PUSH_SECONDS, seconds_left))
        if self._endpoint is not None:
            self._endpoint.close()

    # ------------------------------------------------------------------ what it is told

    def tell(self, happening: Happening) -> None:
        """Something has happened. May be called from any thread."""
        write_down(happening)
        self._counting.count(happening)

    def quarantined(self, name: str, problem: str) -> None:
        """A checkpoint has turned out to be corrupt."""
        self.tell(CheckpointQuarantined(name, problem))

    def knows(self, records: Sequence[AttemptRecord]) -> None:
        """All attempts of the run until now, this one included: the metrics go on from there."""
        earlier, is_first = records[:-1], not self._known
        if is_first:
            newest = next((record for record in reversed(earlier) if record.metrics), None)
            if newest is not None:
                self._tally.go_on_from(newest.metrics)
            if earlier:
                self.tell(Restarted(_AFTER.get(earlier[-1].outcome, "stop")))
        self._earlier, self._known = earlier, records[-1].attempt

    def heard(self, event: Event, before: State, after: State) -> None:
        """Something has come into the loop, and this is what the machine made of it."""
        self._state = after
        match event:
            case Claimed():
                self._gauges.attempt_begins(event.at)
                self._meter.begin(event.at)
                reason, self._reason = self._reason, None
                if reason is not None:
                    self.tell(Restarted(reason))
            case Notice() if not self._noticed:
                self._noticed = True
                self.tell(Noticed(event.source, max(0.0, event.deadline - event.at)))
            case Progressed():
                self._gauges.moved(event.at)
            case Validated():
                self._tally.add("runner_checkpoint_validations_total", 1, (event.result,))
            case Saved() if event.emergency_seconds is not None:
                left = after.policy.grace_seconds - event.emergency_seconds
                self._tally.set("runner_grace_headroom_seconds", left)
        if after.phase in _ENDING and before.phase not in _ENDING:
            self._ends(event, before, after)

    def _ends(self, event: Event, before: State, after: State) -> None:
        """The attempt is being ended, or is over: why."""
        if after.phase is not Phase.DRAINING:  # after which nothing is started again here
            self._reason = _reason(event)
        if self._reason == "hang":
            self._meter.hangs(before.progress_at)
        else:
            self._meter.asked_to_end(event.at)

    # ------------------------------------------------------------------ the attempt's record

    def is_time_to_write(self, now: float) -> bool:
        """Whether the attempt's record should be brought up to date; not while time is short."""
        return now - self._written_at >= _WRITE_SECONDS and self._state.deadline is None

    def facts(self, *, ended: bool = False) -> dict[str, Any]:
        """What the attempt's record has to say of its time, and the run's metrics until now."""
        self._written_at = time.monotonic()
        if ended:
            self._meter.end(self._written_at)
        spent = _rounded(self._meter.now())
        if not spent:
            return {}
        facts = {"spent": spent, "seen_at": utc_now()}
        if not self._known:  # what was counted before this supervisor is not known yet
            return facts
        self._gauges.look()
        self._split()
        return {**facts, "metrics": self._tally.to_json()}

    def goodput(self) -> Goodput | None:
        """Where the run's time went until now; as it was before, while an attempt is beginning."""
        own = self._sight.ledger.record
        if own is not None and own.attempt == self._known:
            records = [*self._earlier, replace(own, spent=self._meter.now())]
            cost = self._assignment.job.cost
            rate = None if cost is None else cost.per_hour
            self._goodput = goodput_of(records, time.time(), live=True, per_hour=rate)
        return self._goodput

    def _split(self) -> None:
        goodput, tally = self.goodput(), self._tally
        if goodput is None:
            return
        tally.set("runner_goodput_ratio", goodput.ratio)
        tally.raise_to("runner_productive_seconds_total", goodput.productive_seconds)
        tally.raise_to("runner_lost_steps_total", goodput.lost_steps)
        for kind, seconds in goodput.badput_seconds.items():
            tally.raise_to("runner_badput_seconds_total", seconds, (kind,))

    # ------------------------------------------------------------------ answers

    def rendered(self, accept: str) -> tuple[bytes, str]:
        """The metrics of this moment, in the format that is asked for, and its type."""
        self._look()
        return metrics.rendered(self._registry, accept)

    def _look(self) -> None:
        """Bring up to date what nobody tells."""
        self._gauges.look()
        self._gauges.show(self._state)
        self._split()

    def status(self) -> Mapping[str, Any]:
        """The facts of this moment, as plain JSON."""
        state, record, goodput = self._state, self._sight.ledger.record, self.goodput()
        return {
            "run_id": self._assignment.run_id,
            "job": self._assignment.job.name,
            "at": utc_now(),
            "phase": state.phase.value,
            "cause": state.cause,
            "attempt": 0 if record is None else record.attempt,
            "attempt_started_at": None if record is None else record.started_at,
            **self._gauges.status(),
            "last_checkpoint": None if record is None else record.committed,
            "saved_step": None if record is None else record.saved_step,
            "grace_seconds": state.policy.grace_seconds,
            "headroom_seconds": self._tally.value("runner_grace_headroom_seconds"),
            "failures": state.failures,
            "goodput": None if goodput is None else goodput.to_json(),
        }

    def _push(self, gateway: str, timeout_seconds: float) -> None:
        self._look()
        job, run_id = self._assignment.job.name, self._assignment.run_id
        try:
            pushadd_to_gateway(
                gateway, job, self._registry, {"run_id": run_id}, timeout=timeout_seconds
            )
        except (OSError, HTTPException) as error:
            log.warning("the Pushgateway at %s did not take the metrics: %s", gateway, error)


def _reason(event: Event) -> str:
    """What ended an attempt that may be followed by another, told by the event that did."""
    match event:
        case Tick():
            return "hang"
        case MemoryShort():
            return "memory"
        case Unhealthy():
            return "unhealthy"
        case Exited():
            return "memory" if event.cause else "crash"
    return "preparation"


def _rounded(spent: Mapping[str, float]) -> dict[str, float]:
    return {kind: round(seconds, 4) for kind, seconds in spent.items() if seconds > 0}
