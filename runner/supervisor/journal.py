"""What is written down of a run while it runs: its log, what its script logs, and its saves.

All of it goes into files on this node, from there into the store, and to the job's trackers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.checkpoint.logs import StoredLogs
from runner.logs.files import LogLimits
from runner.saves import SaveRecord
from runner.store import Store
from runner.supervisor import index
from runner.supervisor.assignment import Assignment
from runner.supervisor.audience import Audience
from runner.supervisor.detached import DETACHED_VARIABLE
from runner.supervisor.pointlog import PointLog, stored_points
from runner.supervisor.preflight import s3_options
from runner.supervisor.runlog import RunLog
from runner.supervisor.savelog import SaveLog, stored_saves
from runner.supervisor.trackers import Trackers, errands

_SHIPPING_SECONDS = 20.0  # for the end of the log
_TRACKERS_SECONDS = 15.0  # for what trackers have not got yet
_HURRIED_SECONDS = 2.0


class Journal:
    """One for a supervisor's life: `start`, `begin` for each attempt, and `finish` once.

    `points` is the folder that the script's values come through. `may_ship` is asked from another
    thread: False while everything is for an emergency save.
    """

    def __init__(
        self,
        assignment: Assignment,
        store: Store,
        points: Path,
        check_fence: Callable[[], None],
        may_ship: Callable[[], bool],
        audience: Audience | None,
    ) -> None:
        job, run_id = assignment.job, assignment.run_id
        folder = index.metrics_of(run_id, store.url)
        self._points = PointLog(points, folder, stored_points(store, run_id))
        self._saves = SaveLog(folder, stored_saves(store, run_id))
        self.log = RunLog(
            index.logs_of(run_id, store.url),
            LogLimits(job.logs.max_size_bytes, job.logs.files),
            StoredLogs(store, run_id),
            check_fence,
            may_ship,
            passes_through=DETACHED_VARIABLE not in os.environ,
            also=[self._points.shipment, self._saves.shipment],
            audience=audience,
        )
        self._trackers = Trackers(
            errands(job.tracking, job.workdir, run_id, store.url, s3_options(job))
        )

    @property
    def newest(self) -> Mapping[str, float]:
        """The last value of each name that the script has logged."""
        return self._points.newest

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Under which ids the trackers know the run, as far as that is known."""
        return self._trackers.provenance

    def start(self) -> None:
        """Keep what is said from here on."""
        self.log.start()

    def start_trackers(self) -> None:
        """Processes that are told what is new, one for each tracker: once, however often called.

        Not before the run's own files were brought back, where some of them keep theirs.
        """
        self._trackers.start()

    def begin(self, attempt: int) -> None:
        """What comes from here on is of this attempt."""
        self._points.begin(attempt)
        self._saves.begin(attempt)
        self.log.begin(attempt)
        self._trackers.news()

    def look(self) -> None:
        """Take what the script has logged since."""
        self._points.look()

    def saved(self, record: SaveRecord) -> None:
        """A checkpoint has become durable."""
        self._saves.note(record)
        self._trackers.news()

    def attempt_ended(self) -> None:
        """Bring into the store what there is, when there is nothing more urgent."""
        self.log.attempt_ended()

    def finish(
        self,
        saves: Sequence[SaveRecord],
        seconds_left: float,
        *,
        hurried: bool,
        fenced: bool,
        ship: bool,
    ) -> None:
        """Write down what is left, and bring it into the store if `ship`; then end.

        `saves` became durable while the loop was over already. A node that is taken away waits a
        moment only for a tracker that fails, and for one that is slow a third of what it has left;
        one that was `fenced` off waits for none: the next one sends the rest.
        """
        self._points.finish()
        for record in saves:
            self._saves.note(record)
        self._saves.finish()
        if not hurried and not fenced:
            self._trackers.start()  # no attempt has come so far, and how the run ended is told
        self._leave_trackers(seconds_left, hurried=hurried, fenced=fenced)
        seconds = min(_SHIPPING_SECONDS, seconds_left / 2)
        self.log.finish(seconds, ship=ship and not fenced)
        self._trackers.close()

    def _leave_trackers(self, seconds_left: float, *, hurried: bool, fenced: bool) -> None:
        if fenced:
            self._trackers.leave(0.0, 0.0)
        elif hurried:
            self._trackers.leave(_HURRIED_SECONDS, max(_HURRIED_SECONDS, seconds_left / 3))
        else:
            self._trackers.leave(_TRACKERS_SECONDS, 4 * _TRACKERS_SECONDS)
