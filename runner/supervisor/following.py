"""A run's log as it is read from outside: where it is, and when there is no more of it to come."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator

from runner.checkpoint.attempts import AttemptRecord
from runner.checkpoint.logs import StoredLogs
from runner.errors import StoreError
from runner.logs.files import LocalLogs
from runner.logs.reading import LogReader, Source
from runner.supervisor.lookup import KnownRun
from runner.wallclock import parse_time

log = logging.getLogger(__name__)

_LOCAL_SECONDS = 0.1
_STORE_SECONDS = 5.0
_SHIPPING_SECONDS = 25.0  # after which the end of a log is in the store, or will never be
_RESTART_SECONDS = 120.0  # after which no other attempt follows a failed one
_FINAL = ("succeeded", "stopped", "interrupted")


def read_log(run: KnownRun, attempt: int | None, *, follow: bool) -> Iterator[bytes]:
    """Blocks of whole lines of a run's log, as `runner.logs.lines` has them.

    With `follow` it goes on until the run has ended: past attempts, and past supervisors that were
    preempted or lost, for as long as it takes until the next one comes. An empty block says that
    there is no more for now.
    """
    reader = LogReader(attempt)
    local, stored = LocalLogs(run.logs), StoredLogs(run.store, run.run_id)
    if not follow:
        yield from _read(reader, [local, stored])
        return
    waits_for_next = False
    asked_store_at = float("-inf")
    while True:
        is_live = run.is_live()
        has_ended = False
        sources: list[Source] = [local]
        if not is_live and time.monotonic() - asked_store_at >= _STORE_SECONDS:
            has_ended = _has_ended(run, attempt)
            sources.append(stored)
        elif asked_store_at == float("-inf"):
            sources.append(stored)
        yield from _read(reader, sources)
        yield b""
        if len(sources) > 1:
            asked_store_at = time.monotonic()
            if has_ended:
                return
            if not is_live and not waits_for_next:
                log.info("run %s is not live on this machine: waiting for it", run.run_id)
            waits_for_next = not is_live
        if attempt is not None and reader.newest_attempt > attempt:
            return
        time.sleep(_LOCAL_SECONDS)


def _read(reader: LogReader, sources: list[Source]) -> Iterator[bytes]:
    """What a store that cannot be asked has is not read; what is on this machine is."""
    try:
        yield from reader.advance(sources)
    except StoreError as error:
        log.warning("what the store has of the log cannot be read: %s", error)
        yield from reader.advance([source for source in sources if isinstance(source, LocalLogs)])


def _has_ended(run: KnownRun, attempt: int | None) -> bool:
    """Whether nothing more is to come. A preempted run, and one that was lost, goes on one day."""
    try:
        record = run.ledger.latest()
    except StoreError as error:
        log.warning("the run's record cannot be read: %s", error)
        return False
    if record is None:
        return False
    if attempt is not None and record.attempt != attempt:
        return record.attempt > attempt
    if record.outcome in _FINAL or (attempt is not None and record.outcome is not None):
        return _has_been_over_for(record, _SHIPPING_SECONDS)
    # A failed attempt is followed by another one, unless its supervisor has given up.
    return record.outcome == "failed" and _has_been_over_for(record, _RESTART_SECONDS)


def _has_been_over_for(record: AttemptRecord, seconds: float) -> bool:
    """On another machine; on this one, a supervisor that is not live has left nothing undone."""
    if record.node == socket.gethostname():
        return True
    ended_at = parse_time(record.ended_at)
    return ended_at is None or time.time() - ended_at > seconds
