"""What every store must do, whether it is a directory or a bucket."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from runner.errors import Fenced, NotFound, StoreError
from runner.store import Content, DirectoryStore, Part, Staging, Store

OWNER = "0123456789abcdef"
PREFIX = "run/checkpoints/step-000000100-a0001-s001"
MANIFEST = f"{PREFIX}/manifest.json"
PART_BYTES = 5 * 1024 * 1024  # the least that S3 takes for a part that is not the last


@pytest.fixture(
    params=[
        "directory",
        pytest.param("s3-http", marks=pytest.mark.ceph),
        pytest.param("s3-https", marks=pytest.mark.ceph),
    ]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "directory":
        return DirectoryStore(tmp_path / "store")
    server, open_s3 = request.getfixturevalue("s3"), request.getfixturevalue("open_s3")
    secure = request.param == "s3-https"
    gateway = server.gateway
    return open_s3(endpoint=gateway.tls_endpoint if secure else gateway.endpoint)


def content(name: str, *parts: bytes) -> Content:
    return Content(name, PART_BYTES, [Part(memoryview(part)) for part in parts])


def large(seed: int, size: int = PART_BYTES) -> bytes:
    return sha256(bytes([seed])).digest() * (size // 32)


def read_back(store: Store, key: str, size: int) -> bytes:
    memory = bytearray(size)
    store.fetch(key, 0, memoryview(memory))
    return bytes(memory)


# ---------------------------------------------------------------- single objects


def test_an_object_is_read_as_it_was_created(store: Store) -> None:
    assert store.create("run/a/b.json", b"content")

    assert store.read("run/a/b.json", 100) == b"content"
    assert store.stored("run/a/b.json").size == 7
    assert store.stored("run/a/b.json").digest in (None, sha256(b"content").hexdigest())


def test_what_is_there_is_not_created_again(store: Store) -> None:
    assert store.create("run/a", b"first")

    assert not store.create("run/a", b"second")
    assert not store.create("run/a", b"first")
    assert store.read("run/a", 100) == b"first"


def test_of_many_that_create_one_key_exactly_one_wins(store: Store) -> None:
    contents = [f"writer {number}".encode() for number in range(16)]

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda data: store.create("run/claim", data), contents))

    assert won.count(True) == 1
    assert store.read("run/claim", 100) == contents[won.index(True)]


def test_replacing_needs_nothing_there(store: Store) -> None:
    store.replace("run/a", b"first")
    store.replace("run/a", b"second, and longer")

    assert store.read("run/a", 100) == b"second, and longer"


@pytest.mark.parametrize("method", ["read", "stored", "fetch", "fetch nothing"])
def test_what_is_not_there_is_not_found(store: Store, method: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: store.read("run/none", 10),
        "stored": lambda: store.stored("run/none"),
        "fetch": lambda: store.fetch("run/none", 0, memoryview(bytearray(1))),
        "fetch nothing": lambda: store.fetch("run/none", 0, memoryview(b"")),
    }
    store.create("run/file", b"x")

    with pytest.raises(NotFound):
        calls[method]()


def test_an_object_larger_than_the_limit_is_not_read(store: Store) -> None:
    store.create("run/a", b"x" * 100)

    assert len(store.read("run/a", 100)) == 100
    with pytest.raises(StoreError, match="larger than 99 bytes") as caught:
        store.read("run/a", 99)
    assert not isinstance(caught.value, NotFound)


def test_a_range_is_fetched_into_the_memory_that_is_given(store: Store) -> None:
    store.create("run/a", bytes(range(100)))
    memory = bytearray(b"\xff" * 12)

    store.fetch("run/a", 90, memoryview(memory)[1:11])
    store.fetch("run/a", 100, memoryview(memory)[0:0])

    assert bytes(memory) == b"\xff" + bytes(range(90, 100)) + b"\xff"


@pytest.mark.parametrize("offset", [91, 100, 1000])
def test_a_range_past_the_end_is_no_answer(store: Store, offset: int) -> None:
    store.create("run/a", bytes(100))

    with pytest.raises(StoreError, match="ends at") as caught:
        store.fetch("run/a", offset, memoryview(bytearray(10)))
    assert not isinstance(caught.value, NotFound)


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/./b", "a\0"])
def test_what_is_no_key_is_refused(store: Store, key: str) -> None:
    for call in (
        lambda: store.read(key, 1),
        lambda: store.stored(key),
        lambda: store.create(key, b""),
        lambda: store.delete([key]),
    ):
        with pytest.raises(StoreError, match="no key"):
            call()


def test_children_are_the_names_directly_below_sorted(store: Store) -> None:
    for key in ("run/b", "run/a/deep", "run/a/deeper/still", "other/c", "runs"):
        store.create(key, b"")

    assert store.children("run") == ["a", "b"]
    assert store.children("run/a") == ["deep", "deeper"]
    assert store.children("") == ["other", "run", "runs"]
    assert store.children("run/none") == []


def test_objects_are_deleted_and_what_is_not_there_is_no_error(store: Store) -> None:
    for name in "abcd":
        store.create(f"run/{name}", b"")

    store.delete(["run/none"])
    store.delete(["run/a", "run/never", "run/b", "run/c"])
    store.delete([])

    assert store.children("run") == ["d"]


# ---------------------------------------------------------------- checkpoints


def test_files_of_all_shapes_are_there_after_the_commit(store: Store) -> None:
    shapes = {
        "empty": [b""],
        "small": [b"tensors"],
        "one-part": [large(1)],
        "two-parts": [large(2), b"end"],
        "full-parts": [large(3), large(4)],
    }
    staging = store.stage(PREFIX, OWNER)

    digests = staging.write([content(name, *parts) for name, parts in shapes.items()])
    staging.commit("manifest.json", b"{}")

    assert store.children(PREFIX) == sorted([*shapes, "manifest.json"])
    for parts, (name, mine) in zip(digests, shapes.items(), strict=True):
        whole = b"".join(mine)
        assert parts == tuple(sha256(part).digest() for part in mine)
        assert read_back(store, f"{PREFIX}/{name}", len(whole)) == whole
        assert store.stored(f"{PREFIX}/{name}").size == len(whole)


def test_a_digest_that_is_known_is_not_computed_again(store: Store) -> None:
    digest = sha256(b"data").digest()
    staging = store.stage(PREFIX, OWNER)

    [[told]] = staging.write([Content("file", 4, [Part(memoryview(b"data"), digest)])])

    assert told is digest


def test_nothing_written_is_a_checkpoint_before_the_commit(store: Store) -> None:
    staging = store.stage(PREFIX, OWNER)
    staging.write([content("file", b"x")])

    with pytest.raises(NotFound):
        store.read(MANIFEST, 10)
    staging.abort()


def test_an_aborted_checkpoint_leaves_nothing(store: Store) -> None:
    store.create("run/other", b"")
    staging = store.stage(PREFIX, OWNER)
    staging.write([content("small", b"x"), content("large", large(1), b"end")])

    staging.abort()

    assert store.children("run/checkpoints") == []
    assert store.children("run") in (["other"], ["checkpoints", "other"])


def test_what_its_owner_staged_before_is_gone(store: Store) -> None:
    store.stage(PREFIX, OWNER).write([content("old", b"x")])

    staging = store.stage(PREFIX, OWNER)
    staging.write([content("new", b"y")])
    staging.commit("manifest.json", b"{}")

    assert store.children(PREFIX) == ["manifest.json", "new"]


def test_a_checkpoint_is_not_committed_over_another(store: Store) -> None:
    commit(store.stage(PREFIX, OWNER), b"first")

    with pytest.raises(StoreError):
        commit(store.stage(PREFIX, "f" * 16), b"second")

    assert store.read(MANIFEST, 10) == b"first"


def test_aborting_after_another_has_committed_leaves_its_files(store: Store) -> None:
    mine, other = store.stage(PREFIX, OWNER), store.stage(PREFIX, "f" * 16)
    for staging in (mine, other):
        staging.write([content("file", b"same")])
    other.commit("manifest.json", b"theirs")

    with pytest.raises(StoreError):
        mine.commit("manifest.json", b"mine")
    mine.abort()

    assert store.read(f"{PREFIX}/file", 10) == b"same"
    assert store.read(MANIFEST, 10) == b"theirs"


class Memory(bytearray):
    """Memory that can be watched by a weak reference."""


def test_parts_are_taken_only_as_fast_as_they_are_stored(store: Store) -> None:
    most = 0

    def parts() -> Iterator[Part]:
        nonlocal most
        for number in range(40):
            memory = Memory(large(number % 7, 1024 if number == 39 else PART_BYTES))
            watched.append(weakref.ref(memory))
            most = max(most, sum(ref() is not None for ref in watched))
            yield Part(memoryview(memory))

    watched: list[weakref.ref[Memory]] = []
    staging = store.stage(PREFIX, OWNER)
    [digests] = staging.write([Content("file", PART_BYTES, parts())])
    staging.abort()

    assert len(digests) == 40
    assert most <= 24  # sixteen lanes, what is looked at ahead, and what is just being let go


def test_an_error_of_the_parts_comes_through(store: Store) -> None:
    def parts() -> Iterator[Part]:
        yield from (Part(memoryview(large(number))) for number in range(3))
        raise Fenced("run", 2, "another")

    staging = store.stage(PREFIX, OWNER)
    with pytest.raises(Fenced):
        staging.write([Content("file", PART_BYTES, parts())])
    staging.abort()

    assert store.children("run/checkpoints") == []


def test_a_copy_has_the_same_bytes_and_lives_on_its_own(store: Store) -> None:
    shapes = {"empty": [b""], "small": [b"x"], "large": [large(1), large(2), b"end"]}
    first = store.stage(PREFIX, OWNER)
    digests = first.write([content(name, *parts) for name, parts in shapes.items()])
    first.commit("manifest.json", b"{}")
    other = PREFIX.replace("s001", "s002")

    second = store.stage(other, OWNER)
    for name, parts in zip(shapes, digests, strict=True):
        size = sum(map(len, shapes[name]))
        second.copy(name, f"{PREFIX}/{name}", size, PART_BYTES, parts)
    second.commit("manifest.json", b"{}")
    sums = {name: store.stored(f"{PREFIX}/{name}") for name in shapes}
    store.delete([MANIFEST, *(f"{PREFIX}/{name}" for name in shapes)])

    for name, parts in shapes.items():
        whole = b"".join(parts)
        assert read_back(store, f"{other}/{name}", len(whole)) == whole
        assert store.stored(f"{other}/{name}") == sums[name]


def test_a_copy_of_what_is_gone_is_not_found(store: Store) -> None:
    staging = store.stage(PREFIX, OWNER)

    with pytest.raises(NotFound):
        staging.copy("file", "run/none", 1, PART_BYTES, [sha256(b"x").digest()])


@pytest.mark.parametrize("parts", [[b"x"], [large(1), b"end"]], ids=["small", "large"])
def test_what_is_gone_and_cannot_be_copied_can_be_written(store: Store, parts: list[bytes]) -> None:
    staging = store.stage(PREFIX, OWNER)
    digests = [sha256(part).digest() for part in parts]

    with pytest.raises(NotFound):
        staging.copy("file", "run/none", sum(map(len, parts)), PART_BYTES, digests)
    written = staging.write([content("file", *parts)])
    staging.commit("manifest.json", b"{}")

    assert written == [tuple(digests)]
    assert read_back(store, f"{PREFIX}/file", len(b"".join(parts))) == b"".join(parts)


def test_what_has_another_size_is_not_copied_and_can_be_written(store: Store) -> None:
    store.replace("run/source", b"other")
    staging = store.stage(PREFIX, OWNER)
    digest = sha256(b"file").digest()

    with pytest.raises(StoreError, match="5 bytes instead of 4"):
        staging.copy("file", "run/source", 4, PART_BYTES, [digest])
    assert staging.write([content("file", b"file")]) == [(digest,)]
    staging.commit("manifest.json", b"{}")

    assert store.read(f"{PREFIX}/file", 10) == b"file"
    assert store.read("run/source", 10) == b"other"


def test_sweeping_leaves_what_is_alive(store: Store) -> None:
    names = [f"step-{number}" for number in range(3)]
    live = [store.stage(f"run/checkpoints/{name}", OWNER) for name in names]
    for staging in live[1:]:
        staging.write([content("file", b"x")])

    swept = store.sweep("run/checkpoints", lambda name: name == "step-0")
    for staging in live[1:]:
        staging.commit("manifest.json", b"{}")

    assert all("step-0" in name for name in swept)
    assert store.children("run/checkpoints/step-1") == ["file", "manifest.json"]
    assert store.children("run/checkpoints/step-2") == ["file", "manifest.json"]


def commit(staging: Staging, manifest: bytes) -> None:
    staging.write([content("file", b"bytes")])
    staging.commit("manifest.json", manifest)
