"""Compressed checkpoints hold the same state, are as safe as plain ones, and take little memory."""

from __future__ import annotations

import json
import mmap
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from nodes import Node
from waiting import wait_until

from runner.checkpoint import compression
from runner.checkpoint import manifest as manifests
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.compression import Decompression, Rates
from runner.checkpoint.format import compressed_part_bytes_for
from runner.checkpoint.frames import Form, Frames, chunk_bytes_for, encode
from runner.checkpoint.keeper import Keeper
from runner.checkpoint.manifest import FileEntry, Manifest
from runner.checkpoint.persist import Persister
from runner.checkpoint.retention import Keep
from runner.errors import Abandoned, CheckpointCorrupt, CheckpointInvalid
from runner.spool import Spool
from runner.store import DirectoryStore, Store
from runner.store.s3 import S3Store
from runner.supervisor.verification import CHECKSUM, verify
from tests.slots import (
    RUN,
    checkpoint_folder,
    file_entry,
    fill,
    memory_folder,
    snapshot,
    views,
)

OWNER = "a" * 16
MEGABYTE = 1 << 20
MODEL, PACKED = "model.safetensors", "model.safetensors.zst"


@pytest.fixture
def store() -> Iterator[DirectoryStore]:
    with memory_folder() as folder:
        yield DirectoryStore(folder / "store")


@pytest.fixture
def archive(store: DirectoryStore) -> Archive:
    return Archive(store, RUN)


def persister(store: Store, *, compresses: bool = True) -> Persister:
    ledger = Ledger(store, RUN, OWNER)
    ledger.claim("node")
    return Persister(store, ledger, Keep(last=100), compresses=compresses)


