"""What a save costs in a bucket, and that what was saved there can be had back."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from counting import counted_requests
from kills import Killed, killed_at
from servers.faultproxy import Fault, FaultProxy
from servers.fixtures import S3Server
from slots import RUN, snapshot, views
from waiting import wait_until

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.manifest import Manifest
from runner.checkpoint.persist import Persister
from runner.checkpoint.restore import load, load_newest
from runner.checkpoint.retention import Keep
from runner.errors import Abandoned
from runner.store import Store

pytestmark = pytest.mark.ceph

MOST_REQUESTS = 10
MIB = 1 << 20


@pytest.fixture
def store(open_s3: Callable[..., Store]) -> Store:
    return open_s3()


def persister(store: Store, keep: Keep | None = None, owner: str = "a" * 16) -> Persister:
    ledger = Ledger(store, RUN, owner)
    ledger.claim("node")
    return Persister(store, ledger, keep or Keep(last=3))


def save(saver: Persister, number: int, files: dict[str, bytes]) -> Manifest:
    moment = replace(snapshot(save=number).moment, step=number)
    manifest = saver.persist(moment, views(files))
    saver.ledger.committed(manifest.name, manifest.moment.step)
    saver.retain()
    return manifest


def small(number: int) -> dict[str, bytes]:
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    return {name: b"%d of %s" % (number, name.encode()) for name in names}


def test_a_save_of_three_small_files_takes_ten_requests_and_no_more_later(store: Store) -> None:
    saver = persister(store)
    counts = []
    for number in range(1, 31):
        with counted_requests() as count:
            save(saver, number, small(number))
        counts.append(count[0])

    assert max(counts[9:]) == counts[9] <= MOST_REQUESTS
    assert len(Archive(store, RUN).names()) == 3


def test_the_newest_is_found_with_two_requests(store: Store) -> None:
    saver = persister(store)
    for number in range(1, 4):
        manifest = save(saver, number, small(number))

    with counted_requests() as count:
        assert Archive(store, RUN).newest() == manifest
    assert count[0] == 2


def test_what_was_saved_comes_back_and_verifies_without_moving_a_byte(store: Store) -> None:
    files = {"model.safetensors": secrets.token_bytes(33 * MIB), "state.json": b"{}"}
    manifest = save(persister(store), 1, files)
    archive, memory = Archive(store, RUN), bytearray()

    def allocate(nbytes: int) -> memoryview:
        memory.extend(bytes(nbytes))
        return memoryview(memory)

    for file in manifest.files:
        stored = store.stored(f"{RUN}/checkpoints/{manifest.name}/{file.name}")
        assert (stored.size, stored.digest) == (file.size, file.digest)
    loaded = load_newest(archive, Ledger(store, RUN, ""), allocate)
    assert loaded is not None
    for image in loaded.layout.images:
        assert memory[image.offset : image.offset + image.size] == files[image.name]


def test_a_file_that_has_not_changed_is_copied_on_the_server(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = persister(store)
    frozen = secrets.token_bytes(33 * MIB)
    first = save(saver, 1, {"frozen.safetensors": frozen, "state.json": b"{}"})
    sent: list[int] = []

    from botocore.httpsession import URLLib3Session

    send = URLLib3Session.send

    def weighing(session: Any, request: Any) -> Any:
        sent.append(int(request.headers.get("Content-Length", 0)))
        return send(session, request)

    monkeypatch.setattr(URLLib3Session, "send", weighing)
    second = save(saver, 2, {"frozen.safetensors": frozen, "state.json": b"{}"})

    assert sum(sent) < MIB
    assert [file.digest for file in second.files] == [file.digest for file in first.files]
    key = f"{RUN}/checkpoints/{second.name}/frozen.safetensors"
    assert store.stored(key).digest == second.files[0].digest
    Archive(store, RUN).verify(second)


def test_a_save_gives_way_while_a_file_is_copied(store: Store, s3: S3Server, prefix: str) -> None:
    saver = persister(store)
    files = {"frozen.safetensors": secrets.token_bytes(33 * MIB), "state.json": b"{}"}
    save(saver, 1, files)
    asked = itertools.count(1)

    with pytest.raises(Abandoned):  # three parts are hashed, then copied
        saver.persist(snapshot(save=2).moment, views(files), gives_way=lambda: next(asked) == 5)

    assert len(Archive(store, RUN).names()) == 1
    wait_until(lambda: not s3.uploads(f"{prefix}/"), what="the upload to be ended")


SOURCES = {
    "gone": lambda server, key, size: server.client.delete_object(Bucket=server.bucket, Key=key),
    "altered": lambda server, key, size: server.client.put_object(
        Bucket=server.bucket,
        Key=key,
        Body=secrets.token_bytes(size),
        ChecksumAlgorithm="SHA256",
    ),
    "altered, and without a checksum": lambda server, key, size: server.client.put_object(
        Bucket=server.bucket, Key=key, Body=secrets.token_bytes(size)
    ),
}


@pytest.mark.parametrize("megabytes", [2, 33])
@pytest.mark.parametrize("spoil", SOURCES.values(), ids=SOURCES)
def test_a_file_that_cannot_be_copied_any_more_is_written(
    store: Store,
    s3: S3Server,
    prefix: str,
    spoil: Callable[[S3Server, str, int], object],
    megabytes: int,
) -> None:
    saver = persister(store)
    frozen = secrets.token_bytes(megabytes * MIB)
    first = save(saver, 1, {"frozen.safetensors": frozen, "state.json": b"{}"})
    spoil(s3, f"{prefix}/{RUN}/checkpoints/{first.name}/frozen.safetensors", len(frozen))

    second = save(saver, 2, {"frozen.safetensors": frozen, "state.json": b"{}"})

    Archive(store, RUN).verify(second)
    assert s3.uploads(f"{prefix}/") == []


@pytest.mark.parametrize(("times", "sound"), [(1, True), (99, False)])
def test_a_part_that_the_network_spoils_is_fetched_again_alone(
    open_s3: Callable[..., Store], proxy: FaultProxy, times: int, sound: bool
) -> None:
    content = secrets.token_bytes(33 * MIB)
    save(persister(open_s3()), 1, {"model.safetensors": content, "state.json": b"{}"})
    archive = Archive(open_s3(endpoint=proxy.url), RUN)
    [manifest] = archive.manifests()
    proxy.add("GET .*model.safetensors", Fault("corrupt", 100_000), times=times)
    memory = bytearray()

    def allocate(nbytes: int) -> memoryview:
        memory.extend(bytes(nbytes))
        return memoryview(memory)

    with counted_requests() as count:
        loaded = load(archive, manifest, allocate)

    assert (loaded is not None) == sound
    assert (str(manifest.name) in archive.quarantined()) == (not sound)
    if sound:
        assert memory[: len(content)] == content
        assert count[0] == 2 + 3 + 1 + 1  # sizes, parts, the other file, and one part again


HASTE_SECONDS = 25


def test_a_save_that_gives_way_in_haste_waits_for_no_cleaning_up(
    open_s3: Callable[..., Store], s3: S3Server, proxy: FaultProxy, prefix: str
) -> None:
    store = open_s3(endpoint=proxy.url)
    saver, deadline = persister(store), 0.0
    files = {"model.safetensors": secrets.token_bytes(33 * MIB), "state.json": b"{}"}
    parts = iter(range(1, 100))

    def gives_way() -> bool:
        nonlocal deadline
        if next(parts) < 3:
            return False
        wait_until(lambda: s3.uploads(f"{prefix}/"), what="the upload to begin")
        proxy.add("DELETE ", Fault("hold"), times=99)
        deadline = time.monotonic() + HASTE_SECONDS
        store.hurry(deadline)
        return True

    with pytest.raises(Abandoned):
        saver.persist(snapshot(save=1).moment, views(files), gives_way=gives_way)
    assert time.monotonic() < deadline - HASTE_SECONDS / 2
    second = saver.persist(snapshot(save=2).moment, views(files))
    assert time.monotonic() < deadline

    store.hurry(None)
    proxy.release()
    Archive(store, RUN).verify(second)
    wait_until(lambda: not s3.uploads(f"{prefix}/"), what="the upload to be ended")


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_request_of_a_save_leaves_the_old_or_the_new_one_whole(
    open_s3: Callable[..., Store], after: bool
) -> None:
    def state(number: int) -> dict[str, bytes]:
        return {**small(number), "large.safetensors": number.to_bytes(4, "big") * (17 * MIB // 4)}

    store, request, number = open_s3(), 0, 2
    saver = persister(store, Keep(last=1))
    save(saver, 1, state(1))
    old = save(saver, 2, state(2))
    died = True
    while died:
        request, number = request + 1, number + 1
        with killed_at(request, after=after):
            try:
                save(saver, number, state(number))
                died = False
            except Killed:
                pass
        store = open_s3()
        saver = persister(store, Keep(last=1), owner=f"{request:016x}")
        saver.sweep()
        newest = next(Archive(store, RUN).manifests())
        assert newest.moment.step in (old.moment.step, number)
        for manifest in Archive(store, RUN).manifests():
            Archive(store, RUN).verify(manifest)
        old = save(saver, number + 100, small(number))
        number += 100
        assert [m.name for m in Archive(store, RUN).manifests()] == [old.name]
    assert request > MOST_REQUESTS
    assert store.sweep(f"{RUN}/checkpoints", lambda name: True) == []
