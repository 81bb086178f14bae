"""Verdicts on checkpoints: how they come about, where they are written, what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
from slots import RUN, Snapshot, checkpoint_folder, commit, memory_folder, snapshot

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.manifest import Moment
from runner.checkpoint.persist import Persister
from runner.checkpoint.restore import load_newest
from runner.checkpoint.retention import Keep, counted_apart, delete_checkpoint, superfluous
from runner.checkpoint.validation import (
    Tolerances,
    Validation,
    Verdict,
    judge,
    read_validation,
    write_validation,
)
from runner.errors import Fenced
from runner.store import DirectoryStore

OWNER = "0123456789abcdef"
VALID, INVALID = Validation(Verdict.VALID), Validation(Verdict.INVALID, "val_loss is nan")
NAN = math.nan


@pytest.fixture
def store() -> Iterator[DirectoryStore]:
    with memory_folder() as folder:
        yield DirectoryStore(folder)


@pytest.fixture
def ledger(store: DirectoryStore) -> Ledger:
    ledger = Ledger(store, RUN, OWNER)
    ledger.claim("node")
    return ledger


# ---------------------------------------------------------------- the verdict

JUDGED = {
    "nothing is returned, nothing is logged": ({}, {}, Tolerances(), ""),
    "equal": ({"loss": 0.5}, {"loss": 0.5}, Tolerances(), ""),
    "within the share": ({"loss": 1.0009}, {"loss": 1.0}, Tolerances(0.001), ""),
    "more than the share apart": (
        {"loss": 1.002}, {"loss": 1.0}, Tolerances(0.001),
        "loss is 1.002 and was 1 when it was saved, more than 0.001 apart"),
    "within its own limit": ({"rmse": 13.4}, {"rmse": 13.0}, Tolerances(0, {"rmse": 0.5}), ""),
    "beyond its own limit": (
        {"rmse": 13.6}, {"rmse": 13.0}, Tolerances(1, {"rmse": 0.5}), "rmse is 13.6"),
    "not logged, so not compared": ({"loss": 7.0}, {"rmse": 1.0}, Tolerances(), ""),
    "not finite": ({"loss": NAN}, {}, Tolerances(), "loss is nan"),
    "infinite": ({"loss": math.inf}, {"loss": 1.0}, Tolerances(), "loss is inf"),
    "logged as nan, so there is nothing to compare with": (
        {"loss": 1.0}, {"loss": NAN}, Tolerances(), ""),
    "a named one is missing": (
        {}, {"rmse": 1.0}, Tolerances(0, {"rmse": 1}), "rmse was not returned"),
    "a named one is missing that was not logged either": (
        {}, {"loss": 1.0}, Tolerances(0, {"rmse": 1}), ""),
    "zero is compared with zero": ({"errors": 0.0}, {"errors": 0.0}, Tolerances(), ""),
    "zero has no share": ({"errors": 1e-9}, {"errors": 0.0}, Tolerances(), "errors is 1e-09"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("returned", "logged", "tolerances", "reason"), JUDGED.values(), ids=list(JUDGED)
)
def test_what_was_returned_is_compared_with_what_was_logged(
    returned: dict[str, float], logged: dict[str, float], tolerances: Tolerances, reason: str
) -> None:
    validation = judge(returned, logged, tolerances)

    assert validation.reason.startswith(reason)
    assert validation.verdict is (Verdict.INVALID if reason else Verdict.VALID)


def test_a_verdict_comes_back_as_it_was_written(store: DirectoryStore, ledger: Ledger) -> None:
    manifest = commit(store, snapshot())
    judged = judge({"loss": math.inf, "rmse": 1.0}, {"rmse": 2.0}, Tolerances())
    written = replace(judged, entrypoint="a:b", seconds=1.5, validated_at="now", host="here")

    assert write_validation(store, ledger, manifest.name, written)

    assert read_validation(store, RUN, manifest.name) == written


def test_what_is_no_verdict_says_nothing(store: DirectoryStore) -> None:
    manifest = commit(store, snapshot())
    file = checkpoint_folder(store, manifest.name) / "validation.json"
    for text in ("", "[]", "{}", '{"verdict": "maybe"}', "null"):
        file.write_text(text)

        assert read_validation(store, RUN, manifest.name) is None


def test_a_checkpoint_that_was_deleted_meanwhile_does_not_come_back(
    store: DirectoryStore, ledger: Ledger
) -> None:
    manifest = commit(store, snapshot())
    delete_checkpoint(store, ledger, manifest.name)

    assert not write_validation(store, ledger, manifest.name, VALID)

    assert not checkpoint_folder(store, manifest.name).exists()


def test_a_verdict_goes_with_its_checkpoint(store: DirectoryStore, ledger: Ledger) -> None:
    manifest = commit(store, snapshot())
    write_validation(store, ledger, manifest.name, VALID)

    delete_checkpoint(store, ledger, manifest.name, [file.name for file in manifest.files])

    assert not checkpoint_folder(store, manifest.name).exists()


def test_a_supervisor_that_was_fenced_off_writes_no_verdict(
    store: DirectoryStore, ledger: Ledger
) -> None:
    manifest = commit(store, snapshot())
    Ledger(store, RUN, "another").claim("elsewhere")

    with pytest.raises(Fenced):
        write_validation(store, ledger, manifest.name, VALID)

    assert read_validation(store, RUN, manifest.name) is None


# ---------------------------------------------------------------- restore


def names(*saves: int) -> list[str]:
    return [snapshot(save=number).name for number in saves]


def commit_all(store: DirectoryStore, *verdicts: Validation | None) -> list[str]:
    """One checkpoint for each, oldest first, with this verdict."""
    saved: list[Snapshot] = [snapshot(save=number) for number in range(1, len(verdicts) + 1)]
    ledger = Ledger(store, RUN, OWNER)
    for one, verdict in zip(saved, verdicts, strict=True):
        commit(store, one)
        if verdict is not None:
            write_validation(store, ledger, one.name, verdict)
    return [one.name for one in saved]


def restored(store: DirectoryStore, **options: object) -> str:
    archive, ledger = Archive(store, RUN), Ledger(store, RUN, "")
    loaded = load_newest(archive, ledger, lambda n: memoryview(bytearray(n)), **options)  # type: ignore[arg-type]
    assert loaded is not None
    return loaded.manifest.name


def test_an_invalid_one_is_passed_over_and_not_put_away(store: DirectoryStore) -> None:
    *_, good, bad = commit_all(store, None, None, INVALID)

    assert restored(store) == good

    assert Archive(store, RUN).quarantined() == set()
    assert Archive(store, RUN).manifest(bad)


def test_a_newer_one_that_was_never_tried_is_not_passed_over(store: DirectoryStore) -> None:
    *_, newest = commit_all(store, VALID, None)

    assert restored(store) == newest


def test_if_all_are_invalid_the_newest_has_to_do(store: DirectoryStore) -> None:
    *_, newest = commit_all(store, INVALID, INVALID)

    assert restored(store) == newest


def test_a_valid_one_that_is_unhealthy_goes_before_an_invalid_one(store: DirectoryStore) -> None:
    unhealthy = commit(store, snapshot(save=1, healthy=False)).name
    bad = commit(store, snapshot(save=2)).name
    write_validation(store, Ledger(store, RUN, OWNER), bad, INVALID)

    assert restored(store, prefer_healthy=True) == unhealthy


def test_an_invalid_one_is_not_the_best(store: DirectoryStore) -> None:
    for number, value in enumerate((3.0, 1.0, 2.0), start=1):
        commit(store, snapshot(save=number, metrics={"rmse": value}))
    write_validation(store, Ledger(store, RUN, OWNER), names(2)[0], INVALID)

    assert Archive(store, RUN).find("best", "rmse").name == names(3)[0]


# ---------------------------------------------------------------- retention


def moments(count: int, attempt: int = 1) -> list[Moment]:
    return [snapshot(attempt, number).moment for number in range(1, count + 1)]


def test_the_newest_valid_one_stays_behind_newer_ones() -> None:
    saved = moments(6)
    verdicts = {str(saved[0].name): Verdict.VALID, str(saved[1].name): Verdict.VALID}

    gone = superfluous(saved, Keep(last=2), (), verdicts)

    assert gone == [saved[0], saved[2], saved[3]]


def test_invalid_ones_are_counted_apart(store: DirectoryStore, ledger: Ledger) -> None:
    saved = moments(5)
    bad = {str(m.name): Verdict.INVALID for m in saved[2:]}

    groups = counted_apart(saved, {str(saved[4].name)}, bad)

    assert groups == (saved[:2], [saved[4]], saved[2:4])


def test_a_save_does_not_delete_the_newest_valid_one(store: DirectoryStore, ledger: Ledger) -> None:
    commit_all(store, VALID, None, INVALID)
    persister = Persister(store, ledger, Keep(last=1), validates=True)

    gone = persister.retain()
    assert gone == []  # the valid one, the newest, and the invalid one, which is counted apart

    later = snapshot(save=4)
    persister.persist(later.moment, {n: memoryview(b) for n, b in later.files.items()})
    assert persister.retain() == names(2)

    persister.note_verdict(later.name, Verdict.VALID)
    assert persister.retain() == names(1)


def test_without_validation_in_the_job_nobody_asks_for_verdicts(
    store: DirectoryStore, ledger: Ledger
) -> None:
    commit_all(store, VALID, None)

    assert Persister(store, ledger, Keep(last=1)).retain() == names(1)
