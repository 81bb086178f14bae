from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from slots import (
    RUN,
    RefusingStore,
    Snapshot,
    checkpoint_folder,
    commit,
    file_entry,
    memory_folder,
    snapshot,
)

from runner.checkpoint import format as fmt
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.manifest import Manifest
from runner.checkpoint.restore import Loaded, load, load_newest
from runner.checkpoint.retention import delete_checkpoint
from runner.errors import (
    CheckpointCorrupt,
    CheckpointInvalid,
    NotFound,
    NoValidCheckpoint,
    SpoolFull,
    StoreError,
    UnknownName,
)
from runner.store import DirectoryStore, Stored

OLD, NEW = snapshot(save=1), snapshot(save=2)
FILES = sorted(NEW.files)


@pytest.fixture
def store() -> Iterator[DirectoryStore]:
    with memory_folder() as folder:
        yield DirectoryStore(folder)


def bytes_of(loaded: Loaded, memory: bytearray) -> dict[str, bytes]:
    return {
        image.name: bytes(memory[image.offset : image.offset + image.size])
        for image in loaded.layout.images
    }


def restored(store: Any, **options: Any) -> Snapshot | None:
    """What a restore finds: the moment and the bytes of its files."""
    memory = bytearray()

    def allocate(nbytes: int) -> memoryview:
        nonlocal memory
        memory = bytearray(b"\xee" * nbytes)
        return memoryview(memory)

    loaded = load_newest(Archive(store, RUN), Ledger(store, RUN, ""), allocate, **options)
    if loaded is None:
        return None
    return Snapshot(loaded.manifest.moment, bytes_of(loaded, memory))


def quarantined(store: DirectoryStore) -> dict[str, dict[str, str]]:
    folder = store.root / RUN / "quarantine"
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


# ---------------------------------------------------------------- what is there


def test_checkpoints_are_listed_newest_first(store: DirectoryStore) -> None:
    for attempt, save, step in [(1, 1, 900), (1, 2, 950), (2, 1, 100), (10, 1, 50), (2, 2, 100)]:
        commit(store, snapshot(attempt, save, step))
    for name in ("notes.txt", "step-1-a1-s1", ".DS_Store"):
        (store.root / RUN / "checkpoints" / name).touch()

    names = Archive(store, RUN).names()

    assert [(n.attempt, n.save) for n in names] == [(10, 1), (2, 2), (2, 1), (1, 2), (1, 1)]
    assert [m.name for m in Archive(store, RUN).manifests()] == [str(name) for name in names]


def test_a_run_without_checkpoints_has_none(store: DirectoryStore) -> None:
    archive = Archive(store, RUN)

    assert archive.names() == []
    assert archive.quarantined() == set()
    assert restored(store) is None


def test_what_is_in_quarantine_is_not_listed(store: DirectoryStore) -> None:
    commit(store, OLD)
    commit(store, NEW)
    archive = Archive(store, RUN)

    archive.quarantine(NEW.name, "a bit flipped")
    archive.quarantine(NEW.name, "found again")

    assert archive.names() == [OLD.moment.name]
    assert archive.quarantined() == {NEW.name}
    note = quarantined(store)[NEW.name]
    assert (note["checkpoint"], note["reason"]) == (NEW.name, "a bit flipped")


def test_a_checkpoint_is_restored_bit_for_bit(store: DirectoryStore) -> None:
    commit(store, OLD)
    commit(store, NEW)

    assert restored(store) == NEW


