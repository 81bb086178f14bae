"""Where a run's time went, from made-up records; real runs are in `test_spending_runs.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.checkpoint.attempts import AttemptRecord
from runner.supervisor.goodput import BADPUT, Goodput, goodput_of

T0 = 1_800_000_000.0


def iso(at: float) -> str:
    return datetime.fromtimestamp(T0 + at, UTC).isoformat()


def attempt(
    number: int, begin: float, end: float | None, spent: Mapping[str, float], **facts: Any
) -> AttemptRecord:
    """A record; times count from T0."""
    facts = {"outcome": None if end is None else "preempted", **facts}
    ended_at = None if end is None else iso(end)
    owner = facts.pop("owner", f"supervisor-{number}")
    return AttemptRecord(number, owner, "node", iso(begin), ended_at=ended_at, spent=spent, **facts)


def parts(goodput: Goodput) -> dict[str, float]:
    """All that is not zero, rounded."""
    all_parts = {"productive": goodput.productive_seconds, **goodput.badput_seconds}
    return {kind: round(seconds, 6) for kind, seconds in all_parts.items() if seconds}


@dataclass(frozen=True)
class Case:
    records: list[AttemptRecord]
    now: float
    expected: dict[str, float]
    until: float
    options: dict[str, Any] = field(default_factory=dict)
    lost_steps: int = 0


FIRST = {"startup": 3.0, "productive": 10.0, "stall": 1.0}  # 14 s
RESUMED = {"startup": 2.0, "restore": 1.0, "productive": 5.0}  # 8 s

CASES = {
    "finished undisturbed, looked at later": Case(
        [attempt(1, 0, 14, FIRST, outcome="succeeded")],
        *(100, {"startup": 3, "productive": 10, "stall": 1}, 14),
    ),
    "preempted, nothing lost, another node": Case(
        [
            attempt(1, 0, 14, FIRST, end_step=10),
            attempt(2, 20, 28, RESUMED, outcome="succeeded", start_step=10,
                    resumed_productive_seconds=10),
        ],
        *(100, {"startup": 5, "productive": 15, "stall": 1, "restore": 1, "waiting_for_node": 6}),
        28,
    ),
    "crashed, four of ten seconds lost, same supervisor": Case(
        [
            attempt(1, 0, 14, FIRST, outcome="failed", owner="a", end_step=10),
            attempt(2, 16, 24, RESUMED, outcome="succeeded", owner="a", start_step=6,
                    resumed_productive_seconds=6),
        ],
        *(100, {"startup": 5, "productive": 11, "stall": 1, "restore": 1, "lost_steps": 4,
                "backoff": 2}, 24),
        lost_steps=4,
    ),
    "gone back behind an earlier attempt": Case(
        [
            attempt(1, 0, 10, {"productive": 10.0}, end_step=10),
            attempt(2, 10, 15, {"productive": 5.0}, start_step=10, end_step=15,
                    resumed_productive_seconds=10),
            attempt(3, 15, 20, {"productive": 5.0}, start_step=8, outcome="succeeded",
                    resumed_productive_seconds=8),
        ],
        *(20, {"productive": 13, "lost_steps": 7}, 20),
        lost_steps=7,
    ),
    "node lost: what the next one began from was made, the rest is not known": Case(
        [
            attempt(1, 0, None, {"startup": 3.0, "productive": 2.0}, saved_step=7),
            attempt(2, 30, 38, RESUMED, outcome="succeeded", start_step=7,
                    resumed_productive_seconds=7),
        ],
        *(100, {"startup": 5, "productive": 12, "restore": 1, "waiting_for_node": 20}, 38),
    ),
    "killed at a known time: what was not kept is lost": Case(
        [
            attempt(1, 0, 15, {"startup": 3.0, "productive": 2.0}, outcome=None, end_step=9),
            attempt(2, 30, 38, RESUMED, outcome="succeeded", start_step=7,
                    resumed_productive_seconds=7),
        ],
        *(100, {"startup": 5, "productive": 12, "restore": 1, "lost_steps": 5,
                "waiting_for_node": 15}, 38),
        lost_steps=2,
    ),
    "preempted and waiting": Case(
        [attempt(1, 0, 14, FIRST)],
        *(44, {"startup": 3, "productive": 10, "stall": 1, "waiting_for_node": 30}, 44),
    ),
    "given up: what is not saved is lost": Case(
        [attempt(1, 0, 14, FIRST, outcome="failed", end_step=10, saved_step=8,
                 saved_productive_seconds=8)],
        *(44, {"startup": 3, "productive": 8, "stall": 1, "lost_steps": 2}, 14),
        lost_steps=2,
    ),
    "live elsewhere, heard of just now": Case(
        [attempt(1, 0, None, FIRST)],
        *(20, {"startup": 3, "productive": 10, "stall": 1}, 14),
    ),
    "not heard of for an hour": Case(
        [attempt(1, 0, None, FIRST)],
        *(3614, {"startup": 3, "productive": 10, "stall": 1, "waiting_for_node": 3600}, 3614),
    ),
    "live here, in backoff": Case(
        [attempt(1, 0, 14, FIRST, outcome="failed", saved_productive_seconds=2)],
        *(16, {"startup": 3, "productive": 10, "stall": 1, "backoff": 2}, 16),
        {"live": True},
    ),
    "submitted before the first attempt began": Case(
        [attempt(1, 5, 19, FIRST, outcome="succeeded")],
        *(100, {"startup": 8, "productive": 10, "stall": 1}, 19),
        {"submitted_at": T0},
    ),
    "nothing has begun": Case([], 7, {"startup": 7}, 7, {"submitted_at": T0}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_history_is_split_completely(case: Case) -> None:
    goodput = goodput_of(case.records, T0 + case.now, **case.options)

    assert parts(goodput) == case.expected
    assert round(goodput.until - T0, 6) == case.until
    assert sum(parts(goodput).values()) == pytest.approx(goodput.wall_seconds)
    assert goodput.lost_steps == case.lost_steps


def test_the_document_has_every_kind_and_the_money() -> None:
    records = CASES["preempted, nothing lost, another node"].records
    document = goodput_of(records, T0 + 100, per_hour=3600.0).to_json()

    assert json.loads(json.dumps(document)) == document
    assert list(document["badput_seconds"]) == list(BADPUT)
    assert document["goodput_ratio"] == round(15 / 28, 4)
    # Nobody pays for a node that is not there; the second start began 10 s from the first.
    assert document["cost"] == {"per_hour": 3600.0, "spent": 22.0, "lost": 7.0, "saved": 10.0}
    assert goodput_of(records, T0 + 100).to_json()["cost"] is None


def test_a_record_of_before_has_nothing_spent_and_is_still_split() -> None:
    goodput = goodput_of([attempt(1, 0, 14, {}, outcome="succeeded")], T0 + 20)

    assert parts(goodput) == {"startup": 14}


SPENT = st.dictionaries(st.sampled_from(["productive", *BADPUT]), st.floats(0, 1e4), max_size=5)


@given(
    lives=st.lists(st.tuples(SPENT, st.floats(0, 100), st.booleans(), st.floats(0, 1)), min_size=1),
    later=st.floats(0, 1e4),
)
def test_whatever_happens_the_parts_add_up(
    lives: list[tuple[dict[str, float], float, bool, float]], later: float
) -> None:
    """Attempts that are closed, each from what a share of the way until then had taken."""
    records, at, reached = [], 0.0, 0.0
    for number, (spent, gap, same, share) in enumerate(lives, 1):
        base = reached * share
        end = at + sum(spent.values())
        records.append(
            attempt(number, at, end, spent, resumed_productive_seconds=base,
                    owner="a" if same else f"b{number}")
        )  # fmt: skip
        at, reached = end + gap, base + spent.get("productive", 0.0)

    goodput = goodput_of(records, T0 + at + later)

    assert sum(parts(goodput).values()) == pytest.approx(goodput.wall_seconds, rel=1e-6, abs=1e-3)
    assert all(seconds >= 0 for seconds in parts(goodput).values())
