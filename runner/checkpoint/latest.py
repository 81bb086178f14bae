"""`<run>/latest.json`: which checkpoint was committed last. A hint, never trusted alone.

It makes finding the newest checkpoint two reads, whatever else there is. It is written after the
commit, so after a kill between the two it names the one before; whoever begins the next attempt
reads what is really there, and his first commit puts it right.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from runner.checkpoint.format import CheckpointName
from runner.errors import NotFound
from runner.store import Store

_MAX_BYTES = 4096


@dataclass(frozen=True)
class Latest:
    """A commit: the attempt and the supervisor that made it, the checkpoint, and its step.

    The attempt is the one that was under way: what it found in a slot an earlier one has taken.
    """

    attempt: int
    owner: str
    checkpoint: str
    step: int


def read_latest(store: Store, run_id: str) -> Latest | None:
    """The hint; None if there is none, or it is none."""
    try:
        document = json.loads(store.read(_key(run_id), _MAX_BYTES))
        latest = Latest(**document)
    except NotFound:
        return None
    except (ValueError, TypeError, RecursionError):
        return None
    known = type(latest.attempt) is int and type(latest.step) is int
    return latest if known and CheckpointName.parse(str(latest.checkpoint)) else None


def write_latest(store: Store, run_id: str, latest: Latest) -> None:
    store.replace(_key(run_id), json.dumps(asdict(latest)).encode() + b"\n")


def _key(run_id: str) -> str:
    return f"{run_id}/latest.json"
