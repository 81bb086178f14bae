"""Every fault of a network or a server, at every request: it succeeds in the end, or ends in time.

What must hold in each case: the call does what it should, exactly once as far as one can see, or
raises StoreError before its deadline.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256

import pytest
from servers.faultproxy import Fault, FaultProxy
from servers.fixtures import S3Server
from waiting import wait_until

from runner.errors import StoreError, StoreUnfit
from runner.store import Content, Part
from runner.store.s3 import S3Store

pytestmark = pytest.mark.ceph

OWNER = "0123456789abcdef"
PART_BYTES = 5 * 1024 * 1024
SMALL = b"small content"
LARGE = (sha256(b"large").digest() * (PART_BYTES // 32 + 40))[: PART_BYTES + 1000]
PARTS = [LARGE[:PART_BYTES], LARGE[PART_BYTES:]]
DIGESTS = [sha256(part).digest() for part in PARTS]


ROUNDS = itertools.count(1)


@dataclass
class Case:
    """A store behind a proxy, with something in it, and a look behind the proxy's back.

    `round` makes names, so that one case serves for several faults.
    """

    store: S3Store
    direct: S3Store
    round: int = 0

    def next(self) -> None:
        self.round = next(ROUNDS)
        self.store.hurry(None)
        for key in self.keys:
            self.direct.replace(key, SMALL)
        self.staging = self.store.stage(self.staged, OWNER)

    @property
    def staged(self) -> str:
        return f"run/checkpoints/staged-{self.round}"

    @property
    def keys(self) -> list[str]:
        return ["run/there", "run/also", "run/too"]

    def fetched(self, key: str) -> bytes:
        memory = bytearray(len(LARGE))
        self.store.fetch(key, 0, memoryview(memory))
        return bytes(memory)

    def has(self, key: str, data: bytes) -> bool:
        return self.direct.read(key, len(data)) == data


def content(name: str, parts: list[bytes]) -> Content:
    return Content(name, PART_BYTES, [Part(memoryview(part)) for part in parts])


def write(case: Case, name: str, parts: list[bytes]) -> bool:
    [digests] = case.staging.write([content(name, parts)])
    stored = case.direct.stored(f"{case.staged}/{name}")
    joined = sha256(b"".join(digests)).hexdigest() if len(parts) > 1 else digests[0].hex()
    return stored.size == sum(map(len, parts)) and stored.digest == joined


def copy(case: Case, name: str, digests: list[bytes]) -> bool:
    size = len(LARGE if name == "large" else SMALL)
    case.staging.copy(name, f"run/stored/{name}", size, PART_BYTES, digests)
    return case.direct.stored(f"{case.staged}/{name}") == case.direct.stored(f"run/stored/{name}")


def remove(case: Case, keys: list[str]) -> bool:
    case.store.delete(keys)
    return not {key.removeprefix("run/") for key in keys} & set(case.direct.children("run"))


def commit(case: Case) -> bool:
    case.staging.commit("manifest.json", b"manifest")
    return case.has(f"{case.staged}/manifest.json", b"manifest")


def replaced(case: Case) -> bool:
    case.store.replace("run/there", b"replaced")
    return case.has("run/there", b"replaced")


def created(case: Case) -> bool:
    key = f"run/attempts/{case.round}"
    return case.store.create(key, b"mine") and case.has(key, b"mine")


# The verb, the request of it that is spoiled, and whether all came out well.
VERBS: dict[str, tuple[str, Callable[[Case], bool]]] = {
    "read": ("GET ", lambda case: case.store.read("run/there", 100) == SMALL),
    "stored": ("HEAD ", lambda case: case.store.stored("run/there").size == len(SMALL)),
    "fetch": ("GET ", lambda case: case.fetched("run/stored/large") == LARGE),
    "create": ("PUT ", created),
    "replace": ("PUT ", replaced),
    "children": (
        "GET .*list-type",
        lambda case: {"also", "stored", "there", "too"} <= set(case.store.children("run")),
    ),
    "delete one": ("DELETE ", lambda case: remove(case, ["run/there"])),
    "delete several": (
        "POST .*delete",
        lambda case: remove(case, ["run/there", "run/also", "run/too"]),
    ),
    "write a small file": ("PUT ", lambda case: write(case, "small", [SMALL])),
    "begin a large file": ("POST .*uploads", lambda case: write(case, "large", PARTS)),
    "send a part": ("PUT .*partNumber=1", lambda case: write(case, "large", PARTS)),
    "complete a large file": ("POST .*uploadId", lambda case: write(case, "large", PARTS)),
    "copy a small file": ("PUT ", lambda case: copy(case, "small", [sha256(SMALL).digest()])),
    "copy a part": ("PUT .*partNumber=2", lambda case: copy(case, "large", DIGESTS)),
    "commit": ("PUT .*manifest", commit),
    "sweep": (
        "GET .*uploads",
        lambda case: case.store.sweep("run", lambda name: name == "none") == [],
    ),
}
FAULTS = {
    "slow down": Fault("status", 503, "SlowDown"),
    "internal error": Fault("status", 500, "InternalError"),
    "throttled": Fault("status", 429, "TooManyRequests"),
    "reset": Fault("reset"),
    "half a body sent": Fault("reset_upload", 3),
    "answer lost": Fault("drop_response"),
    "answer torn": Fault("reset_download", 5),
    "answer short": Fault("truncate", 5),
}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long the pauses are is a matter of `test_store_s3_calls`."""
    monkeypatch.setattr("runner.store.s3_calls._FIRST_PAUSE_SECONDS", 0.005)


