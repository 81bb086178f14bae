"""What is tried of a store before anything is started, with stores that lack something."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from runner.errors import (
    NobodyAnswers,
    NotFound,
    RecordUnreadable,
    StoreDenied,
    StoreError,
    StoreUnfit,
    UsageError,
)
from runner.job import Job
from runner.store import DirectoryStore, S3Options
from runner.supervisor.preflight import (
    check_endpoint,
    check_listing,
    check_reachable,
    check_writable,
    refusals,
    s3_options,
    store_of,
    until_it_answers,
)


class Out:
    """A store that is out of reach so many times, or refuses for another reason."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "there"


def test_a_store_that_is_out_of_reach_is_asked_again_while_there_is_patience(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("runner.supervisor.preflight._FIRST_PAUSE_SECONDS", 0.01)

    assert until_it_answers(Out(StoreError("down"), NobodyAnswers("port 9")), 60) == "there"
    assert [r.message for r in caplog.records] == [
        "the store is out of reach, tried again in 0.01 s: down",
        "the store is out of reach, tried again in 0.02 s: port 9",
    ]
    with pytest.raises(StoreError, match="down"):
        until_it_answers(Out(*[StoreError("down")] * 99), 0.05)
    with pytest.raises(NobodyAnswers):
        until_it_answers(Out(NobodyAnswers("port 9")), 0)


def test_a_call_that_never_comes_back_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.supervisor.preflight._LONGEST_LOOK", 0.1)
    gone = threading.Event()
    calls: list[int] = []

    def ask() -> bool:
        calls.append(1)
        return gone.wait()

    try:
        for patience in (0.0, 0.1):
            with pytest.raises(NobodyAnswers, match="has not come back in 0"):
                until_it_answers(ask, patience)
        assert len(calls) == 2, "one that stands still is not joined by another"
    finally:
        gone.set()


@pytest.mark.parametrize(
    "error",
    [
        StoreDenied("s3", "s3:PutObject", "b"),
        StoreUnfit("s3", "wrong region", "correct it"),
        RecordUnreadable("run.json"),
        UsageError("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_no_waiting_helps_is_said_at_once(error: Exception) -> None:
    out = Out(error)

    with pytest.raises(type(error)):
        until_it_answers(out, 60)


class Pretender(DirectoryStore):
    """A directory that says it is a bucket, and counts what is asked of it."""

    def __init__(self, root: Path, raises: dict[str, StoreError] | None = None) -> None:
        super().__init__(root)
        self.url = "s3://bucket"
        self.asked: list[str] = []
        self._raises = raises or {}

    def _ask(self, verb: str) -> None:
        self.asked.append(verb)
        if verb in self._raises:
            raise self._raises[verb]

    def create(self, key: str, data: bytes) -> bool:
        self._ask("create")
        return super().create(key, data)

    def read(self, key: str, limit: int) -> bytes:
        self._ask("read")
        return super().read(key, limit)

    def children(self, prefix: str) -> list[str]:
        self._ask("children")
        return super().children(prefix)

    def delete(self, keys: Any) -> None:
        self._ask("delete")
        super().delete(keys)


class TwoWinners(Pretender):
    """Lets every writer of a key win."""

    def create(self, key: str, data: bytes) -> bool:
        self._ask("create")
        self.replace(key, data)
        return True


def job(tmp_path: Path, **s3: Any) -> Job:
    return Job(name="job", command=("true",), workdir=tmp_path, store="s3://bucket", s3=s3)


def check_all(tmp_path: Path, store: Pretender) -> None:
    check_reachable(job(tmp_path), store)
    check_writable(job(tmp_path), store)


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(variable, raising=False)


def test_a_start_asks_little_and_leaves_nothing(tmp_path: Path) -> None:
    store = Pretender(tmp_path / "store")

    check_all(tmp_path, store)

    assert store.asked == ["children", "create", "create", "read", "delete"]
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_a_server_on_which_two_writers_win_is_refused_unless_that_is_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = TwoWinners(tmp_path / "store")

    with pytest.raises(UsageError, match="conditional_writes: off"):
        check_writable(job(tmp_path), store)
    with caplog.at_level(logging.WARNING):
        check_writable(job(tmp_path, conditional_writes=False), store)

    assert "conditional_writes is off" in caplog.text
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


REFUSED = {
    "children": ("s3:ListBucket", "arn:aws:s3:::bucket,"),
    "create": ("s3:PutObject", "arn:aws:s3:::bucket/*,"),
    "read": ("s3:GetObject", "arn:aws:s3:::bucket/*,"),
    "delete": ("s3:DeleteObject", "arn:aws:s3:::bucket/*,"),
}


@pytest.mark.parametrize(("verb", "named"), REFUSED.items())
def test_what_is_not_allowed_is_named(tmp_path: Path, verb: str, named: tuple[str, str]) -> None:
    action, resource = named
    store = Pretender(tmp_path / "store", {verb: StoreDenied("here", action, "a key")})

    with pytest.raises(UsageError) as refused:
        check_all(tmp_path, store)

    assert f"the permission {action} is missing; allow it on {resource}" in str(refused.value)


def test_of_a_write_and_a_clean_up_that_fail_the_write_is_told(tmp_path: Path) -> None:
    raises: dict[str, StoreError] = {
        "create": StoreDenied("here", "s3:PutObject", "a key"),
        "delete": StoreDenied("here", "s3:DeleteObject", "a key"),
    }

    with pytest.raises(UsageError, match="s3:PutObject"):
        check_writable(job(tmp_path), Pretender(tmp_path / "store", raises))


def test_only_what_no_retry_helps_is_the_users_fault(tmp_path: Path) -> None:
    store = Pretender(tmp_path)

    with pytest.raises(UsageError, match="look elsewhere"), refusals(store):
        raise StoreUnfit("here", "there is no bucket", "look elsewhere")
    with pytest.raises(StoreError, match="busy") as passing, refusals(store):
        raise StoreError("busy")
    assert not isinstance(passing.value, UsageError)


def test_a_server_that_knows_no_listing_is_no_s3_server(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no S3 server"):
        check_listing(Pretender(tmp_path, {"children": NotFound("x")}))


def test_a_directory_is_not_asked(tmp_path: Path) -> None:
    plain = Job(name="job", command=("true",), workdir=tmp_path)

    check_reachable(plain, store_of(plain))
    check_writable(plain, store_of(plain))

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("http://s3.amazonaws.com", "AWS_ENDPOINT_URL_S3: AWS is not spoken to without encryption"),
        ("http://x.s3.eu-west-1.amazonaws.com", "say https://x.s3.eu-west-1.amazonaws.com"),
        ("http://127.0.0.1:9", "nothing listens on port 9 there"),
    ],
)
def test_an_endpoint_that_cannot_be_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, said: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(variable, raising=False)

    with pytest.raises(UsageError) as refused:
        check_endpoint(Pretender(tmp_path), S3Options())

    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (socket.gaierror(socket.EAI_NONAME, "no such name"), "there is no host storage.example"),
        (socket.gaierror(socket.EAI_AGAIN, "the resolver is out of order"), None),
        (TimeoutError(), None),
        (OSError("no route"), None),
    ],
)
def test_a_name_that_does_not_exist_is_told_from_a_network_that_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: OSError, said: str | None
) -> None:
    def connect(*_: object) -> socket.socket:
        raise problem

    monkeypatch.setattr(socket, "create_connection", connect)
    options = S3Options(endpoint="http://storage.example")
    monkeypatch.setenv("no_proxy", "*")

    with pytest.raises(UsageError, match=said) if said else contextlib.nullcontext():
        check_endpoint(Pretender(tmp_path), options)


def test_the_endpoint_of_the_job_comes_before_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3.amazonaws.com")

    with pytest.raises(UsageError, match=r"s3\.endpoint is http://127\.0\.0\.1:9"):
        check_endpoint(Pretender(tmp_path), S3Options(endpoint="http://127.0.0.1:9"))


def test_behind_a_proxy_nobody_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "")

    check_endpoint(Pretender(tmp_path), S3Options(endpoint="https://nobody.invalid"))


def test_certificates_are_found_beside_the_job(tmp_path: Path) -> None:
    (tmp_path / "trusted.pem").write_text("")

    assert s3_options(job(tmp_path, ca_bundle="trusted.pem")).ca_bundle == str(
        tmp_path / "trusted.pem"
    )
    with pytest.raises(UsageError, match=r"s3\.ca_bundle: there is no file"):
        s3_options(job(tmp_path, ca_bundle="missing.pem"))
