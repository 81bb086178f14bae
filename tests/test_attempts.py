from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from slots import RUN, RefusingStore, memory_folder

from runner.checkpoint.attempts import AttemptRecord, Ledger
from runner.errors import Fenced, NotFound, StoreError
from runner.spool import new_owner
from runner.store import DirectoryStore
from runner.wallclock import parse_time, utc_now


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path)


def record_path(store: DirectoryStore, attempt: int) -> Path:
    return store.root / RUN / "attempts" / f"{attempt:06d}.json"


# ---------------------------------------------------------------- claiming


def test_attempts_are_numbered_from_one(store: DirectoryStore) -> None:
    ledger = Ledger(store, RUN, "a")

    numbers = [ledger.claim("node-1").attempt for _ in range(3)]

    assert numbers == [1, 2, 3]
    assert store.children(f"{RUN}/attempts") == ["000001.json", "000002.json", "000003.json"]


def test_a_claim_says_whose_it_is_and_since_when(store: DirectoryStore) -> None:
    before = datetime.now(UTC)

    record = Ledger(store, RUN, "a").claim("node-1")

    assert Ledger(store, RUN, "other").latest() == record
    assert (record.owner, record.node, record.outcome) == ("a", "node-1", None)
    assert before <= datetime.fromisoformat(record.started_at) <= datetime.now(UTC)


def test_an_attempt_that_is_missing_in_between_is_not_given_again(store: DirectoryStore) -> None:
    ledger = Ledger(store, RUN, "a")
    for _ in range(3):
        ledger.claim("node")
    record_path(store, 2).unlink()

    assert ledger.claim("node").attempt == 4


def test_numbers_are_compared_as_numbers(store: DirectoryStore) -> None:
    store.create(f"{RUN}/attempts/999999.json", AttemptRecord(999_999, "x", "n", "t").to_json())
    ledger = Ledger(store, RUN, "a")

    assert [ledger.claim("n").attempt for _ in range(2)] == [1_000_000, 1_000_001]
    latest = ledger.latest()
    assert latest is not None
    assert latest.attempt == 1_000_001


def test_what_is_no_record_in_the_folder_is_passed_over(store: DirectoryStore) -> None:
    ledger = Ledger(store, RUN, "a")
    ledger.claim("node")
    for name in ("notes.txt", ".000007.json", "٣.json", "-5.json"):
        (store.root / RUN / "attempts" / name).write_text("x")

    assert [record.attempt for record in ledger.records()] == [1]
    assert ledger.claim("node").attempt == 2


