"""The run's own files: what has changed is stored, and comes back whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from slots import RUN, RefusingStore

from runner.checkpoint.outputs import Outputs
from runner.errors import StoreError
from runner.store import Content, DirectoryStore, Stored

PLENTY = 1 << 30


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def write(folder: Path, **files: bytes) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_another_node_gets_what_was_written_on_the_first(
    store: DirectoryStore, here: Path, tmp_path: Path
) -> None:
    write(here, metrics_json=b"{}", plots__loss_png=b"\x89PNG", empty=b"", log=b"x" * (33 << 20))
    stored = Outputs(store, RUN, here, PLENTY).store_changed()
    there = tmp_path / "there"

    brought = Outputs(store, RUN, there, PLENTY).bring_back()

    assert sorted(stored) == sorted(brought) == sorted(tree(here))
    assert tree(there) == tree(here)
    assert Outputs(store, RUN, there, PLENTY).store_changed() == []


def test_only_what_has_changed_is_moved(store: DirectoryStore, here: Path) -> None:
    outputs = Outputs(store, RUN, here, PLENTY)
    write(here, a=b"one", b=b"two")
    outputs.store_changed()
    assert outputs.store_changed() == []

    write(here, a=b"ONE", c=b"three")
    os.utime(here / "a", ns=(1, 1))  # an editor that takes care of times

    assert sorted(outputs.store_changed()) == ["a", "c"]
    assert store.read(f"{RUN}/outputs/a", 9) == b"ONE"


def test_the_smallest_go_first_where_there_is_too_much(
    store: DirectoryStore, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(here, small=b"1" * 10, middle=b"2" * 100, large=b"3" * 1000)

    assert Outputs(store, RUN, here, 500).store_changed() == ["small", "middle"]
    assert "1 of 3 files are not stored" in caplog.text
    assert "large" in caplog.text
    assert store.children(f"{RUN}/outputs") == ["middle", "small"]


def test_what_this_node_has_is_never_overwritten(store: DirectoryStore, here: Path) -> None:
    write(here, a=b"old")
    Outputs(store, RUN, here, PLENTY).store_changed()
    write(here, a=b"new")

    assert Outputs(store, RUN, here, PLENTY).bring_back() == []
    assert tree(here) == {"a": b"new"}


def test_nothing_but_plain_files_below_the_folder_is_stored(
    store: DirectoryStore, here: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("outside")
    (here / "link").symlink_to(tmp_path / "secret")
    (here / "folder").symlink_to(tmp_path)
    os.mkfifo(here / "pipe")
    os.close(os.open(os.fsencode(here) + b"/\xff", os.O_CREAT))
    write(here, file=b"x")

    assert Outputs(store, RUN, here, PLENTY).store_changed() == ["file"]


def test_a_file_that_is_not_the_one_that_was_stored_is_left_out(
    store: DirectoryStore, here: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(here, good=b"good", bad=b"bad", gone=b"gone")
    Outputs(store, RUN, here, PLENTY).store_changed()
    (store.root / RUN / "outputs" / "bad").write_bytes(b"BAD")
    (store.root / RUN / "outputs" / "gone").unlink()
    there = tmp_path / "there"

    assert Outputs(store, RUN, there, PLENTY).bring_back() == ["good"]
    assert tree(there) == {"good": b"good"}
    assert "output bad is not brought back" in caplog.text
    assert "output gone is not in the store any more" in caplog.text


def test_a_shorter_file_than_the_index_says_costs_none_of_the_others(
    store: DirectoryStore, here: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(here, good=b"good", bad=b"long", last=b"last")
    Outputs(store, RUN, here, PLENTY).store_changed()
    (store.root / RUN / "outputs" / "bad").write_bytes(b"s")

    assert Outputs(store, RUN, tmp_path / "there", PLENTY).bring_back() == ["good", "last"]
    assert "output bad is not brought back" in caplog.text


def test_what_was_moved_before_a_refusal_is_in_the_index(
    store: DirectoryStore, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here, a=b"1", bb=b"22")
    put = store.put

    def refuses(key: str, content: Content) -> tuple[bytes, ...]:
        if key.endswith("/bb"):
            raise StoreError("full")
        return put(key, content)

    monkeypatch.setattr(store, "put", refuses)
    with pytest.raises(StoreError, match="full"):
        Outputs(store, RUN, here, PLENTY).store_changed()

    assert Outputs(store, RUN, tmp_path / "there", PLENTY).bring_back() == ["a"]


# ---------------------------------------------------------------- a folder that is not ours alone


def test_what_a_link_leads_to_is_not_stored_though_it_was_a_file_a_moment_ago(
    store: DirectoryStore, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "x").write_text("outside")
    write(here, a=b"1", bb=b"22", ccc=b"333")
    (here / "folder").mkdir()
    (here / "folder" / "x").write_bytes(b"4444")
    put, kept = store.put, []

    def swaps(key: str, content: Content) -> tuple[bytes, ...]:
        if key.endswith("/a"):
            (here / "bb").unlink()
            (here / "bb").symlink_to(tmp_path / "secret")
            (here / "ccc").unlink()
            os.mkfifo(here / "ccc")
            shutil.rmtree(here / "folder")
            (here / "folder").symlink_to(tmp_path / "secrets")
        kept.append(key)
        return put(key, content)

    monkeypatch.setattr(store, "put", swaps)

    assert Outputs(store, RUN, here, PLENTY).store_changed() == ["a"]
    assert kept == [f"{RUN}/outputs/a"]


def test_what_is_brought_back_is_not_written_through_a_link(
    store: DirectoryStore,
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(here, a=b"1")
    (here / "folder").mkdir()
    (here / "folder" / "x").write_bytes(b"22")
    Outputs(store, RUN, here, PLENTY).store_changed()
    there, outside = tmp_path / "there", tmp_path / "outside"
    outside.mkdir()
    stored = store.stored

    def plants(key: str) -> Stored:
        if key.endswith("/a"):
            there.mkdir()
            (there / "folder").symlink_to(outside)
            (there / "a").symlink_to(outside / "a")
        return stored(key)

    monkeypatch.setattr(store, "stored", plants)

    assert Outputs(store, RUN, there, PLENTY).bring_back() == ["a"]
    assert list(outside.iterdir()) == []
    assert (there / "a").read_bytes() == b"1"
    assert not (there / "a").is_symlink()
    assert "output folder/x is not brought back: something is in its way" in caplog.text


def entry(**changes: object) -> dict[str, object]:
    return {"size": 1, "sha256": "0" * 64, "modified_ns": 1, **changes}


INDEXES: dict[str, object] = {
    "above": {"../x": entry()},
    "absolute": {"/x": entry()},
    "a way round": {"a/../../x": entry()},
    "doubled": {"a//x": entry()},
    "nothing": {"": entry()},
    "a NUL": {"a\0": entry()},
    "a size that is none": {"x": entry(size=-1)},
    "a size in words": {"x": entry(size="1")},
    "no digest": {"x": {"size": 1, "modified_ns": 1}},
    "a list": [],
    "a list of files": ["x"],
}


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES)
def test_an_index_that_leads_out_of_the_folder_or_is_none_is_not_followed(
    store: DirectoryStore, tmp_path: Path, index: object, caplog: pytest.LogCaptureFixture
) -> None:
    store.replace(f"{RUN}/outputs.json", json.dumps(index).encode())
    there = tmp_path / "deep" / "there"
    before = set(tmp_path.rglob("*"))

    assert Outputs(store, RUN, there, PLENTY).bring_back() == []
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == {p for p in before if p.is_file()}
    assert bool(index) == ("unusable" in caplog.text) or index == []


def test_a_file_that_shrinks_while_it_is_stored_is_stored_as_it_was_found(
    store: DirectoryStore, here: Path, tmp_path: Path
) -> None:
    write(here, log=b"x" * (33 << 20))
    put = store.put

    def cut(*arguments: object) -> object:
        os.truncate(here / "log", 20 << 20)
        return put(*arguments)  # type: ignore[arg-type]

    store.put = cut  # type: ignore[method-assign, assignment]
    Outputs(store, RUN, here, PLENTY).store_changed()
    shutil.rmtree(here)

    assert Outputs(store, RUN, here, PLENTY).bring_back() == ["log"]
    assert tree(here) == {"log": b"x" * (20 << 20)}


CALLS: dict[str, Callable[[Outputs], object]] = {
    "storing": Outputs.store_changed,
    "bringing back": Outputs.bring_back,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_store_that_refuses_is_an_error(
    store: DirectoryStore, tmp_path: Path, call: Callable[[Outputs], object]
) -> None:
    refusing = RefusingStore(store)
    refusing.refused = {"read"}

    with pytest.raises(StoreError):
        call(Outputs(refusing, RUN, tmp_path / "there", PLENTY))
