"""ClearML: one task, continued by each supervisor.

Offline each supervisor leaves a session, a zip file that `clearml-task --import-offline-session`
imports; a later one can be imported into the task of the first.
Source: https://clear.ml/docs/latest/docs/references/sdk/task
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from runner.tracking.base import About, Reading, Shown

os.environ.setdefault("CLEARML_LOG_LEVEL", "ERROR")


class ClearMLTracker:
    """See `runner.tracking.base.Tracker`."""

    def __init__(self) -> None:
        self._task: Any = None

    def begin(self, about: About, known: str | None) -> str:
        offline = about.settings.get("mode") == "offline"
        if offline:
            # Where sessions are kept is read when the library is loaded.
            os.environ["CLEARML_CACHE_DIR"] = str(about.folder)
        from clearml import Task
        from clearml.config import ConfigWrapper

        # A process of its own for reports is for what has something else to do: it takes seconds
        # to be told anything, and ten to end.
        ConfigWrapper.set_overrides({"sdk": {"development": {"report_use_subprocess": False}}})
        if offline:
            Task.set_offline(offline_mode=True)
        continued = None if offline else known
        self._task = Task.init(
            project_name=about.settings.get("project") or about.job,
            task_name=about.run_id,
            reuse_last_task_id=continued or False,
            continue_last_task=0 if continued else False,  # steps count on by themselves
            auto_connect_arg_parser=False,
            auto_connect_frameworks={"detect_repository": False},  # it may wait for ever
            auto_connect_streams=False,
            auto_resource_monitoring=False,
        )
        self._task.connect(dict(about.params), name="params")
        self.note(about.tags)
        # Another offline session has an id of its own, and is still of the same task.
        return known if offline and known is not None else str(self._task.id)

    def sent(self) -> Mapping[str, int]:
        return {}  # it reports in the background, so what has arrived says nothing

    def log(self, readings: Sequence[Reading]) -> None:
        logger = self._task.get_logger()
        for one in readings:
            logger.report_scalar(one.name, one.name, value=one.value, iteration=one.step)
        self._task.flush(wait_for_uploads=True)

    def note(self, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self._task.set_parameter(f"runner/{name}", value)

    def show(self, checkpoint: Shown) -> None:
        self.note({"checkpoint": checkpoint.uri})

    def end(self, outcome: str | None) -> None:
        if outcome == "failed":
            self._task.mark_failed(ignore_errors=True, force=True)
        self._task.close()
