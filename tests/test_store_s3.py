"""What only a real S3 server can show: checksums, lost answers, permissions, roles."""

from __future__ import annotations

import itertools
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from servers.ceph import ROLE_CLOSED, ROLE_TRUSTED
from servers.faultproxy import Fault, FaultProxy
from servers.fixtures import S3Server
from waiting import wait_until

from runner.checkpoint.outputs import Outputs
from runner.errors import Abandoned, NotFound, StoreDenied, StoreError, StoreUnfit, UsageError
from runner.store import Content, Part, S3Options
from runner.store.s3 import S3Store
from runner.store.s3_calls import Calls, Try
from runner.store.s3_errors import Call
from runner.store.s3_lanes import Job, Lanes

pytestmark = pytest.mark.ceph

OWNER = "0123456789abcdef"
CHECKPOINT = "run/checkpoints/step-000000100-a0001-s001"
PART_BYTES = 5 * 1024 * 1024
Open = Callable[..., S3Store]


def pattern(seed: int, size: int) -> bytes:
    return (sha256(bytes([seed])).digest() * (size // 32 + 1))[:size]


def in_parts(name: str, data: bytes) -> Content:
    parts = [data[at : at + PART_BYTES] for at in range(0, len(data), PART_BYTES)]
    return Content(name, PART_BYTES, [Part(memoryview(part)) for part in parts])


LARGE = pattern(1, 3 * PART_BYTES + 12345)


def save(store: S3Store, manifest: bytes = b"{}", data: bytes = LARGE) -> tuple[bytes, ...]:
    staging = store.stage(CHECKPOINT, OWNER)
    [digests] = staging.write([in_parts("model", data)])
    staging.commit("manifest.json", manifest)
    return digests


def fetched(store: S3Store, key: str, size: int) -> bytes:
    memory = bytearray(size)
    store.fetch(key, 0, memoryview(memory))
    return bytes(memory)


# ---------------------------------------------------------------- checksums


def test_the_server_keeps_the_digest_that_a_manifest_has(open_s3: Open) -> None:
    store = open_s3()

    digests = save(store)

    assert len(digests) == 4
    stored = store.stored(f"{CHECKPOINT}/model")
    assert (stored.size, stored.digest) == (len(LARGE), sha256(b"".join(digests)).hexdigest())
    assert store.stored(f"{CHECKPOINT}/manifest.json").digest == sha256(b"{}").hexdigest()


@pytest.mark.parametrize("request_line", ["PUT .*partNumber=2", "PUT .*/model "])
def test_bytes_that_were_spoiled_on_the_way_are_sent_again(
    open_s3: Open, proxy: FaultProxy, request_line: str
) -> None:
    data = LARGE if "part" in request_line else LARGE[:PART_BYTES]
    proxy.add(request_line, Fault("corrupt_upload", 1_000_000), times=2)
    store = open_s3(endpoint=proxy.url)

    save(store, data=data)

    assert proxy.hits == 2
    assert fetched(open_s3(), f"{CHECKPOINT}/model", len(data)) == data


def test_a_manifest_spoiled_on_the_way_back_is_read_again(open_s3: Open, proxy: FaultProxy) -> None:
    store = open_s3(endpoint=proxy.url)
    store.replace("run/a", b"what was written")
    proxy.add("GET ", Fault("corrupt", 3))

    assert store.read("run/a", 100) == b"what was written"
    assert proxy.hits == 1


def test_a_wrong_digest_is_refused_by_the_server(
    open_s3: Open, s3: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.store.s3_calls.SHORT_PATIENCE_SECONDS", 0.5)
    staging = open_s3().stage(CHECKPOINT, OWNER)
    lie = Part(memoryview(b"bytes"), sha256(b"others").digest())

    with pytest.raises(StoreError, match="do not arrive as sent"):
        staging.write([Content("file", 5, [lie])])

    staging.abort()
    assert s3.keys(prefix) == []


def test_a_copy_that_turns_out_to_be_something_else_is_refused(open_s3: Open) -> None:
    store = open_s3()
    store.replace("run/source", b"other bytes")
    staging = store.stage(CHECKPOINT, OWNER)

    with pytest.raises(StoreError, match="other bytes than it should"):
        staging.copy("file", "run/source", 11, PART_BYTES, [sha256(b"these bytes").digest()])
    staging.abort()

    assert store.children(CHECKPOINT) == []


@pytest.mark.parametrize("last", [1, 3])
def test_a_copy_asks_before_each_part_whether_to_go_on(
    open_s3: Open, s3: S3Server, prefix: str, last: int
) -> None:
    store = open_s3()
    digests = save(store)
    staging = store.stage("run/checkpoints/next", OWNER)
    asked = itertools.count(1)

    def go_on() -> None:
        if next(asked) == last:
            raise Abandoned("gives way")

    with pytest.raises(Abandoned):
        staging.copy("model", f"{CHECKPOINT}/model", len(LARGE), PART_BYTES, digests, go_on)
    staging.abort()

    wait_until(lambda: not s3.uploads(f"{prefix}/"), what="the upload to be ended")
    assert store.children("run/checkpoints/next") == []


def test_a_copied_file_keeps_its_composite_checksum(open_s3: Open) -> None:
    store = open_s3()
    digests = save(store)
    staging = store.stage("run/checkpoints/next", OWNER)

    staging.copy("model", f"{CHECKPOINT}/model", len(LARGE), PART_BYTES, digests)
    staging.commit("manifest.json", b"{}")

    copied = store.stored("run/checkpoints/next/model")
    assert copied == store.stored(f"{CHECKPOINT}/model")
    assert copied.digest == sha256(b"".join(digests)).hexdigest()


def test_a_copy_whose_source_goes_half_way_leaves_no_upload_and_can_be_written(
    open_s3: Open, s3: S3Server, proxy: FaultProxy, prefix: str
) -> None:
    digests = save(open_s3())
    staging = open_s3(endpoint=proxy.url).stage("run/checkpoints/next", OWNER)
    proxy.add("PUT .*partNumber=2", Fault("status", 404, "NoSuchKey"), times=99)

    with pytest.raises(NotFound):
        staging.copy("model", f"{CHECKPOINT}/model", len(LARGE), PART_BYTES, digests)

    wait_until(lambda: not s3.uploads(f"{prefix}/"), what="the upload to be ended")
    proxy.clear()
    assert staging.write([in_parts("model", LARGE)]) == [digests]
    staging.commit("manifest.json", b"{}")
    assert open_s3().stored("run/checkpoints/next/model").size == len(LARGE)


# ---------------------------------------------------------------- conditional writes


def test_conditional_writes_are_found_to_work_and_the_probe_is_gone(
    open_s3: Open, s3: S3Server, prefix: str
) -> None:
    assert open_s3().check_conditional_writes()
    assert s3.keys(prefix) == []


@pytest.mark.parametrize(
    ("method", "arguments", "key"),
    [
        ("create", ("run/attempts/1", b"owner: mine"), "run/attempts/1"),
        ("commit", (), f"{CHECKPOINT}/manifest.json"),
    ],
)
def test_a_lost_acknowledgement_is_a_success_when_the_object_is_ours(
    open_s3: Open, proxy: FaultProxy, method: str, arguments: tuple[Any, ...], key: str
) -> None:
    store = open_s3(endpoint=proxy.url)
    proxy.add(f"PUT .*/{key}", Fault("drop_response"))

    if method == "create":
        assert store.create(*arguments)
    else:
        save(store)

    assert proxy.hits == 1
    assert sum(line.startswith("PUT") and key in line for line in proxy.requests) == 2
    assert open_s3().read(key, 100)


def test_a_lost_refusal_is_no_success_when_the_object_is_anothers(
    open_s3: Open, proxy: FaultProxy
) -> None:
    open_s3().create("run/attempts/1", b"owner: other")
    proxy.add("PUT ", Fault("drop_response"))

    assert not open_s3(endpoint=proxy.url).create("run/attempts/1", b"owner: mine!")
    assert proxy.hits == 1


def test_a_commit_whose_outcome_is_unknown_leaves_the_files(
    open_s3: Open, proxy: FaultProxy
) -> None:
    store = open_s3(endpoint=proxy.url)
    staging = store.stage(CHECKPOINT, OWNER)
    staging.write([in_parts("model", b"tensors")])
    proxy.add("PUT .*manifest", Fault("drop_response"), times=1)
    proxy.add("(GET|HEAD|PUT) .*manifest", Fault("reset"), times=1000)
    store.hurry(time.monotonic() + 1.0)

    with pytest.raises(StoreError):
        staging.commit("manifest.json", b"{}")
    store.hurry(None)
    staging.abort()

    assert open_s3().children(CHECKPOINT) == ["manifest.json", "model"]


def test_a_server_without_conditional_writes_is_found_out(
    open_s3: Open, proxy: FaultProxy, s3: S3Server, prefix: str
) -> None:
    proxy.add("PUT ", Fault("status", 501, "NotImplemented"), times=100)
    store = open_s3(endpoint=proxy.url)

    with pytest.raises(StoreUnfit, match="conditional_writes: off"):
        store.create("run/a", b"x")
    assert not store.check_conditional_writes()
    assert s3.keys(prefix) == []


def test_without_conditional_writes_a_look_comes_before_the_write(
    open_s3: Open, proxy: FaultProxy
) -> None:
    store = open_s3(endpoint=proxy.url, conditional_writes=False)

    assert store.create("run/a", b"first")
    assert not store.create("run/a", b"second")
    save(store)

    assert store.read("run/a", 10) == b"first"
    with pytest.raises(StoreError, match="another has written it"):
        store.stage(CHECKPOINT, OWNER).commit("manifest.json", b"other")
    assert not store.check_conditional_writes()


# ---------------------------------------------------------------- listing, sweeping, deleting


def begin_upload(s3: S3Server, key: str) -> None:
    upload = s3.client.create_multipart_upload(Bucket=s3.bucket, Key=key)["UploadId"]
    s3.client.upload_part(Bucket=s3.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 100)


def test_sweeping_aborts_stale_uploads_and_leaves_live_ones(
    open_s3: Open, s3: S3Server, prefix: str
) -> None:
    for name in ("stale-1", "stale-2", "live"):
        begin_upload(s3, f"{prefix}/run/checkpoints/{name}/model")
    begin_upload(s3, f"{prefix}/run/checkpoints/stale-1/optimizer")
    begin_upload(s3, f"{prefix}/other/checkpoints/stale-1/model")

    swept = open_s3().sweep("run/checkpoints", lambda name: name.startswith("stale"))

    assert swept == ["stale-1", "stale-2"]
    assert s3.uploads(f"{prefix}/") == [
        f"{prefix}/other/checkpoints/stale-1/model",
        f"{prefix}/run/checkpoints/live/model",
    ]


def test_uploads_right_below_what_is_swept_are_ended_too(
    open_s3: Open, s3: S3Server, prefix: str
) -> None:
    for name in ("outputs/events", "outputs/deep/log", "checkpoints/live/model"):
        begin_upload(s3, f"{prefix}/run/{name}")

    assert open_s3().sweep("run/outputs", lambda name: True) == ["deep", "events"]
    assert s3.uploads(f"{prefix}/") == [f"{prefix}/run/checkpoints/live/model"]


def test_an_upload_that_is_swept_away_under_its_writer_fails(
    open_s3: Open, s3: S3Server, prefix: str
) -> None:
    store = open_s3()

    def parts() -> Iterator[Part]:
        yield from (Part(memoryview(pattern(n, PART_BYTES))) for n in range(2))
        wait_until(lambda: s3.uploads(f"{prefix}/"), what="the upload to begin")
        assert open_s3().sweep("run/checkpoints", lambda name: True)
        yield Part(memoryview(b"end"))

    staging = store.stage(CHECKPOINT, OWNER)
    with pytest.raises(StoreError):
        staging.write([Content("model", PART_BYTES, parts())])
    staging.abort()

    assert s3.uploads(f"{prefix}/") == s3.keys(prefix) == []


def test_an_aborted_save_leaves_no_upload_behind(open_s3: Open, s3: S3Server, prefix: str) -> None:
    def parts() -> Iterator[Part]:
        yield from (Part(memoryview(pattern(n, PART_BYTES))) for n in range(2))
        wait_until(lambda: s3.uploads(f"{prefix}/"), what="the upload to begin")
        raise StoreError("no more")

    staging = open_s3().stage(CHECKPOINT, OWNER)
    with pytest.raises(StoreError, match="no more"):
        staging.write([in_parts("done", b"x"), Content("model", PART_BYTES, parts())])
    staging.abort()

    # The answer that the upload has begun may not have come yet: whoever gets it ends it.
    wait_until(lambda: not s3.uploads(f"{prefix}/"), what="the upload to end")
    assert s3.keys(prefix) == []


def test_an_upload_that_begins_when_its_save_was_aborted_is_ended(
    open_s3: Open, s3: S3Server, proxy: FaultProxy, prefix: str
) -> None:
    def parts() -> Iterator[Part]:
        yield from (Part(memoryview(pattern(n, PART_BYTES))) for n in range(2))
        wait_until(lambda: proxy.hits, what="the upload to be asked for")
        raise StoreError("no more")

    proxy.add("POST .*uploads", Fault("hold"))
    staging = open_s3(endpoint=proxy.url).stage(CHECKPOINT, OWNER)
    with pytest.raises(StoreError, match="no more"):
        staging.write([Content("model", PART_BYTES, parts())])
    staging.abort()
    assert not any("uploadId" in line for line in proxy.requests)
    proxy.release()

    wait_until(
        lambda: any(re.match("DELETE .*uploadId", line) for line in proxy.requests),
        what="the upload to be aborted",
    )
    wait_until(lambda: not s3.uploads(f"{prefix}/"), what="it to be gone")


def test_a_manifest_that_may_still_arrive_keeps_the_files_of_another_try(
    open_s3: Open, s3: S3Server, proxy: FaultProxy, prefix: str
) -> None:
    store = open_s3(endpoint=proxy.url)
    staging = store.stage(CHECKPOINT, OWNER)
    staging.write([in_parts("model", b"x")])
    proxy.add("PUT .*manifest.json", Fault("hold"), times=9)
    store.hurry(time.monotonic() + 2)
    with pytest.raises(StoreError):
        staging.commit("manifest.json", b"{}")
    staging.abort()
    store.hurry(None)
    again = store.stage(CHECKPOINT, OWNER)
    again.write([in_parts("model", b"x")])
    proxy.release()
    wait_until(lambda: len(s3.keys(f"{prefix}/{CHECKPOINT}/")) == 2, what="the first manifest")

    again.abort()

    assert s3.keys(f"{prefix}/{CHECKPOINT}/") == ["manifest.json", "model"]


def test_an_upload_is_ended_by_one_alone(
    open_s3: Open, s3: S3Server, proxy: FaultProxy, prefix: str
) -> None:
    """Of two that end it at the same time, one is answered 409 by some servers."""

    def parts() -> Iterator[Part]:
        yield from (Part(memoryview(pattern(n, PART_BYTES))) for n in range(2))
        wait_until(lambda: proxy.hits, what="the upload to be asked for")
        raise StoreError("no more")

    def aborts() -> list[str]:
        return [line for line in proxy.requests if re.match("DELETE .*uploadId", line)]

    proxy.add("POST .*uploads", Fault("latency", 1))
    proxy.add("DELETE .*uploadId", Fault("hold"), times=9)
    staging = open_s3(endpoint=proxy.url).stage(CHECKPOINT, OWNER)
    with pytest.raises(StoreError, match="no more"):
        staging.write([Content("model", PART_BYTES, parts())])
    wait_until(aborts, what="the late answer, whose upload is being ended")

    staging.abort()

    assert len(aborts()) == 1
    proxy.release()
    wait_until(lambda: not s3.uploads(f"{prefix}/"), what="it to be gone")


def test_an_upload_that_another_is_just_ending_is_ended_again(
    open_s3: Open, s3: S3Server, proxy: FaultProxy, prefix: str
) -> None:
    proxy.add("PUT .*partNumber=2", Fault("status", 400, "EntityTooSmall"), times=99)
    proxy.add("DELETE .*uploadId", Fault("status", 409, "BucketAlreadyExists"))
    staging = open_s3(endpoint=proxy.url).stage(CHECKPOINT, OWNER)
    with pytest.raises(StoreError):
        staging.write([in_parts("model", LARGE)])

    staging.clean()

    assert proxy.hits == 2
    assert s3.uploads(f"{prefix}/") == []


def test_what_cannot_be_removed_holds_up_nothing_else(
    open_s3: Open, s3: S3Server, proxy: FaultProxy, prefix: str
) -> None:
    staging = open_s3(endpoint=proxy.url).stage(CHECKPOINT, OWNER)
    staging.write([in_parts(name, b"x") for name in "abcd"])
    proxy.add("DELETE .*/[ac] ", Fault("status", 403, "AccessDenied"), times=99)

    with pytest.raises(StoreDenied):
        staging.clean()

    assert s3.keys(f"{prefix}/{CHECKPOINT}/") == ["a", "c"]


def test_a_second_upload_that_was_begun_beside_the_first_is_ended(
    open_s3: Open, s3: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two tries of one request in haste may do, both of them in time."""
    ask, begun = Calls.ask, []

    def asking_twice(calls: Calls, call: Call, send: Callable[[Try], Any], **options: Any) -> Any:
        if call.operation == "CreateMultipartUpload":
            begun.append(send(Try()))
        return ask(calls, call, send, **options)

    monkeypatch.setattr(Calls, "ask", asking_twice)

    save(open_s3())

    assert len(begun) == 1
    wait_until(lambda: not s3.uploads(f"{prefix}/"), what="it to be gone")


def test_a_file_whose_parts_were_not_all_sent_is_none(
    open_s3: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever runs the jobs: a manifest must never name such a file."""

    def all_but_one(lanes: Lanes, jobs: Iterator[Job], call_off: Callable[[], None]) -> None:
        for job in list(jobs)[:-1]:
            job()

    monkeypatch.setattr(Lanes, "run", all_but_one)
    staging = open_s3().stage(CHECKPOINT, OWNER)

    for data in (b"x", LARGE):
        with pytest.raises(StoreError, match="not stored as a whole"):
            staging.write([in_parts("model", data)])
    staging.abort()


def test_more_than_a_page_is_listed_and_deleted(
    open_s3: Open, proxy: FaultProxy, s3: S3Server, prefix: str
) -> None:
    names = [f"{number:04}" for number in range(1005)]
    with ThreadPoolExecutor(16) as pool:
        list(
            pool.map(
                lambda name: s3.client.put_object(Bucket=s3.bucket, Key=f"{prefix}/many/{name}"),
                names,
            )
        )
    store = open_s3(endpoint=proxy.url)

    assert store.children("many") == names
    proxy.clear()
    store.delete([f"many/{name}" for name in names])

    assert store.children("many") == []
    assert [line.split()[0] for line in proxy.requests[:3]] == ["DELETE", "POST", "POST"]
    assert "/many/0000 " in proxy.requests[0]


def test_without_batches_objects_are_deleted_one_by_one(open_s3: Open, proxy: FaultProxy) -> None:
    store = open_s3(endpoint=proxy.url)
    for name in "abcd":
        store.create(f"run/{name}", b"")
    proxy.add("POST .*delete", Fault("status", 400, "MissingContentMD5"))

    store.delete(["run/a", "run/b", "run/c"])

    assert store.children("run") == ["d"]
    assert proxy.hits == 1


def test_a_save_of_three_small_files_takes_four_requests(open_s3: Open, proxy: FaultProxy) -> None:
    store = open_s3(endpoint=proxy.url)
    staging = store.stage(CHECKPOINT, OWNER)

    staging.write([in_parts(name, b"x" * 1000) for name in ("model", "optimizer", "state")])
    staging.commit("manifest.json", b"{}")

    assert [line.split()[0] for line in proxy.requests] == ["PUT"] * 4


# ---------------------------------------------------------------- who may do what


POLICIES = {
    "s3:PutObject": lambda store: store.replace("run/a", b"x"),
    "s3:GetObject": lambda store: store.read("run/there", 10),
    "s3:DeleteObject": lambda store: store.delete(["run/there"]),
    "s3:ListBucket": lambda store: store.children("run"),
    "s3:ListBucketMultipartUploads": lambda store: store.sweep("run", lambda name: True),
}


@pytest.fixture(scope="session")
def other_user(s3_bucket: S3Server) -> tuple[str, str, str]:
    """A second user of the gateway: its name, key and secret."""
    if s3_bucket.gateway.admin is None:
        pytest.skip("making users needs the gateway that the tests bring up themselves")
    name, key, secret = (f"user-{secrets.token_hex(4)}", secrets.token_hex(8), secrets.token_hex(8))
    s3_bucket.gateway.admin(
        "user", "create", f"--uid={name}", "--display-name=other",
        f"--access-key={key}", f"--secret-key={secret}",
    )  # fmt: skip
    return name, key, secret


@pytest.mark.parametrize("action", POLICIES)
def test_a_missing_permission_is_named(
    open_s3: Open,
    s3: S3Server,
    prefix: str,
    other_user: tuple[str, str, str],
    monkeypatch: pytest.MonkeyPatch,
    action: str,
) -> None:
    name, key, secret = other_user
    open_s3().create("run/there", b"x")
    allowed = [one for one in POLICIES if one != action]
    s3.client.put_bucket_policy(
        Bucket=s3.bucket,
        Policy=json.dumps({"Version": "2012-10-17", "Statement": [{
            "Effect": "Allow", "Principal": {"AWS": [f"arn:aws:iam:::user/{name}"]},
            "Action": allowed,
            "Resource": [f"arn:aws:s3:::{s3.bucket}", f"arn:aws:s3:::{s3.bucket}/*"],
        }]}),
    )  # fmt: skip
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    store = open_s3()

    with pytest.raises(StoreDenied, match=f"lack {action} on arn:aws:s3:::{s3.bucket}") as caught:
        POLICIES[action](store)
    assert caught.value.action == action
    if action == "s3:GetObject":
        with pytest.raises(StoreDenied):
            store.stored("run/there")
    for other in allowed:
        POLICIES[other](store)
    s3.client.delete_bucket_policy(Bucket=s3.bucket)


@pytest.fixture
def sts(s3: S3Server) -> str:
    """The address of a gateway that knows roles."""
    if s3.gateway.sts_endpoint is None:
        pytest.skip("roles need the gateway that the tests bring up themselves")
    return s3.gateway.sts_endpoint


def test_a_role_is_assumed_with_the_credentials_of_the_chain(
    open_s3: Open, s3: S3Server, sts: str
) -> None:
    with FaultProxy(s3.port(sts)) as proxy:
        store = open_s3(role=f"arn:aws:iam:::role/{ROLE_TRUSTED}", endpoint=proxy.url)

        store.replace("run/by-role", b"x")

        assert store.read("run/by-role", 10) == b"x"
        assert [line.split()[0] for line in proxy.requests] == ["POST", "PUT", "GET"]


def test_a_role_that_may_not_be_assumed_is_said(open_s3: Open, sts: str) -> None:
    store = open_s3(role=f"arn:aws:iam:::role/{ROLE_CLOSED}", endpoint=sts)

    with pytest.raises(StoreUnfit, match="cannot be assumed"):
        store.children("")


# ---------------------------------------------------------------- what is set up wrongly


UNFIT = {
    "no such bucket": (lambda s3: {}, "no-such-bucket-here", "there is no bucket"),
    "nobody listens": (lambda s3: {"endpoint": "http://127.0.0.1:9"}, None, "does not answer"),
    "no such name": (lambda s3: {"endpoint": "http://s3.invalid"}, None, "does not answer"),
    "certificate not trusted": (
        lambda s3: {"endpoint": s3.gateway.tls_endpoint, "ca_bundle": None}, None, "not trusted"),
    "no such bundle": (lambda s3: {"ca_bundle": "nowhere.pem"}, None, "there is no file"),
    "AWS without encryption": (
        lambda s3: {"endpoint": "http://s3.amazonaws.com"}, None, "not encrypted"),
    "not an endpoint": (lambda s3: {"endpoint": "127.0.0.1"}, None, "cannot be made"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "bucket", "message"), UNFIT.values(), ids=UNFIT)
def test_what_is_set_up_wrongly_is_said_with_the_next_step(
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    changes: Callable[[S3Server], dict[str, Any]],
    bucket: str | None,
    message: str,
) -> None:
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    store = S3Store(f"s3://{bucket or s3.bucket}/x", s3.options(**changes(s3)))

    for ask in (lambda: store.read("a", 1), lambda: store.stored("a"), lambda: store.children("")):
        if "answer" in message:  # asked for again until there is no time left
            store.hurry(time.monotonic() + 3)
        with pytest.raises(StoreError, match=message) as caught:
            ask()
        assert not isinstance(caught.value, NotFound)
        if "answer" not in message:
            assert isinstance(caught.value, StoreUnfit)


def test_an_object_in_the_place_of_the_prefix_is_said(s3: S3Server, prefix: str) -> None:
    s3.client.put_object(Bucket=s3.bucket, Key=f"{prefix}/object", Body=b"x")
    store = S3Store(f"s3://{s3.bucket}/{prefix}/object", s3.options())

    with pytest.raises(StoreUnfit, match="is an object"):
        store.check_conditional_writes()


@pytest.mark.parametrize("url", ["", "bucket", "s3://", "s3:///prefix", "http://b/p", "s3://b/p?q"])
def test_what_is_no_place_in_s3_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="s3://bucket/prefix"):
        S3Store(url)


WRONG_KEYS = {
    "wrong secret": {"AWS_SECRET_ACCESS_KEY": "wrong"},
    "unknown key": {"AWS_ACCESS_KEY_ID": "UNKNOWNKEY0123456789"},
    "no credentials": {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
    "no such profile": {"AWS_PROFILE": "nobody"},
}


@pytest.mark.parametrize("environment", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_credentials_that_do_not_work_are_said_but_never_shown(
    open_s3: Open,
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    environment: dict[str, str | None],
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    store = open_s3()

    with caplog.at_level(logging.DEBUG):
        for ask in (lambda: store.stored("a"), lambda: store.create("a", b"")):
            with pytest.raises(StoreUnfit, match="credentials") as caught:
                ask()
            said = f"{caught.value!r} {caught.value}"
            assert caught.value.__cause__ is caught.value.__context__ is None
            for secret in (s3.gateway.secret_key, "wrong", "UNKNOWNKEY0123456789"):
                assert secret not in said


@pytest.mark.parametrize("with_role", [False, True], ids=["user", "role"])
def test_no_secret_is_in_a_log_even_of_everything(
    open_s3: Open,
    s3: S3Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    with_role: bool,
) -> None:
    for name in ("boto3", "botocore", "urllib3"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    address = request.getfixturevalue("sts") if with_role else s3.gateway.endpoint
    role = f"arn:aws:iam:::role/{ROLE_TRUSTED}" if with_role else None
    with FaultProxy(s3.port(address)) as proxy, caplog.at_level(logging.DEBUG):
        proxy.add("PUT ", Fault("status", 503))
        open_s3(endpoint=proxy.url, role=role).replace("run/a", b"x")

    assert "PutObject once more" in caplog.text
    for secret in (s3.gateway.secret_key, "Authorization", "Signature=", "security-token"):
        assert secret.lower() not in caplog.text.lower()


def test_opening_a_store_sends_nothing(s3: S3Server, proxy: FaultProxy) -> None:
    S3Store(f"s3://{s3.bucket}/x", s3.options(endpoint=proxy.url))
    S3Store("s3://bucket/prefix/", S3Options(endpoint="http://127.0.0.1:9"))

    assert proxy.requests == []
    assert S3Store("s3://bucket/prefix/").url == "s3://bucket/prefix"


def test_what_new_objects_are_to_be_is_asked_for(open_s3: Open, s3: S3Server, prefix: str) -> None:
    save(open_s3(storage_class="STANDARD"))
    refused = open_s3(storage_class="NO_SUCH_CLASS")

    head = s3.client.head_object(Bucket=s3.bucket, Key=f"{prefix}/{CHECKPOINT}/model")
    assert head.get("StorageClass", "STANDARD") == "STANDARD"
    for write in (lambda: refused.replace("run/a", b"x"), lambda: save(refused)):
        with pytest.raises(StoreUnfit, match="storage_class"):
            write()


def test_an_output_that_a_kill_has_cut_off_is_ended_by_the_next_attempt(
    open_s3: Open, s3: S3Server, prefix: str, tmp_path: Path
) -> None:
    begin_upload(s3, f"{prefix}/run/outputs/events")
    begin_upload(s3, f"{prefix}/run/checkpoints/live/model")

    assert Outputs(open_s3(), "run", tmp_path / "here", 1 << 30).bring_back() == []

    assert s3.uploads(f"{prefix}/") == [f"{prefix}/run/checkpoints/live/model"]
