from __future__ import annotations

import contextlib
import io
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from kills import fork, kill_everywhere, opening_with, wait_for
from slots import RUN, Snapshot, checkpoint_folder, memory_folder, small_disk, snapshot, views

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.persist import Persister
from runner.checkpoint.restore import load_newest
from runner.checkpoint.retention import Keep
from runner.errors import NotFound, StoreError
from runner.store import Content, DirectoryStore, Part, Staging, Stored, open_store

OWNER = "0123456789abcdef"
MANIFEST = "manifest.json"


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def write(staging: Staging, name: str, *parts: bytes) -> tuple[bytes, ...]:
    """Store one file; the digests of its parts."""
    pieces = [Part(memoryview(part)) for part in parts]
    [digests] = staging.write([Content(name, len(parts[0]) if parts else 1, pieces)])
    return digests


def tree(folder: Path) -> list[str]:
    """Everything below a folder, directories with a slash."""
    return sorted(
        f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}" for path in folder.rglob("*")
    )


# ---------------------------------------------------------------- single objects


def test_an_object_is_read_as_it_was_created(store: DirectoryStore) -> None:
    assert store.create("run/a/b.json", b"content")

    assert store.read("run/a/b.json", 100) == b"content"
    assert store.stored("run/a/b.json") == Stored(7)
    assert store.url == str(store.root)


def test_what_is_there_is_not_created_again(store: DirectoryStore) -> None:
    store.create("run/a", b"first")

    assert not store.create("run/a", b"second")
    assert store.read("run/a", 100) == b"first"
    assert tree(store.root / "run") == ["a"]


def test_replacing_needs_nothing_there(store: DirectoryStore) -> None:
    store.replace("run/a", b"first")
    store.replace("run/a", b"second, and longer")

    assert store.read("run/a", 100) == b"second, and longer"
    assert tree(store.root / "run") == ["a"]


@pytest.mark.parametrize("method", ["read", "stored", "fetch"])
def test_what_is_not_there_is_not_found(store: DirectoryStore, method: str) -> None:
    store.create("run/file", b"x")
    arguments = {"read": (10,), "stored": (), "fetch": (0, memoryview(bytearray(1)))}[method]

    for key in ("run/a", "other/a", "run/file/a"):
        with pytest.raises(NotFound):
            getattr(store, method)(key, *arguments)


def test_an_object_larger_than_the_limit_is_not_read(store: DirectoryStore) -> None:
    store.create("run/a", b"x" * 100)

    assert len(store.read("run/a", 100)) == 100
    with pytest.raises(StoreError, match="larger than 99 bytes") as caught:
        store.read("run/a", 99)
    assert not isinstance(caught.value, NotFound)


def test_a_range_is_fetched_into_the_memory_that_is_given(store: DirectoryStore) -> None:
    store.create("run/a", bytes(range(100)))
    memory = bytearray(b"\xff" * 12)

    store.fetch("run/a", 90, memoryview(memory)[1:11])
    store.fetch("run/a", 100, memoryview(memory)[0:0])

    assert bytes(memory) == b"\xff" + bytes(range(90, 100)) + b"\xff"


@pytest.mark.parametrize("offset", [91, 100, 1000])
def test_a_range_past_the_end_is_no_answer(store: DirectoryStore, offset: int) -> None:
    store.create("run/a", bytes(100))

    with pytest.raises(StoreError, match="ends at") as caught:
        store.fetch("run/a", offset, memoryview(bytearray(10)))
    assert not isinstance(caught.value, NotFound)


def test_children_are_sorted_and_do_not_show_what_is_unfinished(store: DirectoryStore) -> None:
    for key in ("run/b", "run/a/deep", "other/c"):
        store.create(key, b"")
    store.stage("run/checkpoint", OWNER)
    (store.root / "run" / ".tmp-b-123").touch()

    assert store.children("run") == ["a", "b"]
    assert store.children("") == ["other", "run"]
    assert store.children("run/none") == []
    assert DirectoryStore(store.root / "nowhere").children("") == []


