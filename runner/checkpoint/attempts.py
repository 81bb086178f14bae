"""Who has the run: one record per attempt, and the fence that it is.

    <run>/run.json                 the job as submitted, provenance, created at
    <run>/attempts/000012.json     one life of the trainer: owner, node, start, end, outcome
    <run>/latest.json              the last commit, see `latest`

An attempt begins by creating its record if absent, so two supervisors never get the same number.
Before every commit and every deletion a supervisor asks for the next number: if it exists and is
another supervisor's, this one is stale and stops writing.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from runner.checkpoint.latest import Latest, read_latest, write_latest
from runner.errors import Fenced, NotFound, RecordUnreadable, StoreError
from runner.store import Store
from runner.wallclock import utc_now

_MAX_RECORD_BYTES = 16 << 20


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt as the store remembers it; the outcome is None until it has ended.

    A record whose supervisor was killed keeps what it began from and the last checkpoint that it
    committed. `went_back_from` names the checkpoints that were passed over on purpose, because the
    run had failed again and again behind them: nothing begins from them any more. Times are ISO
    8601 in UTC, durations seconds.

    `expected_steps` is how many steps the whole run will have, as its script seems to go.

    `spent` has what the time from `started_at` to `seen_at` went into, by kind: `productive`, and
    the kinds of `runner.supervisor.goodput`. `resumed_productive_seconds` is what the state that it
    began from had taken to train, `saved_productive_seconds` that of its last commit. `metrics`
    are the run's counters and histograms up to then: the last that will be heard of them, and what
    the next supervisor goes on from.
    """

    attempt: int
    owner: str
    node: str
    started_at: str
    resumed_from: str | None = None
    start_step: int = 0
    went_back_from: tuple[str, ...] = ()
    first_step_at: str | None = None
    committed: str | None = None
    saved_step: int | None = None
    ended_at: str | None = None
    end_step: int | None = None
    outcome: str | None = None
    cause: str | None = None
    exit_code: int | None = None
    notice_to_durable_seconds: float | None = None
    expected_steps: int | None = None
    seen_at: str | None = None
    spent: Mapping[str, float] = field(default_factory=dict)
    resumed_productive_seconds: float = 0.0
    saved_productive_seconds: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> AttemptRecord:
        """Read a record; fields of later versions are passed over. RecordUnreadable if it is."""
        try:
            document = json.loads(data)
            known = {each.name for each in fields(cls)}
            facts = {key: value for key, value in document.items() if key in known}
            facts["went_back_from"] = tuple(map(str, facts.get("went_back_from", ())))
            spent = {str(kind): float(value) for kind, value in facts.get("spent", {}).items()}
            facts["spent"] = {kind: value for kind, value in spent.items() if 0 <= value < math.inf}
            facts["metrics"] = dict(facts.get("metrics", {}))
            return cls(**facts)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise RecordUnreadable(f"an attempt's record is unreadable: {error}") from error


