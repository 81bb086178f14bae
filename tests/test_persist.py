"""A save writes what has changed, copies what has not, and costs the same however old a run is."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from slots import RUN, fill, snapshot, views

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.keeper import Keeper
from runner.checkpoint.latest import read_latest
from runner.checkpoint.manifest import FileEntry, Manifest
from runner.checkpoint.persist import Persister
from runner.checkpoint.retention import Keep
from runner.checkpoint.weights import weights_alone
from runner.errors import Abandoned, Fenced, StoreError, UsageError
from runner.spool import RankSpool, Spool, Weights
from runner.store import DirectoryStore

OWNER = "a" * 16
PART = 16 << 20


class CountingStore:
    """A store that counts what is asked of it: the calls, and the bytes that are written."""

    def __init__(self, store: DirectoryStore) -> None:
        self._store, self.url = store, store.url
        self.calls: Counter[str] = Counter()
        self.fetches_at_once = store.fetches_at_once

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def counted(*arguments: Any) -> Any:
            self.calls[name] += 1
            return method(*arguments)

        return counted


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[RankSpool]:
    spool = Spool(tmp_path / "spool")
    spool.open()
    yield spool.rank
    spool.close()


def persister(store: Any, keep: Keep | None = None, owner: str = OWNER) -> Persister:
    ledger = Ledger(store, RUN, owner)
    ledger.claim("node")
    return Persister(store, ledger, keep or Keep(last=100))


def large(number: int, megabytes: int) -> bytes:
    return bytes([number]) * (megabytes << 20)


def save(
    saver: Persister, number: int, files: dict[str, bytes], **changes: Any
) -> tuple[Manifest, dict[str, FileEntry]]:
    moment = replace(snapshot(save=number).moment, **changes)
    manifest = saver.persist(moment, views({"state.json": b"{}", **files}))
    return manifest, {file.name: file for file in manifest.files}


def inode(store: DirectoryStore, manifest: Manifest, name: str) -> int:
    return (store.root / RUN / "checkpoints" / manifest.name / name).stat().st_ino


# ---------------------------------------------------------------- what has not changed


def test_a_file_that_has_not_changed_is_not_written_again(store: DirectoryStore) -> None:
    saver = persister(store)
    frozen = large(1, 33)
    first, _ = save(saver, 1, {"frozen.safetensors": frozen, "model.safetensors": large(2, 2)})
    second, files = save(saver, 2, {"frozen.safetensors": frozen, "model.safetensors": large(3, 2)})

    assert inode(store, second, "frozen.safetensors") == inode(store, first, "frozen.safetensors")
    assert inode(store, second, "model.safetensors") != inode(store, first, "model.safetensors")
    assert len(files["frozen.safetensors"].parts) == 3
    Archive(store, RUN).verify(second)


CHANGES = {
    "in its first part": lambda content: b"x" + content[1:],
    "in its last byte": lambda content: content[:-1] + b"x",
    "in its second part": lambda content: content[: PART + 5] + b"x" + content[PART + 6 :],
    "in its length": lambda content: content + b"x",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_has_changed_anywhere_is_written(store: DirectoryStore, change: Any) -> None:
    saver = persister(store)
    content = large(1, 33)
    save(saver, 1, {"model.safetensors": content})
    second, _ = save(saver, 2, {"model.safetensors": change(content)})

    archive = Archive(store, RUN)
    archive.verify(second)
    path = store.root / RUN / "checkpoints" / second.name / "model.safetensors"
    assert path.read_bytes() == change(content)


@pytest.mark.parametrize("verified", [False, True])
def test_the_next_supervisor_copies_from_what_it_has_verified(
    store: DirectoryStore, rank: RankSpool, verified: bool
) -> None:
    files = {"frozen.safetensors": safetensors.numpy.save({"weight": np.zeros(2 << 20, "u1")})}
    first, _ = save(persister(store), 1, files)
    saver = persister(store, owner="b" * 16)
    if verified:
        resumption = Keeper(rank, saver, Archive(store, RUN)).restore()
        assert resumption is not None
        assert resumption.source == "store"

    second, _ = save(saver, 2, files)
    third, _ = save(saver, 3, files)

    shared = inode(store, second, "frozen.safetensors")
    assert (inode(store, first, "frozen.safetensors") == shared) == verified
    assert inode(store, third, "frozen.safetensors") == shared


def test_a_file_that_became_shorter_on_the_disk_is_written(store: DirectoryStore) -> None:
    saver = persister(store, Keep(last=1))
    first, _ = save(saver, 1, {"frozen.safetensors": large(1, 2)})
    os.truncate(store.root / RUN / "checkpoints" / first.name / "frozen.safetensors", 1 << 20)

    second, _ = save(saver, 2, {"frozen.safetensors": large(1, 2)})
    saver.retain()

    Archive(store, RUN).verify(second)


def test_a_file_that_was_to_be_copied_and_is_gone_is_written(store: DirectoryStore) -> None:
    saver = persister(store)
    first, _ = save(saver, 1, {"frozen.safetensors": large(1, 2)})
    (store.root / RUN / "checkpoints" / first.name / "frozen.safetensors").unlink()

    second, _ = save(saver, 2, {"frozen.safetensors": large(1, 2)})

    Archive(store, RUN).verify(second)


def test_a_checkpoint_stays_whole_when_the_one_it_shares_with_goes(store: DirectoryStore) -> None:
    saver = persister(store, Keep(last=1))
    save(saver, 1, {"frozen.safetensors": large(1, 2)})
    second, _ = save(saver, 2, {"frozen.safetensors": large(1, 2)})
    saver.retain()

    assert [m.name for m in Archive(store, RUN).manifests()] == [second.name]
    Archive(store, RUN).verify(second)


# ---------------------------------------------------------------- what it costs


def test_a_save_costs_no_more_when_the_run_is_old(store: DirectoryStore) -> None:
    counting = CountingStore(store)
    saver = persister(counting, Keep(last=3))
    costs = []
    for number in range(1, 61):
        counting.calls.clear()
        manifest, _ = save(saver, number, {"model.safetensors": b"m" * number})
        saver.ledger.committed(manifest.name, manifest.moment.step)
        saver.retain()
        costs.append(dict(counting.calls))

    assert costs[9] == costs[59]
    assert costs[59]["children"] == 1  # the pins
    assert len(Archive(store, RUN).names()) == 3


def test_the_newest_is_found_with_two_reads(store: DirectoryStore) -> None:
    saver = persister(store)
    for number in range(1, 6):
        manifest, _ = save(saver, number, {})
        saver.ledger.committed(manifest.name, manifest.moment.step)
    counting = CountingStore(store)

    newest = Archive(counting, RUN).newest()  # type: ignore[arg-type]

    assert newest == manifest
    assert counting.calls == {"read": 2}


@pytest.mark.parametrize("hint", [b"", b"{", b"[]", b'{"checkpoint": "../x"}', None])
def test_a_hint_that_is_wrong_is_not_trusted(store: DirectoryStore, hint: bytes | None) -> None:
    saver = persister(store)
    first, _ = save(saver, 1, {})
    if hint is None:  # it names one that is gone
        saver.ledger.committed(str(snapshot(save=9).moment.name), 900)
    else:
        store.replace(f"{RUN}/latest.json", hint)

    assert Archive(store, RUN).newest() == first
    second, _ = save(saver, 2, {})
    saver.ledger.committed(second.name, second.moment.step)
    latest = read_latest(store, RUN)
    assert latest is not None
    assert latest.checkpoint == second.name


def test_the_record_of_a_killed_supervisor_gets_its_last_commit(store: DirectoryStore) -> None:
    """Which was only noted in `latest.json`, so that a save costs one small write less."""
    killed = persister(store).ledger
    killed.committed(str(snapshot(save=3).moment.name), 300)
    assert json.loads(store.read(f"{RUN}/attempts/000001.json", 9999))["saved_step"] is None
    assert [record.saved_step for record in killed.records()] == [300]

    following = persister(store, owner="b" * 16).ledger
    following.committed(str(snapshot(attempt=2, save=1).moment.name), 400)

    assert [record.saved_step for record in following.records()] == [300, 400]


# ---------------------------------------------------------------- giving way, and being fenced


def test_a_commit_whose_answer_was_lost_is_found_and_not_made_again(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = persister(store)
    stage = store.stage

    def losing(prefix: str, owner: str) -> Any:
        staging = stage(prefix, owner)
        commit = staging.commit

        def lose(name: str, manifest: bytes) -> None:
            commit(name, manifest)
            raise StoreError("the connection was reset")

        monkeypatch.setattr(staging, "commit", lose)
        return staging

    monkeypatch.setattr(store, "stage", losing)
    with pytest.raises(StoreError):
        save(saver, 1, {})
    [committed] = Archive(store, RUN).manifests()

    again, _ = save(saver, 1, {})

    assert again == committed


def test_a_save_that_gives_way_leaves_nothing(store: DirectoryStore) -> None:
    saver = persister(store)
    asked = iter([False, False, True])
    files = views({"state.json": b"{}", "model.safetensors": large(1, 33)})

    with pytest.raises(Abandoned):
        saver.persist(snapshot(save=1).moment, files, gives_way=lambda: next(asked))

    assert list((store.root / RUN / "checkpoints").iterdir()) == []
    saver.persist(snapshot(save=1).moment, files)
    assert len(Archive(store, RUN).names()) == 1


@pytest.mark.parametrize("megabytes", [0, 65])
def test_a_fenced_supervisor_commits_nothing(store: DirectoryStore, megabytes: int) -> None:
    saver = persister(store)
    persister(store, owner="b" * 16)

    with pytest.raises(Fenced):
        save(saver, 1, {"model.safetensors": large(1, megabytes)})

    assert Archive(store, RUN).names() == []


# ---------------------------------------------------------------- weights alone


def state_of(**components: list[tuple[str, str]]) -> bytes:
    trees = {
        name: {"state": {ref[1]: {"$": "tensor", "file": ref[0], "name": ref[1]} for ref in refs}}
        for name, refs in components.items()
    }
    rest = {"version": 1, "state": {"secret": 1}, "progress": {}, "rng": {}}
    return json.dumps({**rest, "components": trees}).encode()


def test_weights_are_their_files_and_their_part_of_the_tree() -> None:
    files = {
        "model.safetensors": b"m",
        "ema.safetensors": b"e",
        "optimizer.safetensors": b"o",
        "state.json": state_of(
            model=[("model.safetensors", "w")],
            ema=[("ema.safetensors", "w"), ("model.safetensors", "tied")],
            optimizer=[("optimizer.safetensors", "w")],
        ),
    }
    kept = weights_alone(views(files), ["ema"])

    assert set(kept) == {"ema.safetensors", "model.safetensors", "state.json"}
    document = json.loads(bytes(kept["state.json"]))
    assert set(document) == {"version", "components"}
    assert set(document["components"]) == {"ema"}


def test_a_slot_may_give_its_weights_first_and_all_of_it_later(
    store: DirectoryStore, rank: RankSpool
) -> None:
    saver = persister(store)
    keeper = Keeper(rank, saver, Archive(store, RUN))
    state = state_of(model=[("model.safetensors", "w")])
    taken = snapshot(save=2, step=50)
    taken = replace(taken, files={**taken.files, "state.json": state})
    marker = fill(rank, 0, taken, must=True)
    rank.publish(replace(marker, weights=Weights(1, ["model"])))

    [weights] = keeper.persist_due()

    assert (weights.manifest.moment.scope, weights.manifest.moment.step) == ("weights", 50)
    assert [f.name for f in weights.manifest.files] == ["model.safetensors", "state.json"]
    assert keeper.persist_due() == []
    assert keeper.has_unsaved()

    full = keeper.persist_newest(("preemption",))

    assert full is not None
    assert (full.manifest.moment.scope, full.manifest.name) == ("full", taken.name)
    assert not keeper.has_unsaved()


def test_a_run_never_continues_from_weights_alone(store: DirectoryStore, rank: RankSpool) -> None:
    saver = persister(store)
    full, _ = save(saver, 1, {})
    weights, _ = save(saver, 2, {}, scope="weights")
    keeper = Keeper(rank, saver, Archive(store, RUN))

    resumption = keeper.restore()
    assert resumption is not None
    assert str(resumption.moment.name) == full.name
    with pytest.raises(UsageError, match="weights alone"):
        keeper.restore(which=weights.name)


def test_weights_do_not_crowd_out_what_a_run_continues_from(store: DirectoryStore) -> None:
    saver = persister(store, Keep(last=2))
    for number in range(1, 4):
        save(saver, number, {})
    for number in range(4, 9):
        save(saver, number, {}, scope="weights")
    saver.retain()

    moments = [manifest.moment for manifest in Archive(store, RUN).manifests()]
    assert [(m.save, m.scope) for m in moments] == [
        (8, "weights"),
        (7, "weights"),
        (3, "full"),
        (2, "full"),
    ]