def test_objects_are_deleted_in_the_order_given(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["run/c/manifest", "run/c/b", "run/c/a"]
    for key in keys:
        store.create(key, b"")
    gone: list[str] = []
    unlink = os.unlink
    monkeypatch.setattr(os, "unlink", lambda path: (gone.append(str(path)), unlink(path)))

    store.delete([keys[0], "run/c/never-there", *keys[1:]])

    there = [str(store.root / key) for key in keys]
    assert [path for path in gone if path in there] == there
    assert store.children("run") == []


def test_deleting_what_is_not_there_is_no_error(store: DirectoryStore) -> None:
    store.create("run/a", b"")

    store.delete(["run/b", "run/none/b", "none/b"])

    assert store.children("run") == ["a"]


def test_a_store_is_opened_by_its_directory(tmp_path: Path) -> None:
    opened = open_store(str(tmp_path))

    assert isinstance(opened, DirectoryStore)
    assert opened.root == tmp_path


# ---------------------------------------------------------------- keys

BAD_KEYS = ["", "..", ".", "a/..", "../a", "a/../../b", "a/./b", "/etc/passwd", "/", "a//b", "a/",
            "a\0b", "a/b\0"]  # fmt: skip
CALLS: dict[str, Callable[[DirectoryStore, str], Any]] = {
    "read": lambda store, key: store.read(key, 10),
    "stored": lambda store, key: store.stored(key),
    "fetch": lambda store, key: store.fetch(key, 0, memoryview(bytearray(1))),
    "create": lambda store, key: store.create(key, b"x"),
    "replace": lambda store, key: store.replace(key, b"x"),
    "delete": lambda store, key: store.delete([key]),
    "stage": lambda store, key: store.stage(key, OWNER),
    "sweep": lambda store, key: store.sweep(key, lambda name: True),
    "children": lambda store, key: store.children(key or ".."),  # "" is the root
}


@pytest.mark.parametrize("key", BAD_KEYS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_key_leads_out_of_the_store(
    store: DirectoryStore, call: Callable[[DirectoryStore, str], Any], key: str
) -> None:
    store.create("a/b", b"inside")
    (store.root.parent / "b").write_text("outside")
    before = tree(store.root.parent)

    with pytest.raises(StoreError, match="is no key"):
        call(store, key)

    assert tree(store.root.parent) == before


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../b", "/b", "a\0b"])
def test_no_file_of_a_checkpoint_leads_out_of_it(store: DirectoryStore, name: str) -> None:
    staging = store.stage("run/c", OWNER)
    before = tree(store.root)

    with pytest.raises(StoreError):
        write(staging, name, b"x")
    with pytest.raises(StoreError):
        staging.commit(name, b"x")

    assert tree(store.root) == before


# ---------------------------------------------------------------- races


def test_one_of_sixteen_threads_creates(store: DirectoryStore) -> None:
    barrier = threading.Barrier(16)

    def create(number: int) -> bool:
        barrier.wait()
        return store.create(f"run/attempts/{round_}", str(number).encode())

    with ThreadPoolExecutor(16) as pool:
        for round_ in range(8):
            won = list(pool.map(create, range(16)))
            assert won.count(True) == 1
            assert store.read(f"run/attempts/{round_}", 10) == str(won.index(True)).encode()
    assert tree(store.root / "run" / "attempts") == [str(number) for number in range(8)]


def test_one_of_several_processes_creates() -> None:
    with memory_folder() as folder:
        store = DirectoryStore(folder)
        for round_ in range(10):
            gate, opener = os.pipe()
            start = partial(race, gate, opener, store, round_)
            children = [fork(start) for _ in range(5)]
            os.close(gate)
            os.close(opener)  # the last end of it: all of them read on

            codes = [wait_for(child) for child in children]

            assert sorted(codes) == [0, 1, 1, 1, 1]
            winner = children[codes.index(0)]
            assert store.read(f"run/{round_}", 100) == str(winner).encode()


def race(gate: int, opener: int, store: DirectoryStore, round_: int) -> int:
    os.close(opener)
    os.read(gate, 1)
    return 0 if store.create(f"run/{round_}", str(os.getpid()).encode()) else 1


def test_whoever_reads_sees_the_old_or_the_new() -> None:
    with memory_folder() as folder:
        store = DirectoryStore(folder)
        store.replace("run/a", b"0" * 70_000)
        over = threading.Event()
        seen: list[bytes] = []

        def read() -> None:
            while not over.is_set():
                seen.append(store.read("run/a", 1 << 20))

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(300):
            store.replace("run/a", str(number % 10).encode() * (1000 * (number % 70) + 1))
        over.set()
        reader.join()

        assert seen
        assert all(content == content[:1] * len(content) for content in seen)
        assert all(content for content in seen)


# ---------------------------------------------------------------- staging


def test_nothing_is_there_before_the_commit_and_all_of_it_after(store: DirectoryStore) -> None:
    staging = store.stage("run/checkpoints/c", OWNER)
    write(staging, "model", b"one", b"two", b"")
    write(staging, "empty")
    assert store.children("run/checkpoints") == []

    staging.commit(MANIFEST, b"{}")

    assert tree(store.root / "run") == [
        "checkpoints/",
        "checkpoints/c/",
        "checkpoints/c/empty",
        "checkpoints/c/manifest.json",
        "checkpoints/c/model",
    ]
    assert store.read("run/checkpoints/c/model", 100) == b"onetwo"


def test_after_an_abort_nothing_is_left(store: DirectoryStore) -> None:
    staging = store.stage("run/checkpoints/c", OWNER)
    write(staging, "model", b"one")

    staging.abort()
    staging.abort()

    assert tree(store.root / "run" / "checkpoints") == []


def test_a_committed_checkpoint_is_never_changed_again(store: DirectoryStore) -> None:
    first = store.stage("run/c", OWNER)
    first.commit(MANIFEST, b"first")

    second = store.stage("run/c", "fedcba9876543210")
    write(second, "model", b"x")
    with pytest.raises(StoreError):
        second.commit(MANIFEST, b"second")
    second.abort()

    assert tree(store.root / "run") == ["c/", "c/manifest.json"]
    assert store.read("run/c/manifest.json", 10) == b"first"


def test_two_writers_do_not_get_into_each_others_files(store: DirectoryStore) -> None:
    one, other = store.stage("run/c", OWNER), store.stage("run/c", "fedcba9876543210")
    write(one, "model", b"one")
    write(other, "model", b"other")

    one.commit(MANIFEST, b"one")
    other.abort()

    assert store.read("run/c/model", 10) == b"one"


def test_a_writer_whose_remains_could_not_be_removed_can_try_again(store: DirectoryStore) -> None:
    write(store.stage("run/c", OWNER), "model", b"half of i")

    again = store.stage("run/c", OWNER)
    write(again, "model", b"all of it")
    again.commit(MANIFEST, b"{}")

    assert store.read("run/c/model", 100) == b"all of it"
    assert tree(store.root / "run") == ["c/", "c/manifest.json", "c/model"]


def test_what_is_not_known_to_be_durable_is_not_there(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry must not find its own checkpoint in the way."""
    staging = store.stage("run/checkpoints/c", OWNER)
    write(staging, "model", b"one")
    fsync = os.fsync

    def fail_behind_the_rename(descriptor: int) -> None:
        if (store.root / "run/checkpoints/c").exists():
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_behind_the_rename)
    with pytest.raises(StoreError):
        staging.commit(MANIFEST, b"{}")
    assert store.children("run/checkpoints") == []
    staging.abort()
    monkeypatch.undo()

    again = store.stage("run/checkpoints/c", OWNER)
    again.commit(MANIFEST, b"{}")

    assert store.children("run/checkpoints") == ["c"]


def test_a_sweep_takes_what_is_stale_and_leaves_the_living_alone(store: DirectoryStore) -> None:
    old, live = snapshot(attempt=1), snapshot(attempt=2)
    for taken in (old, live):
        staging = store.stage(f"run/checkpoints/{taken.name}", OWNER)
        write(staging, "model", b"one")
    committed = store.stage("run/checkpoints/step-000000001-a0001-s009", OWNER)
    committed.commit(MANIFEST, b"{}")
    asked: list[str] = []

    removed = store.sweep("run/checkpoints", lambda name: (asked.append(name), name == old.name)[1])

    assert sorted(asked) == sorted([old.name, live.name])
    assert removed == [f".tmp-{old.name}-{OWNER}"]
    assert tree(store.root / "run" / "checkpoints") == [
        f".tmp-{live.name}-{OWNER}/",
        f".tmp-{live.name}-{OWNER}/model",
        "step-000000001-a0001-s009/",
        "step-000000001-a0001-s009/manifest.json",
    ]
    assert store.sweep("run/nothing", lambda name: True) == []


@pytest.mark.parametrize("method", ["create", "replace"])
def test_a_sweep_leaves_alone_what_is_being_written(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Another supervisor of the run may begin at any moment."""
    store.create("run/checkpoints/c/state", b"")
    call = "link" if method == "create" else "replace"
    appear, swept = getattr(os, call), []

    def sweep_first(*arguments: Any, **options: Any) -> None:
        swept.extend(store.sweep("run/checkpoints", lambda name: True))
        appear(*arguments, **options)

    monkeypatch.setattr(os, call, sweep_first)

    getattr(store, method)("run/attempts/a", b"content")

    assert swept == []
    assert store.read("run/attempts/a", 100) == b"content"


def test_what_is_swept_before_its_writer_has_locked_it_is_begun_once_more(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create("run/checkpoints/c/state", b"")
    swept: list[list[str]] = []

    def sweep_at_once(path: Path) -> io.FileIO:
        file = io.FileIO(str(path), "x")
        if not swept:
            swept.append(store.sweep("run/checkpoints", lambda name: True))
        return file

    opening = opening_with(sweep_at_once)
    monkeypatch.setattr(Path, "open", opening)

    assert store.create("run/attempts/a", b"content")

    assert [len(names) for names in swept] == [1]
    assert store.read("run/attempts/a", 100) == b"content"
    assert tree(store.root / "run" / "attempts") == ["a"]


def test_remains_of_objects_are_swept_wherever_they_lie(store: DirectoryStore) -> None:
    run = store.root / "run"
    names = [".tmp-latest.json-0123456789abcdef", "attempts/.tmp-000001.json-0123456789abcdef"]
    own = ["outputs/.tmp-notes", "outputs/.tmp-", "outputs/.tmp-x-0123"]  # of the script
    for name in [*names, *own]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"{")

    removed = store.sweep("run/checkpoints", lambda name: False)

    assert sorted(removed) == sorted(name.rpartition("/")[2] for name in names)
    assert tree(run) == sorted(["attempts/", "outputs/", *own])


# ---------------------------------------------------------------- durability


class Recorder:
    """Every call that changes the disk, in order: what was called, and on which path."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        for name in ("rename", "replace", "link", "mkdir", "unlink"):
            monkeypatch.setattr(os, name, self._watch(name, getattr(os, name)))
        fsync = os.fsync

        def watch_fsync(descriptor: int) -> None:
            self.calls.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", watch_fsync)
        watched = opening_with(self._file)
        monkeypatch.setattr(Path, "open", watched)

    def _watch(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Any, *arguments: Any, **options: Any) -> Any:
            self.calls.append((name, str(path)))
            return call(path, *arguments, **options)

        return watched

    def _file(self, path: Path) -> io.FileIO:
        recorder = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                recorder.calls.append(("write", str(path)))
                return super().write(data)

        return File(str(path), "x")

    def last(self, name: str, path: Path | str) -> int:
        """The place in the order of the last such call."""
        return max(i for i, call in enumerate(self.calls) if call == (name, str(path)))


def test_files_and_directories_are_synced_before_the_rename_and_the_parent_after(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = store.root / "run" / "checkpoints" / f".tmp-c-{OWNER}"
    recorder = Recorder(monkeypatch)

    staging = store.stage("run/checkpoints/c", OWNER)
    write(staging, "model", b"one", b"two")
    write(staging, "state", b"three")
    staging.commit(MANIFEST, b"{}")

    rename = recorder.last("rename", staged)
    for name in ("model", "state", MANIFEST):
        synced = recorder.last("fsync", staged / name)
        assert recorder.last("write", staged / name) < synced < recorder.last("fsync", staged)
    assert recorder.last("fsync", staged / "state") < recorder.last("write", staged / MANIFEST)
    assert recorder.last("fsync", staged) < rename
    assert rename < recorder.last("fsync", staged.parent)
    assert recorder.calls[-1] == ("fsync", str(staged.parent))
    for new in (store.root, store.root / "run", store.root / "run" / "checkpoints"):
        assert recorder.last("mkdir", new) < recorder.last("fsync", new.parent)


@pytest.mark.parametrize("method", ["create", "replace"])
def test_an_object_is_synced_before_it_appears_and_its_directory_after(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    recorder = Recorder(monkeypatch)

    getattr(store, method)("run/attempts/a", b"content")

    folder = store.root / "run" / "attempts"
    temporary = next(path for call, path in recorder.calls if call == "write")
    assert Path(temporary).parent == folder
    appears = recorder.last("link" if method == "create" else "replace", temporary)
    assert recorder.last("write", temporary) < recorder.last("fsync", temporary) < appears
    assert appears < recorder.last("fsync", folder)
    assert recorder.last("mkdir", folder) < recorder.last("fsync", folder.parent) < appears


# ---------------------------------------------------------------- a kill at any instant


@pytest.mark.parametrize("method", ["create", "replace"])
def test_a_kill_while_an_object_is_written_leaves_the_old_or_the_new(method: str) -> None:
    with memory_folder() as folder:
        old = None if method == "create" else b"old"
        seen = set()

        def opened() -> DirectoryStore:
            return DirectoryStore(folder / "store")

        def prepare() -> None:
            shutil.rmtree(folder / "store", ignore_errors=True)
            if old is not None:
                opened().replace("run/a", old)

        def work() -> None:
            getattr(opened(), method)("run/a", b"new content")

        for _ in kill_everywhere(work, prepare):
            store = opened()
            there = store.children("run") == ["a"]
            seen.add(store.read("run/a", 100) if there else None)

        assert seen == {old, b"new content"}


def save(store: DirectoryStore, taken: Snapshot, owner: str, keep: Keep) -> None:
    """What a supervisor does with a slot: claim, clean up, persist, record, let old ones go."""
    ledger = Ledger(store, RUN, owner)
    ledger.claim("node")
    persister = Persister(store, ledger, keep)
    persister.sweep()
    manifest = persister.persist(taken.moment, views(taken.files))
    ledger.committed(manifest.name, manifest.moment.step)
    persister.retain()


def newest(store: DirectoryStore) -> dict[str, bytes]:
    """The files of the newest sound checkpoint, as a restore finds them."""
    memory = bytearray()

    def allocate(nbytes: int) -> memoryview:
        memory.extend(bytes(nbytes))
        return memoryview(memory)

    loaded = load_newest(Archive(store, RUN), Ledger(store, RUN, ""), allocate)
    assert loaded is not None
    return {
        image.name: bytes(memory[image.offset : image.offset + image.size])
        for image in loaded.layout.images
    }


def test_a_kill_at_any_instant_of_a_save_leaves_the_whole_old_or_the_whole_new() -> None:
    with memory_folder() as folder:
        store = DirectoryStore(folder / "store")
        old, new = snapshot(attempt=1, save=1), snapshot(attempt=2, save=1)
        begun = DirectoryStore(folder / "begun")
        save(begun, old, "a" * 16, Keep(last=1))
        found = []

        def prepare() -> None:
            shutil.rmtree(store.root, ignore_errors=True)
            shutil.copytree(begun.root, store.root)

        for at in kill_everywhere(lambda: save(store, new, "b" * 16, Keep(last=1)), prepare):
            files = newest(store)
            assert files in (old.files, new.files), f"half a checkpoint after a kill at call {at}"
            found.append(files == new.files)
            assert store.children(f"{RUN}/quarantine") == []
            # The next supervisor gets rid of every remain, and can save.
            last = snapshot(attempt=9, save=1)
            save(store, last, "c" * 16, Keep(last=1))
            assert newest(store) == last.files
            checkpoints = tree(store.root / RUN / "checkpoints")
            assert {path.split("/")[0] for path in checkpoints} == {last.name}

        assert found == sorted(found), "the new one was there, and then it was not"
        assert len(found) > 30
        assert {False, True} == set(found)


def test_a_slot_that_was_committed_just_before_a_kill_can_be_saved_again() -> None:
    with memory_folder() as folder:
        store, taken = DirectoryStore(folder), snapshot()
        save(store, taken, "a" * 16, Keep())

        save(store, taken, "b" * 16, Keep())

        assert newest(store) == taken.files
        assert store.children(f"{RUN}/checkpoints") == [taken.name]


# ---------------------------------------------------------------- disks that refuse


def failing_calls(store: DirectoryStore, content: bytes) -> Iterator[Callable[[], object]]:
    def stage() -> None:
        staging = store.stage("run/checkpoints/c", OWNER)
        try:
            write(staging, "model", content)
            staging.commit(MANIFEST, b"{}")
        except BaseException:
            staging.abort()
            raise

    yield lambda: store.create("run/new", content)
    yield lambda: store.replace("run/old", content)
    yield stage


ASKS: dict[str, Callable[[DirectoryStore], Any]] = {
    "read": lambda store: store.read("run/a", 100),
    "stored": lambda store: store.stored("run/b"),
    "fetch": lambda store: store.fetch("run/a", 0, memoryview(bytearray(1))),
    "children": lambda store: store.children("run/attempts"),
    "create": lambda store: store.create("run/b", b"new"),
    "replace": lambda store: store.replace("run/a", b"new"),
    "put": lambda store: store.put("run/c", Content("c", 1, iter([Part(memoryview(b"c"))]))),
    "stage": lambda store: store.stage("run/checkpoints/x", "owner"),
}


@pytest.mark.parametrize("known_by", ["create", "replace", "read", "children"])
@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_a_run_that_was_there_and_is_gone_is_no_empty_run(
    tmp_path: Path, ask: Callable[[DirectoryStore], Any], known_by: str
) -> None:
    """Where a file system was unmounted, the mount point is left: a run would begin anew in it."""
    for key in ("run/a", "run/attempts/000001.json"):
        DirectoryStore(tmp_path / "store").create(key, b"a")
    store = DirectoryStore(tmp_path / "store")
    ASKS[known_by](store)
    mounted = (tmp_path / "store").rename(tmp_path / "elsewhere")
    (tmp_path / "store").mkdir()

    with pytest.raises(StoreError, match="was there and is gone") as refusal:
        ask(store)
    assert not isinstance(refusal.value, NotFound)
    assert list(store.root.iterdir()) == []

    store.root.rmdir()
    mounted.rename(store.root)
    assert "a" in store.children("run")


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_a_folder_that_somebody_makes_where_a_run_was_is_not_that_run(
    tmp_path: Path, ask: Callable[[DirectoryStore], Any]
) -> None:
    """A script that makes its own folder anew, in the mount point of what was unmounted."""
    for key in ("run/a", "run/attempts/000001.json"):
        DirectoryStore(tmp_path / "store").create(key, b"a")
    store = DirectoryStore(tmp_path / "store")
    store.read("run/a", 10)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    (store.root / "run" / "outputs").mkdir(parents=True)

    with pytest.raises(StoreError, match="was there and is gone") as refusal:
        ask(store)
    assert not isinstance(refusal.value, NotFound)
    assert tree(store.root) == ["run/", "run/outputs/"]


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_a_run_that_is_mounted_again_with_other_numbers_is_the_same_run(
    tmp_path: Path, ask: Callable[[DirectoryStore], Any]
) -> None:
    """Some file systems give a folder another inode each time; what lies in it tells it."""
    store = DirectoryStore(tmp_path / "store")
    for key in ("run/a", "run/attempts/000001.json"):
        store.create(key, b"a")
    shutil.copytree(store.root, tmp_path / "copy")
    shutil.rmtree(store.root)
    (tmp_path / "copy").rename(store.root)

    with contextlib.suppress(NotFound):
        ask(store)
    assert store.read("run/a", 10) in (b"a", b"new")


def test_a_full_disk_is_a_store_error_and_nothing_is_left_behind(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        store = DirectoryStore(disk / "store")
        store.create("run/old", b"old")
        before = tree(disk)
        for call in failing_calls(store, bytes(2 << 20)):
            with pytest.raises(StoreError, match="No space left"):
                call()

        (store.root / "run" / "checkpoints").rmdir()
        assert tree(disk) == before
        assert store.read("run/old", 10) == b"old"
        assert store.create("run/new", b"fits")


def test_a_read_only_disk_is_a_store_error(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        store = DirectoryStore(disk / "store")
        store.create("run/old", b"old")
        before = tree(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

        for call in failing_calls(store, b"x"):
            with pytest.raises(StoreError, match="Read-only"):
                call()
        with pytest.raises(StoreError, match="Read-only"):
            store.delete(["run/old"])

        assert tree(disk) == before
        assert store.read("run/old", 10) == b"old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into every directory")
def test_a_directory_that_may_not_be_written_is_a_store_error(store: DirectoryStore) -> None:
    store.create("run/old", b"old")
    before = tree(store.root)
    (store.root / "run").chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        for call in failing_calls(store, b"x"):
            with pytest.raises(StoreError, match="Permission denied"):
                call()
        assert tree(store.root) == before
    finally:
        (store.root / "run").chmod(stat.S_IRWXU)


def is_refused(operation: Callable[[], object]) -> bool:
    try:
        operation()
    except NotFound:
        raise
    except StoreError:
        return True
    return False


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "link"])
def test_whatever_call_fails_it_is_a_store_error(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store.create("run/old", b"old")
    store.create("run/checkpoints/before/manifest.json", b"")
    before = tree(store.root)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    refused = [is_refused(operation) for operation in failing_calls(store, b"x")]

    assert refused.count(True) == (3 if call == "fsync" else 1)
    if call == "fsync":
        assert tree(store.root) == before
    assert checkpoint_folder(store, "c", "run").exists() == (call in ("replace", "link"))
    assert not [path for path in tree(store.root) if ".tmp-" in path]


# ---------------------------------------------------------------- what need not be hashed or moved


def test_a_digest_that_is_known_is_taken_as_it_is(store: DirectoryStore) -> None:
    staging = store.stage("run/c", OWNER)
    pieces = [Part(memoryview(b"one"), b"known"), Part(memoryview(b"two"))]

    [digests] = staging.write([Content("model", 3, pieces)])

    assert digests == (b"known", sha256(b"two").digest())


def test_a_copy_has_the_bytes_of_what_it_was_copied_from(store: DirectoryStore) -> None:
    first = store.stage("run/a", OWNER)
    digests = write(first, "model", b"one", b"two")
    first.commit(MANIFEST, b"{}")

    second = store.stage("run/b", OWNER)
    second.copy("model", "run/a/model", 6, 3, digests)
    second.commit(MANIFEST, b"{}")
    store.delete(["run/a/model"])

    assert store.read("run/b/model", 100) == b"onetwo"


def test_what_is_gone_is_not_copied(store: DirectoryStore) -> None:
    staging = store.stage("run/b", OWNER)

    with pytest.raises(NotFound):
        staging.copy("model", "run/a/model", 3, 3, [b""])

    assert write(staging, "model", b"one") == (sha256(b"one").digest(),)


def test_a_save_that_is_given_up_does_not_wait_for_hashes_that_have_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashing, go_on, hashed = threading.Event(), threading.Event(), []

    def slow(memory: memoryview) -> Any:
        hashing.set()
        go_on.wait(60)
        hashed.append(len(memory))
        return sha256(memory)

    def parts() -> Iterator[Part]:
        for _ in range(20):
            yield Part(memoryview(bytes(4096)))
        hashing.wait(60)
        raise StoreError("given up")

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            go_on.set()  # those that have begun are waited for
            super().shutdown(wait=wait)

    monkeypatch.setattr("runner.store.local.ThreadPoolExecutor", Pool)
    monkeypatch.setattr("runner.store.local.sha256", slow)
    staging = DirectoryStore(tmp_path / "store").stage("run/checkpoints/one", "a" * 16)
    with pytest.raises(StoreError, match="given up"):
        staging.write([Content("model", 4096, parts())])
    staging.abort()

    assert 1 <= len(hashed) <= 2
