from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from children import Children
from slots import (
    RUN,
    RefusingStore,
    Snapshot,
    checkpoint_folder,
    commit,
    fill,
    memory_folder,
    read_slot,
    snapshot,
)
from waiting import wait_until

from runner.checkpoint import persist as persist_module
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.format import part_bytes_for
from runner.checkpoint.keeper import Keeper, Origin, Resumption, Saved
from runner.checkpoint.persist import Persister
from runner.checkpoint.retention import Keep
from runner.errors import CheckpointCorrupt, Fenced, NoValidCheckpoint, StoreError, UnknownName
from runner.spool import Marker, RankSpool, Spool
from runner.store import Content, DirectoryStore, Part

OWNER = "a" * 16


class Node:
    """One node's spool and keeper, and the store that it shares with the others."""

    def __init__(self, folder: Path) -> None:
        self.directory = DirectoryStore(folder / "store")
        self.store = RefusingStore(self.directory)
        self.spool = Spool(folder / "spool")
        self.spool.open()
        self.facts: dict[str, Any] = {"host": "node-1"}
        self.start()

    def start(self, owner: str = OWNER, keep: Keep | None = None, **options: Any) -> Keeper:
        """A supervisor begins here, over whatever the one before it has left."""
        self.ledger = Ledger(self.store, RUN, owner)
        self.ledger.claim("node-1")
        keep = keep or Keep(last=100)
        self.persister = Persister(self.store, self.ledger, keep, lambda: self.facts)
        self.archive = Archive(self.store, RUN)
        self.keeper = Keeper(self.rank, self.persister, self.archive, **options)
        return self.keeper

    @property
    def rank(self) -> RankSpool:
        return self.spool.rank

    def saved(self) -> list[str]:
        """Names of the checkpoints in the store, oldest first."""
        return sorted((m.name for m in self.archive.manifests()), key=lambda n: n.split("-a")[1])

    def files(self, name: str) -> dict[str, bytes]:
        folder = checkpoint_folder(self.directory, name)
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}

    def given(self) -> Snapshot | None:
        """What the trainer finds to begin from, read as the trainer reads it."""
        marker = self.rank.read_restore()
        if marker is None:
            return None
        assert self.rank.is_claimed(marker.slot)
        moment = {**marker.moment, "triggers": tuple(marker.moment["triggers"])}
        return Snapshot(type(snapshot().moment)(**moment), read_slot(self.rank, marker))


@pytest.fixture
def node() -> Iterator[Node]:
    with memory_folder() as folder:
        node = Node(folder)
        yield node
        node.spool.close()


def shown(markers: list[Marker]) -> list[tuple[int, int, bool]]:
    return [(*marker.order, marker.must) for marker in markers]


# ---------------------------------------------------------------- persisting


def test_what_is_due_is_persisted_oldest_first_and_the_rest_is_left(node: Node) -> None:
    due = [snapshot(save=2, triggers=("interval",)), snapshot(save=3, triggers=("best",))]
    fill(node.rank, 0, due[1], must=True)
    fill(node.rank, 1, due[0], must=True)
    fill(node.rank, 2, snapshot(save=4))

    saved = node.keeper.persist_due()

    assert [one.manifest.name for one in saved] == [taken.name for taken in due]
    assert node.saved() == [taken.name for taken in due]
    assert [node.files(taken.name) for taken in due] == [taken.files for taken in due]
    assert [node.archive.manifest(taken.name).moment for taken in due] == [t.moment for t in due]
    assert shown(node.rank.complete()) == [(1, 2, False), (1, 3, False), (1, 4, False)]
    assert node.keeper.persist_due() == []
    assert all(one.persist_seconds >= 0 for one in saved)
    assert saved[0].durable_at <= saved[1].durable_at


def test_what_is_durable_is_told_before_anything_is_deleted_for_it(node: Node) -> None:
    heard: list[tuple[int, list[str]]] = []
    old, new = snapshot(save=1, step=10), snapshot(save=2, step=20)
    node.start(keep=Keep(last=1), on_durable=lambda step: heard.append((step, node.saved())))

    for slot, taken in enumerate((old, new)):
        fill(node.rank, slot, taken, must=True)
        node.keeper.persist_due()

    assert heard == [(10, [old.name]), (20, [old.name, new.name])]
    assert node.saved() == [new.name]


def test_the_newest_is_persisted_with_the_triggers_added(node: Node) -> None:
    fill(node.rank, 0, snapshot(save=1))
    fill(node.rank, 1, snapshot(save=2, triggers=("interval",)))

    saved = node.keeper.persist_newest(("preemption", "interval"))

    assert saved is not None
    assert saved.manifest.moment.triggers == ("interval", "preemption")
    assert node.saved() == [snapshot(save=2).name]
    assert node.archive.manifest(node.saved()[0]).moment.triggers == ("interval", "preemption")


def test_the_newest_is_by_attempt_and_save_not_by_step(node: Node) -> None:
    fill(node.rank, 0, snapshot(1, 9, step=900))
    fill(node.rank, 1, snapshot(2, 1, step=500))

    saved = node.keeper.persist_newest(())

    assert saved is not None
    assert saved.manifest.moment.step == 500


def test_what_is_durable_is_not_persisted_again(node: Node) -> None:
    assert node.keeper.persist_newest(()) is None
    fill(node.rank, 0, snapshot(save=1))
    assert node.keeper.has_unsaved()

    assert node.keeper.persist_newest(("manual",)) is not None
    assert not node.keeper.has_unsaved()
    assert node.keeper.persist_newest(("preemption",)) is None

    fill(node.rank, 1, snapshot(save=2))
    assert node.keeper.has_unsaved()
    assert node.keeper.persist_newest(("preemption",)) is not None


