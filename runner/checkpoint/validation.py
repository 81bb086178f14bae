"""Whether a checkpoint has been tried, and what came of it: `validation.json` beside the manifest.

    <run>/checkpoints/step-…/validation.json

A manifest proves that the bytes are those that were saved; this says that they were read back,
loaded and used. It is written after the commit, when there is time for it, and is no part of the
checkpoint: most have none. An `invalid` checkpoint is sound, and of no use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from runner.checkpoint.attempts import Ledger
from runner.checkpoint.format import MANIFEST_FILE, VALIDATION_FILE
from runner.errors import NotFound
from runner.store import Store

_MAX_BYTES = 1 << 20


class Verdict(StrEnum):
    VALID = "valid"
    INVALID = "invalid"


@dataclass(frozen=True)
class Compared:
    """A metric as it was logged at the save and as it came out now; `limit` is the most apart."""

    logged: float
    returned: float
    limit: float

    @property
    def agrees(self) -> bool:
        return abs(self.returned - self.logged) <= self.limit


@dataclass(frozen=True)
class Validation:
    """What came of trying a checkpoint. `reason` says what is wrong, "" if nothing is.

    `metrics` are those that the entry point returned, `compared` those that were logged as well.
    """

    verdict: Verdict
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    compared: Mapping[str, Compared] = field(default_factory=dict)
    entrypoint: str = ""
    seconds: float = 0.0
    validated_at: str = ""
    host: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; numbers that are not finite become strings."""
        plain: dict[str, Any] = _plain(asdict(self) | {"verdict": self.verdict.value})
        return plain

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Validation:
        """The inverse. ValueError, KeyError or TypeError where it is none."""
        return cls(
            verdict=Verdict(document["verdict"]),
            reason=str(document["reason"]),
            metrics={str(k): float(v) for k, v in document["metrics"].items()},
            compared={
                str(name): Compared(**{k: float(v) for k, v in one.items()})
                for name, one in document["compared"].items()
            },
            entrypoint=str(document["entrypoint"]),
            seconds=float(document["seconds"]),
            validated_at=str(document["validated_at"]),
            host=str(document["host"]),
        )


@dataclass(frozen=True)
class Tolerances:
    """How far a metric may be from what was logged: `relative`, or `absolute` for those named.

    Those named must be returned by the entry point, if they were logged.
    """

    relative: float = 0.001
    absolute: Mapping[str, float] = field(default_factory=dict)

    def limit(self, name: str, logged: float) -> float:
        known = self.absolute.get(name)
        return self.relative * abs(logged) if known is None else known


def judge(
    returned: Mapping[str, float], logged: Mapping[str, float], tolerances: Tolerances
) -> Validation:
    """The verdict on a checkpoint that could be loaded and used. Pure.

    What the entry point returned must be finite, and close to what was logged for the very state
    that was saved, where that was logged and is finite.
    """
    compared = {
        name: Compared(logged[name], value, tolerances.limit(name, logged[name]))
        for name, value in returned.items()
        if math.isfinite(logged.get(name, math.nan)) and math.isfinite(value)
    }
    problems = [
        f"{name} is {value}" for name, value in returned.items() if not math.isfinite(value)
    ]
    problems += [
        f"{name} is {one.returned:.6g} and was {one.logged:.6g} when it was saved, "
        f"more than {one.limit:.3g} apart"
        for name, one in compared.items()
        if not one.agrees
    ]
    problems += [
        f"{name} was not returned, and the job wants it compared"
        for name in tolerances.absolute
        if math.isfinite(logged.get(name, math.nan)) and name not in returned
    ]
    verdict = Verdict.INVALID if problems else Verdict.VALID
    return Validation(verdict, "; ".join(problems), dict(returned), compared)


def read_validation(store: Store, run_id: str, name: str) -> Validation | None:
    """What came of the last validation of a checkpoint; None if it was not tried. One request."""
    try:
        return Validation.from_json(json.loads(store.read(_key(run_id, name), _MAX_BYTES)))
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # not one that was written here


def write_validation(store: Store, ledger: Ledger, name: str, validation: Validation) -> bool:
    """Write it beside the manifest; False if the checkpoint was deleted meanwhile.

    Raises Fenced if a newer attempt has the run, and StoreError.
    """
    ledger.check_fence()
    key = _key(ledger.run_id, name)
    text = json.dumps(validation.to_json(), indent=1, allow_nan=False)
    store.replace(key, text.encode() + b"\n")
    try:
        store.stored(f"{ledger.run_id}/checkpoints/{name}/{MANIFEST_FILE}")
    except NotFound:
        # Manifests are deleted first, so whoever deletes has gone past this file, or will find it.
        store.delete([key])
        return False
    return True


def _key(run_id: str, name: str) -> str:
    return f"{run_id}/checkpoints/{name}/{VALIDATION_FILE}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
