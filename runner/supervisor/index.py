"""The runs that were started on this machine, so that `runner status` finds them by name.

    $RUNNER_HOME/runs/<run>-<hash of the store>.json     one run, also one that is in a cluster
    $RUNNER_HOME/logs/<run>-<hash of the store>/     what its attempts said, see `runner.logs`
    $RUNNER_HOME/metrics/<run>-<hash of the store>/  the values they have logged, see `pointlog`
    $RUNNER_HOME/files/<run>-<hash of the store>/    local files of a run whose store is S3

Nothing here is needed to continue a run: that is the store's part. Of an S3 server it is remembered
how to reach it, and never with which credentials.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from runner.job import is_s3
from runner.store import S3Options

HOME_VARIABLE = "RUNNER_HOME"
SPOOL_ROOT_VARIABLE = "RUNNER_SPOOL_ROOT"


@dataclass(frozen=True)
class Entry:
    """Where a run of this machine keeps its things."""

    run_id: str
    store: str
    spool: str
    logs: str
    started_at: str
    s3: Mapping[str, Any] | None = None
    cluster: Mapping[str, str] | None = None
    """For a run in a cluster: the namespace, and the kubeconfig's context if one was named."""

    @property
    def options(self) -> S3Options:
        """How to reach the store's server."""
        known = {field.name for field in fields(S3Options)}
        given = self.s3 if isinstance(self.s3, Mapping) else {}
        return S3Options(**{k: v for k, v in given.items() if k in known})


def home() -> Path:
    """`RUNNER_HOME`, or the user's state folder as the XDG base directory specification has it."""
    given = os.environ.get(HOME_VARIABLE)
    if given:
        return Path(given)
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "runner"


def logs_of(run_id: str, store: str) -> Path:
    return home() / "logs" / _key(run_id, store)


def metrics_of(run_id: str, store: str) -> Path:
    return home() / "metrics" / _key(run_id, store)


def files_of(run_id: str, store: str, state_folder: Path | None = None) -> Path:
    """The folder for a run's local files: beside its checkpoints, where those are on a disk.

    `state_folder` is that of another user or node; default: this one's `home`.
    """
    if is_s3(store):
        return (state_folder or home()) / "files" / _key(run_id, store)
    return Path(store) / run_id


def remember(entry: Entry) -> None:
    """Write the entry, over an older one of the same run. Does nothing where it cannot."""
    path = home() / "runs" / f"{_key(entry.run_id, entry.store)}.json"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(entry)))
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def entries() -> list[Entry]:
    """All runs of this machine, the newest first."""
    known = {field.name for field in fields(Entry)}
    found = []
    for path in (home() / "runs").glob("*.json"):
        try:
            document = json.loads(path.read_text())
            found.append(Entry(**{k: v for k, v in document.items() if k in known}))
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # an entry that is being replaced, or is of another version
    return sorted(found, key=lambda entry: entry.started_at, reverse=True)


def _key(run_id: str, store: str) -> str:
    return f"{run_id}-{hashlib.sha256(store.encode()).hexdigest()[:8]}"
