"""Takes a look at a run: reads from the store and from this machine, and never writes.

A look is cheap enough to be taken every second: what cannot change any more is remembered, and of
files that grow only the end is read. A report looks closely, at everything there is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import AttemptRecord
from runner.checkpoint.manifest import Manifest
from runner.checkpoint.retention import pins
from runner.errors import CheckpointCorrupt, NotFound, StoreError, UsageError
from runner.logs.files import Span
from runner.logs.reading import LogReader, Source
from runner.points import Point, points_of
from runner.saves import SaveRecord, saves_of
from runner.supervisor.history import History
from runner.supervisor.lookup import KnownRun, board_of, checkpoint_row, status_from
from runner.supervisor.pointlog import local_points, stored_points
from runner.supervisor.savelog import local_saves, stored_saves
from runner.supervisor.upkeep import decided
from runner.supervisor.verification import verify_found
from runner.views.curves import Curves
from runner.views.facts import Details, Facts
from runner.views.overview import overview
from runner.wallclock import parse_time

log = logging.getLogger(__name__)

Verify = Literal["no", "quick", "deep"]
_TAIL_BYTES = 64 << 10
_STORE_SECONDS = 15.0  # between two looks into the store at a run whose files are here


class Looker:
    """Looks at one run, again and again."""

    def __init__(self, run: KnownRun) -> None:
        self.run = run
        self._ended: dict[int, AttemptRecord] = {}
        self._document: Mapping[str, Any] = {}
        self._records: list[AttemptRecord] = []
        self._newest: Manifest | None = None
        self._looked_into_store = float("-inf")
        self._known_to_board: tuple[Any, ...] = ()
        self._curves, self._history = Curves(), History(run)
        self._verdicts: dict[str, tuple[bool, str, str]] = {}

    # ------------------------------------------------------------------ one look

    def look(self) -> Facts:
        """The facts of this moment. StoreError if the store cannot be asked."""
        run = self.run
        published = run.spool.status()
        board = board_of(run) if published else None
        known = (
            None if published is None else (published.get("attempt"), published.get("phase")),
            None if board is None else (board.persisted_step, bool(board.first_step_ns)),
        )
        is_old = time.monotonic() - self._looked_into_store >= _STORE_SECONDS
        if published is None or is_old or known != self._known_to_board:
            self._look_into_store()
            self._known_to_board = known
        record = self._records[-1] if self._records else None
        saves = self._newest_saves()
        expected = board.expected_steps if board is not None else 0
        return Facts(
            seen_at=time.time(),
            status=status_from(run, record, self._newest, board, published),
            document=self._document,
            records=tuple(self._records),
            newest=self._newest,
            newest_values=self._newest_values(),
            last_points={r.attempt: p for r in self._records if (p := self._last_point(r))},
            last_save=saves[-1] if saves else None,
            total_steps=expected or (None if record is None else record.expected_steps),
            emergency_seconds=_emergency(published, saves),
        )

    def _look_into_store(self) -> None:
        ledger = self.run.ledger
        self._document = ledger.run() or {}
        self._records = ledger.records(known=self._ended)
        # The newest may change, and so may what its supervisor has left half said.
        self._ended = {r.attempt: r for r in self._records[:-1] if r.outcome is not None}
        self._newest = self.run.archive.newest()
        self._looked_into_store = time.monotonic()

    def _newest_values(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for point in points_of(tail(self._point_sources())):
            values |= point.values
        return values

    def _newest_saves(self) -> list[SaveRecord]:
        full = (s for s in saves_of(tail(self._save_sources())) if s.scope == "full")
        return list(full)

    def _last_point(self, record: AttemptRecord) -> Point | None:
        """How far an attempt came whose end nobody has noted."""
        if record.ended_at is not None:
            return None
        points = points_of(tail(self._point_sources(), record.attempt))
        return max(
            (point for point in points if point.attempt == record.attempt),
            key=lambda point: point.time,
            default=None,
        )

    def _point_sources(self) -> Sequence[Source]:
        here = local_points(self.run.metrics)
        return [here] if self.run.is_live() else [here, _Asked(self._stored_points())]

    def _stored_points(self) -> Source:
        return stored_points(self.run.store, self.run.run_id)

    def _save_sources(self) -> Sequence[Source]:
        here, stored = local_saves(self.run.metrics), stored_saves(self.run.store, self.run.run_id)
        return [here] if self.run.is_live() else [here, _Asked(stored)]

    # ------------------------------------------------------------------ a close look

    def overview(self, verify: Verify = "quick") -> dict[str, Any]:
        """The whole document. StoreError if the store cannot be asked."""
        facts = self.look()
        self._curves.take(self._history.advance())
        return overview(facts, self._details(verify))

    def _details(self, verify: Verify) -> Details:
        archive = self.run.archive
        manifests = list(archive.manifests())
        return Details(
            saves=self._saves(manifests),
            checkpoints=self._checkpoints(manifests, verify),
            quarantine={name: archive.why_quarantined(name) for name in archive.quarantined()},
            curves=list(self._curves.traces()),
        )

    def _saves(self, manifests: Sequence[Manifest]) -> list[SaveRecord]:
        """All that were noted; of the others, those that are still there."""
        stored = stored_saves(self.run.store, self.run.run_id)
        blocks = LogReader().advance([local_saves(self.run.metrics), _Asked(stored)])
        found = {save.checkpoint: save for block in blocks for save in saves_of(block)}
        for manifest in manifests:
            if manifest.name not in found:
                found[manifest.name] = _unmeasured(manifest)
        return sorted(found.values(), key=lambda save: save.time)

    def _checkpoints(self, manifests: Sequence[Manifest], verify: Verify) -> list[dict[str, Any]]:
        run, archive = self.run, self.run.archive
        pinned = pins(run.store, run.run_id)
        restored = self._records[-1].resumed_from if self._records else None
        gone_back = {name for record in self._records for name in record.went_back_from}
        moments = [manifest.moment for manifest in manifests]
        try:
            _, why = decided(run, self._document, moments, restored, gone_back, pinned)
        except UsageError:  # the run was submitted by a version that did not say it
            why = {}
        rows = []
        for manifest in manifests:
            sound, compared, problem = self._verdict(manifest, verify)
            rows.append(
                {
                    **checkpoint_row(manifest, pinned, archive.validation(manifest.name)),
                    "kept_because": list(why.get(manifest.name, ())),
                    "sound": sound,
                    "compared": compared,
                    "problem": problem,
                }
            )
        return rows

    def _verdict(self, manifest: Manifest, verify: Verify) -> tuple[bool | None, str, str]:
        """Whether a checkpoint is sound, what was compared for that, and what is wrong.

        A checkpoint never changes, so one that was looked at is not looked at again. A store that
        has no checksums is asked for the sizes only, unless every byte is to be read.
        """
        if verify == "no":
            return self._verdicts.get(manifest.name, (None, "", ""))
        known = self._verdicts.get(manifest.name)
        if known is not None and (verify == "quick" or known[1] == "all bytes"):
            return known
        found = (
            _read_all(self.run.archive, manifest)
            if verify == "deep"
            else _compared(self.run.archive, manifest)
        )
        if found is None:
            return None, "", ""
        self._verdicts[manifest.name] = found
        return found


# ---------------------------------------------------------------------------- reading


def tail(sources: Sequence[Source], attempt: int | None = None) -> bytes:
    """The last whole lines of what grows: of the newest attempt that has any, or of a given one."""
    spans: list[tuple[Span, Source]] = [
        (span, source)
        for source in sources
        for span in source.spans()
        if attempt is None or span.attempt == attempt
    ]
    if not spans:
        return b""
    newest = max(spans, key=lambda pair: (pair[0].attempt, pair[0].end))
    span, source = newest
    begin = max(span.begin, span.end - _TAIL_BYTES)
    block = source.read(span, begin, _TAIL_BYTES)
    if begin > span.begin:
        block = block[block.find(b"\n") + 1 :]
    return block[: block.rfind(b"\n") + 1]


class _Asked:
    """A source in a store; where that cannot be asked, it has nothing."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def spans(self) -> list[Span]:
        try:
            return self._source.spans()
        except StoreError as error:
            log.warning("what the store has of the run's values cannot be read: %s", error)
            return []

    def read(self, span: Span, begin: int, limit: int) -> bytes:
        try:
            return self._source.read(span, begin, limit)
        except StoreError as error:
            log.warning("what the store has of the run's values cannot be read: %s", error)
            return b""