class Ledger:
    """The attempts of one run, as one supervisor (`owner`) sees and extends them."""

    def __init__(self, store: Store, run_id: str, owner: str) -> None:
        self._store, self.run_id, self.owner = store, run_id, owner
        self.record: AttemptRecord | None = None
        self.gone_back: frozenset[str] = frozenset()
        """What the run has gone back from, as far as this ledger was told or has looked."""
        self._has_looked = False
        self._late: AttemptRecord | None = None  # that the store has refused
        self._changing = threading.Lock()

    @property
    def attempt(self) -> int:
        """The number of the attempt that was claimed last, 0 before the first."""
        return 0 if self.record is None else self.record.attempt

    def run(self) -> dict[str, Any] | None:
        """`run.json`, or None if the run does not exist."""
        try:
            data = self._store.read(f"{self.run_id}/run.json", _MAX_RECORD_BYTES)
            document = json.loads(data)
        except NotFound:
            return None
        except (ValueError, RecursionError) as error:
            raise RecordUnreadable(f"{self.run_id}/run.json is unreadable: {error}") from error
        if not isinstance(document, dict):
            raise RecordUnreadable(f"{self.run_id}/run.json is no JSON object")
        return document

    def begin(self, document: Mapping[str, Any]) -> bool:
        """Create `run.json`; False if the run exists."""
        return self._store.create(f"{self.run_id}/run.json", _dump(document))

    def amend(self, document: Mapping[str, Any]) -> None:
        """Put another `run.json` in place of the one there is."""
        self._store.replace(f"{self.run_id}/run.json", _dump(document))

    def records(self, known: Mapping[int, AttemptRecord] | None = None) -> list[AttemptRecord]:
        """All attempts, oldest first; RecordUnreadable if one of them is.

        Those that are `known`, because they cannot change any more, are not read again. Metrics go
        on from one attempt to the next: only the newest that has any is given with them, because
        those of hundreds would take more memory than all else that a supervisor has.
        """
        latest = read_latest(self._store, self.run_id)
        have, records = known or {}, list[AttemptRecord]()
        newest: int | None = None  # of those that have metrics
        for number in self._numbers():
            record = have.get(number) or self._read(number)
            if record is None:
                continue
            if record.metrics:
                if newest is not None:
                    records[newest] = replace(records[newest], metrics={})
                newest = len(records)
            records.append(_with_commit(record, latest))
        return records

    def look_for_gone_back(self) -> frozenset[str]:
        """What all attempts until now have gone back from; afterwards it is in `gone_back`.

        Nobody else adds to it while the run is this owner's, so the store is asked once.
        """
        if not self._has_looked:
            names = (name for record in self.records() for name in record.went_back_from)
            self.gone_back |= frozenset(names)
            self._has_looked = True
        return self.gone_back

    def went_back(self, names: Sequence[str]) -> None:
        """Note in this attempt's record what it has gone back from."""
        if names:
            self.gone_back |= frozenset(names)
            self.update(went_back_from=tuple(names))

    def latest(self) -> AttemptRecord | None:
        """The newest attempt, whoever has it."""
        numbers = self._numbers()
        record = self._read(numbers[-1]) if numbers else None
        return record and _with_commit(record, read_latest(self._store, self.run_id))

    def claim(self, node: str) -> AttemptRecord:
        """Begin the next attempt. Its number is this owner's alone."""
        number = max(self._numbers(), default=0) + 1
        self.catch_up()
        self._complete(number - 1)
        while True:
            record = AttemptRecord(number, self.owner, node, utc_now())
            if self._store.create(self._key(number), record.to_json()):
                with self._changing:
                    self.record = record
                return record
            number += 1

    def update(self, **changes: Any) -> AttemptRecord:
        """Change the record of the attempt that was claimed last.

        What the store refuses is written with the next change, or by `catch_up`.
        """
        with self._changing:
            if self.record is None:
                raise StoreError("no attempt has been claimed")
            self.record = self._late = replace(self.record, **changes)
            self._store.replace(self._key(self.record.attempt), self.record.to_json())
            self._late = None
            return self.record

    def catch_up(self) -> None:
        """Write what the store has refused so far, if it has. Raises StoreError."""
        with self._changing:
            if self._late is not None:
                self._store.replace(self._key(self._late.attempt), self._late.to_json())
                self._late = None

    def committed(
        self, checkpoint: str, step: int, productive_seconds: float | None = None
    ) -> None:
        """Note a commit of this attempt: one small write, into `latest.json`.

        The attempt's own record has it from its next change on, and with it what the state had
        taken to train.
        """
        with self._changing:
            if self.record is None:
                raise StoreError("no attempt has been claimed")
            self.record = replace(
                self.record,
                committed=checkpoint,
                saved_step=step,
                saved_productive_seconds=productive_seconds,
            )
            latest = Latest(self.record.attempt, self.owner, checkpoint, step)
        write_latest(self._store, self.run_id, latest)

    def check_fence(self) -> None:
        """Fenced if a newer attempt is another supervisor's."""
        if self.record is None:
            return
        newer = self._read(self.record.attempt + 1)
        if newer is not None and newer.owner != self.owner:
            raise Fenced(self.run_id, newer.attempt, newer.owner)

    def _complete(self, number: int) -> None:
        """Write into the record before this attempt what its supervisor has only left a hint of."""
        latest = read_latest(self._store, self.run_id)
        record = self._read(number) if latest is not None and latest.attempt == number else None
        if record is not None and _with_commit(record, latest) != record:
            self._store.replace(self._key(number), _with_commit(record, latest).to_json())

    def _numbers(self) -> list[int]:
        names = self._store.children(f"{self.run_id}/attempts")
        digits = (name.removesuffix(".json") for name in names)
        return sorted(int(text) for text in digits if text.isascii() and text.isdigit())

    def _key(self, number: int) -> str:
        return f"{self.run_id}/attempts/{number:06d}.json"

    def _read(self, number: int) -> AttemptRecord | None:
        try:
            return AttemptRecord.from_json(self._store.read(self._key(number), _MAX_RECORD_BYTES))
        except NotFound:
            return None


def _with_commit(record: AttemptRecord, latest: Latest | None) -> AttemptRecord:
    """The record with the last commit in it, if that was this attempt's."""
    if latest is None or (latest.attempt, latest.owner) != (record.attempt, record.owner):
        return record
    return replace(record, committed=latest.checkpoint, saved_step=latest.step)


def _dump(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=1).encode() + b"\n"
