"""`<run>/tracking/<tracker>.json`: under which id a tracker knows the run, and what it has got.

It lies in the store, so that the next supervisor goes on with it, on whatever node.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from runner.errors import NotFound
from runner.store import Store

_MAX_BYTES = 4 << 20


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
        sent = {str(name): int(step) for name, step in document["sent"].items()}
        return TrackingState(document["id"], sent, document["checkpoint"])
    except NotFound:
        return TrackingState()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return TrackingState()


def write_state(store: Store, run_id: str, tracker: str, state: TrackingState) -> None:
    store.replace(_key(run_id, tracker), json.dumps(asdict(state)).encode() + b"\n")


def _key(run_id: str, tracker: str) -> str:
    return f"{run_id}/tracking/{tracker}.json"