@pytest.mark.parametrize("part_bytes", [64, 100, 1 << 20])
def test_a_checkpoint_of_many_parts_is_restored_bit_for_bit(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    monkeypatch.setattr(fmt, "part_bytes_for", lambda size: part_bytes)
    taken = Snapshot(NEW.moment, {**NEW.files, "empty.bin": b"", "exact.bin": b"x" * 200})
    manifest = commit(store, taken)

    assert restored(store) == taken
    Archive(store, RUN).verify(manifest)


def test_files_lie_in_memory_as_in_a_slot(store: DirectoryStore) -> None:
    layout = Archive(store, RUN).layout(commit(store, NEW))

    fmt.check_images(layout.images, layout.nbytes, "memory")
    assert {image.name: image.size for image in layout.images} == {
        name: len(content) for name, content in NEW.files.items()
    }
    assert all(image.offset % 4096 == 0 for image in layout.images)


# ---------------------------------------------------------------- damage

Damage = Callable[[Path], None]


def flip(name: str, at: int) -> Damage:
    """Flip a bit of a byte; `at` counts thousandths of the file."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[(len(content) - 1) * at // 1000] ^= 1 << (at % 8)
        (folder / name).write_bytes(content)

    return damage


def cut(name: str, thousandths: int) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: (len(content) - 1) * thousandths // 1000])

    return damage


def extend(name: str) -> Damage:
    def damage(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(b"\0")

    return damage


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def rewrite(**changes: Any) -> Damage:
    """Another manifest, whose digest is right."""

    def damage(folder: Path) -> None:
        manifest = Manifest.from_json((folder / "manifest.json").read_bytes(), folder.name)
        (folder / "manifest.json").write_bytes(replace(manifest, **changes).to_json())

    return damage


def another_version(folder: Path) -> None:
    document = json.loads((folder / "manifest.json").read_text()) | {"format": 2}
    (folder / "manifest.json").write_text(json.dumps(document))


def swap(folder: Path) -> None:
    one, other = folder / "model.safetensors", folder / "optimizer.safetensors"
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


def huge_manifest(folder: Path) -> None:
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate((64 << 20) + 1)


def from_the_one_before(name: str) -> Damage:
    return lambda folder: shutil.copy(folder.parent / OLD.name / name, folder / name)


STATE = file_entry("state.json", NEW.files["state.json"])
DAMAGES: dict[str, Damage] = (
    {f"{name}: a bit at {at}": flip(name, at) for name in FILES for at in range(0, 1001, 125)}
    | {f"{name}: cut at {at}": cut(name, at) for name in FILES for at in (0, 500, 1000)}
    | {f"{name}: a byte more": extend(name) for name in FILES}
    | {f"{name}: missing": remove(name) for name in FILES}
    | {f"{name}: of the one before": from_the_one_before(name) for name in FILES}
    | {f"the manifest: cut at {at}": cut("manifest.json", at) for at in (0, 1, 500, 999)}
    | {
        f"the manifest names {name!r}": rewrite(files=(STATE, file_entry(name, b"x")))
        for name in ("../state.json", "/etc/passwd", "a/b", "..", "a\0b", "manifest.json")
    }
    | {
        "the manifest: of another version": another_version,
        "the manifest: of the one before": from_the_one_before("manifest.json"),
        "the manifest: huge": huge_manifest,
        "the manifest: files that are not there": rewrite(
            files=(STATE, file_entry("ema.safetensors", b"x"))
        ),
        "the manifest: a huge size": rewrite(
            files=(STATE, replace(file_entry("model.safetensors", b"x"), size=1 << 50,
                                  part_bytes=1 << 50))
        ),
        "two files swapped": swap,
    }
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_goes_into_quarantine_and_the_one_before_is_restored(
    store: DirectoryStore, damage: Damage
) -> None:
    commit(store, OLD)
    commit(store, NEW)
    folder = checkpoint_folder(store, NEW.name)
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    assert restored(store) == OLD

    assert set(quarantined(store)) == {NEW.name}
    assert quarantined(store)[NEW.name]["reason"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert restored(store) == OLD  # and it is not looked at again


def test_any_flipped_bit_of_a_manifest_is_found_or_means_nothing(store: DirectoryStore) -> None:
    commit(store, OLD)
    commit(store, NEW)
    folder = checkpoint_folder(store, NEW.name)
    for at in range(0, 1001, 20):
        flip("manifest.json", at)(folder)
        found = restored(store)
        flip("manifest.json", at)(folder)
        shutil.rmtree(store.root / RUN / "quarantine", ignore_errors=True)

        assert found in (OLD, NEW)
    assert restored(store) == NEW


def test_a_checkpoint_without_a_manifest_is_none(store: DirectoryStore) -> None:
    commit(store, OLD)
    commit(store, NEW)
    (checkpoint_folder(store, NEW.name) / "manifest.json").unlink()

    assert restored(store) == OLD
    assert quarantined(store) == {}


@pytest.mark.parametrize("damage", [flip("state.json", 500), another_version, remove(FILES[0])])
def test_a_run_whose_checkpoints_are_all_bad_is_never_begun_anew(
    store: DirectoryStore, damage: Damage
) -> None:
    for taken in (OLD, NEW):
        commit(store, taken)
        damage(checkpoint_folder(store, taken.name))

    for _ in range(2):  # the second time they are in quarantine already
        with pytest.raises(NoValidCheckpoint, match="quarantine"):
            restored(store)

    assert set(quarantined(store)) == {OLD.name, NEW.name}


def test_a_run_whose_checkpoints_have_vanished_is_never_begun_anew(store: DirectoryStore) -> None:
    ledger = Ledger(store, RUN, "a")
    ledger.claim("node")
    commit(store, OLD)
    ledger.update(committed=OLD.name)
    shutil.rmtree(checkpoint_folder(store, OLD.name))

    with pytest.raises(NoValidCheckpoint, match=OLD.name):
        restored(store)


def test_an_attempt_that_has_saved_nothing_begins_at_the_start(store: DirectoryStore) -> None:
    Ledger(store, RUN, "a").claim("node")

    assert restored(store) is None


# ---------------------------------------------------------------- what is no proof of corruption


@pytest.mark.parametrize("method", ["children", "read", "stored", "fetch"])
def test_a_store_that_refuses_proves_nothing(store: DirectoryStore, method: str) -> None:
    commit(store, OLD)
    commit(store, NEW)

    with pytest.raises(StoreError):
        restored(RefusingStore(store, [method]))

    assert quarantined(store) == {}
    assert restored(store) == NEW


class DeletingStore(RefusingStore):
    """Another supervisor's retention deletes a checkpoint while it is being read."""

    def __init__(self, store: DirectoryStore, name: str, at: int) -> None:
        super().__init__(store)
        self._name, self._left = name, at

    def _one_less(self, key: str) -> None:
        if self._name in key:
            if self._left == 0:
                delete_checkpoint(self.store, Ledger(self.store, RUN, ""), self._name)
            self._left -= 1

    def read(self, key: str, limit: int) -> bytes:
        self._one_less(key)
        return self.store.read(key, limit)

    def stored(self, key: str) -> Stored:
        self._one_less(key)
        return self.store.stored(key)

    def fetch(self, key: str, offset: int, into: memoryview) -> None:
        self._one_less(key)
        self.store.fetch(key, offset, into)


@pytest.mark.parametrize("at", range(7))  # 1 manifest, 3 sizes, 3 files
def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_corrupt(
    store: DirectoryStore, at: int
) -> None:
    commit(store, OLD)
    commit(store, NEW)

    assert restored(DeletingStore(store, NEW.name, at)) == OLD

    assert quarantined(store) == {}
    assert not checkpoint_folder(store, NEW.name).exists()


def test_memory_that_is_short_is_no_corruption(store: DirectoryStore) -> None:
    commit(store, NEW)

    def allocate(nbytes: int) -> memoryview:
        raise SpoolFull(f"no {nbytes} bytes")

    with pytest.raises(SpoolFull):
        load_newest(Archive(store, RUN), Ledger(store, RUN, ""), allocate)
    assert quarantined(store) == {}


def test_no_memory_is_asked_for_before_the_sizes_are_known_to_be_true(
    store: DirectoryStore,
) -> None:
    manifest = commit(store, NEW)
    extend("state.json")(checkpoint_folder(store, NEW.name))
    asked: list[int] = []

    def allocate(nbytes: int) -> memoryview:
        asked.append(nbytes)
        return memoryview(bytearray(nbytes))

    assert load(Archive(store, RUN), manifest, allocate) is None
    assert asked == []
    assert set(quarantined(store)) == {NEW.name}


# ---------------------------------------------------------------- which one

# (save, healthy, damaged), the newest last; how far to go back; healthy ones first; which is found
CHOICES: dict[str, tuple[list[tuple[int, bool, bool]], int, bool, int]] = {
    "the newest": ([(1, True, False), (2, True, False), (3, True, False)], 0, False, 3),
    "one back": ([(1, True, False), (2, True, False), (3, True, False)], 1, False, 2),
    "two back": ([(1, True, False), (2, True, False), (3, True, False)], 2, False, 1),
    "never past the oldest": ([(1, True, False), (2, True, False)], 7, False, 1),
    "the only one": ([(1, True, False)], 3, False, 1),
    "one back from a bad one": (
        [(1, True, False), (2, True, True), (3, True, False)], 1, False, 1),
    "back to a bad oldest": ([(1, True, True), (2, True, False), (3, True, False)], 2, False, 2),
    "back to bad ones": ([(1, True, True), (2, True, True), (3, True, False)], 2, False, 3),
    "an unhealthy one, by default": ([(1, True, False), (2, False, False)], 0, False, 2),
    "the newest healthy one": (
        [(1, True, False), (2, True, False), (3, False, False)], 0, True, 2),
    "the healthy one before a bad healthy one": (
        [(1, True, False), (2, True, True), (3, False, False)], 0, True, 1),
    "an unhealthy one rather than none": (
        [(1, True, True), (2, False, False), (3, False, False)], 0, True, 3),
    "back among the healthy": (
        [(1, True, False), (2, True, False), (3, False, False)], 1, True, 1),
    "never past the oldest healthy one": (
        [(1, True, False), (2, True, False), (3, False, False)], 5, True, 1),
    "back among the unhealthy, if there are no others": (
        [(1, False, False), (2, False, False)], 1, True, 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("saved", "skip", "prefer_healthy", "found"), CHOICES.values(), ids=CHOICES
)
def test_a_restore_chooses(
    store: DirectoryStore,
    saved: list[tuple[int, bool, bool]],
    skip: int,
    prefer_healthy: bool,
    found: int,
) -> None:
    for save, healthy, damaged in saved:
        taken = snapshot(save=save, healthy=healthy)
        commit(store, taken)
        if damaged:
            flip("state.json", 500)(checkpoint_folder(store, taken.name))

    chosen = restored(store, skip=skip, prefer_healthy=prefer_healthy)

    assert chosen is not None
    assert chosen.moment.save == found
    assert chosen.files == snapshot(save=found).files


def test_weights_alone_are_not_continued_from(store: DirectoryStore) -> None:
    commit(store, OLD)
    commit(store, snapshot(save=2, scope="weights"))

    assert restored(store) == OLD


def test_a_torn_record_of_an_attempt_does_not_keep_a_run_from_continuing(
    store: DirectoryStore,
) -> None:
    Ledger(store, RUN, "a").claim("node")
    (store.root / RUN / "attempts" / "000001.json").write_text("{")
    commit(store, NEW)

    assert restored(store) == NEW


# ---------------------------------------------------------------- by name


@pytest.fixture
def archive(store: DirectoryStore) -> Archive:
    for save, rmse in [(1, 5.0), (2, 3.0), (3, 4.0)]:
        commit(store, snapshot(1, save, metrics={"rmse": rmse}))
    commit(store, snapshot(2, 1, 200, metrics={"rmse": 9.0}))
    return Archive(store, RUN)


@pytest.mark.parametrize(
    ("which", "options", "name"),
    [
        ("latest", (), "step-000000200-a0002-s001"),
        ("best", ("rmse",), "step-000000200-a0001-s002"),
        ("best", ("rmse", "min"), "step-000000200-a0001-s002"),
        ("best", ("rmse", "max"), "step-000000200-a0002-s001"),
        ("100", (), "step-000000100-a0001-s001"),
        ("000100", (), "step-000000100-a0001-s001"),
        ("200", (), "step-000000200-a0002-s001"),  # the way taken since is the newer one
        ("step-000000300-a0001-s003", (), "step-000000300-a0001-s003"),
    ],
)
def test_a_checkpoint_is_found(
    archive: Archive, which: str, options: tuple[str, ...], name: str
) -> None:
    assert archive.find(which, *options).name == name


@pytest.mark.parametrize(
    ("which", "metric"),
    [
        ("best", None),
        ("best", "loss"),
        ("150", None),
        ("٢٠٠", None),
        ("9" * 5000, None),
        ("", None),
        ("..", None),
        ("step-000000300-a0001-s004", None),
        ("step-000000300-a0001-s003/", None),
    ],
)
def test_what_there_is_not_is_not_found(archive: Archive, which: str, metric: str | None) -> None:
    with pytest.raises(UnknownName):
        archive.find(which, metric)


def test_a_name_that_is_nearly_right_is_answered_with_the_nearest(archive: Archive) -> None:
    with pytest.raises(UnknownName, match="step-000000300-a0001-s003") as caught:
        archive.find("step-000000300-a0001-s03")
    assert "did you mean" in str(caught.value)
    with pytest.raises(UnknownName, match="did you mean 300"):
        archive.find("3000")


def test_where_there_is_no_best_it_is_said_why(archive: Archive) -> None:
    with pytest.raises(UnknownName, match=f"'best' of run {RUN}; the job has no keep.best"):
        archive.find("best")
    with pytest.raises(UnknownName, match="none has the metric loss"):
        archive.find("best", "loss")


def test_the_latest_of_no_checkpoints_is_unknown(store: DirectoryStore) -> None:
    with pytest.raises(UnknownName):
        Archive(store, RUN).find("latest")


def test_a_checkpoint_in_quarantine_is_not_found(archive: Archive) -> None:
    archive.quarantine("step-000000300-a0001-s003", "a bit flipped")

    with pytest.raises(UnknownName):
        archive.find("step-000000300-a0001-s003")


def test_one_that_is_named_and_unreadable_is_said_to_be_so(
    archive: Archive, store: DirectoryStore
) -> None:
    name = "step-000000300-a0001-s003"
    another_version(checkpoint_folder(store, name))

    with pytest.raises(CheckpointInvalid, match="format 2"):
        archive.find(name)
    with pytest.raises(UnknownName):
        archive.find("300")


def test_one_that_is_named_and_has_no_manifest_is_not_there(
    archive: Archive, store: DirectoryStore
) -> None:
    name = "step-000000300-a0001-s003"
    (checkpoint_folder(store, name) / "manifest.json").unlink()

    with pytest.raises(NotFound):
        archive.find(name)


# ---------------------------------------------------------------- verifying


def test_a_sound_checkpoint_is_verified_in_silence(store: DirectoryStore) -> None:
    Archive(store, RUN).verify(commit(store, NEW))


@pytest.mark.parametrize(
    "damage",
    [
        *(flip(name, at) for name in FILES for at in (0, 500, 1000)),
        *(cut(name, 500) for name in FILES),
        *(extend(name) for name in FILES),
        *(remove(name) for name in FILES),
        swap,
    ],
)
@pytest.mark.parametrize("part_bytes", [50, 1 << 20])
def test_verifying_finds_any_damage_and_changes_nothing(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, damage: Damage, part_bytes: int
) -> None:
    monkeypatch.setattr(fmt, "part_bytes_for", lambda size: part_bytes)
    manifest = commit(store, NEW)
    damage(checkpoint_folder(store, NEW.name))

    with pytest.raises(CheckpointCorrupt) as caught:
        Archive(store, RUN).verify(manifest)

    assert caught.value.checkpoint == NEW.name
    assert quarantined(store) == {}


def test_verifying_what_was_deleted_meanwhile_finds_nothing(store: DirectoryStore) -> None:
    manifest = commit(store, NEW)
    shutil.rmtree(checkpoint_folder(store, NEW.name))

    with pytest.raises(NotFound):
        Archive(store, RUN).verify(manifest)


def test_the_digest_is_that_of_the_content(store: DirectoryStore) -> None:
    manifest = commit(store, NEW)

    digest = Archive(store, RUN).digest(manifest)

    assert digest == fmt.content_digest({n: memoryview(c) for n, c in NEW.files.items()})
    same = Snapshot(replace(NEW.moment, attempt=7, save=9, created_at="later"), NEW.files)
    assert Archive(store, RUN).digest(commit(store, same)) == digest
    other = snapshot(save=3)
    assert Archive(store, RUN).digest(commit(store, other)) != digest


def test_there_is_no_digest_of_bytes_that_are_not_verified(store: DirectoryStore) -> None:
    manifest = commit(store, NEW)
    flip("model.safetensors", 999)(checkpoint_folder(store, NEW.name))

    with pytest.raises(CheckpointCorrupt):
        Archive(store, RUN).digest(manifest)
