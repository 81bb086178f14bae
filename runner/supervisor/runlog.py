"""Everything that a run says on this node: what its trainers print, and the supervisor's messages.

It goes three ways: on to the supervisor's own stdout and stderr, into files that rotate, and from
those into the store. None of them can hold up the trainer or the supervisor for long, and none can
end the run.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from runner.checkpoint.logs import StoredLogs
from runner.logs import lines
from runner.logs.files import LocalLogs, LogLimits, LogWriter
from runner.logs.sink import Patience, Sink
from runner.supervisor.audience import Audience
from runner.supervisor.output import STDERR, Output, PassThrough, inherited_pipes, named_pipes
from runner.supervisor.shipping import Courier, Shipment

log = logging.getLogger(__name__)

_BUFFER_BYTES = 16 << 20
_PATIENCE = Patience(seconds=30.0, share=0.5)  # a file keeps all, unless the disk stands still
_DRAIN_SECONDS = 2.5
_FLUSH_SECONDS = 1.0
_HELD_MESSAGES = 1000


class RunLog:
    """One for a supervisor's life: `start`, for each attempt `begin` and `pipes`, then `finish`.

    `may_ship` is asked from another thread: False while everything is for an emergency save.
    Without `passes_through` the trainer's output is in the files only; messages always pass.
    `also` goes into the store together with the log. The `audience` is there from `start` to
    `finish`.
    """

    def __init__(
        self,
        folder: Path,
        limits: LogLimits,
        stored: StoredLogs,
        check_fence: Callable[[], None],
        may_ship: Callable[[], bool],
        *,
        passes_through: bool = True,
        also: Sequence[Shipment] = (),
        audience: Audience | None = None,
    ) -> None:
        self._folder, self._limits, self._stored = folder, limits, stored
        self._check_fence, self._may_ship = check_fence, may_ship
        self._passes_through = passes_through or not limits.max_bytes
        self._also, self._audience = also, audience
        self._attempt = 0
        self._lock = threading.Lock()
        self._held: list[bytes] = []
        self._through: PassThrough | None = None
        self._kept: Sink | None = None
        self._writer: LogWriter | None = None
        self._courier: Courier | None = None
        self._output: Output | None = None
        self._messages = _Messages(self._say)
        self._replaced: list[logging.Handler] = []

    def start(self) -> None:
        """From here on messages go the same ways as the trainer's output."""
        self._through = PassThrough(None if self._audience is None else self._audience.screen)
        if self._limits.max_bytes:
            self._writer = LogWriter(self._folder, self._limits)
            self._kept = Sink(
                "log",
                self._writer.write,
                self._mark_of_loss,
                capacity_bytes=_BUFFER_BYTES,
                patience=_PATIENCE,
            )
        self._take_messages_over()
        if self._audience is not None:
            self._audience.start(self._through)

    def begin(self, attempt: int) -> None:
        """What comes from here on is of this attempt."""
        with self._lock:
            self._attempt = attempt
            held, self._held = self._held, []
        for text in held:
            self._keep_message(text)
        if self._courier is None and (shipments := self._shipments()):
            self._courier = Courier(shipments, self._check_fence, self._may_ship)
            self._courier.start()
        if self._courier is not None:
            self._courier.begin(attempt)

    def _shipments(self) -> list[Shipment]:
        if self._kept is None:
            return list(self._also)
        mine = Shipment(LocalLogs(self._folder), self._stored, self._limits.max_bytes)
        return [mine, *self._also]

    def pipes(self, folder: Path | None = None, owner: tuple[int, int] | None = None) -> Output:
        """What the trainer of this attempt is to print into: with names, in a folder, if given."""
        assert self._through is not None
        makes = named_pipes(folder, owner) if folder else inherited_pipes()
        self._output = Output(self._attempt, self._keep, self._pass_on, makes)
        return self._output

    def drain(self) -> None:
        """The trainer and all that it started are dead: take what they have printed last."""
        output, self._output = self._output, None
        if output is not None and not output.drain(_DRAIN_SECONDS):
            log.warning("not all that the trainer has printed could be passed on so far")

    def attempt_ended(self) -> None:
        """Bring into the store what there is, when there is nothing more urgent."""
        if self._courier is not None:
            self._courier.ship_soon()

    def finish(self, timeout_seconds: float, *, ship: bool) -> None:
        """Write and store what is left, and give the messages back to whoever had them.

        A stderr that stands still gets no message any more: saying it would never end.
        """
        deadline = time.monotonic() + timeout_seconds
        if self._audience is not None and self._through is not None:
            self._audience.stop()
            self._through.leave()
        if self._kept is not None:
            self._kept.flush(min(_FLUSH_SECONDS, timeout_seconds))
        if self._courier is not None:
            self._courier.finish(max(0.0, deadline - time.monotonic()), ship=ship)
        # Whatever is said after this goes where it went before, unless it would hang there.
        if self._through is not None and self._through.flush(_FLUSH_SECONDS):
            self._through.close()
            self._give_messages_back()
        if self._kept is not None and self._kept.close(_FLUSH_SECONDS) and self._writer is not None:
            self._writer.close()

    # ------------------------------------------------------------------ where it goes

    def _pass_on(self, target: int, data: bytes) -> None:
        if self._passes_through and self._through is not None:
            self._through.write(target, data)

    def _keep(self, attempt: int, data: bytes) -> None:
        if self._kept is not None:
            self._kept.offer(attempt, data)

    def _say(self, text: bytes, on_stderr: bytes) -> None:
        """A message of the supervisor. It never waits: that would hold up the supervisor itself."""
        if self._through is not None and self._replaced:
            self._through.write(STDERR, on_stderr + b"\n", urgent=True)
        with self._lock:
            if not self._attempt:
                self._held = [*self._held, text][-_HELD_MESSAGES:]
                return
        self._keep_message(text)

    def _keep_message(self, text: bytes) -> None:
        if self._kept is not None:
            made = lines.records(lines.stamp(time.time()), self._attempt, lines.RUN, text)
            self._kept.offer(self._attempt, made, urgent=True)

    def _mark_of_loss(self, nbytes: int) -> bytes:
        text = f"… about {nbytes} bytes of the log are missing here: the disk is too slow"
        now = lines.stamp(time.time())
        return lines.records(now, self._attempt, lines.RUN, text.encode())

    def _take_messages_over(self) -> None:
        root = logging.getLogger()
        self._replaced = [
            handler
            for handler in root.handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
        ]
        for handler in self._replaced:
            root.removeHandler(handler)
            self._messages.setFormatter(handler.formatter)
        root.addHandler(self._messages)

    def _give_messages_back(self) -> None:
        root = logging.getLogger()
        root.removeHandler(self._messages)
        for handler in self._replaced:
            root.addHandler(handler)
        self._replaced = []


class _Messages(logging.Handler):
    """Hands each message on, as it is and as it would stand on stderr."""

    def __init__(self, say: Callable[[bytes, bytes], None]) -> None:
        super().__init__()
        self._hand_on = say
        self._plain = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            texts = self._plain.format(record), self.format(record)
        except Exception:  # noqa: BLE001 - of a message whose arguments do not fit, as in logging
            self.handleError(record)
        else:
            self._hand_on(*(text.encode(errors="backslashreplace") for text in texts))
