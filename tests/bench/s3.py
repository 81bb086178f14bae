"""A bucket, beside boto3's own ways: throughput, memory, requests, and an emergency save.

Against the server that `S3_ENDPOINT` names (see tests/servers); it is the same for both sides of
each ratio. Where it runs on this machine, its processor time is theirs too.
"""

from __future__ import annotations

import base64
import mmap
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.manifest import Manifest
from runner.checkpoint.persist import Persister
from runner.checkpoint.retention import Keep
from runner.spool import open_slot
from runner.store import Store, open_store
from tests.bench.bucket import Bucket, bucket, options
from tests.bench.figures import Check, Figure, Peer
from tests.bench.place import REPOSITORY, Neighbours, Place, neighbours
from tests.bench.supervised import Settings, SupervisedRun
from tests.counting import counted_requests
from tests.slots import snapshot

MIB = 1 << 20
_PART_BYTES = 16 * MIB
_SWEEP = ((8, 2), (16, 2), (16, 4), (16, 8), (32, 4))  # MiB of a part, threads
_LARGE_BYTES = 1024 * MIB
_OLD_SAVES, _YOUNG_SAVES, _SAVES = 10_000, 10, 20

Values = dict[str, list[float]]


def measure(place: Place, repetitions: int) -> tuple[list[Figure], list[Check]]:
    """Up and down, of 1 GiB."""
    values: Values = {name: [] for name in ("up", "upload_file", "sweep", "down", "download_file")}
    others = Neighbours()
    path = _random_file(place.memory / "large", _LARGE_BYTES)
    right = []
    with bucket() as there:
        for number in range(repetitions):
            place.settle()
            with neighbours(others):
                right.append(_one_round(there, path, number, values))
    size = _LARGE_BYTES / 1e6
    plain = Peer("boto3 upload_file", values["upload_file"])
    sweep = Peer("the best of plain multipart PUTs", values["sweep"])
    down = Peer("boto3 download_file", values["download_file"])

    def figure(name: str, key: str, peer: Peer) -> Figure:
        return Figure(name, "s", values[key], peer, size, neighbours=others.cores)

    return [
        figure("upload, checksums and commit", "up", plain),
        figure("upload, checksums and commit", "up", sweep),
        figure("download and verification", "down", down),
    ], [Check("what came back is what was sent", str(all(right)), "True")]


def _one_round(there: Bucket, path: Path, number: int, values: Values) -> bool:
    """Ours and theirs, by turns, over the same bytes; whether ours came back whole."""
    memory = _mapped(path)
    state = {"model.safetensors": memory, "state.json": memoryview(b"{}")}
    saver = _persister(there.store(), f"run-{number}")
    manifest: list[Manifest] = []
    values["up"].append(
        _seconds(lambda: manifest.append(saver.persist(snapshot(save=1).moment, state)))
    )
    key = f"{there.prefix}/plain"
    values["upload_file"].append(
        _seconds(lambda: there.client.upload_file(str(path), there.name, key))
    )
    values["sweep"].append(
        min(_seconds(lambda way=way: _plain_upload(there, key, memory, *way)) for way in _SWEEP)
    )
    archive = Archive(there.store(), f"run-{number}")
    layout = archive.layout(manifest[0])
    into = memoryview(mmap.mmap(-1, layout.nbytes))
    into[:: mmap.PAGESIZE] = bytes(len(into[:: mmap.PAGESIZE]))  # touched, as a slot is
    values["down"].append(_seconds(lambda: archive.load_into(manifest[0], layout, into)))
    target = path.with_name("down")
    values["download_file"].append(
        _seconds(lambda: there.client.download_file(there.name, key, str(target)))
    )
    target.unlink()
    return into[: len(memory)] == memory


