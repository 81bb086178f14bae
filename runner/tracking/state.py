"""Under which id a tracker knows the run, and what it has got.

<run>/tracking/<tracker>.json    in the store, so that the next supervisor goes on with it, on
                                 whatever node; written from time to time
.<tracker>.sent.json             in the tracker's folder on this node, as of this instant; where
                                 the tracker itself is files in that folder, what counts
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from runner.errors import NotFound
from runner.store import Store

_MAX_BYTES = 4 << 20
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True)
class TrackingState:
    """`sent` is the highest step of each metric that was sent, `checkpoint` the newest shown."""

    id: str | None = None
    sent: Mapping[str, int] = field(default_factory=dict)
    checkpoint: str | None = None


def read_state(store: Store, run_id: str, tracker: str) -> TrackingState:
    """What is known; nothing, where there is nothing or it is unreadable. Raises StoreError."""
    try:
        document = json.loads(store.read(_key(run_id, tracker), _MAX_BYTES))
        return TrackingState(document["id"], _steps(document["sent"]), document["checkpoint"])
    except NotFound:
        return TrackingState()
    except _UNREADABLE:
        return TrackingState()


def write_state(store: Store, run_id: str, tracker: str, state: TrackingState) -> None:
    store.replace(_key(run_id, tracker), json.dumps(asdict(state)).encode() + b"\n")


def read_note(folder: Path, tracker: str, known_id: str) -> dict[str, int]:
    """What the run of that id was sent from this folder; nothing, where there is no such note."""
    try:
        document = json.loads(_note_path(folder, tracker).read_bytes())
        return _steps(document["sent"]) if document["id"] == known_id else {}
    except (OSError, *_UNREADABLE):
        return {}


def write_note(folder: Path, tracker: str, known_id: str, sent: Mapping[str, int]) -> None:
    """Raises OSError. Not synced: what it is for is a process that dies, not a machine."""
    path = _note_path(folder, tracker)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps({"id": known_id, "sent": dict(sent)}) + "\n")
    partial.replace(path)


def _steps(sent: Mapping[str, int]) -> dict[str, int]:
    return {str(name): int(step) for name, step in sent.items()}


def _note_path(folder: Path, tracker: str) -> Path:
    return folder / f".{tracker}.sent.json"


def _key(run_id: str, tracker: str) -> str:
    return f"{run_id}/tracking/{tracker}.json"
