from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slots import (
    RUN,
    RefusingStore,
    checkpoint_folder,
    commit,
    file_entry,
    memory_folder,
    snapshot,
)

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.format import CheckpointName
from runner.checkpoint.manifest import Manifest, Moment
from runner.checkpoint.persist import Persister
from runner.checkpoint.retention import Keep, delete_checkpoint, pins, ranked, superfluous
from runner.errors import Fenced, StoreError
from runner.store import DirectoryStore

# ---------------------------------------------------------------- the policy


def save(number: int, **facts: object) -> Moment:
    """The n-th save of an attempt, 10 steps after the one before it, in the middle of an epoch."""
    plain: dict[str, object] = {"attempt": 1, "step": 10 * number, "epoch": 0, "batch": number}
    return Moment(save=number, **plain | facts)  # type: ignore[arg-type]


def scored(number: int, value: float, **facts: object) -> Moment:
    return save(number, metrics={"rmse": value}, **facts)


def end_of_epoch(number: int, epoch: int) -> Moment:
    """The boundary between two epochs: no batch of the next one is done."""
    return save(number, epoch=epoch, batch=0)


BEST = Keep(last=1, best_metric="rmse")
NAN, INF = math.nan, math.inf
POLICIES: dict[str, tuple[list[Moment], Keep, list[int]]] = {
    "nothing is saved": ([], Keep(), []),
    "fewer than the last N": ([save(1), save(2)], Keep(last=3), [1, 2]),
    "the last N": ([save(n) for n in range(1, 6)], Keep(last=3), [3, 4, 5]),
    "a limit of one keeps the one": ([save(1)], Keep(last=1), [1]),
    "a limit of one keeps the newest": ([save(1), save(2)], Keep(last=1), [2]),
    "a limit of none keeps the newest": ([save(1), save(2)], Keep(last=0), [2]),
    "a limit of none keeps the newest though it is unhealthy, and the newest healthy": (
        [save(1), save(2), save(3, healthy=False), save(4, healthy=False)], Keep(last=0), [2, 4]),
    "all are unhealthy": (
        [save(1, healthy=False), save(2, healthy=False)], Keep(last=1), [2]),
    "the newest healthy one stays behind newer ones": (
        [save(1), save(2), *(save(n, healthy=False) for n in (3, 4, 5))],
        Keep(last=2), [2, 4, 5]),
    "the newest healthy one is among the last": (
        [save(1), save(2), save(3, healthy=False)], Keep(last=2), [2, 3]),
    "weights alone are nothing to continue from": (
        [save(1), save(2), save(3, scope="weights"), save(4, scope="weights")],
        Keep(last=1), [2, 4]),
    "weights alone beside unhealthy ones": (
        [save(1, healthy=False), save(2, healthy=False), save(3, scope="weights")],
        Keep(last=1), [2, 3]),
    "the best is the last": ([scored(1, 3), scored(2, 2), scored(3, 1)], BEST, [3]),
    "the best is the first": ([scored(1, 1), scored(2, 2), scored(3, 3)], BEST, [1, 3]),
    "best and last swap": ([scored(1, 2), scored(2, 1), scored(3, 3)], BEST, [2, 3]),
    "of equal ones the earlier is the best": (
        [scored(1, 1), scored(2, 1), scored(3, 1), scored(4, 2)], BEST, [1, 4]),
    "of equal ones the earlier attempt is the best": (
        [scored(5, 1, attempt=1), scored(1, 1, attempt=2), scored(2, 3, attempt=2)],
        BEST, [5, 2]),
    "the best K": (
        [scored(n, value) for n, value in enumerate([5, 1, 4, 2, 3], 1)],
        replace(BEST, best_count=2), [2, 4, 5]),
    "the highest can be the best": (
        [scored(1, 1), scored(2, 3), scored(3, 2)], replace(BEST, best_mode="max"), [2, 3]),
    "of equal highest ones the earlier is the best": (
        [scored(1, 3), scored(2, 3), scored(3, 2)], replace(BEST, best_mode="max"), [1, 3]),
    "what has no metric is never the best": (
        [save(1), scored(2, 9), save(3), save(4)], BEST, [2, 4]),
    "another metric is not the metric": (
        [save(1, metrics={"loss": 0.0}), scored(2, 9), save(3)], BEST, [2, 3]),
    "what is not finite is never the best": (
        [scored(1, NAN), scored(2, -INF), scored(3, 5), scored(4, INF), save(5)], BEST, [3, 5]),
    "no metric is finite": ([scored(1, NAN), scored(2, NAN)], BEST, [2]),
    "the best stays though it is unhealthy": (
        [scored(1, 1, healthy=False), scored(2, 2), scored(3, 3)], BEST, [1, 3]),
    "every second epoch's end": (
        [end_of_epoch(n, n) for n in range(1, 7)],
        Keep(last=1, every_epochs=2), [2, 4, 6]),
    "the beginning of the run is no epoch's end": (
        [end_of_epoch(1, 0), end_of_epoch(2, 1), save(3)], Keep(last=1, every_epochs=1), [2, 3]),
    "the middle of an epoch is no epoch's end": (
        [save(1, epoch=2, batch=5), save(2, epoch=2, batch=6)],
        Keep(last=1, every_epochs=2), [2]),
    "newest is by attempt, not by step": (
        [save(9, attempt=1, step=900), save(1, attempt=2, step=500)], Keep(last=1), [1]),
    "the rules add up": (
        [scored(1, 1), end_of_epoch(2, 5), save(3), save(4), save(5, healthy=False)],
        Keep(last=1, best_metric="rmse", every_epochs=5), [1, 2, 4, 5]),
}  # fmt: skip