@pytest.fixture(scope="module")
def prefix() -> str:
    """One place for all, because what is read and copied need be written only once."""
    return f"faults-{secrets.token_hex(6)}"


@pytest.fixture
def case(open_s3: Callable[..., S3Store], proxy: FaultProxy) -> Case:
    made = Case(open_s3(endpoint=proxy.url), open_s3())
    if not made.direct.children("run/stored"):
        stored = made.direct.stage("run/stored", OWNER)
        stored.write([content("large", PARTS), content("small", [SMALL])])
    made.next()
    return made


@pytest.mark.parametrize("verb", VERBS)
def test_a_fault_that_passes_does_no_harm(case: Case, proxy: FaultProxy, verb: str) -> None:
    request, does_it = VERBS[verb]
    for name, fault in FAULTS.items():
        case.next()
        proxy.clear()
        proxy.add(request, fault)

        assert does_it(case), f"{verb}: {name}"
        assert proxy.hits == 1, f"{verb}: {name}"


ENDLESS = {
    "always busy": Fault("status", 503, "SlowDown"),
    "always reset": Fault("reset"),
    "never an answer": Fault("stall_upload"),
}
DEADLINE_SECONDS = 0.1


@pytest.mark.parametrize("verb", VERBS)
def test_a_fault_that_stays_ends_at_the_deadline(case: Case, proxy: FaultProxy, verb: str) -> None:
    request, does_it = VERBS[verb]
    for name, fault in ENDLESS.items():
        case.next()
        proxy.clear()
        proxy.add(request, fault, times=1000)
        begun = time.monotonic()
        case.store.hurry(begun + DEADLINE_SECONDS)

        with pytest.raises(StoreError):
            does_it(case)

        # The time-outs of a socket are a minute; a busy machine alone may take seconds.
        assert time.monotonic() - begun < DEADLINE_SECONDS + 5, f"{verb}: {name}"


REFUSALS = {
    "expired": (Fault("status", 400, "ExpiredToken"), StoreUnfit, "have expired"),
    "clock": (Fault("status", 403, "RequestTimeTooSkewed"), StoreUnfit, "clock differs"),
    "bucket gone": (Fault("status", 404, "NoSuchBucket"), StoreUnfit, "there is no bucket"),
    "quota": (Fault("status", 403, "QuotaExceeded"), StoreError, "store is full"),
    "disk full": (Fault("status", 507, "InsufficientStorage"), StoreError, "store is full"),
    "region": (
        Fault("status", 301, "PermanentRedirect", ("x-amz-bucket-region: eu-west-1",)),
        StoreUnfit,
        "set region to eu-west-1",
    ),
}