def _emergency(published: Mapping[str, Any] | None, saves: Sequence[SaveRecord]) -> float | None:
    """What a save after a notice takes: as the supervisor reckons, or as the last one took."""
    if published is not None and published.get("emergency_seconds") is not None:
        return float(published["emergency_seconds"])
    return saves[-1].total_seconds if saves else None


def _unmeasured(manifest: Manifest) -> SaveRecord:
    moment = manifest.moment
    return SaveRecord(
        checkpoint=manifest.name,
        attempt=moment.attempt,
        step=moment.step,
        time=parse_time(moment.created_at) or 0.0,
        triggers=moment.triggers,
        scope=moment.scope,
        nbytes=manifest.nbytes,
        snapshot_seconds=moment.snapshot_seconds,
    )


def _read_all(archive: Archive, manifest: Manifest) -> tuple[bool, str, str] | None:
    try:
        verdict = verify_found(archive, lambda: archive.manifest(manifest.name), deep=True)
    except NotFound:
        return None
    return not verdict.problem, "all bytes", verdict.problem


def _compared(archive: Archive, manifest: Manifest) -> tuple[bool, str, str] | None:
    """Without moving a byte: sizes, and the store's own checksums where it keeps any."""
    has_checksums = True
    try:
        archive.layout(manifest)
        for file in manifest.files:
            stored = archive.store.stored(
                f"{archive.run_id}/checkpoints/{manifest.name}/{file.name}"
            )
            has_checksums &= stored.digest is not None
            if stored.digest not in (None, file.digest):
                return False, "checksums", f"{file.name} has another checksum in the store"
    except CheckpointCorrupt as error:
        return False, "sizes", error.problem
    except NotFound:
        return None
    return True, "sizes and checksums" if has_checksums else "sizes", ""