def test_supervisors_that_claim_at_once_get_numbers_of_their_own() -> None:
    with memory_folder() as folder:
        store = DirectoryStore(folder)
        barrier = threading.Barrier(8)

        def claim(owner: str) -> list[int]:
            ledger = Ledger(store, RUN, owner)
            barrier.wait()
            return [ledger.claim("node").attempt for _ in range(6)]

        owners = [new_owner() for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            claimed = dict(zip(owners, pool.map(claim, owners), strict=True))

        numbers = sorted(number for own in claimed.values() for number in own)
        assert numbers == list(range(1, 49))
        for owner, own in claimed.items():
            assert own == sorted(own)
            assert [r.attempt for r in Ledger(store, RUN, "").records() if r.owner == owner] == own


# ---------------------------------------------------------------- the fence


def test_a_supervisor_that_has_claimed_nothing_is_not_fenced(store: DirectoryStore) -> None:
    Ledger(store, RUN, "other").claim("node")

    Ledger(store, RUN, "a").check_fence()


def test_an_older_supervisor_is_fenced_once_a_newer_one_claims(store: DirectoryStore) -> None:
    older, newer = Ledger(store, RUN, "a" * 16), Ledger(store, RUN, "b" * 16)
    older.claim("node-1")
    older.check_fence()

    newer.claim("node-2")

    with pytest.raises(Fenced, match="attempt 2") as caught:
        older.check_fence()
    assert (caught.value.run_id, caught.value.attempt) == (RUN, 2)
    assert caught.value.owner == "b" * 16
    newer.check_fence()


def test_ones_own_next_attempt_is_no_fence(store: DirectoryStore) -> None:
    ledger = Ledger(store, RUN, "a")
    first = ledger.claim("node")

    ledger.claim("node")
    ledger.check_fence()
    ledger.record = first  # as it is until the claim has returned
    ledger.check_fence()


def test_a_supervisor_is_fenced_however_many_claims_ago_that_was(store: DirectoryStore) -> None:
    older, newer = Ledger(store, RUN, "a"), Ledger(store, RUN, "b")
    older.claim("node-1")
    for _ in range(4):
        newer.claim("node-2")

    with pytest.raises(Fenced):
        older.check_fence()


def test_a_supervisor_that_comes_back_claims_and_fences_the_one_between(
    store: DirectoryStore,
) -> None:
    one, other = Ledger(store, RUN, "a"), Ledger(store, RUN, "b")
    one.claim("node-1")
    other.claim("node-2")
    one.claim("node-1")

    one.check_fence()
    with pytest.raises(Fenced):
        other.check_fence()


def test_a_store_that_does_not_answer_is_no_fence_and_no_leave_to_write(
    store: DirectoryStore,
) -> None:
    refusing = RefusingStore(store)
    ledger = Ledger(refusing, RUN, "a")
    ledger.claim("node")

    refusing.refused = {"read"}

    with pytest.raises(StoreError):
        ledger.check_fence()


# ---------------------------------------------------------------- records


def test_an_update_keeps_what_it_does_not_name(store: DirectoryStore) -> None:
    ledger = Ledger(store, RUN, "a")
    claimed = ledger.claim("node-1")

    ledger.update(resumed_from="step-000000100-a0001-s001", start_step=100)
    ledger.update(committed="step-000000200-a0001-s002", saved_step=200)
    ledger.update(outcome="preempted", exit_code=-9)

    stored = Ledger(store, RUN, "").latest()
    assert stored is not None
    assert stored == ledger.record
    assert asdict(stored) == asdict(claimed) | {
        "resumed_from": "step-000000100-a0001-s001",
        "start_step": 100,
        "committed": "step-000000200-a0001-s002",
        "saved_step": 200,
        "outcome": "preempted",
        "exit_code": -9,
    }


def test_an_update_changes_the_own_record_even_when_there_is_a_newer_one(
    store: DirectoryStore,
) -> None:
    older, newer = Ledger(store, RUN, "a"), Ledger(store, RUN, "b")
    older.claim("node-1")
    theirs = newer.claim("node-2")

    older.update(outcome="fenced")

    assert [r.outcome for r in newer.records()] == ["fenced", None]
    assert newer.latest() == theirs


def test_what_a_store_refuses_of_a_record_is_written_before_the_next_attempt(
    store: DirectoryStore,
) -> None:
    refusing = RefusingStore(store)
    ledger = Ledger(refusing, RUN, "a" * 16)  # type: ignore[arg-type]
    ledger.claim("node")
    refusing.refused = {"replace"}
    with pytest.raises(StoreError):
        ledger.update(outcome="failed", end_step=7)
    with pytest.raises(StoreError):
        ledger.claim("node")
    refusing.refused = set()

    ledger.claim("node")

    found = [(record.attempt, record.outcome, record.end_step) for record in ledger.records()]
    assert found == [(1, "failed", 7), (2, None, None)]


def test_what_a_store_refuses_of_a_record_is_written_when_it_takes_it_again(
    store: DirectoryStore,
) -> None:
    """So that a run which ends while a disk is full is not taken for one that was lost."""
    refusing = RefusingStore(store)
    ledger = Ledger(refusing, RUN, "a" * 16)  # type: ignore[arg-type]
    ledger.claim("node")
    refusing.refused = {"replace"}
    with pytest.raises(StoreError):
        ledger.update(outcome="succeeded", end_step=60)
    with pytest.raises(StoreError):
        ledger.catch_up()
    refusing.refused = set()

    ledger.catch_up()

    latest = Ledger(store, RUN, "").latest()
    assert latest is not None
    assert (latest.outcome, latest.end_step) == ("succeeded", 60)


def test_an_update_needs_a_claim(store: DirectoryStore) -> None:
    with pytest.raises(StoreError):
        Ledger(store, RUN, "a").update(outcome="succeeded")
    assert store.children("") == []


def test_a_field_that_there_is_not_cannot_be_updated(store: DirectoryStore) -> None:
    ledger = Ledger(store, RUN, "a")
    record = ledger.claim("node")

    with pytest.raises(TypeError):
        ledger.update(no_such_field=1)
    assert ledger.latest() == record


def test_fields_of_a_later_version_are_passed_over(store: DirectoryStore) -> None:
    record = AttemptRecord(1, "a", "node", utc_now(), start_step=7)
    document = json.loads(record.to_json()) | {"zone": "eu-1", "gpus": [1, {"x": 2}]}

    assert AttemptRecord.from_json(json.dumps(document).encode()) == record


def test_fields_that_an_earlier_version_did_not_write_have_their_defaults() -> None:
    data = b'{"attempt": 1, "owner": "a", "node": "n", "started_at": "2025-11-21T05:46:00+00:00"}'

    assert AttemptRecord.from_json(data).start_step == 0


TORN = {
    "nothing": b"",
    "half of it": AttemptRecord(1, "a", "node", "t").to_json()[:40],
    "zeros": bytes(100),
    "not UTF-8": b'{"attempt": "\xff"}',
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "no owner": b'{"attempt": 1, "node": "n", "started_at": "t"}',
    "deep nesting": b"[" * 100_000,
}


@pytest.mark.parametrize("data", TORN.values(), ids=TORN)
def test_a_torn_record_is_a_store_error(store: DirectoryStore, data: bytes) -> None:
    ledger = Ledger(store, RUN, "a")
    ledger.claim("node")
    record_path(store, 2).write_bytes(data)
    reads: list[Callable[[], Any]] = [
        lambda: AttemptRecord.from_json(data),
        ledger.check_fence,
        ledger.latest,
        ledger.records,
    ]

    for read in reads:
        with pytest.raises(StoreError) as caught:
            read()
        assert not isinstance(caught.value, NotFound)


def test_a_record_that_vanishes_meanwhile_is_passed_over(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(store, RUN, "a")
    ledger.claim("node")
    monkeypatch.setattr(store, "children", lambda prefix: ["000001.json", "000002.json"])

    assert [record.attempt for record in ledger.records()] == [1]
    assert ledger.latest() is None


# ---------------------------------------------------------------- the run itself


def test_a_run_is_begun_once(store: DirectoryStore) -> None:
    one, other = Ledger(store, RUN, "a"), Ledger(store, RUN, "b")
    assert one.run() is None

    assert one.begin({"job": {"name": RUN}})
    assert not other.begin({"job": {"name": "another"}})

    assert other.run() == {"job": {"name": RUN}}


def test_a_run_can_be_amended(store: DirectoryStore) -> None:
    ledger = Ledger(store, RUN, "a")
    ledger.begin({"job": 1})

    ledger.amend({"job": 2})

    assert ledger.run() == {"job": 2}


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000])
def test_a_run_that_is_unreadable_is_a_store_error(store: DirectoryStore, data: bytes) -> None:
    store.create(f"{RUN}/run.json", data)

    with pytest.raises(StoreError) as caught:
        Ledger(store, RUN, "a").run()
    assert not isinstance(caught.value, NotFound)


def test_owners_are_unlike_each_other() -> None:
    assert len({new_owner() for _ in range(1000)}) == 1000


@pytest.mark.parametrize("text", [None, "", "yesterday", "2025-13-01T00:00:00+00:00"])
def test_a_time_that_is_none_is_none(text: str | None) -> None:
    assert parse_time(text) is None


def test_a_time_is_read_as_seconds() -> None:
    assert parse_time("1970-01-01T00:01:00.5+00:00") == 60.5