@pytest.mark.parametrize(("moments", "keep", "kept"), POLICIES.values(), ids=POLICIES)
def test_the_policy_keeps(moments: list[Moment], keep: Keep, kept: list[int]) -> None:
    for order in (moments, moments[::-1]):
        gone = superfluous(order, keep)

        left = [moment.save for moment in moments if moment not in gone]
        assert left == kept


def test_the_oldest_goes_first() -> None:
    moments = [save(2, attempt=2), save(3), save(1, attempt=2), save(1, attempt=10), save(9)]

    gone = superfluous(moments, Keep(last=1))

    assert [(m.attempt, m.save) for m in gone] == [(1, 3), (1, 9), (2, 1), (2, 2)]


def test_what_is_protected_stays_and_counts_for_no_rule() -> None:
    moments = [save(n) for n in range(1, 6)]
    protected = {str(moments[0].name), str(moments[4].name), "step-000000999-a0001-s001", "x"}

    gone = superfluous(moments, Keep(last=2), protected)

    assert [moment.save for moment in gone] == [2, 3]


def test_the_best_come_first() -> None:
    moments = [scored(1, 2), save(2), scored(3, NAN), scored(4, 1), scored(5, 2)]

    assert [m.save for m in ranked(moments, "rmse", "min")] == [4, 1, 5]
    assert [m.save for m in ranked(moments, "rmse", "max")] == [1, 5, 4]
    assert ranked(moments, "loss", "min") == []


# ---------------------------------------------------------------- deleting


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path)


def names(store: DirectoryStore) -> list[str]:
    """Every directory of a checkpoint, with or without a manifest."""
    return sorted(path.name for path in (store.root / RUN / "checkpoints").iterdir())


def claimed(store: DirectoryStore, owner: str = "a" * 16) -> Ledger:
    ledger = Ledger(store, RUN, owner)
    ledger.claim("node")
    return ledger


