"""Brings a tracker up to date with a run: what it has not got yet is sent, and nothing twice.

All that is sent is read from the run's record: the points that its scripts have logged, its
attempts, its checkpoints. So it can be stopped and continued anywhere. A step that is trained again
after a crash is not sent again: trackers cannot take back what they have shown.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.copies import copy_files
from runner.checkpoint.format import CheckpointName
from runner.checkpoint.logs import StoredLogs
from runner.checkpoint.manifest import Manifest
from runner.errors import CheckpointCorrupt, NotFound, TrackerError, TrackerRefused
from runner.logs.files import LocalLogs
from runner.logs.reading import LogReader, Source
from runner.points import points_of
from runner.store import Store
from runner.tracking.base import About, Reading, Shown, Tracker, flat
from runner.tracking.state import TrackingState, read_note, read_state, write_note, write_state

_BATCH = 500
_NOTE_SECONDS = 30.0
_NEVER = CheckpointName(-1, -1, -1)


@dataclass(frozen=True)
class Record:
    """Where a run's record is: in the store, and its newest points in a folder of this node."""

    store: Store
    run_id: str
    points: Path

    @property
    def place(self) -> str:
        """What `--from` takes."""
        return f"{self.store.url.removeprefix('file://')}/{self.run_id}"


@dataclass(frozen=True)
class Settings:
    """The tracker's section of the job, which may hold a password, and folders of this node."""

    own: Mapping[str, Any]
    folder: Path
    workdir: Path

    @property
    def is_offline(self) -> bool:
        """Whether the tracker is files in the folder, and what it has is what they have."""
        return self.own.get("mode") == "offline"


def about_run(record: Record, settings: Settings) -> About:
    """What a tracker is told, from the run's own record. TrackerError if the run is not there."""
    document = Ledger(record.store, record.run_id, "").run()
    if document is None:
        raise TrackerError(f"there is no run {record.run_id} in {record.store.url}")
    job = document.get("job") or {}
    command = job.get("command") or []
    return About(
        run_id=record.run_id,
        key=f"{record.place}@{document.get('created_at')}",
        job=str(job.get("name", record.run_id)),
        settings=settings.own,
        folder=settings.folder,
        workdir=settings.workdir,
        params=dict(flat(job.get("params") or {})),
        tags={
            "runner.run_id": record.run_id,
            "runner.place": record.place,
            "runner.version": str(document.get("runner")),
            "runner.command": shlex.join(map(str, command)),
        },
    )


