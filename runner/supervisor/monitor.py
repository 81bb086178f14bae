"""What a live run tells to whoever asks: it listens to the supervisor and answers over HTTP.

The loop says when it comes round, and what has happened. Everything else is looked up when it is
asked for, on the endpoint's own threads: a run that nobody looks at pays nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from prometheus_client import CollectorRegistry, pushadd_to_gateway

from runner import __version__
from runner.board import Board
from runner.checkpoint.attempts import Ledger, utc_now
from runner.supervisor import metrics
from runner.supervisor.assignment import Assignment
from runner.supervisor.endpoint import Endpoint, Pulse, Sources
from runner.supervisor.events import Event, Validated
from runner.supervisor.state import Phase, State

log = logging.getLogger(__name__)

_PUSH_SECONDS = 5.0


@dataclass(frozen=True)
class Sight:
    """What of the supervisor can be seen from here: its board, if there is one, and its ledger."""

    board: Callable[[], Board | None]
    ledger: Ledger


class Monitor:
    """One for a supervisor's life: `start`, then `beat` and `heard`, `leaving`, and `close`."""

    def __init__(self, assignment: Assignment, store_url: str, sight: Sight) -> None:
        self._assignment, self._store, self._sight = assignment, store_url, sight
        self._pulse = Pulse()
        self._state = State()
        self._tally = metrics.tally_for(store_url)
        self._registry: CollectorRegistry = metrics.registry_of(self._tally)
        job = assignment.job
        labels = (assignment.run_id, job.name, store_url, job.launcher, __version__)
        self._tally.set("runner_run_info", 1, labels)
        self._endpoint = (
            Endpoint(job.metrics.host, job.metrics.port, self._pulse, self._sources())
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

    def heard(self, event: Event, before: State, after: State) -> None:
        """Something has happened, and this is what the machine made of it."""
        self._state = after
        if isinstance(event, Validated):
            self._tally.add("runner_checkpoint_validations_total", 1, (event.result,))

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

    def _push(self, gateway: str, timeout_seconds: float) -> None:
        self._look()
        job, run_id = self._assignment.job.name, self._assignment.run_id
        try:
            pushadd_to_gateway(
                gateway, job, self._registry, {"run_id": run_id}, timeout=timeout_seconds
            )
        except (OSError, HTTPException) as error:
            log.warning("the Pushgateway at %s did not take the metrics: %s", gateway, error)

    # ------------------------------------------------------------------ answers

    def _sources(self) -> Sources:
        return Sources(metrics=self._metrics, status=self.status)

    def _metrics(self, accept: str) -> tuple[bytes, str]:
        self._look()
        return metrics.rendered(self._registry, accept)

    def status(self) -> Mapping[str, Any]:
        """The facts of this moment, as plain JSON."""
        board, state, record = self._sight.board(), self._state, self._sight.ledger.record
        return {
            "run_id": self._assignment.run_id,
            "job": self._assignment.job.name,
            "store": self._store,
            "pid": os.getpid(),
            "at": utc_now(),
            "phase": state.phase.value,
            "cause": state.cause,
            "attempt": 0 if record is None else record.attempt,
            "attempt_started_at": None if record is None else record.started_at,
            "step": 0 if board is None else board.step,
            "epoch": None if board is None else board.epoch,
            "epochs": None if board is None else board.epochs or None,
            "batch": None if board is None else board.batch,
            "activity": None if board is None else board.phase,
            "last_checkpoint": None if record is None else record.committed,
            "saved_step": None if record is None else record.saved_step,
            "failures": state.failures,
        }

    def _look(self) -> None:
        """Bring up to date what nobody tells."""
        tally, board, record = self._tally, self._sight.board(), self._sight.ledger.record
        phase = self._state.phase
        tally.set_all("runner_phase", {(each.value,): each is phase for each in Phase})
        if record is not None:
            tally.set("runner_attempt", record.attempt)
        if board is not None:
            tally.set("runner_step", board.step)
            tally.set("runner_epoch", board.epoch)
            tally.set("runner_epochs", board.epochs or None)