def test_an_older_one_that_must_be_saved_is_saved_after_the_newest(node: Node) -> None:
    fill(node.rank, 0, snapshot(save=1), must=True)
    fill(node.rank, 1, snapshot(save=2))

    node.keeper.persist_newest(("preemption",))
    assert node.keeper.has_unsaved()
    node.keeper.persist_due()

    assert node.saved() == [snapshot(save=1).name, snapshot(save=2).name]
    assert not node.keeper.has_unsaved()


def test_a_saved_checkpoint_stands_in_the_record_of_the_attempt(node: Node) -> None:
    fill(node.rank, 0, snapshot(save=3, step=270), must=True)

    node.keeper.persist_due()

    record = node.ledger.latest()
    assert record is not None
    assert (record.committed, record.saved_step) == (snapshot(save=3, step=270).name, 270)


def test_old_checkpoints_go_after_the_commit_and_never_before(node: Node) -> None:
    keeper = node.start(keep=Keep(last=1))
    old, new = snapshot(save=1), snapshot(save=2)
    fill(node.rank, 0, old, must=True)
    keeper.persist_due()
    there: list[bool] = []
    delete = node.directory.delete

    def watched(keys: list[str]) -> None:
        there.append((checkpoint_folder(node.directory, new.name) / "manifest.json").exists())
        delete(keys)

    node.store.delete = watched  # type: ignore[method-assign]
    fill(node.rank, 0, new, must=True)
    keeper.persist_due()

    assert there == [True]
    assert node.saved() == [new.name]


def test_nothing_old_goes_when_the_commit_fails(node: Node) -> None:
    keeper = node.start(keep=Keep(last=1))
    fill(node.rank, 0, snapshot(save=1), must=True)
    keeper.persist_due()
    fill(node.rank, 0, snapshot(save=2), must=True)
    node.store.refused = {"stage"}

    with pytest.raises(StoreError):
        keeper.persist_due()

    assert node.saved() == [snapshot(save=1).name]


@pytest.mark.parametrize("method", ["replace", "delete"])
def test_what_fails_after_the_commit_does_not_undo_it(node: Node, method: str) -> None:
    keeper = node.start(keep=Keep(last=1))
    fill(node.rank, 0, snapshot(save=1), must=True)
    keeper.persist_due()
    fill(node.rank, 0, snapshot(save=2), must=True)
    node.store.refused = {method}

    saved = keeper.persist_due()

    assert [one.manifest.moment.save for one in saved] == [2]
    assert not keeper.has_unsaved()
    assert snapshot(save=2).name in node.saved()


@pytest.mark.parametrize("must", [True, False])
@pytest.mark.parametrize("method", ["stage", "read"])
def test_a_store_that_refuses_leaves_the_slot_to_be_tried_again(
    node: Node, method: str, must: bool
) -> None:
    taken = snapshot(save=1)
    fill(node.rank, 0, taken, must=must)
    node.store.refused = {method}

    with pytest.raises(StoreError):
        node.keeper.persist_newest(("preemption",))

    assert shown(node.rank.complete()) == [(1, 1, True)]
    assert node.keeper.has_unsaved()
    node.store.refused = set()
    assert [one.manifest.name for one in node.keeper.persist_due()] == [taken.name]
    assert node.files(taken.name) == taken.files
    assert list((node.directory.root / RUN / "checkpoints").iterdir()) == [
        checkpoint_folder(node.directory, taken.name)
    ]