def test_the_manifest_goes_first(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = commit(store, snapshot())
    asked: list[str] = []
    monkeypatch.setattr(store, "delete", asked.extend)

    delete_checkpoint(store, claimed(store), manifest.name)

    assert [key.rpartition("/")[2] for key in asked] == [
        "manifest.json",
        "validation.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert {key.rpartition("/")[0] for key in asked} == {f"{RUN}/checkpoints/{manifest.name}"}


def test_a_fenced_supervisor_deletes_nothing(store: DirectoryStore) -> None:
    kept = [commit(store, snapshot(save=n)).name for n in (1, 2)]
    ledger = claimed(store)
    claimed(store, "b" * 16)

    with pytest.raises(Fenced):
        delete_checkpoint(store, ledger, kept[0])
    with pytest.raises(Fenced):
        Persister(store, ledger, Keep(last=1)).retain()

    assert names(store) == kept


def test_one_that_is_pinned_stays(store: DirectoryStore) -> None:
    saved = [commit(store, snapshot(save=n)).name for n in (1, 2, 3)]
    store.create(f"{RUN}/pins/{saved[0]}", b"")
    assert pins(store, RUN) == {saved[0]}

    gone = Persister(store, claimed(store), Keep(last=1)).retain()

    assert gone == [saved[1]]
    assert names(store) == [saved[0], saved[2]]


def test_the_one_that_the_newest_attempt_began_from_stays(store: DirectoryStore) -> None:
    saved = [commit(store, snapshot(save=n)).name for n in (1, 2, 3)]
    ledger = claimed(store)
    ledger.update(resumed_from=saved[0])

    Persister(store, ledger, Keep(last=1)).retain()
    assert names(store) == [saved[0], saved[2]]

    ledger.claim("node")
    ledger.update(resumed_from=saved[2])
    Persister(store, ledger, Keep(last=1)).retain()
    assert names(store) == [saved[2]]


def test_what_is_in_quarantine_is_neither_counted_nor_deleted(store: DirectoryStore) -> None:
    saved = [commit(store, snapshot(save=n)).name for n in (1, 2, 3)]
    Archive(store, RUN).quarantine(saved[2], "a bit flipped")

    gone = Persister(store, claimed(store), Keep(last=1)).retain()

    assert gone == [saved[0]]
    assert names(store) == saved[1:]


def test_one_whose_manifest_is_unreadable_is_left_alone(store: DirectoryStore) -> None:
    saved = [commit(store, snapshot(save=n)).name for n in (1, 2, 3)]
    (checkpoint_folder(store, saved[0]) / "manifest.json").write_text("{")

    assert Persister(store, claimed(store), Keep(last=1)).retain() == [saved[1]]
    assert names(store) == [saved[0], saved[2]]


def test_what_is_half_deleted_goes(store: DirectoryStore) -> None:
    saved = [commit(store, snapshot(save=n)).name for n in (1, 2)]
    (checkpoint_folder(store, saved[0]) / "manifest.json").unlink()

    assert Persister(store, claimed(store), Keep(last=5)).sweep() == [saved[0]]
    assert names(store) == [saved[1]]


def test_files_that_are_newer_than_any_checkpoint_may_be_an_upload(store: DirectoryStore) -> None:
    saved = [commit(store, snapshot(save=n)).name for n in (1, 2)]
    (checkpoint_folder(store, saved[1]) / "manifest.json").unlink()

    assert Persister(store, claimed(store), Keep(last=5)).sweep() == []
    assert names(store) == saved


@pytest.mark.parametrize("method", ["children", "read", "delete"])
def test_a_store_that_refuses_loses_nothing(store: DirectoryStore, method: str) -> None:
    saved = [commit(store, snapshot(save=n)).name for n in (1, 2)]
    refusing = RefusingStore(store)
    persister = Persister(refusing, claimed(refusing), Keep(last=1))
    refusing.refused = {method}

    with pytest.raises(StoreError):
        persister.retain()

    assert names(store) == saved


# ---------------------------------------------------------------- histories with crashes


class Crash(BaseException):
    """The supervisor is gone."""


class CrashingStore(DirectoryStore):
    """Deletes so many objects, and then the supervisor is gone."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.deletions_left = 10**9

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            if self.deletions_left == 0:
                raise Crash
            super().delete([key])
            self.deletions_left -= 1


@dataclass
class History:
    """A run's life: what was saved when, what was pinned, and after how many deletions it died."""

    keep: Keep
    moments: list[Moment]
    pinned: set[int]
    resumed_from: int | None
    crashes: list[int] = field(default_factory=list)


values = st.none() | st.integers(0, 3).map(float) | st.sampled_from([NAN, INF])
keeps = st.builds(
    Keep,
    last=st.integers(1, 3),  # none at all cannot be asked for
    best_metric=st.none() | st.just("rmse"),
    best_mode=st.sampled_from(["min", "max"]),
    best_count=st.integers(1, 2),
    every_epochs=st.none() | st.integers(1, 3),
)


@st.composite
def histories(draw: st.DrawFn) -> History:
    moments, attempt, number, epoch = [], 1, 0, 0
    for _ in range(draw(st.integers(1, 7))):
        if draw(st.integers(0, 3)) == 0:
            attempt, number = attempt + 1, 0
            epoch = draw(st.integers(0, epoch))  # it goes back
        number += 1
        at_end = draw(st.booleans())
        epoch += at_end
        value = draw(values)
        moments.append(
            Moment(
                attempt=attempt,
                save=number,
                step=10 * epoch + (0 if at_end else 5),
                epoch=epoch,
                batch=0 if at_end else 5,
                metrics={} if value is None else {"rmse": value},
                healthy=draw(st.integers(0, 3)) > 0,
                scope=draw(st.sampled_from(["full", "full", "full", "weights"])),
            )
        )
    places = st.integers(0, len(moments) - 1)
    return History(
        draw(keeps),
        moments,
        draw(st.sets(places, max_size=2)),
        draw(st.none() | places),
        draw(st.lists(st.integers(0, 4), max_size=4)),
    )


def must_survive(moments: Sequence[Moment], keep: Keep) -> set[CheckpointName]:
    """What the rules keep, said once more, and more clumsily."""
    by_age = sorted(moments, key=lambda m: (m.attempt, m.save))
    full = [m for m in by_age if m.scope == "full"]
    kept = full[-keep.last :] + [m for m in by_age if m.scope == "weights"][-keep.last :]
    kept += full[-1:] + [m for m in full if m.healthy][-1:]
    if keep.best_metric:
        have = [m for m in by_age if math.isfinite(m.metrics.get(keep.best_metric, NAN))]
        have.sort(
            key=lambda m: m.metrics["rmse"] if keep.best_mode == "min" else -m.metrics["rmse"]
        )
        kept += have[: keep.best_count]
    if keep.every_epochs:
        kept += [m for m in by_age if m.batch == 0 and m.epoch and m.epoch % keep.every_epochs == 0]
    return {m.name for m in kept}


@settings(max_examples=60, deadline=None)
@given(histories())
def test_what_a_rule_keeps_survives_every_crash_and_the_rest_is_gone_in_the_end(
    history: History,
) -> None:
    with memory_folder() as folder:
        store = CrashingStore(folder)
        for moment in history.moments:
            write(store, moment)
        protected = {history.moments[at].name for at in history.pinned}
        for name in protected:
            store.create(f"{RUN}/pins/{name}", b"")
        ledger = claimed(store)
        if history.resumed_from is not None:
            protected.add(history.moments[history.resumed_from].name)
            ledger.update(resumed_from=str(history.moments[history.resumed_from].name))
        kept = must_survive(history.moments, history.keep) | protected
        persister = Persister(store, ledger, history.keep)
        archive = Archive(store, RUN)

        for deletions in history.crashes:
            store.deletions_left = deletions
            with contextlib.suppress(Crash):
                persister.retain()
            whole = {
                manifest.moment.name
                for manifest in archive.manifests()
                if verified(store, manifest)
            }
            assert kept <= whole
        store.deletions_left = 10**9
        persister.retain()

        assert set(archive.names()) == kept
        assert names(store) == sorted(str(name) for name in kept)
        assert persister.retain() == []


def write(store: DirectoryStore, moment: Moment) -> None:
    """A checkpoint of two files, written without the care that a real one gets."""
    contents = {"model.safetensors": b"m" * moment.step, "state.json": b"{}"}
    manifest = Manifest(RUN, moment, tuple(file_entry(*item) for item in contents.items()))
    folder = checkpoint_folder(store, manifest.name)
    folder.mkdir(parents=True)
    for name, content in {**contents, "manifest.json": manifest.to_json()}.items():
        (folder / name).write_bytes(content)


def verified(store: DirectoryStore, manifest: Manifest) -> bool:
    Archive(store, RUN).verify(manifest)
    return True
