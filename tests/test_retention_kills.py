"""A retention run that lets several checkpoints go is killed at each of its calls, and so is the
start that finds what it has left: in a directory at each call that changes the disk, in a bucket at
each request that changes something there.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest
from kills import Killed, kill_everywhere, killed_at
from servers.fixtures import S3Server
from slots import RUN, memory_folder, read_slot, snapshot, views

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.keeper import Keeper
from runner.checkpoint.persist import Persister
from runner.checkpoint.restore import load
from runner.checkpoint.retention import Keep, delete_checkpoint
from runner.spool import Spool
from runner.store import DirectoryStore, Store

FIRST, SECOND, THIRD = "a" * 16, "b" * 16, "c" * 16
KEEP = Keep(last=2, best_metric="rmse")
SAVES = {
    number: snapshot(save=number, metrics={"rmse": abs(5.0 - number)}) for number in range(1, 9)
}
PINNED, BEGUN_FROM, HAS_VERDICT = 2, 3, 4
KEPT, GOING = {PINNED, BEGUN_FROM, 5, 7, 8}, {1, 4, 6}
BY_NAME = {taken.name: taken for taken in SAVES.values()}
Work = Callable[[], object]
Prepare = Callable[[], None]


class Place(Protocol):
    """Where a run lives, and how whatever works there is killed."""

    def opened(self) -> Store:
        """As a supervisor opens it that knows nothing yet."""

    def content(self) -> dict[str, bytes]:
        """All that there is of the run, by its key; what is no object is there without content."""

    def put_back(self, content: Mapping[str, bytes]) -> None:
        """This, and nothing else, is there."""

    def kill_everywhere(self, work: Work, prepare: Prepare) -> Iterator[int]:
        """Yields after each kill, and after the one time that none came."""


@dataclass
class Folder:
    path: Path

    def opened(self) -> Store:
        return DirectoryStore(self.path)

    def content(self) -> dict[str, bytes]:
        run = self.path / RUN
        return {
            str(path.relative_to(run)): path.read_bytes() if path.is_file() else b""
            for path in run.rglob("*")
        }

    def put_back(self, content: Mapping[str, bytes]) -> None:
        shutil.rmtree(self.path / RUN)
        for name, data in content.items():
            path = self.path / RUN / name
            if data:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def kill_everywhere(self, work: Work, prepare: Prepare) -> Iterator[int]:
        return kill_everywhere(work, prepare)


@dataclass
class Prefix:
    open_s3: Callable[..., Store]
    server: S3Server
    prefix: str
    _objects: dict[str, bytes] = field(default_factory=dict)

    def opened(self) -> Store:
        return self.open_s3()

    def content(self) -> dict[str, bytes]:
        uploads = dict.fromkeys(self.server.uploads(self.prefix), b"")
        keys, store = self.server.keys(f"{self.prefix}/{RUN}/"), self.opened()
        return uploads | {key: store.read(f"{RUN}/{key}", 1 << 20) for key in keys}

    def put_back(self, content: Mapping[str, bytes]) -> None:
        store, keys = self.opened(), self.server.keys(f"{self.prefix}/{RUN}/")
        store.delete([f"{RUN}/{key}" for key in keys if key not in content])
        for key, data in content.items():
            if key not in keys or key.startswith("attempts"):
                store.replace(f"{RUN}/{key}", data)

    def kill_everywhere(self, work: Work, prepare: Prepare) -> Iterator[int]:
        for at in itertools.count(1):
            prepare()
            with killed_at(at, after=True, changes_only=True) as count:
                try:
                    work()
                except Killed:
                    assert count[0] == at
                else:
                    assert count[0] < at, "it did not notice that it was killed"
            yield at
            if count[0] < at:
                return


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(params=["directory", pytest.param("bucket", marks=pytest.mark.ceph)])
def place(request: pytest.FixtureRequest, folder: Path) -> Place:
    if request.param == "directory":
        return Folder(folder / "store")
    open_s3, server, prefix = map(request.getfixturevalue, ("open_s3", "s3", "prefix"))
    return Prefix(open_s3, server, prefix)


def fill(place: Place) -> Ledger:
    """A run with more checkpoints than its policy keeps; who has it."""
    store = place.opened()
    ledger = Ledger(store, RUN, FIRST)
    ledger.claim("node")
    saver = Persister(store, ledger, KEEP)
    for taken in SAVES.values():
        saver.persist(taken.moment, views(taken.files))
    ledger.committed(SAVES[8].name, SAVES[8].moment.step)
    ledger.update(resumed_from=SAVES[BEGUN_FROM].name)
    store.create(f"{RUN}/pins/{SAVES[PINNED].name}", b"by hand")
    store.create(f"{RUN}/checkpoints/{SAVES[HAS_VERDICT].name}/validation.json", b"{}")
    return ledger


def retain(place: Place, first: Ledger) -> list[str]:
    """What the supervisor does that has filled it."""
    store = place.opened()
    ledger = Ledger(store, RUN, FIRST)
    ledger.record = first.record
    return Persister(store, ledger, KEEP).retain()


def start(place: Place, folder: Path, owner: str = SECOND) -> Mapping[str, bytes]:
    """What a supervisor elsewhere does: claim, clean up, restore, let old ones go.

    The files that its trainer is given.
    """
    store, spool = place.opened(), Spool(folder / f"spool-{owner}")
    spool.open()
    try:
        ledger = Ledger(store, RUN, owner)
        ledger.claim("another node")
        persister = Persister(store, ledger, KEEP)
        persister.sweep()
        resumption = Keeper(spool.rank, persister, Archive(store, RUN)).restore()
        assert resumption is not None
        ledger.update(resumed_from=str(resumption.moment.name))
        persister.retain()
        marker = spool.rank.read_restore()
        assert marker is not None
        return read_slot(spool.rank, marker)
    finally:
        spool.remove()


def whole(store: Store) -> set[int]:
    """The saves that a restore may give, however far it goes back.

    Fails if one of them has a manifest, and not bit for bit the files that were saved.
    """
    archive, found = Archive(store, RUN), set()
    for manifest in archive.manifests():
        memory = bytearray()

        def allocate(nbytes: int, memory: bytearray = memory) -> memoryview:
            memory.extend(bytes(nbytes))
            return memoryview(memory)

        loaded = load(archive, manifest, allocate)
        assert loaded is not None, f"{manifest.name} has a manifest and is not whole"
        for image in loaded.layout.images:
            content = memory[image.offset : image.offset + image.size]
            assert content == BY_NAME[manifest.name].files[image.name]
        found.add(manifest.moment.save)
    assert store.children(f"{RUN}/quarantine") == []
    return found


def in_the_end(place: Place) -> dict[str, bytes]:
    """What there is, but for who has tried it, and when."""
    others = {k: v for k, v in place.content().items() if not k.startswith("attempts/0")}
    latest = others.pop("latest.json")
    assert SAVES[8].name.encode() in latest
    return others


def undisturbed(place: Place, folder: Path, first: Ledger) -> dict[str, bytes]:
    """What there is in the end when nothing is killed."""
    assert retain(place, first) == [SAVES[number].name for number in sorted(GOING)]
    assert start(place, folder) == SAVES[8].files
    assert whole(place.opened()) == KEPT - {BEGUN_FROM}
    return in_the_end(place)


def test_a_kill_at_any_call_of_a_retention_run_loses_nothing_and_the_next_start_ends_it(
    place: Place, folder: Path
) -> None:
    first = fill(place)
    begun = place.content()
    expected = undisturbed(place, folder, first)
    found = []

    for at in place.kill_everywhere(lambda: retain(place, first), lambda: place.put_back(begun)):
        there = whole(place.opened())
        assert there >= KEPT, f"one that is kept is lost after a kill at call {at}"
        found.append(len(there))

        assert start(place, folder) == SAVES[8].files
        assert in_the_end(place) == expected, f"after a kill at call {at}"

    assert found == sorted(found, reverse=True), "one was gone, and then it was there again"
    assert set(found) >= {len(KEPT) + left for left in range(len(GOING))}


def test_a_kill_at_any_call_of_the_start_that_ends_it_loses_nothing(
    place: Place, folder: Path
) -> None:
    """One is half deleted, another is still to go."""
    first = fill(place)
    full = place.content()
    expected = undisturbed(place, folder, first)
    place.put_back(full)
    store = place.opened()
    delete_checkpoint(store, first, SAVES[1].name)
    for name in ("manifest.json", "model.safetensors"):
        store.delete([f"{RUN}/checkpoints/{SAVES[4].name}/{name}"])
    begun, kills = place.content(), 0

    for at in place.kill_everywhere(lambda: start(place, folder), lambda: place.put_back(begun)):
        there = whole(place.opened())
        assert KEPT - {BEGUN_FROM} <= there <= KEPT | {6}, f"after a kill at call {at}"
        kills = at

        assert start(place, folder, THIRD) == SAVES[8].files
        assert in_the_end(place) == expected, f"after a kill at call {at}"

    assert kills > 5