class Mirror:
    """One tracker's picture of one run. `advance` may be called again after any error."""

    def __init__(
        self, record: Record, name: str, make: Callable[[], Tracker], settings: Settings
    ) -> None:
        self._record, self._name, self._make, self._settings = record, name, make, settings
        self._made: Tracker | None = None
        self._reader, self._pending = LogReader(), deque[Reading]()
        self._state: TrackingState | None = None
        self._known_id: str | None = None
        self._sent: dict[str, int] = {}
        self._is_sure = False  # whether `sent` tells what has arrived
        self._has_read_store = False
        self._noted_attempt = 0
        self._saved_at = 0.0
        self.refused: list[str] = []

    @property
    def id(self) -> str | None:
        """The tracker's id of the run, once it is known."""
        return self._known_id if self._state is None else self._state.id

    def recall(self) -> None:
        """Find out the id that the run had in the tracker before, which takes no tracker."""
        self._known_id = read_state(self._record.store, self._record.run_id, self._name).id

    @property
    def _tracker(self) -> Tracker:
        if self._made is None:
            self._made = self._make()
        return self._made

    def begin(self) -> None:
        """Find or create the tracker's run. Does nothing when that is done."""
        if self._state is not None:
            return
        record = self._record
        known = read_state(record.store, record.run_id, self._name)
        found = self._tracker.begin(about_run(record, self._settings), known.id)
        state = known if found == known.id else TrackingState(found)
        if state != known:
            write_state(record.store, record.run_id, self._name, state)
        self._state, self._sent = state, self._sent_until_now(state)

    def _sent_until_now(self, state: TrackingState) -> dict[str, int]:
        """Files may have been lost with a node, and with them what they had been sent."""
        note = read_note(self._settings.folder, self._name, str(state.id))
        before = {} if self._settings.is_offline else state.sent
        names = [*before, *(name for name in note if name not in before)]
        return {name: max(before.get(name, -1), note.get(name, -1)) for name in names}

    def advance(self, *, everything: bool = True) -> None:
        """Send all that is new; without `everything`, only points, for which no store is asked."""
        self.begin()
        if everything:
            self._note_attempt()
        self._send_points()
        if everything:
            self._show_checkpoints()
        if time.monotonic() - self._saved_at >= _NOTE_SECONDS:
            self._save()

    def end(self) -> None:
        """Send what is left, and say how the run ended, if it has."""
        self.advance()
        self._save()  # before the last word, which may take longer than there is time for
        latest = Ledger(self._record.store, self._record.run_id, "").latest()
        self._tracker.end(None if latest is None else latest.outcome)

    # ------------------------------------------------------------------ points

    def _send_points(self) -> None:
        if not self._is_sure:
            for name, step in self._tracker.sent().items():
                self._sent[name] = max(step, self._sent.get(name, -1))
            self._is_sure = True
        self._send_pending()
        for block in self._reader.advance(self._sources()):
            self._pending.extend(_readings(block))
            self._send_pending()
        self._has_read_store = True

    def _sources(self) -> list[Source]:
        """The store has what other nodes have left there, so it is read once."""
        sources: list[Source] = [LocalLogs(self._record.points, ".jsonl")]
        if not self._has_read_store:
            record = self._record
            sources.append(StoredLogs(record.store, record.run_id, "metrics", ".jsonl"))
        return sources

    def _send_pending(self) -> None:
        """In batches; one that fails stays, and what of it has arrived is asked for."""
        while self._pending:
            batch = list(islice(self._pending, _BATCH))
            fresh = [reading for reading in batch if self._is_fresh(reading)]
            self._is_sure = not fresh
            self._log(fresh)
            self._is_sure = True
            for reading in fresh:
                self._sent[reading.name] = reading.step
            if fresh:
                self._note()
            for _ in batch:
                self._pending.popleft()

    def _is_fresh(self, reading: Reading) -> bool:
        return reading.step > self._sent.get(reading.name, -1)

    def _log(self, batch: list[Reading]) -> None:
        """One value that is refused for good must not hold up the others."""
        if not batch:
            return
        try:
            self._tracker.log(batch)
        except TrackerRefused as error:
            if len(batch) == 1:
                self.refused.append(f"{batch[0].name} at step {batch[0].step}: {error}")
                return
            middle = len(batch) // 2
            self._log(batch[:middle])
            self._log(batch[middle:])

    # ------------------------------------------------------------------ attempts, checkpoints

    def _note_attempt(self) -> None:
        latest = Ledger(self._record.store, self._record.run_id, "").latest()
        if latest is not None and latest.attempt != self._noted_attempt:
            attempt = {"runner.attempt": str(latest.attempt), "runner.host": latest.node}
            self._tracker.note({**attempt, **self._commit_tags()})
            self._noted_attempt = latest.attempt

    def _commit_tags(self) -> Mapping[str, str]:
        """Which code it is: known soon after a run has begun."""
        document = Ledger(self._record.store, self._record.run_id, "").run() or {}
        git = (document.get("provenance") or {}).get("git") or {}
        if not git.get("commit"):
            return {}
        return {
            "mlflow.source.git.commit": str(git["commit"]),
            "mlflow.source.git.branch": str(git.get("branch")),
            "runner.git.dirty": str(git.get("dirty")),
        }

    def _show_checkpoints(self) -> None:
        """Oldest first. What retention has deleted meanwhile is passed over."""
        archive = Archive(self._record.store, self._record.run_id)
        for name in sorted(archive.names()):
            if name <= self._shown:
                continue
            try:
                manifest = archive.manifest(str(name))
            except (NotFound, CheckpointCorrupt):
                continue
            self._show(archive, manifest)
            assert self._state is not None
            self._state = replace(self._state, checkpoint=str(name))

    @property
    def _shown(self) -> CheckpointName:
        known = None if self._state is None else self._state.checkpoint
        return CheckpointName.parse(known or "") or _NEVER

    def _show(self, archive: Archive, manifest: Manifest) -> None:
        upload = self._settings.own.get("upload", "none")
        uri = f"{self._record.place}/checkpoints/{manifest.name}"
        shown = Shown(manifest.name, manifest.moment.step, uri, json.loads(manifest.to_json()))
        if upload != "all" and not (upload == "best" and "best" in manifest.moment.triggers):
            self._tracker.show(shown)
            return
        with tempfile.TemporaryDirectory(prefix="runner-upload-") as folder:
            try:
                copy_files(archive, manifest, Path(folder))
            except (NotFound, CheckpointCorrupt) as error:
                self.refused.append(f"{manifest.name} is not uploaded: {error}")
                return
            self._tracker.show(replace(shown, files=Path(folder)))

    def _note(self) -> None:
        """On this node only: for a store, a note of each batch would be too much."""
        assert self._state is not None
        with contextlib.suppress(OSError):  # a full disk costs no more than the note
            write_note(self._settings.folder, self._name, str(self._state.id), self._sent)

    def _save(self) -> None:
        assert self._state is not None
        state = replace(self._state, sent=dict(self._sent))
        if state != self._state or not self._saved_at:
            write_state(self._record.store, self._record.run_id, self._name, state)
        self._state, self._saved_at = state, time.monotonic()


def _readings(block: bytes) -> Iterator[Reading]:
    for point in points_of(block):
        for name, value in point.values.items():
            yield Reading(name, value, point.step, point.epoch, point.time)
