"""What will happen to the node: notices by time and by step, or a recorded life of real ones."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import UsageError
from runner.units import parse_duration

_MAX_TRACE_BYTES = 64 << 20


@dataclass(frozen=True)
class SpotPlan:
    """Times in seconds since the start of the simulation.

    `steps` fire at the first boundary with at least this step. `up` are the stretches in which the
    node is there; the last one does not end, so that the run can. A stretch that ends brings a
    notice at its end, and the kill `grace_seconds` later.
    """

    grace_seconds: float
    after: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    up: tuple[tuple[float, float], ...] = ((0.0, math.inf),)
    lose_disk: bool = False


def plan_from(
    grace_seconds: float,
    preempt: Sequence[str],
    *,
    lose_disk: bool,
    trace: Path | None,
    speedup: float,
) -> SpotPlan:
    """The plan that the command line asks for. UsageError says what is wrong with it."""
    after, steps = [], []
    for text in preempt:
        kind, _, value = text.partition("=")
        try:
            if kind == "after":
                after.append(parse_duration(value))
            elif kind == "step" and value.isascii() and value.isdigit() and int(value) > 0:
                steps.append(int(value))
            else:
                raise ValueError("say after=20s or step=150")
        except ValueError as error:
            raise UsageError(f"--preempt {text}: {error}") from error
    if not (math.isfinite(speedup) and speedup > 0):
        raise UsageError(f"--speedup {speedup}: a positive number")
    return SpotPlan(
        grace_seconds=grace_seconds,
        after=tuple(sorted(after)),
        steps=tuple(sorted(steps)),
        up=read_trace(trace, speedup) if trace is not None else ((0.0, math.inf),),
        lose_disk=lose_disk,
    )


def read_trace(path: Path, speedup: float) -> tuple[tuple[float, float], ...]:
    """The stretches in which a recorded node was there.

    Format: `{"metadata": {"gap_seconds": G}, "data": [n0, n1, …]}`, with n nodes held at second
    i·G, as in the traces of "Can't Be Late" (NSDI '24). UsageError if it is not that.
    """
    try:
        if path.stat().st_size > _MAX_TRACE_BYTES:
            raise ValueError("it is too large")
        document: Any = json.loads(path.read_bytes())
        gap, held = float(document["metadata"]["gap_seconds"]), document["data"]
        sound = 0 < gap < math.inf and isinstance(held, list) and held
        if not sound or any(type(n) is not int or n < 0 for n in held):
            raise ValueError("gap_seconds must be positive, data a list of numbers of nodes")
    except OSError as error:
        raise UsageError(f"--trace {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"--trace {path}: not a recorded spot trace ({error})") from error
    stretches: list[tuple[float, float]] = []
    begun: float | None = None
    for index, nodes in enumerate(held):
        now = index * gap / speedup
        if nodes and begun is None:
            begun = now
        elif not nodes and begun is not None:
            stretches.append((begun, now))
            begun = None
    end = len(held) * gap / speedup
    stretches.append((begun if begun is not None else end, math.inf))
    return tuple(stretches)