def test_a_disk_that_fails_in_the_middle_leaves_nothing_but_the_slot(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = snapshot(save=1)
    fill(node.rank, 0, taken, must=True)
    stage = node.directory.stage

    def failing(prefix: str, owner: str) -> Any:
        staging = stage(prefix, owner)
        write = staging.write

        def fail(contents: Any) -> Any:
            write([content for content in contents if content.name != "optimizer.safetensors"])
            raise StoreError("the disk is full")

        monkeypatch.setattr(staging, "write", fail)
        return staging

    monkeypatch.setattr(node.directory, "stage", failing)
    with pytest.raises(StoreError):
        node.keeper.persist_due()
    monkeypatch.undo()

    assert list((node.directory.root / RUN / "checkpoints").iterdir()) == []
    assert [one.manifest.name for one in node.keeper.persist_due()] == [taken.name]


def test_a_slot_that_was_saved_just_before_a_kill_does_not_stand_in_the_way(node: Node) -> None:
    """Killed between the commit and the end of the claim: the slot is still said to be due."""
    saved, later = snapshot(save=1), snapshot(save=2)
    for slot, taken in enumerate((saved, later)):
        fill(node.rank, slot, taken, must=True)
    node.rank.claim(0)
    commit(node.directory, saved)

    keeper = node.start("b" * 16)
    keeper.restore()
    keeper.restored()
    keeper.persist_due()

    assert node.saved() == [saved.name, later.name]
    assert not keeper.has_unsaved()


# ---------------------------------------------------------------- slots that lie


def edit_marker(**changes: Any) -> Callable[[RankSpool], None]:
    def edit(rank: RankSpool) -> None:
        path = rank.folder / "slot-0.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_moment(**changes: Any) -> Callable[[RankSpool], None]:
    def edit(rank: RankSpool) -> None:
        path = rank.folder / "slot-0.json"
        document = json.loads(path.read_text())
        document["moment"].update(changes)
        path.write_text(json.dumps(document))

    return edit


def edit_image(number: int, **changes: Any) -> Callable[[RankSpool], None]:
    def edit(rank: RankSpool) -> None:
        path = rank.folder / "slot-0.json"
        document = json.loads(path.read_text())
        document["images"][number].update(changes)
        path.write_text(json.dumps(document))

    return edit


def cut_slot(size: int) -> Callable[[RankSpool], None]:
    def cut(rank: RankSpool) -> None:
        with rank.slot_path(0).open("r+b") as file:
            file.truncate(size)

    return cut


def overwrite_a_header(rank: RankSpool) -> None:
    with rank.slot_path(0).open("r+b") as file:
        file.write(b"\xff" * 8)


LIES: dict[str, Callable[[RankSpool], None]] = {
    "the slot is cut": cut_slot(100),
    "the slot is empty": cut_slot(0),
    "the slot ends one byte early": lambda rank: cut_slot(rank.slot_path(0).stat().st_size - 1)(
        rank
    ),
    "the slot is gone": lambda rank: rank.slot_path(0).unlink(),
    "a header is overwritten": overwrite_a_header,
    "an offset is a byte off": edit_image(0, offset=1),
    "an offset is past the end": edit_image(0, offset=1 << 40),
    "an offset is negative": edit_image(0, offset=-8),
    "an offset is endless": edit_image(0, offset=float("inf")),
    "an offset is text": edit_image(0, offset="0"),
    "a size is too small": edit_image(0, size=90),
    "a size is negative": edit_image(0, size=-1),
    "images overlap": edit_image(1, offset=0),
    "a name leads away": edit_image(0, name="../model.safetensors"),
    "a name is a list": edit_image(0, name=["model.safetensors"]),
    "a name stands twice": edit_image(0, name="optimizer.safetensors"),
    "there is no state": edit_image(2, name="other.json"),
    "there are no images": edit_marker(images=[]),
    "an image is text": edit_marker(images=["model.safetensors"]),
    "the step is negative": edit_moment(step=-1),
    "the step is text": edit_moment(step="100"),
    "a trigger is unknown": edit_moment(triggers=["whim"]),
    "a metric is text": edit_moment(metrics={"loss": "low"}),
    "a metric is a list": edit_moment(metrics={"loss": []}),
    "the scope is unknown": edit_moment(scope="half"),
    "the seconds are endless": edit_moment(productive_seconds=float("inf")),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_slot_that_lies_is_not_persisted_and_the_others_are(
    node: Node, lie: Callable[[RankSpool], None]
) -> None:
    before, good = snapshot(save=1), snapshot(save=2)
    commit(node.directory, before)
    fill(node.rank, 1, good, must=True)
    fill(node.rank, 0, snapshot(save=3), must=True)
    lie(node.rank)

    saved = node.keeper.persist_due()

    assert [one.manifest.name for one in saved] == [good.name]
    assert node.saved() == [before.name, good.name]
    assert node.files(before.name) == before.files
    assert shown(node.rank.complete()) == [(1, 2, False)]
    assert not node.rank.is_claimed(0)


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_slot_that_lies_is_not_restored_from(
    node: Node, lie: Callable[[RankSpool], None]
) -> None:
    fill(node.rank, 1, snapshot(save=2))
    fill(node.rank, 0, snapshot(save=3))
    lie(node.rank)

    node.keeper.restore()

    assert node.given() == snapshot(save=2)


@pytest.mark.parametrize("newest", [False, True], ids=["what is due", "the newest"])
def test_a_slot_that_is_cut_short_while_it_is_persisted_is_dropped(
    node: Node, children: Children, monkeypatch: pytest.MonkeyPatch, newest: bool
) -> None:
    """In a process of its own: it used to be ended by SIGBUS."""
    before, good, large = snapshot(save=1), snapshot(save=2), snapshot(save=3)
    tensors = safetensors.numpy.save({"weight": np.zeros(20 << 20, np.float32)})
    large = replace(large, files={**large.files, "model.safetensors": tensors})
    commit(node.directory, before)
    fill(node.rank, 1, good, must=True)
    fill(node.rank, 0, large, must=True)
    gives_way = node.keeper._gives_way
    asked: list[Marker] = []

    def cut(marker: Marker, *on_its_way: Any) -> bool:
        asked.extend([marker] if marker.slot == 0 and on_its_way else [])
        if len(asked) == 2:
            os.truncate(node.rank.slot_path(0), part_bytes_for(len(tensors)))  # the first is kept
        return gives_way(marker, *on_its_way)

    monkeypatch.setattr(node.keeper, "_gives_way", cut)

    def persist() -> None:
        saved = [node.keeper.persist_newest(["manual"])] if newest else node.keeper.persist_due()
        assert [one and one.manifest.name for one in saved] == [good.name]

    assert children.exit_code(children.start(persist)) == 0
    assert node.saved() == [before.name, good.name]
    assert node.files(before.name) == before.files
    assert shown(node.rank.complete()) == [(1, 2, False)]
    assert not node.rank.is_claimed(0)
    assert not list((node.directory.root / RUN / "checkpoints").glob(".tmp-*"))


# ---------------------------------------------------------------- restoring


def place(node: Node, slots: list[Snapshot], stored: list[Snapshot]) -> None:
    for taken in stored:
        commit(node.directory, taken)
    for slot, taken in enumerate(slots):
        fill(node.rank, slot, taken)


# in the slots, in the store, and what is found where; as (attempt, save)
PRECEDENCE: dict[str, tuple[list[tuple[int, int]], list[tuple[int, int]], Any]] = {
    "nothing": ([], [], None),
    "a slot": ([(1, 1)], [], ("slot", 1, 1)),
    "the store": ([], [(1, 1)], ("store", 1, 1)),
    "a newer slot": ([(1, 2)], [(1, 1)], ("slot", 1, 2)),
    "a newer store": ([(1, 1)], [(1, 2)], ("store", 1, 2)),
    "the same in both": ([(1, 1)], [(1, 1)], ("slot", 1, 1)),
    "the newer of two slots": ([(1, 3), (1, 2)], [(1, 1)], ("slot", 1, 3)),
    "a slot of a later attempt": ([(2, 1)], [(1, 9)], ("slot", 2, 1)),
    "the store of a later attempt": ([(1, 9)], [(2, 1)], ("store", 2, 1)),
}


@pytest.mark.parametrize(("slots", "stored", "found"), PRECEDENCE.values(), ids=PRECEDENCE)
def test_the_newest_of_slots_and_store_is_restored(
    node: Node, slots: list[tuple[int, int]], stored: list[tuple[int, int]], found: Any
) -> None:
    # The later the attempt, the earlier its steps: neither steps nor clocks decide.
    place(
        node, *[[snapshot(a, s, step=1000 - 100 * a) for a, s in all_] for all_ in (slots, stored)]
    )

    resumption = node.keeper.restore()

    if found is None:
        assert resumption is None
        assert node.given() is None
        return
    source, attempt, save = found
    expected = snapshot(attempt, save, step=1000 - 100 * attempt)
    assert resumption is not None
    assert (resumption.source, resumption.moment) == (source, expected.moment)
    assert resumption.seconds >= 0
    assert node.given() == expected


def test_a_restored_slot_is_kept_until_the_trainer_has_it(node: Node) -> None:
    fill(node.rank, 0, snapshot(save=1))
    fill(node.rank, 1, snapshot(save=2))

    resumption = node.keeper.restore()

    assert resumption is not None
    assert resumption.slot == 1
    assert node.rank.is_claimed(1)
    assert shown(node.rank.complete()) == [(1, 1, False)]
    node.keeper.restored()
    node.keeper.restored()
    assert shown(node.rank.complete()) == [(1, 1, False), (1, 2, False)]


def test_a_slot_that_was_due_when_its_supervisor_died_is_still_due(node: Node) -> None:
    best = snapshot(save=2, triggers=("best",))
    commit(node.directory, snapshot(save=1))
    fill(node.rank, 0, best, must=True)
    node.rank.claim(0)

    keeper = node.start("b" * 16)
    resumption = keeper.restore()
    assert resumption is not None
    assert resumption.source == "slot"
    keeper.restored()

    assert keeper.has_unsaved()
    assert [one.manifest.name for one in keeper.persist_due()] == [best.name]


def test_a_slot_that_no_trainer_came_to_take_is_not_lost(node: Node) -> None:
    """The node goes away while a new trainer is starting: its state is in no store yet."""
    commit(node.directory, snapshot(save=1))
    fill(node.rank, 0, snapshot(save=2))
    node.keeper.restore()
    assert node.keeper.has_unsaved()

    saved = node.keeper.persist_newest(("preemption",))

    assert saved is not None
    assert saved.manifest.name == snapshot(save=2).name
    assert not node.keeper.has_unsaved()


def test_what_came_from_the_store_is_not_saved_again(node: Node) -> None:
    commit(node.directory, snapshot(save=1))
    node.keeper.restore()

    assert not node.keeper.has_unsaved()
    assert node.keeper.persist_newest(("preemption",)) is None
    node.keeper.restored()
    assert node.keeper.persist_newest(("preemption",)) is None
    assert node.keeper.persist_due() == []


def test_files_without_a_manifest_do_not_make_a_slot_durable(node: Node) -> None:
    """An upload that was cut off has a name in the store, and is no checkpoint."""
    fill(node.rank, 0, snapshot(save=2))
    half = checkpoint_folder(node.directory, snapshot(save=2).name)
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")

    resumption = node.keeper.restore()

    assert resumption is not None
    assert resumption.source == "slot"
    assert node.keeper.has_unsaved()


def test_going_back_passes_over_the_slots(node: Node) -> None:
    stored = [snapshot(save=n) for n in (1, 2, 3)]
    place(node, [snapshot(save=4)], stored)

    for go_back, expected in [(1, stored[1]), (2, stored[0]), (9, stored[0])]:
        resumption = node.keeper.restore(go_back)

        assert resumption is not None
        assert (resumption.source, resumption.moment.save) == ("store", expected.moment.save)
        assert node.given() == expected
    assert node.rank.complete() == []


def test_after_going_back_the_way_taken_since_is_the_newer_one(node: Node) -> None:
    place(node, [], [snapshot(1, save) for save in (1, 2, 3)])
    node.keeper.restore(2)
    node.keeper.restored()
    fill(node.rank, 1, snapshot(2, 1, step=150), must=True)
    node.keeper.persist_due()

    node.start("b" * 16).restore()

    given = node.given()
    assert given is not None
    assert given.moment.name == snapshot(2, 1, step=150).moment.name


@pytest.mark.parametrize(
    ("which", "save"), [("best", 2), ("100", 1), (snapshot(save=3).name, 3), ("latest", 4)]
)
def test_a_named_checkpoint_is_restored_whatever_is_newer(
    node: Node, which: str, save: int
) -> None:
    scores = {1: 5.0, 2: 1.0, 3: 3.0, 4: 4.0}
    stored = {n: snapshot(save=n, metrics={"rmse": rmse}) for n, rmse in scores.items()}
    place(node, [snapshot(save=5)], [*stored.values()])
    keeper = node.start(best=("rmse", "min"))

    resumption = keeper.restore(which=which)

    assert resumption is not None
    assert resumption.source == "store"
    assert node.given() == stored[save]


def test_a_name_that_there_is_not_leaves_the_slots_alone(node: Node) -> None:
    place(node, [snapshot(save=2)], [snapshot(save=1)])

    with pytest.raises(UnknownName):
        node.keeper.restore(which="best")

    assert shown(node.rank.complete()) == [(1, 2, False)]
    assert node.keeper.has_unsaved()


def test_a_named_checkpoint_that_is_not_sound_is_an_error(node: Node) -> None:
    place(node, [], [snapshot(save=1), snapshot(save=2)])
    (checkpoint_folder(node.directory, snapshot(save=2).name) / "state.json").write_bytes(b"{}")

    with pytest.raises(NoValidCheckpoint, match="quarantine"):
        node.keeper.restore(which="latest")

    assert node.given() is None


def test_a_corrupt_checkpoint_is_passed_over(node: Node) -> None:
    place(node, [], [snapshot(save=1), snapshot(save=2)])
    path = checkpoint_folder(node.directory, snapshot(save=2).name) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    node.keeper.restore()

    assert node.given() == snapshot(save=1)
    assert node.archive.quarantined() == {snapshot(save=2).name}


def test_a_run_with_nothing_but_corrupt_checkpoints_is_not_begun_anew(node: Node) -> None:
    place(node, [], [snapshot(save=1)])
    (checkpoint_folder(node.directory, snapshot(save=1).name) / "state.json").unlink()

    with pytest.raises(NoValidCheckpoint):
        node.keeper.restore()


@pytest.mark.parametrize("method", ["children", "read", "fetch"])
def test_a_store_that_refuses_is_an_error_and_no_new_beginning(node: Node, method: str) -> None:
    place(node, [], [snapshot(save=1)])
    node.store.refused = {method}

    with pytest.raises(StoreError):
        node.keeper.restore()
    assert node.given() is None

    node.store.refused = set()
    node.keeper.restore()
    assert node.given() == snapshot(save=1)


def test_a_healthy_one_is_preferred_where_that_is_wanted(node: Node) -> None:
    healthy = snapshot(save=1)
    place(node, [snapshot(save=3, healthy=False)], [healthy, snapshot(save=2, healthy=False)])

    node.start().restore()
    given = node.given()
    assert given is not None
    assert given.moment.save == 3

    node.start(prefer_healthy=True).restore()
    assert node.given() == healthy


def test_an_older_healthy_slot_is_newer_than_the_store(node: Node) -> None:
    healthy = snapshot(save=2)
    place(node, [healthy, snapshot(save=3, healthy=False)], [snapshot(save=1)])

    node.start(prefer_healthy=True).restore()

    assert node.given() == healthy


def test_a_claimed_slot_of_a_dead_supervisor_is_found(node: Node) -> None:
    fill(node.rank, 1, snapshot(save=2))
    node.rank.claim(1)

    resumption = node.start("b" * 16).restore()

    assert resumption is not None
    assert (resumption.source, resumption.slot) == ("slot", 1)


# ---------------------------------------------------------------- from another run

OTHER = "pretrained"
THEIRS = snapshot(attempt=12, save=7, step=5000)


def origin(node: Node, *components: str) -> Origin:
    commit(node.directory, THEIRS, OTHER)
    return Origin(Archive(node.store, OTHER), "latest", components)


def test_a_run_can_begin_with_all_of_anothers_checkpoint(node: Node) -> None:
    resumption = node.keeper.restore(origin=origin(node))

    assert resumption is not None
    assert resumption.moment == THEIRS.moment
    assert node.given() == THEIRS


def test_a_run_that_takes_over_components_begins_at_step_0(node: Node) -> None:
    resumption = node.keeper.restore(origin=origin(node, "model", "ema"))

    assert resumption is not None
    assert resumption.moment == replace(THEIRS.moment, step=0)
    marker = node.rank.read_restore()
    assert marker is not None
    assert marker.facts["components"] == ["model", "ema"]


def test_what_a_run_has_of_its_own_comes_before_its_origin(node: Node) -> None:
    fill(node.rank, 1, snapshot(save=1))

    node.keeper.restore(origin=origin(node))

    assert node.given() == snapshot(save=1)


def test_anothers_checkpoint_never_becomes_one_of_this_run(node: Node) -> None:
    node.keeper.restore(origin=origin(node))

    assert not node.keeper.has_unsaved()
    assert node.keeper.persist_newest(("preemption",)) is None
    node.keeper.restored()
    assert node.rank.complete() == []
    fill(node.rank, 1, snapshot(1, 1))
    saved = node.keeper.persist_newest(("preemption",))
    assert saved is not None
    assert node.saved() == [snapshot(1, 1).name]


@pytest.mark.parametrize("killed", [True, False])
def test_anothers_checkpoint_is_fetched_again_by_the_next_attempt(node: Node, killed: bool) -> None:
    """No trainer took it, or the supervisor was killed: it must not pass for a slot of ours."""
    where = origin(node, "model")
    first = node.keeper.restore(origin=where)
    keeper = node.start("b" * 16) if killed else node.keeper

    again = keeper.restore(origin=where)

    assert first is not None
    assert again is not None
    assert again.source == "store"
    assert again.moment == first.moment == replace(THEIRS.moment, step=0)
    assert keeper.persist_newest(()) is None
    keeper.restored()
    assert node.rank.complete() == []
    assert keeper.restore() is None


def test_an_origin_that_is_corrupt_is_an_error_and_stays_as_it_is(node: Node) -> None:
    where = origin(node)
    path = checkpoint_folder(node.directory, THEIRS.name, OTHER) / "state.json"
    path.write_bytes(b"x" * path.stat().st_size)

    with pytest.raises(CheckpointCorrupt):
        node.keeper.restore(origin=where)

    assert not (node.directory.root / OTHER / "quarantine").exists()
    assert node.given() is None


# ---------------------------------------------------------------- beside a save


class SlowSave:
    """The save of one snapshot stops between two parts, and goes on, or fails, when it may.

    `gives_way` is what the save at hand asks before each of its parts.
    """

    def __init__(self, node: Node, taken: Snapshot) -> None:
        self.stopped, self.may_go_on = threading.Event(), threading.Event()
        self.fails = False
        self.gives_way: Callable[[], bool] = bool
        stage, persist = node.directory.stage, node.persister.persist

        def slow_stage(prefix: str, owner: str) -> Any:
            staging = stage(prefix, owner)
            if prefix.endswith(taken.name) and not self.may_go_on.is_set():
                write = staging.write
                staging.write = lambda contents: write([*map(self._slow, contents)])  # type: ignore[method-assign]
            return staging

        def watched(*arguments: Any) -> Any:
            if arguments[0].name == taken.moment.name:
                self.gives_way = arguments[-1]
            return persist(*arguments)

        node.store.stage = slow_stage  # type: ignore[method-assign]
        node.persister.persist = watched  # type: ignore[method-assign]

    def _slow(self, content: Content) -> Content:
        def parts() -> Iterator[Part]:
            for part in content.parts:
                yield part
                self.stopped.set()
                assert self.may_go_on.wait(10)
                if self.fails:
                    raise StoreError("503")

        return Content(content.name, content.part_bytes, parts())


Run = Callable[[Callable[[], Any]], Future[Any]]


@contextmanager
def beside(slow: SlowSave, save: Callable[[], Any]) -> Iterator[tuple[Future[Any], Run]]:
    """The save, stopped in its middle, and what runs something else on a thread of its own."""
    with ThreadPoolExecutor(2) as pool:
        try:
            saving = pool.submit(save)
            assert slow.stopped.wait(10)
            yield saving, pool.submit
        finally:
            slow.may_go_on.set()


@pytest.mark.parametrize("must", [True, False])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("first", ["the save", "the trainer"])
def test_a_slot_is_restored_from_while_it_is_persisted(
    node: Node, first: str, fails: bool, must: bool
) -> None:
    """It goes back to the trainer when both have ended, whichever of them ends first."""
    taken = snapshot(save=1)
    fill(node.rank, 0, taken, must=must)
    slow = SlowSave(node, taken)
    slow.fails = fails
    save = node.keeper.persist_due if must else lambda: node.keeper.persist_newest(())

    with beside(slow, save) as (saving, _):
        resumption = node.keeper.restore()

        assert not saving.done()
        assert resumption is not None
        assert (resumption.source, resumption.slot) == ("slot", 0)
        assert node.given() == taken
        assert node.keeper.has_unsaved()
        if first == "the trainer":
            node.keeper.restored()
            assert node.rank.is_claimed(0)
            assert node.keeper.has_unsaved()
        slow.may_go_on.set()
        assert isinstance(saving.exception(10), StoreError if fails else type(None))

    if first == "the save":
        assert node.rank.is_claimed(0)
        assert node.keeper.has_unsaved() == fails
        assert node.given() == taken
        node.keeper.restored()
    assert shown(node.rank.complete()) == [(1, 1, fails)]
    assert node.keeper.has_unsaved() == fails
    assert node.saved() == ([] if fails else [taken.name])
    assert [one.manifest.name for one in node.keeper.persist_due()] == [taken.name] * fails


def test_the_next_trainer_is_given_what_is_still_being_persisted(node: Node) -> None:
    """The one before it was killed while it restored, and its attempt's save is not done yet."""
    taken = snapshot(save=1)
    fill(node.rank, 0, taken, must=True)
    slow = SlowSave(node, taken)

    with beside(slow, node.keeper.persist_due):
        for _ in range(3):
            resumption = node.keeper.restore()
            assert resumption is not None
            assert resumption.source == "slot"
            assert node.given() == taken
        node.keeper.restored()
        assert node.rank.is_claimed(0)

    assert shown(node.rank.complete()) == [(1, 1, False)]


def test_a_save_that_ends_while_the_store_is_looked_at_is_durable(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = snapshot(save=1)
    fill(node.rank, 0, taken, must=True)
    slow = SlowSave(node, taken)

    with beside(slow, node.keeper.persist_due) as (saving, _):

        def seen_too_early() -> Iterator[Any]:
            slow.may_go_on.set()
            assert saving.result(10)
            return iter(())

        monkeypatch.setattr(node.archive, "manifests", seen_too_early)
        resumption = node.keeper.restore()

    assert resumption is not None
    assert resumption.source == "slot"
    assert not node.keeper.has_unsaved()
    node.keeper.restored()
    assert not node.keeper.has_unsaved()
    assert node.keeper.persist_newest(("preemption",)) is None


@pytest.mark.parametrize(
    "restore",
    [
        lambda keeper: keeper.restore(which=snapshot(save=1).name),
        lambda keeper: keeper.restore(2),  # over the one that is being saved, too
    ],
    ids=["a named one", "going back"],
)
def test_what_is_being_persisted_is_not_overwritten_by_what_is_restored(
    node: Node, restore: Callable[[Keeper], Resumption | None]
) -> None:
    """What comes from the store is laid into slot 0, which is free when the save has ended."""
    stored, taken = snapshot(save=1), snapshot(save=3)
    place(node, [], [stored, snapshot(save=2)])
    fill(node.rank, 0, taken, must=True)
    slow = SlowSave(node, taken)
    fetching = threading.Event()
    fetch = node.directory.fetch

    def watched(key: str, offset: int, into: memoryview) -> None:
        fetching.set()
        fetch(key, offset, into)

    node.store.fetch = watched  # type: ignore[method-assign]
    with beside(slow, node.keeper.persist_due) as (saving, run):
        restoring = run(lambda: restore(node.keeper))
        assert not fetching.wait(0.2)
        assert read_slot(node.rank, node.rank.claimed()[0]) == taken.files
        slow.may_go_on.set()
        resumption = restoring.result(10)
        assert [one.manifest.name for one in saving.result(10)] == [taken.name]

    assert fetching.is_set()
    assert node.files(taken.name) == taken.files
    assert resumption is not None
    assert (resumption.source, resumption.slot) == ("store", 0)
    assert node.given() == stored


Save = Callable[[Keeper], Any]


@pytest.mark.parametrize(
    ("must", "save"),
    [(True, Keeper.persist_due), (False, lambda keeper: keeper.persist_newest(()))],
    ids=["which must be saved", "which a dead trainer left"],
)
def test_an_older_save_gives_way_to_the_newest_and_is_made_up_for(
    node: Node, must: bool, save: Save
) -> None:
    older, newest = snapshot(save=1), snapshot(save=2)
    fill(node.rank, 0, older, must=must)
    slow = SlowSave(node, older)

    with beside(slow, lambda: save(node.keeper)) as (giving_way, run):
        fill(node.rank, 1, newest)
        saving = run(lambda: node.keeper.persist_newest(("preemption",)))
        wait_until(slow.gives_way, what="the newest to be waited for")
        assert node.keeper.has_unsaved()
        slow.may_go_on.set()
        saved = saving.result(10)
        assert not giving_way.result(10)  # it has saved nothing, and that is no failure

    assert isinstance(saved, Saved)
    assert saved.manifest.name == newest.name
    assert saved.manifest.moment.triggers == ("preemption",)
    assert node.saved() == [newest.name]
    assert shown(node.rank.complete()) == [(1, 1, True), (1, 2, False)]
    assert node.keeper.has_unsaved()
    checkpoints = checkpoint_folder(node.directory, newest.name).parent
    assert [path.name for path in checkpoints.iterdir()] == [newest.name]  # and nothing half done

    assert [one.manifest.name for one in node.keeper.persist_due()] == [older.name]
    assert node.files(older.name) == older.files
    assert not node.keeper.has_unsaved()


def test_nothing_older_is_begun_while_the_newest_is_waited_for(node: Node) -> None:
    """Three slots: the first is being saved, the second is due as well, the third is newest."""
    taken = [snapshot(save=n) for n in (1, 2, 3)]
    for slot in (0, 1):
        fill(node.rank, slot, taken[slot], must=True)
    slow = SlowSave(node, taken[0])

    with beside(slow, node.keeper.persist_due) as (due, run):
        fill(node.rank, 2, taken[2], must=True)
        newest = run(lambda: node.keeper.persist_newest(()))
        wait_until(slow.gives_way, what="the newest to be waited for")
        slow.may_go_on.set()
        assert newest.result(10) is not None
        assert due.result(10) == []

    assert node.saved() == [taken[2].name]
    assert [one.manifest.name for one in node.keeper.persist_due()] == [
        one.name for one in taken[:2]
    ]


@pytest.mark.parametrize("must", [True, False])
def test_a_save_of_the_newest_is_waited_for_and_not_made_twice(node: Node, must: bool) -> None:
    taken = snapshot(save=1, triggers=("interval",) if must else ())
    fill(node.rank, 0, taken, must=must)
    slow = SlowSave(node, taken)
    save = node.keeper.persist_due if must else lambda: node.keeper.persist_newest(())

    with beside(slow, save) as (saving, run):
        waiting = run(lambda: node.keeper.persist_newest(("preemption",)))
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        assert not slow.gives_way()
        assert node.keeper.has_unsaved()
        slow.may_go_on.set()
        assert waiting.result(10) is None  # it is durable by now
        assert saving.result(10)

    assert node.saved() == [taken.name]
    assert node.files(taken.name) == taken.files
    assert not node.keeper.has_unsaved()
    assert shown(node.rank.complete()) == [(1, 1, False)]


def test_a_save_of_the_newest_that_fails_is_made_by_the_one_that_waits(node: Node) -> None:
    taken = snapshot(save=1)
    fill(node.rank, 0, taken, must=True)
    slow = SlowSave(node, taken)
    slow.fails = True

    with beside(slow, node.keeper.persist_due) as (saving, run):
        waiting = run(lambda: node.keeper.persist_newest(("preemption",)))
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        slow.may_go_on.set()
        assert isinstance(saving.exception(10), StoreError)
        saved = waiting.result(10)

    assert saved is not None
    assert saved.manifest.moment.triggers == ("preemption",)
    assert node.saved() == [taken.name]
    assert not node.keeper.has_unsaved()


# ---------------------------------------------------------------- fenced


@pytest.mark.parametrize("large", [True, False])
def test_a_fenced_supervisor_persists_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """It hears of it before it moves much, and in any case before it commits."""
    keep_last = node.start(keep=Keep(last=1))
    fill(node.rank, 0, snapshot(save=1), must=True)
    keep_last.persist_due()
    Ledger(node.directory, RUN, "b" * 16).claim("node-2")
    fill(node.rank, 0, snapshot(save=2), must=True)
    before = sorted(node.directory.root.rglob("*"))
    node.store.refused = {"delete", "create", "replace"}
    if large:
        monkeypatch.setattr(persist_module, "_LARGE_BYTES", 1)
        node.store.refused.add("stage")

    for persist in (keep_last.persist_due, lambda: keep_last.persist_newest(("preemption",))):
        with pytest.raises(Fenced):
            persist()

    assert sorted(node.directory.root.rglob("*")) == before
    assert shown(node.rank.complete()) == [(1, 2, True)]


def test_one_that_is_fenced_while_it_writes_leaves_nothing(node: Node) -> None:
    fill(node.rank, 0, snapshot(save=1), must=True)
    stage = node.directory.stage

    def overtaken(prefix: str, owner: str) -> Any:
        Ledger(node.directory, RUN, "b" * 16).claim("node-2")
        return stage(prefix, owner)

    node.store.stage = overtaken  # type: ignore[method-assign]
    with pytest.raises(Fenced):
        node.keeper.persist_due()

    assert list((node.directory.root / RUN / "checkpoints").iterdir()) == []
    assert node.saved() == []


def test_what_dead_attempts_left_unfinished_is_swept_away_and_nothing_else(node: Node) -> None:
    node.start("b" * 16)  # attempt 2
    staged = [
        node.directory.stage(f"{RUN}/checkpoints/{snapshot(attempt).name}", "c" * 16)
        for attempt in (1, 2, 3)
    ]
    for staging in staged:
        staging.write([Content("model.safetensors", 4, [Part(memoryview(b"half"))])])

    assert node.persister.sweep() == [f".tmp-{snapshot(1).name}-{'c' * 16}"]

    assert len(list((node.directory.root / RUN / "checkpoints").iterdir())) == 2
    assert node.persister.sweep() == []


def test_a_store_that_cannot_be_swept_is_no_reason_to_stop(node: Node) -> None:
    node.store.refused = {"sweep"}

    assert node.persister.sweep() == []


# ---------------------------------------------------------------- requests


def ask(node: Node, which: object, number: int = 1) -> dict[str, Any]:
    node.rank.send("fetch.json", {"number": number, "which": which})
    node.keeper.answer()
    reply = node.rank.take("fetched.json")
    assert reply is not None
    assert reply.pop("number") == number
    return reply


def fetched(node: Node, reply: dict[str, Any]) -> dict[str, bytes]:
    memory = (node.rank.folder / "fetched").read_bytes()
    return {i["name"]: memory[i["offset"] : i["offset"] + i["size"]] for i in reply["images"]}


def test_nothing_is_answered_where_nothing_is_asked(node: Node) -> None:
    assert node.keeper.answer() == []
    assert not (node.rank.folder / "fetched.json").exists()


def test_a_saved_checkpoint_is_brought_into_the_spool(node: Node) -> None:
    scores = {1: 5.0, 2: 1.0, 3: 3.0}
    for save, rmse in scores.items():
        commit(node.directory, snapshot(save=save, metrics={"rmse": rmse}))
    node.start(best=("rmse", "min"))
    slots = [fill(node.rank, slot, snapshot(save=4 + slot)) for slot in range(2)]

    for number, (which, save) in enumerate([("best", 2), ("latest", 3), ("100", 1)]):
        reply = ask(node, which, number)
        marker = Marker(**reply)
        assert marker.order == (1, save)
        assert fetched(node, reply) == snapshot(save=save).files
    assert node.rank.complete() == slots


@pytest.fixture
def memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.checkpoint.keeper.available_bytes", lambda folder: 0)


@pytest.mark.usefixtures("memory_is_short")
def test_what_there_is_no_memory_for_is_answered_with_an_error(node: Node) -> None:
    commit(node.directory, snapshot(save=1))
    (node.rank.folder / "fetched").write_bytes(bytes(100))

    assert "there is no memory" in ask(node, "latest")["error"]

    assert not (node.rank.folder / "fetched").exists()


@pytest.mark.usefixtures("memory_is_short")
def test_what_there_is_no_memory_for_is_brought_to_the_disk(node: Node, tmp_path: Path) -> None:
    node.spool.close()
    node.spool = Spool(node.spool.path, disk=tmp_path / "disk")
    node.spool.open()
    node.start()
    commit(node.directory, snapshot(save=1))

    reply = ask(node, "latest")

    assert (node.rank.folder / "fetched").is_symlink()
    assert len(list((tmp_path / "disk").iterdir())) == 1
    assert fetched(node, reply) == snapshot(save=1).files
    node.spool.remove()
    assert list((tmp_path / "disk").iterdir()) == []


def test_one_that_is_still_on_its_way_is_persisted_first(node: Node) -> None:
    fill(node.rank, 0, snapshot(save=1), must=True)

    reply = ask(node, "latest")

    assert fetched(node, reply) == snapshot(save=1).files
    assert node.saved() == [snapshot(save=1).name]


@pytest.mark.parametrize("which", ["best", "latest", "17", "..", None, {"a": 1}])
def test_what_cannot_be_found_is_answered_with_an_error(node: Node, which: object) -> None:
    reply = ask(node, which)

    assert set(reply) == {"error"}
    assert str(which) in reply["error"]


def test_a_checkpoint_that_is_not_sound_is_answered_with_an_error(node: Node) -> None:
    commit(node.directory, snapshot(save=1))
    (checkpoint_folder(node.directory, snapshot(save=1).name) / "state.json").write_bytes(b"{}")

    assert "quarantine" in ask(node, "latest")["error"]


def test_a_store_that_refuses_is_answered_with_an_error(node: Node) -> None:
    commit(node.directory, snapshot(save=1))
    node.store.refused = {"fetch"}

    assert "fetch is refused" in ask(node, "latest")["error"]
    assert not (node.rank.folder / "fetched").exists()


def test_a_fenced_supervisor_answers_and_ends(node: Node) -> None:
    fill(node.rank, 0, snapshot(save=1), must=True)
    Ledger(node.directory, RUN, "b" * 16).claim("node-2")
    node.rank.send("fetch.json", {"number": 3, "which": "latest"})

    with pytest.raises(Fenced):
        node.keeper.answer()

    reply = node.rank.take("fetched.json")
    assert reply is not None
    assert reply["number"] == 3
    assert "error" in reply


# ---------------------------------------------------------------- provenance


def test_provenance_is_what_the_supervisor_knows_and_what_the_trainer_knows(node: Node) -> None:
    node.facts = {"host": "node-1", "git": {"commit": "abc", "dirty": False}}
    fill(node.rank, 0, snapshot(save=1), must=True, facts={"torch": "2.6", "gpus": ["H200"]})

    node.keeper.persist_due()

    provenance = node.archive.manifest(snapshot(save=1).name).provenance
    assert provenance == {
        "host": "node-1",
        "git": {"commit": "abc", "dirty": False},
        "torch": "2.6",
        "gpus": ["H200"],
    }


def test_provenance_is_asked_for_at_each_save(node: Node) -> None:
    for save in (1, 2):
        node.facts = {"asked": save}
        fill(node.rank, 0, snapshot(save=save), must=True)
        node.keeper.persist_due()

    found = [node.archive.manifest(name).provenance for name in node.saved()]
    assert found == [{"asked": 1}, {"asked": 2}]


def test_nothing_of_the_environment_goes_into_the_store(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIK7MDENG")
    fill(node.rank, 0, snapshot(save=1), must=True, facts={"torch": "2.6"})
    node.keeper.persist_due()
    node.keeper.restore()

    for path in node.directory.root.rglob("*"):
        assert path.is_dir() or b"wJalrXUtnFEMIK7MDENG" not in path.read_bytes()


def test_a_resumption_says_where_it_came_from(node: Node) -> None:
    place(node, [], [snapshot(save=1)])

    resumption = node.keeper.restore()

    assert isinstance(resumption, Resumption)
    assert set(asdict(resumption)) == {"moment", "slot", "source", "seconds", "nbytes"}