@pytest.mark.parametrize(("fault", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_raised_as_what_it_is(
    case: Case,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    error: type[StoreError],
    message: str,
) -> None:
    monkeypatch.setattr("runner.store.s3_calls.SHORT_PATIENCE_SECONDS", 0.1)
    for verb in ("read", "stored", "create", "begin a large file"):
        request, does_it = VERBS[verb]
        case.next()
        proxy.clear()
        # HEAD has no body that could say why: the store asks once more by GET.
        proxy.add("(GET|HEAD) " if verb == "stored" else request, fault, times=1000)

        with pytest.raises(error, match=message):
            does_it(case)


def test_expired_credentials_are_looked_for_again(case: Case, proxy: FaultProxy) -> None:
    proxy.add("GET ", Fault("status", 400, "ExpiredToken"))

    assert case.store.read("run/there", 100) == SMALL
    assert proxy.hits == 1


# ---------------------------------------------------------------- haste


def test_a_stalled_part_is_overtaken_on_a_second_connection(case: Case, proxy: FaultProxy) -> None:
    assert write(case, "before", PARTS)  # so that it is known how long a part takes
    proxy.add("PUT .*partNumber=1", Fault("stall_upload"))
    begun = time.monotonic()
    case.store.hurry(begun + 15)

    assert write(case, "large", PARTS)

    assert time.monotonic() - begun < 8  # not the time-out of a socket
    assert proxy.hits == 1


def test_a_stalled_download_is_overtaken_where_it_stopped(case: Case, proxy: FaultProxy) -> None:
    assert case.fetched("run/stored/large") == LARGE
    proxy.add("GET ", Fault("stall", 3_000_000))
    begun = time.monotonic()
    case.store.hurry(begun + 15)

    assert case.fetched("run/stored/large") == LARGE

    assert time.monotonic() - begun < 8
    assert proxy.hits == 1


def test_a_download_goes_on_where_it_was_cut(case: Case, proxy: FaultProxy, s3: S3Server) -> None:
    for fault in (Fault("reset_download", 4_000_000), Fault("truncate", 1_000_000)):
        proxy.add("GET ", fault)

    assert case.fetched("run/stored/large") == LARGE
    assert proxy.hits == 2


def test_an_object_that_changes_while_it_is_read_is_not_mixed(
    case: Case, proxy: FaultProxy
) -> None:
    key = f"{case.staged}/large"
    assert write(case, "large", PARTS)
    assert case.fetched(key) == LARGE
    proxy.add("GET ", Fault("stall", 3_000_000))
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(case.fetched, key)
        wait_until(lambda: proxy.hits, what="the download to stall")
        other = case.direct.stage(case.staged, "f" * 16)
        other.write([content("large", [PARTS[0][::-1], PARTS[1]])])
        case.store.hurry(time.monotonic() + 15)

        with pytest.raises(StoreError, match="was changed while it was read"):
            fetching.result()


@pytest.mark.parametrize("verb", ["read", "create", "send a part", "fetch"])
def test_haste_reaches_a_call_that_is_under_way(case: Case, proxy: FaultProxy, verb: str) -> None:
    request, does_it = VERBS[verb]
    proxy.add(request, Fault("stall_upload"), times=1000)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            does_it(case)
        except StoreError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: proxy.hits, what="the request to arrive")
    begun = time.monotonic()
    case.store.hurry(begun + 0.3)
    thread.join(10)

    assert not thread.is_alive()
    assert len(raised) == 1
    assert 0.2 < time.monotonic() - begun < 0.3 + 5


def test_when_the_haste_is_over_there_is_patience_again(case: Case, proxy: FaultProxy) -> None:
    case.store.hurry(time.monotonic() - 1)
    with pytest.raises(StoreError, match="no time left"):
        case.store.read("run/there", 100)

    case.store.hurry(None)

    proxy.add("GET ", Fault("status", 503), times=2)
    assert case.store.read("run/there", 100) == SMALL


def test_a_late_answer_writes_nothing_into_memory_given_back(case: Case, proxy: FaultProxy) -> None:
    proxy.add("GET ", Fault("latency", 0.6), times=10)
    memory = bytearray(100)
    case.store.hurry(time.monotonic() + 0.2)

    with pytest.raises(StoreError):
        case.store.fetch("run/stored/large", 0, memoryview(memory))
    wait_until(no_request_is_under_way, what="the late answers")

    assert memory == bytes(100)


def no_request_is_under_way() -> bool:
    return not any(thread.name == "s3" for thread in threading.enumerate())