def weights(nbytes: int, seed: int = 0) -> bytes:
    """A safetensors file of about that size, with what trained weights look like."""
    values = np.random.default_rng(seed).standard_normal(nbytes // 4, dtype=np.float32)
    return safetensors.numpy.save({"w": np.float32(0.02) * values})


def save(
    saver: Persister, number: int, model: bytes, *, urgent: bool = False, **options: Any
) -> Manifest:
    files = views({MODEL: model, "state.json": b"{}"})
    triggers = ("preemption",) if urgent else ("interval",)
    return saver.persist(snapshot(save=number, triggers=triggers).moment, files, **options)


def entry_of(manifest: Manifest, content_name: str = MODEL) -> FileEntry:
    return next(file for file in manifest.files if file.content_name == content_name)


def loaded(archive: Archive, manifest: Manifest) -> dict[str, bytes]:
    """The files as they would lie in a slot, after everything was read back from the store."""
    read = archive.manifest(manifest.name)
    layout = archive.layout(read)
    memory = memoryview(bytearray(layout.nbytes))
    archive.load_into(read, layout, memory)
    return {i.name: bytes(memory[i.offset : i.offset + i.size]) for i in layout.images}


# ---------------------------------------------------------------- there and back

CHUNK = 4 * MEGABYTE
SIZES = [1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 33 * MEGABYTE + 5]


@pytest.mark.parametrize("size", SIZES)
def test_a_file_of_any_size_comes_back(store: DirectoryStore, archive: Archive, size: int) -> None:
    model = np.random.default_rng(size).bytes(size)

    manifest = save(persister(store), 1, model)

    assert loaded(archive, manifest) == {MODEL: model, "state.json": b"{}"}
    frames = entry_of(manifest).frames
    assert frames is not None
    assert len(frames.lengths) == max(1, -(-size // CHUNK))
    assert len(entry_of(manifest).parts) == max(1, -(-entry_of(manifest).size // (8 * MEGABYTE)))
    archive.verify(manifest)


def test_tensors_of_all_dtypes_and_without_elements_come_back(
    store: DirectoryStore, archive: Archive
) -> None:
    dtypes = ["?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"]
    values = np.random.default_rng(0)
    tensors = {d: values.integers(0, 2, size=(7, 3)).astype(d) for d in dtypes}
    tensors |= {f"{d} empty": np.empty((0, 3), d) for d in dtypes}

    manifest = save(persister(store), 1, safetensors.numpy.save(tensors))

    back = safetensors.numpy.load(loaded(archive, manifest)[MODEL])
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name], tensor)


def test_only_files_with_tensors_are_compressed_and_by_their_names_one_sees_it(
    store: DirectoryStore, archive: Archive
) -> None:
    taken = snapshot()
    manifest = persister(store).persist(taken.moment, views(taken.files))

    folder = checkpoint_folder(store, manifest.name)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "model.safetensors.zst",
        "optimizer.safetensors.zst",
        "state.json",
    ]
    assert (folder / "state.json").read_bytes() == taken.files["state.json"]
    document = json.loads((folder / "manifest.json").read_bytes())
    assert ["frames" in file for file in document["files"]] == [True, True, False]
    assert archive.manifest(manifest.name) == manifest
    assert manifest.content_nbytes == sum(map(len, taken.files.values()))
    assert manifest.nbytes == sum(
        path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"
    )


def test_the_digest_of_the_content_is_that_of_a_plain_checkpoint(
    store: DirectoryStore, archive: Archive
) -> None:
    taken = snapshot()
    plain = persister(store, compresses=False).persist(taken.moment, views(taken.files))
    later = replace(taken.moment, save=2)
    packed = persister(store).persist(later, views(taken.files))

    assert archive.digest(packed) == archive.digest(plain)


def test_trained_weights_take_a_sixth_less(store: DirectoryStore) -> None:
    manifest = save(persister(store), 1, weights(8 * MEGABYTE))

    assert manifest.nbytes < 0.84 * manifest.content_nbytes


def test_a_name_that_would_become_too_long_stays_plain(
    store: DirectoryStore, archive: Archive
) -> None:
    long = "x" * 188 + ".safetensors"
    files = {long: weights(1000), "state.json": b"{}"}

    manifest = persister(store).persist(snapshot().moment, views(files))

    assert [file.name for file in manifest.files] == [long, "state.json"]
    assert loaded(archive, manifest) == files


# ---------------------------------------------------------------- parts and frames


@pytest.mark.parametrize("seed", range(20))
def test_parts_may_come_in_any_order_and_end_anywhere(seed: int) -> None:
    chance = random.Random(seed)
    content = weights(20_000, seed)[:20_000]
    chunk_bytes = chance.choice([999, 1000, 4096, 20_000])
    chunks = [content[at : at + chunk_bytes] for at in range(0, len(content), chunk_bytes)]
    coded = [encode(memoryview(chunk), Form(4, turned=True)) for chunk in chunks]
    digests = tuple(sha256(chunk).hexdigest() for chunk in chunks)
    frames = Frames(len(content), chunk_bytes, tuple(map(len, coded)), digests)
    stored = b"".join(coded)
    part_bytes = max(map(len, coded)) + chance.choice([0, 1, 500, len(stored)])
    assert frames.problem(len(stored), part_bytes) is None
    file = replace(file_entry(PACKED, stored, part_bytes), frames=frames)
    into = bytearray(len(content))

    parts = [stored[at : at + part_bytes] for at in range(0, len(stored), part_bytes)]
    decompression = Decompression(file, frames, memoryview(into))
    for index in chance.sample(range(len(parts)), len(parts)):
        decompression.take(index, memoryview(parts[index]))

    assert into == content


@pytest.mark.parametrize("size", [0, 1, 90_000 * MEGABYTE, 5 << 40])
def test_what_does_not_compress_still_has_a_legal_number_of_parts(size: int) -> None:
    """zstd adds three bytes to each block of 128 KiB, and some to each frame."""
    most = size + 3 * (size >> 17) + 32 * (size // chunk_bytes_for(size) + 1)
    part_bytes = compressed_part_bytes_for(size)

    assert -(-most // part_bytes) <= 10_000
    assert part_bytes >= 8 * MEGABYTE
    assert 2 * chunk_bytes_for(size) <= part_bytes


# ---------------------------------------------------------------- what is damaged


def test_every_flipped_byte_is_found(store: DirectoryStore, archive: Archive) -> None:
    manifest = save(persister(store), 1, weights(400))
    path = checkpoint_folder(store, manifest.name) / PACKED
    stored = path.read_bytes()
    assert len(stored) > 300
    for place in range(len(stored)):
        damaged = bytearray(stored)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointCorrupt, match=f"of {PACKED} are not those saved"):
            loaded(archive, manifest)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b""])
def test_a_file_of_another_size_is_found(
    store: DirectoryStore, archive: Archive, change: Callable[[bytes], bytes]
) -> None:
    manifest = save(persister(store), 1, weights(400))
    path = checkpoint_folder(store, manifest.name) / PACKED
    path.write_bytes(change(path.read_bytes()))

    with pytest.raises(CheckpointCorrupt, match=f"{PACKED} has .* bytes instead of"):
        loaded(archive, manifest)


Change = Callable[[dict[str, Any]], object]


def told_otherwise(store: DirectoryStore, manifest: Manifest, change: Change) -> None:
    """Write another manifest, whose own digest is right."""
    path = checkpoint_folder(store, manifest.name) / "manifest.json"
    document = json.loads(path.read_bytes())
    change(next(file for file in document["files"] if file["name"] == PACKED))
    del document["digest"]
    document["digest"] = manifests._digest(document)
    path.write_text(json.dumps(document))


def with_frames(**changes: Any) -> Change:
    return lambda file: file["frames"].update(changes)


SHA = "a" * 64
LIES: dict[str, Change] = {
    "no index": lambda file: file.pop("frames"),
    "an index of a plain file": lambda file: file.update(name=MODEL),
    "no object": lambda file: file.update(frames=[]),
    "null": lambda file: file.update(frames=None),
    "no size": lambda file: file["frames"].pop("size"),
    "size 0": with_frames(size=0),
    "a negative size": with_frames(size=-1),
    "a huge size": with_frames(size=1 << 62),
    "a size of two chunks": with_frames(size=CHUNK + 1),
    "a size that is a fraction": with_frames(size=400.5),
    "a size that is true": with_frames(size=True),
    "no chunk size": lambda file: file["frames"].pop("chunk_bytes"),
    "chunks of nothing": with_frames(chunk_bytes=0),
    "huge chunks": with_frames(chunk_bytes=1 << 62, size=1 << 62),
    "no lengths": with_frames(lengths=[]),
    "lengths that are no list": with_frames(lengths=7),
    "lengths as text": with_frames(lengths=["1"]),
    "another length": lambda file: file["frames"]["lengths"].append(1),
    "a longer frame": lambda file: file["frames"].update(lengths=[file["size"] + 1]),
    "a negative frame": lambda file: file["frames"].update(lengths=[-file["size"]]),
    "no digests": with_frames(digests=[]),
    "digests that are no list": with_frames(digests={SHA: 1}),
    "a digest too many": with_frames(digests=[SHA, SHA]),
    "a digest that is none": with_frames(digests=["A" * 64]),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_an_index_that_lies_is_refused(
    store: DirectoryStore, archive: Archive, lie: Change
) -> None:
    manifest = save(persister(store), 1, weights(400))
    told_otherwise(store, manifest, lie)

    with pytest.raises(CheckpointInvalid, match="its manifest is unusable"):
        archive.manifest(manifest.name)


CONSISTENT_LIES: dict[str, Change] = {
    "another content": with_frames(digests=[SHA]),
    "a byte more": lambda file: file["frames"].update(size=file["frames"]["size"] + 1),
    "a byte less": lambda file: file["frames"].update(size=file["frames"]["size"] - 1),
}


@pytest.mark.parametrize("lie", CONSISTENT_LIES.values(), ids=CONSISTENT_LIES)
def test_a_lie_about_the_content_is_found_while_it_is_read(
    store: DirectoryStore, archive: Archive, lie: Change
) -> None:
    manifest = save(persister(store), 1, weights(400))
    told_otherwise(store, manifest, lie)

    with pytest.raises(CheckpointCorrupt, match=f"frame 0 of {PACKED} is unusable"):
        loaded(archive, manifest)


def test_a_plain_and_a_compressed_file_of_one_name_are_refused(
    store: DirectoryStore, archive: Archive
) -> None:
    manifest = save(persister(store), 1, weights(400))
    both = replace(manifest, files=(*manifest.files, file_entry(MODEL, b"x")))
    path = checkpoint_folder(store, manifest.name) / "manifest.json"
    path.write_bytes(both.to_json())

    with pytest.raises(CheckpointInvalid, match="once each"):
        archive.manifest(manifest.name)


# ---------------------------------------------------------------- switched on and off


def inode(store: DirectoryStore, manifest: Manifest) -> int:
    name = entry_of(manifest).name
    return (checkpoint_folder(store, manifest.name) / name).stat().st_ino


def test_a_file_that_has_not_changed_is_copied_compressed(
    store: DirectoryStore, archive: Archive
) -> None:
    saver, model = persister(store), weights(9 * MEGABYTE)
    first, second = (save(saver, number, model) for number in (1, 2))

    assert inode(store, first) == inode(store, second)
    assert entry_of(first) == entry_of(second)
    assert loaded(archive, second)[MODEL] == model


@pytest.mark.parametrize("place", [100, 5 * MEGABYTE, -1])
def test_a_file_that_has_changed_anywhere_is_compressed_again(
    store: DirectoryStore, archive: Archive, place: int
) -> None:
    saver, model = persister(store), bytearray(weights(9 * MEGABYTE))
    first = save(saver, 1, bytes(model))
    model[place] ^= 1
    second = save(saver, 2, bytes(model))

    assert inode(store, first) != inode(store, second)
    assert loaded(archive, second)[MODEL] == model


def test_compression_may_be_switched_on_and_off_between_attempts(
    store: DirectoryStore, archive: Archive
) -> None:
    model = weights(2 * MEGABYTE)
    saved: list[Manifest] = []
    for number, on in enumerate([False, True, True, False, False], 1):
        saver = persister(store, compresses=on)
        if saved:
            saver.vouch(saved[-1].name)  # as one that was restored from
        saved.append(save(saver, number, model))

    assert [entry_of(manifest).name for manifest in saved] == [MODEL, PACKED, PACKED, MODEL, MODEL]
    copied = [inode(store, a) == inode(store, b) for a, b in pairwise(saved)]
    assert copied == [False, True, False, True]
    assert all(loaded(archive, manifest)[MODEL] == model for manifest in saved)


def test_what_is_no_longer_kept_goes_with_its_compressed_files(store: DirectoryStore) -> None:
    saver = persister(store)
    saver.keep = Keep(last=1)
    saved = [save(saver, number, weights(400, number)) for number in (1, 2)]

    assert saver.retain() == [saved[0].name]
    assert [p.name for p in (store.root / RUN / "checkpoints").iterdir()] == [saved[1].name]


# ---------------------------------------------------------------- in an emergency

SLOW, FAST = 100e6, 200e6
QUESTIONS = {
    "nothing is known": (None, None, False),
    "the store alone is known": (None, SLOW, False),
    "compression alone is known": (FAST, None, False),
    "the store is the slower one": (FAST, SLOW, True),
    "compression is the slower one": (SLOW, FAST, False),
}


@pytest.mark.parametrize(("compressed", "stored", "sooner"), QUESTIONS.values(), ids=QUESTIONS)
def test_compression_is_used_only_where_it_ends_sooner(
    compressed: float | None, stored: float | None, sooner: bool
) -> None:
    rates = Rates()
    if compressed is not None:
        rates.compressed(int(compressed), int(0.8 * compressed), seconds=1)
    if stored is not None:
        rates.stored(int(stored), seconds=1)

    assert rates.compressing_ends_sooner is sooner


def test_compression_that_saves_nothing_never_ends_sooner() -> None:
    rates = Rates()
    rates.compressed(int(FAST), int(FAST), seconds=1)
    rates.stored(int(SLOW), seconds=1)

    assert not rates.compressing_ends_sooner


@pytest.mark.parametrize(("compressed", "stored"), [(1000, int(SLOW)), (int(FAST), 1000)])
def test_a_small_save_says_nothing_about_speed(compressed: int, stored: int) -> None:
    rates = Rates()
    rates.compressed(compressed, compressed // 2, seconds=compressed / FAST)
    rates.stored(stored, seconds=stored / SLOW)

    assert not rates.compressing_ends_sooner


class SlowStore(DirectoryStore):
    """A store that takes some megabytes a second."""

    def stage(self, prefix: str, owner: str) -> Any:
        staging = super().stage(prefix, owner)
        write = staging.write

        def slowly(contents: Any) -> Any:
            written = write(contents)
            threading.Event().wait(0.5)
            return written

        staging.write = slowly  # type: ignore[method-assign]
        return staging


@pytest.mark.parametrize("slow_store", [False, True])
def test_an_urgent_save_does_what_the_saves_before_have_shown_to_be_faster(
    slow_store: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(chunk: memoryview, form: Form) -> bytes:
        threading.Event().wait(0.2)
        return encode(chunk, form)

    if not slow_store:
        monkeypatch.setattr(compression, "encode", slowly)
    with memory_folder() as folder:
        saver = persister(SlowStore(folder) if slow_store else DirectoryStore(folder))
        first = save(saver, 1, weights(16 * MEGABYTE, 1), urgent=True)
        save(saver, 2, weights(16 * MEGABYTE, 2))
        third = save(saver, 3, weights(16 * MEGABYTE, 3), urgent=True)

    assert entry_of(first).name == MODEL, "nothing had been measured"
    assert entry_of(third).name == (PACKED if slow_store else MODEL)


@pytest.mark.parametrize("first_is_urgent", [False, True])
def test_an_urgent_save_copies_what_is_there_however_it_is_stored(
    store: DirectoryStore, first_is_urgent: bool
) -> None:
    saver, model = persister(store), weights(2 * MEGABYTE)
    first = save(saver, 1, model, urgent=first_is_urgent)
    second = save(saver, 2, model, urgent=True)
    third = save(saver, 3, model)

    assert inode(store, first) == inode(store, second)
    assert entry_of(third).name == PACKED


@pytest.mark.parametrize(
    ("triggers", "name"),
    [(("preemption",), MODEL), (("interrupt", "final"), MODEL), (("final",), PACKED), ((), PACKED)],
)
def test_a_preemption_and_an_interrupt_are_urgent(
    store: DirectoryStore, tmp_path: Path, triggers: tuple[str, ...], name: str
) -> None:
    spool = Spool(tmp_path / "spool")
    spool.open()
    keeper = Keeper(spool.rank, persister(store), Archive(store, RUN))
    fill(spool.rank, 0, snapshot())

    saved = keeper.persist_newest(triggers)

    assert saved is not None
    assert entry_of(saved.manifest).name == name
    spool.close()


# ---------------------------------------------------------------- given up in the middle


def test_a_save_that_gives_way_leaves_nothing(store: DirectoryStore) -> None:
    asked: list[int] = []

    def gives_way() -> bool:
        asked.append(1)
        return len(asked) == 3

    saver, model = persister(store), weights(40 * MEGABYTE)
    with pytest.raises(Abandoned):
        save(saver, 1, model, gives_way=gives_way)

    assert len(asked) == 3, "it is asked at each part"
    assert list((store.root / RUN / "checkpoints").iterdir()) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("compress")]
    save(saver, 1, model)


# ---------------------------------------------------------------- memory

STATE_BYTES = 200 * MEGABYTE
MOST_EXTRA_BYTES = 110 * MEGABYTE


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, see proc_pid_status(5)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(re.finditer(r"RssAnon:\s+(\d+)", status)).group(1))


class Watch:
    """The most memory that is in use while this is open, over what there was before."""

    def __enter__(self) -> Watch:
        self.before = self.most = anonymous_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def extra_bytes(self) -> int:
        return self.most - self.before


def mapped(path: Path, nbytes: int) -> memoryview:
    """A file in memory, as a slot is one."""
    with path.open("w+b") as file:
        file.truncate(nbytes)
        return memoryview(mmap.mmap(file.fileno(), nbytes))


def test_memory_does_not_grow_with_the_state(store: DirectoryStore, archive: Archive) -> None:
    folder, part = store.root.parent, weights(STATE_BYTES // 8)
    nbytes = 8 * len(part)
    slot = mapped(folder / "slot", nbytes)
    for begin in range(0, nbytes, len(part)):
        slot[begin : begin + len(part)] = part
    digest = sha256(slot).digest()

    with Watch() as saving:
        files = {MODEL: slot, "state.json": memoryview(b"{}")}
        manifest = persister(store).persist(snapshot().moment, files)
    layout = archive.layout(manifest)
    target = mapped(folder / "restored", layout.nbytes)
    with Watch() as restoring:
        archive.load_into(manifest, layout, target)

    assert sha256(target[:nbytes]).digest() == digest
    assert saving.extra_bytes < MOST_EXTRA_BYTES
    assert restoring.extra_bytes < MOST_EXTRA_BYTES


# ---------------------------------------------------------------- in a bucket


@pytest.mark.ceph
def test_a_bucket_takes_them_in_parts_and_verifies_and_copies_them(
    open_s3: Callable[..., S3Store],
) -> None:
    store, model = open_s3(), weights(60 * MEGABYTE)
    saver = persister(store)

    first, second = save(saver, 1, model), save(saver, 2, model)

    assert len(entry_of(first).parts) > 5
    assert entry_of(first) == entry_of(second)
    for manifest in (first, second):
        verdicts = verify(Archive(store, RUN), manifest)
        assert [v.compared for v in verdicts if v.name == PACKED] == [CHECKSUM]
        assert all(verdict.sound for verdict in verdicts)
    assert loaded(Archive(store, RUN), second)[MODEL] == model


@pytest.mark.ceph
def test_a_save_to_a_bucket_that_gives_way_leaves_nothing(
    open_s3: Callable[..., S3Store],
) -> None:
    asked: list[int] = []

    def gives_way() -> bool:
        asked.append(1)
        return len(asked) == 4

    store = open_s3()
    with pytest.raises(Abandoned):
        save(persister(store), 1, weights(60 * MEGABYTE), gives_way=gives_way)

    assert store.children(f"{RUN}/checkpoints") == []


# ---------------------------------------------------------------- whole runs

STEPS = 24
COMPRESSED = {"every": {"epochs": 1}, "snapshot_every": {"steps": 1}, "compression": "zstd"}


def test_a_compressed_run_is_resumed_exactly_and_its_checkpoints_are_usable(
    new_node: Callable[[str], Node],
) -> None:
    """Preempted on one node and continued on another, from what is compressed in the store."""
    quiet = new_node("quiet")
    quiet.store_folder = quiet.folder / "another-store"
    quiet.gate.touch()
    undisturbed = quiet.run("run", quiet.training())
    assert undisturbed.code == 0, undisturbed.err

    node = new_node("node")
    params = {"befalls": {"1": {"15": "wait"}}}
    job = node.training(params=params, checkpoint=COMPRESSED)
    supervisor = node.start("run", job)
    supervisor.wait_for("step 15")
    wait_until(lambda: node.manifests(), what="the save at the end of the first epoch")
    assert [file.name for file in node.newest().files if file.frames is None] == ["state.json"]
    supervisor.send_signal(signal.SIGTERM)
    node.wait_until_asked()
    node.gate.touch()
    assert supervisor.wait() == 75

    another = new_node("another")
    another.gate.touch()
    job = another.training(params={**params, "gate": str(node.gate)}, checkpoint=COMPRESSED)
    done = another.run("run", job)

    assert done.code == 0, done.err
    assert f"finished at {STEPS}" in done.out
    assert another.digest() == quiet.digest()
    newest = another.newest()
    assert {file.name.rpartition(".")[2] for file in newest.files} == {"zst", "json"}
    assert another.call("checkpoints", "verify", "job").code == 0

    exported = another.call("checkpoints", "export", "job", "latest", "copy")
    assert exported.code == 0, exported.err
    folder = another.folder / "copy"
    described = Manifest.from_json((folder / "manifest.json").read_bytes(), newest.name)
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        *(file.name for file in described.files),
    }
    for file in described.files:
        assert sha256((folder / file.name).read_bytes()).hexdigest() == file.digest
    assert safetensors.numpy.load_file(folder / MODEL)


def test_a_job_that_asks_for_a_library_that_is_missing_is_refused_before_anything(
    node: Node,
) -> None:
    (node.folder / "empty" / "backports").mkdir(parents=True)
    (node.folder / "empty" / "backports" / "__init__.py").touch()
    (node.folder / "empty" / "compression.py").touch()

    refused = node.run(
        "run",
        node.training(checkpoint=COMPRESSED),
        env={"PYTHONPATH": str(node.folder / "empty")},
    )

    assert refused.code == 2
    assert "pip install 'runner[zstd]'" in refused.err
    assert not node.store_folder.exists()