def _plain_upload(there: Bucket, key: str, memory: memoryview, part_mib: int, threads: int) -> None:
    """Low-level multipart PUTs with a SHA-256 for each part, and nothing besides."""
    client, part_bytes = there.client, part_mib * MIB
    names = {"Bucket": there.name, "Key": key}
    upload = client.create_multipart_upload(**names, ChecksumAlgorithm="SHA256")["UploadId"]

    def send(number: int) -> dict[str, Any]:
        body = bytes(memory[(number - 1) * part_bytes : number * part_bytes])
        checksum = base64.b64encode(sha256(body).digest()).decode()
        answer = client.upload_part(
            **names,
            UploadId=upload,
            PartNumber=number,
            Body=body,
            ChecksumAlgorithm="SHA256",
            ChecksumSHA256=checksum,
        )
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}

    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(send, range(1, -(-len(memory) // part_bytes) + 1)))
    client.complete_multipart_upload(**names, UploadId=upload, MultipartUpload={"Parts": parts})


# ---------------------------------------------------------------------------- memory


def measure_memory(place: Place, repetitions: int) -> tuple[list[Figure], list[Check]]:
    """What a process that uploads 3 GB needs besides the slot."""
    path = _random_file(place.memory / "huge", 3_000_000_000)
    extra = []
    with bucket() as there:
        for number in range(repetitions):
            _, printed = place.python("-m", "tests.bench.s3", str(path), there.url, f"run-{number}")
            extra.append(float(printed))
    return [
        Figure("extra memory while uploading", "MB", extra, size_mb=3000, limit=200),
    ], []


def upload_and_look(path: Path, url: str, run_id: str) -> float:
    """Upload a file as a supervisor does; megabytes of its own that the process grew by."""
    store = open_store(url, options())
    saver = _persister(store, run_id)
    saver.persist(snapshot(save=1).moment, {"state.json": memoryview(b"{}")})
    before, highest = _own_megabytes(), [0.0]
    watcher = subprocess.Popen(
        [sys.executable, "-c", _WATCH, str(os.getpid())], stdout=subprocess.PIPE, text=True
    )
    state = {"model.safetensors": _mapped(path), "state.json": memoryview(b"{}")}
    saver.persist(snapshot(save=2).moment, state)
    watcher.terminate()
    highest.append(float(watcher.communicate()[0].split()[-1]))
    return max(highest) - before


_WATCH = """
import re, sys, time
highest = 0
while True:
    with open(f"/proc/{sys.argv[1]}/status") as status:
        now = int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1]) / 1000
    if now > highest:
        highest = now
        print(highest, flush=True)
    time.sleep(0.002)
"""


def _own_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


# ---------------------------------------------------------------------------- requests


def measure_requests(place: Place, repetitions: int) -> tuple[list[Figure], list[Check]]:
    """A save of three small files, retention included: requests and seconds, young and old.

    Of two runs in turn, so that both have the same neighbours.
    """
    files = {
        name: memoryview(secrets.token_bytes(64 << 10))
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
    }
    before = {"old": _OLD_SAVES, "young": _YOUNG_SAVES - 1}
    requests: Values = {run: [] for run in before}
    seconds: Values = {run: [] for run in before}
    with bucket() as there:
        savers = {run: _persister(there.store(), run, Keep(last=3)) for run in before}
        for run, saves in before.items():
            for number in range(1, saves + 1):
                _save(savers[run], number, files)
        for number in range(1, _SAVES + 1):
            for run, saves in before.items():
                with counted_requests() as count:
                    seconds[run].append(
                        _seconds(lambda r=run, n=saves + number: _save(savers[r], n, files))
                    )
                requests[run].append(float(count[0]))
    young = f"after {_YOUNG_SAVES}"
    return [
        Figure("requests of a save", "requests", requests["old"], limit=10.5),
        Figure(
            f"requests after {_OLD_SAVES} saves",
            "requests",
            requests["old"],
            Peer(young, requests["young"]),
        ),
        Figure(
            f"seconds after {_OLD_SAVES} saves", "s", seconds["old"], Peer(young, seconds["young"])
        ),
    ], []


def _save(saver: Persister, number: int, files: dict[str, memoryview]) -> None:
    moment = replace(snapshot(save=number).moment, step=number)
    manifest = saver.persist(moment, files)
    saver.ledger.committed(manifest.name, manifest.moment.step)
    saver.retain()


# ---------------------------------------------------------------------------- an emergency


def measure_emergency(
    place: Place, megabytes: float, repetitions: int
) -> tuple[list[Figure], list[Check]]:
    """SIGTERM until durable in the bucket, beside the bare upload of as many bytes."""
    recorded, bare = [], []
    others = Neighbours()
    with bucket() as there:
        run = SupervisedRun(place, "emergency", Settings(megabytes), there)
        path = None
        try:
            for number in range(repetitions):
                with neighbours(others):
                    run.start()
                    run.wait_for_steps(4, attempt=number + 1)
                    run.end()
                    notice = run.record(number + 1).notice_to_durable_seconds
                    if notice is not None:
                        recorded.append(notice)
                path = path or _random_file(place.memory / "bare", run.newest().nbytes)
                with neighbours(others):
                    bare.append(_bare_upload(there, path, number))
        finally:
            run.close()
    peer = Peer("the bare upload", bare)
    name, cores = "SIGTERM to durable in a bucket", others.cores
    wanted = "emergencies with their time in the record"
    return [
        Figure(name, "s", recorded, peer, megabytes, neighbours=cores),
    ], [Check(wanted, str(len(recorded)), str(repetitions))]


def _bare_upload(there: Bucket, path: Path, number: int) -> float:
    """The same code without anything around it: files into the bucket, and a manifest."""
    saver = _persister(there.store(), f"bare-{number}")
    state = {"model.safetensors": _mapped(path), "state.json": memoryview(b"{}")}
    return _seconds(lambda: saver.persist(snapshot(save=1).moment, state))


# ---------------------------------------------------------------------------- small things


def _persister(store: Store, run_id: str, keep: Keep | None = None) -> Persister:
    ledger = Ledger(store, run_id, secrets.token_hex(8))
    ledger.claim("bench")
    return Persister(store, ledger, keep or Keep(last=100))


def _random_file(path: Path, nbytes: int) -> Path:
    """A file in memory that does not compress, filled fast."""
    slot = memoryview(open_slot(path, nbytes))
    noise = secrets.token_bytes(8 * MIB)
    for at in range(0, nbytes, len(noise)):
        end = min(nbytes, at + len(noise))
        slot[at:end] = noise[: end - at]
        slot[at : at + 8] = at.to_bytes(8, "little")
    return path


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))


def _seconds(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def main(arguments: Sequence[str]) -> None:
    path, url, run_id = arguments
    print(upload_and_look(Path(path), url, run_id))


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main(sys.argv[1:])
