"""Notices of preemption, from services that answer like the clouds' own, or like nothing at all."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers.metadata import (
    TOKEN,
    AwsService,
    AzureService,
    Fault,
    GcpService,
    Service,
    drips,
    floods,
    hangs,
    resets,
    says,
    sends,
    status,
)
from waiting import wait_until

from runner import notices
from runner.doctor import Finding, Verdict, machine
from runner.errors import MetadataError
from runner.job import Job
from runner.notices import URL_VARIABLE, Advice, MetadataServer, News, Preemption, Watch, problem_of
from runner.notices import aws as aws_module
from runner.notices import watch as watch_module
from runner.notices.aws import Aws
from runner.notices.azure import Azure
from runner.notices.gcp import Gcp
from runner.notices.metadata import MOST_BYTES, Answer
from runner.notices.news import Found, Memory, Source, deadline_of, time_of_day
from runner.notices.watch import SOURCES, Watcher

GRACE_SECONDS = 17.0
SERVICES: dict[str, type[Service]] = {"aws": AwsService, "gcp": GcpService, "azure": AzureService}
SLACK_SECONDS = 10.0  # that a deadline may be early: dates have whole seconds, machines are slow


@pytest.fixture
def aws() -> Iterator[AwsService]:
    with AwsService() as service:
        yield service


@pytest.fixture
def gcp() -> Iterator[GcpService]:
    with GcpService() as service:
        yield service


@pytest.fixture
def azure() -> Iterator[AzureService]:
    with AzureService() as service:
        yield service


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watchers that ask without pauses to speak of."""
    for source, pause in ((Aws, 0.01), (Azure, 0.01)):
        monkeypatch.setattr(source, "pause_seconds", pause)
    monkeypatch.setattr("runner.notices.gcp._FASTEST_SECONDS", 0.01)
    monkeypatch.setattr(watch_module, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(watch_module, "_LONGEST_PAUSE_SECONDS", 0.02)


class Listener:
    """A watch over one cloud, and what it has told."""

    def __init__(self, cloud: str, service: Service, answer_seconds: float = 5.0) -> None:
        self.heard: list[News] = []
        server = MetadataServer(service.url, answer_seconds)
        self.watch = Watch([cloud], GRACE_SECONDS, self.heard.append, server)

    def __enter__(self) -> Listener:
        self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.stop()

    def wait_for(self, number: int) -> list[News]:
        wait_until(lambda: len(self.heard) >= number, what=f"{number} pieces of news")
        return self.heard


def is_early(deadline: float | None, expected: float) -> bool:
    """Whether it is the one that is expected, or a little earlier; never a moment later."""
    assert deadline is not None
    return expected - SLACK_SECONDS < deadline <= expected + 0.001


def look(source: Source) -> list[Found]:
    return list(source.look())


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("notices")]


def announce(service: Service) -> None:
    """A preemption, in the cloud's own way."""
    if isinstance(service, AwsService):
        service.interrupt()
    elif isinstance(service, AzureService):
        service.evict()
    elif isinstance(service, GcpService):
        service.preempt()


def test_the_package_exports_exactly_this() -> None:
    assert notices.__all__ == [
        *("URL_VARIABLE", "Advice", "MetadataServer", "News", "Preemption", "Watch", "problem_of")
    ]
    assert all(hasattr(notices, name) for name in notices.__all__)


# ---------------------------------------------------------------- every cloud


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("cloud", SERVICES)
def test_a_notice_is_told_once_however_often_it_is_seen(cloud: str) -> None:
    with SERVICES[cloud]() as service, Listener(cloud, service) as listener:
        if isinstance(service, GcpService):
            service.longest_wait_seconds = 0.05
            service.change("FALSE", "another-etag")  # the one that may wait already ends
        wait_until(lambda: len(service.requests) > 2, what="some questions")
        assert listener.heard == []

        announced = time.monotonic()
        announce(service)

        (news,) = listener.wait_for(1)
        asked = len(service.requests)
        if isinstance(service, GcpService):
            service.change("TRUE", "a-third-etag")  # its long poll ends, and nothing is new
        wait_until(lambda: len(service.requests) > asked + 2, what="more questions")
        assert listener.heard == [news]
        assert isinstance(news, Preemption)
        assert news.source == cloud
        assert news.at >= announced
    wait_until(lambda: not threads(), what="the end of the threads")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("skew_seconds", [0.0, 3 * 3600.0, -3 * 3600.0])
@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 120), ("azure", 30), ("gcp", 17)])
def test_the_deadline_is_the_clouds_by_its_own_clock(
    cloud: str, seconds: float, skew_seconds: float
) -> None:
    """Google names none: there it is the grace of the job file."""
    with SERVICES[cloud](skew_seconds) as service:
        announce(service)
        with Listener(cloud, service) as listener:
            (news,) = listener.wait_for(1)

    assert isinstance(news, Preemption)
    assert is_early(news.deadline, news.at + seconds)


def test_where_the_cloud_says_no_date_the_clock_of_the_node_has_to_do(aws: AwsService) -> None:
    aws.says_date = False
    aws.interrupt(in_seconds=60)

    (found,) = look(Aws(MetadataServer(aws.url)))

    assert is_early(found.deadline, found.at + 60)


def test_a_date_that_is_cut_to_a_second_makes_no_deadline_late(aws: AwsService) -> None:
    aws.now = lambda: datetime(2026, 1, 1, 12, 0, 0, 900_000, UTC)  # type: ignore[method-assign]
    aws.say("spot/instance-action", '{"action": "stop", "time": "2026-01-01T12:01:00Z"}')

    (found,) = look(Aws(MetadataServer(aws.url)))

    assert found.deadline is not None
    assert 58 < found.deadline - found.at <= 59.1


REFUSALS: dict[str, Fault] = {
    "500": status(500, "Internal Server Error"),
    "503": status(503),
    "a redirect": sends(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n"),
    "no answer": hangs,
    "a header that drips": drips,
    "a closed connection": sends(b""),
    "a reset": resets,
    "half a status line": sends(b"HTTP/1.1 2"),
    "half a header": sends(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "half a body": sends(b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"action": "termi'),
    "half a chunk": sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n{}"),
    "a chunk without a size": sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n"),
    "another protocol": sends(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a hundred continues": sends(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "too many headers": sends(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n"),
    "10 MB": floods(10_000_000),
    "10 MB in chunks": floods(10_000_000, chunked=True),
    "a page of HTML": says("<html>Sign in to the Wi-Fi</html>", "Content-Type: text/html"),
    "bytes": says(b"\x00\xff\xfe\x80" * 20),
    "nothing": says(""),
    "a list": says("[]"),
    "a text": says('"terminate"'),
    "null": says("null"),
    "deep": says("[" * 200_000),
    "a long number": says("9" * 200_000),
    "wrong types": says('{"action": 5, "time": [], "Events": {"EventId": 1}}'),
    "an unknown action": says('{"action": "noop", "time": "2026-01-01T00:00:00Z", "Events": 0}'),
}
ASKED_FOR = {"aws": "instance-action", "gcp": "preempted", "azure": "scheduledevents"}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("cloud", SERVICES)
def test_a_bad_answer_is_no_notice_and_hides_none(
    cloud: str, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning for all of them; and what is announced later is heard."""
    with SERVICES[cloud]() as service:
        service.spoil(ASKED_FOR[cloud], fault, times=3)
        source = SOURCES[cloud](MetadataServer(service.url, 0.1))
        if isinstance(source, Azure):
            source = Azure(MetadataServer(service.url, 0.1), 0.0)
        heard: list[News] = []
        watcher = Watcher(source, "the service", GRACE_SECONDS, heard.append)
        with caplog.at_level(logging.INFO, "runner"):
            watcher.start()
            wait_until(lambda: "answers now" in caplog.text, what="a good answer")
        assert heard == []

        announce(service)

        wait_until(lambda: heard, what="the notice")
        watcher.over.set()
        with service.changed:
            service.over.set()
            service.changed.notify_all()
        watcher.join()
    (warning,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"no notices from {cloud} at present" in warning.getMessage()
    assert "terminate" not in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("cloud", SERVICES)
def test_a_service_that_is_absent_costs_one_line_in_the_log(
    cloud: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = SERVICES[cloud]()
    service.__exit__(None, None, None)
    failed: list[int] = []
    pause_after = Watcher.pause_after
    monkeypatch.setattr(Watcher, "pause_after", lambda w, n: failed.append(n) or pause_after(w, n))

    with Listener(cloud, service) as listener:
        wait_until(lambda: len(failed) > 4, what="some attempts")

    assert listener.heard == []
    assert failed[:4] == [1, 2, 3, 4]
    (record,) = [r for r in caplog.records if r.name.startswith("runner")]
    place = service.url.removeprefix("http://")
    assert f"{place}: nothing can be reached there (Connection refused)" in record.getMessage()


def test_what_is_absent_is_asked_ever_less_and_what_was_there_is_not_left_alone() -> None:
    watcher = Watcher(Aws(MetadataServer()), "there", GRACE_SECONDS, lambda _: None)

    absent = [watcher.pause_after(n) for n in (1, 2, 3, 6, 7, 8, 10_000)]
    watcher._was_there = True
    once_seen = [watcher.pause_after(n) for n in (1, 2, 3, 4, 10_000)]

    assert absent == [1, 2, 4, 32, 60, 60, 60]
    assert once_seen == [1, 2, 4, 5, 5]


@pytest.mark.usefixtures("impatient")
def test_an_error_of_our_own_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        name, pause_seconds = "aws", 0.01
        looks = 0

        def look(self) -> Iterator[Found]:
            self.looks += 1
            if self.looks == 1:
                raise ZeroDivisionError
            yield Found("interruption", "x", time.monotonic())

        def acknowledge(self) -> None: ...

    heard: list[News] = []
    watcher = Watcher(Broken(), "there", GRACE_SECONDS, heard.append)
    watcher.start()

    wait_until(lambda: heard, what="the notice")
    watcher.over.set()
    watcher.join()
    assert "not understood" in caplog.text


@pytest.mark.parametrize("cloud", SERVICES)
def test_a_watch_ends_at_once_while_it_waits_for_an_answer(cloud: str) -> None:
    with SERVICES[cloud]() as service:
        service.spoil("", hangs, times=99)
        listener = Listener(cloud, service, answer_seconds=30)
        listener.watch.start()
        wait_until(lambda: service.requests, what="the first question")

        listener.watch.stop()

        wait_until(lambda: not threads(), what="the end of the threads")


def test_no_proxy_of_the_environment_is_asked(
    aws: AwsService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        proxy = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy)
        monkeypatch.setenv("no_proxy", "")

        assert problem_of("aws", MetadataServer(aws.url)) is None


def test_the_environment_says_where_the_service_is(
    gcp: GcpService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    assert MetadataServer().place == "169.254.169.254"

    monkeypatch.setenv(URL_VARIABLE, gcp.url + "/")

    assert problem_of("gcp") is None
    assert len(gcp.requests) == 1


@pytest.mark.parametrize(
    "url",
    ["x", "https://h", "http://", "http://h/path", "http://h:x", "http://h:99999", "http://[::1",
     "http://user:pass@h", "file:///h", "http://\u00e9"],
)  # fmt: skip
def test_a_url_that_is_none_is_named_by_its_variable(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URL_VARIABLE, url)

    problem = problem_of("gcp")

    assert problem is not None
    assert f"the URL in {URL_VARIABLE}: it is not http://HOST[:PORT]" in problem
    assert "pass" not in problem


def test_a_name_that_can_be_no_hosts_is_out_of_reach() -> None:
    problem = problem_of("gcp", MetadataServer("http://a..b"))

    assert problem is not None
    assert "a..b: nothing can be reached there" in problem


def test_the_host_is_named_as_it_was_given(gcp: GcpService) -> None:
    problem_of("gcp", MetadataServer(gcp.url))

    assert gcp.requests[0].headers["host"] == gcp.url.removeprefix("http://")
    assert MetadataServer("http://[fd00:ec2::254]").place == "[fd00:ec2::254]"


@pytest.mark.parametrize("cloud", SERVICES)
def test_a_request_is_over_in_time_however_slowly_the_answer_comes(cloud: str) -> None:
    with SERVICES[cloud]() as service:
        service.spoil("", drips, times=9)
        began = time.monotonic()

        problem = problem_of(cloud, MetadataServer(service.url, 0.2))

        assert problem is not None
        assert "no answer came within 0.2 s" in problem
        assert 0.2 <= time.monotonic() - began < 10


def test_no_more_is_read_than_could_be_of_use(aws: AwsService) -> None:
    server = MetadataServer(aws.url)
    aws.spoil("fits", says(b"x" * MOST_BYTES))
    aws.spoil("too-long", says(b"x" * (MOST_BYTES + 1)))

    assert len(server.ask("/fits", {}).body) == MOST_BYTES
    with pytest.raises(MetadataError, match="longer than 256 KiB"):
        server.ask("/too-long", {})


def test_the_rest_of_a_flood_is_left_where_it_is(aws: AwsService) -> None:
    mebibyte, sent = b" " * 2**20, []

    def flood(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(64):
                connection.sendall(mebibyte)
                sent.append(mebibyte)
        over.set()

    aws.spoil("", flood)
    with pytest.raises(MetadataError, match="longer than"):
        MetadataServer(aws.url).ask("/", {})

    assert aws.over.wait(10)
    assert len(sent) < 32  # what the buffers of the two sockets hold, and no more


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff{}", b"[" * 200_000, b"1" * 5_000, b'"{}"']
)
def test_what_is_no_json_object_is_an_error(body: bytes) -> None:
    with pytest.raises(MetadataError, match=r"is not JSON|not an object"):
        Answer(200, {}, body, 0.0, 0.0).json_object()


@pytest.mark.parametrize("length", ["Content-Length: 6", "Transfer-Encoding: chunked"])
def test_an_answer_that_breaks_off_is_none(gcp: GcpService, length: str) -> None:
    gcp.spoil("", sends(f"HTTP/1.1 200 OK\r\n{length}\r\n\r\nFALSE".encode()))

    with pytest.raises(MetadataError, match=r"breaks off|cannot be read"):
        MetadataServer(gcp.url).ask("/", {})


# ---------------------------------------------------------------- AWS


def test_aws_is_asked_with_a_token_that_is_kept(aws: AwsService) -> None:
    source = Aws(MetadataServer(aws.url))

    assert [look(source) for _ in range(3)] == [[], [], []]

    (token,) = aws.asked("token", "PUT")
    assert token.headers["x-aws-ec2-metadata-token-ttl-seconds"] == "21600"
    asked = [request.path.removeprefix("/latest/meta-data/") for request in aws.requests[1:]]
    assert asked == ["spot/instance-action", "events/recommendations/rebalance"] * 3


def test_a_token_is_renewed_when_it_is_refused(aws: AwsService) -> None:
    source = Aws(MetadataServer(aws.url))
    assert look(source) == []
    aws.end_tokens()
    aws.interrupt()

    (found,) = look(source)

    assert found.event == "interruption"
    assert len(aws.asked("token", "PUT")) == 2


def test_a_service_that_refuses_each_token_is_not_asked_in_a_circle(aws: AwsService) -> None:
    aws.spoil("instance-action", status(401), times=99)

    with pytest.raises(MetadataError, match="spot/instance-action is answered with status 401"):
        look(Aws(MetadataServer(aws.url)))

    assert len(aws.requests) == 4


def test_a_token_is_renewed_before_it_ends(
    aws: AwsService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws_module, "_TOKEN_SECONDS", 600)  # so that it is about to end at once
    source = Aws(MetadataServer(aws.url))

    look(source)
    look(source)

    assert len(aws.asked("token", "PUT")) == 4


@pytest.mark.parametrize("fault", [status(403), status(405), says("a b"), says("a\r\nb"), says("")])
def test_what_gives_no_token_is_not_aws(aws: AwsService, fault: Fault) -> None:
    """What a container may not reach looks the same as what is not there: the message says so."""
    aws.spoil("token", fault)

    problem = problem_of("aws", MetadataServer(aws.url))

    assert problem is not None
    assert "it gives no token" in problem
    assert "the hop limit of the instance's metadata options has to be 2 or more" in problem
    assert len(aws.requests) == 1


AWS_DOCUMENTS: dict[str, tuple[str, float | None]] = {
    # what stands there → seconds to the deadline, None where it says none
    "a stop": ('{"action": "stop", "time": "%s"}', 90),
    "a hibernation": ('{"action": "hibernate", "time": "%s"}', 90),
    "another form of time": ('{"action": "stop", "time": " 2999-01-01T00:00:00+02:00"}', 120),
    "a time long ago": ('{"action": "stop", "time": "1999-01-01T00:00:00Z"}', 2),
    "the end of time": ('{"action": "stop", "time": "9999-12-31T23:59:59-23:59"}', 120),
    "no time": ('{"action": "terminate"}', None),
    "a number": ('{"action": "terminate", "time": 12}', None),
    "no date": ('{"action": "terminate", "time": "soon"}', None),
}


@pytest.mark.parametrize(("document", "seconds"), AWS_DOCUMENTS.values(), ids=AWS_DOCUMENTS)
def test_an_interruption_is_believed_and_its_time_if_it_can_be_one(
    aws: AwsService, document: str, seconds: float | None
) -> None:
    said = document.replace("%s", aws.later(90).strftime("%Y-%m-%dT%H:%M:%SZ"))
    aws.say("spot/instance-action", said)

    (found,) = look(Aws(MetadataServer(aws.url)))

    assert not found.is_advice
    if seconds is None:
        assert found.deadline is None
    else:
        assert is_early(found.deadline, found.at + seconds)


@pytest.mark.usefixtures("impatient")
def test_a_rebalance_recommendation_is_advice_and_told_once(aws: AwsService) -> None:
    with Listener("aws", aws) as listener:
        aws.recommend()
        listener.wait_for(1)
        aws.interrupt()

        heard = listener.wait_for(2)

    assert [type(news) for news in heard] == [Advice, Preemption]


def test_advice_that_cannot_be_read_hides_no_interruption(aws: AwsService) -> None:
    aws.interrupt()
    aws.spoil("rebalance", status(500))
    found: list[Found] = []

    with contextlib.suppress(MetadataError):
        for each in Aws(MetadataServer(aws.url)).look():
            found.append(each)  # one by one, because the error comes after it

    assert [each.event for each in found] == ["interruption"]
    assert len(aws.asked("rebalance")) == 1


@pytest.mark.usefixtures("impatient")
def test_a_time_that_comes_nearer_is_told_again(aws: AwsService) -> None:
    with Listener("aws", aws) as listener:
        aws.interrupt(in_seconds=110)
        listener.wait_for(1)
        aws.interrupt(in_seconds=115)
        asked = len(aws.requests)
        wait_until(lambda: len(aws.requests) > asked + 4, what="more questions")
        aws.interrupt(in_seconds=30)

        first, second = listener.wait_for(2)

    assert isinstance(first, Preemption)
    assert isinstance(second, Preemption)
    assert is_early(second.deadline, first.deadline - 80 + SLACK_SECONDS / 2)


# ---------------------------------------------------------------- Google Cloud


def test_google_is_asked_once_and_then_waited_for(gcp: GcpService) -> None:
    gcp.longest_wait_seconds = 0.01
    source = Gcp(MetadataServer(gcp.url))

    assert [look(source) for _ in range(3)] == [[], [], []]

    waiting = {"wait_for_change": "true", "timeout_sec": "15", "last_etag": gcp.etag}
    assert [request.query for request in gcp.requests] == [{}, waiting, waiting]
    assert {request.headers["metadata-flavor"] for request in gcp.requests} == {"Google"}


def test_a_change_is_heard_while_it_is_waited_for(gcp: GcpService) -> None:
    with Listener("gcp", gcp) as listener:
        wait_until(lambda: gcp.asked("wait_for_change"), what="the long poll")
        announced = time.monotonic()
        gcp.preempt()

        (news,) = listener.wait_for(1)

    assert news.at - announced < 10  # where a long poll takes 15 s


def test_a_change_between_two_questions_is_not_missed(gcp: GcpService) -> None:
    source = Gcp(MetadataServer(gcp.url))
    assert look(source) == []
    gcp.preempt()
    began = time.monotonic()

    (found,) = look(source)

    assert found.event == "preempted"
    assert time.monotonic() - began < 10


def test_after_an_error_google_is_asked_how_it_is_now(gcp: GcpService) -> None:
    source = Gcp(MetadataServer(gcp.url))
    look(source)
    gcp.spoil("wait_for_change", sends(b""))
    with pytest.raises(MetadataError):
        look(source)
    gcp.preempt()

    assert [found.event for found in look(source)] == ["preempted"]
    assert gcp.requests[-1].query == {}


@pytest.mark.parametrize("answer", ["FALSE", "FALSE\n", "false"])
def test_a_long_poll_that_is_answered_at_once_is_no_reason_to_hurry(
    gcp: GcpService, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.notices.gcp._FASTEST_SECONDS", 60.0)
    source = Gcp(MetadataServer(gcp.url))
    pauses = []
    for etag in ("a", "b", "c", "not to be sent back"):
        gcp.change(answer, etag)
        look(source)
        pauses.append(source.pause_seconds)

    assert pauses[0] == 0
    assert all(30 < pause <= 60 for pause in pauses[1:])
    assert source._etag is None


def test_what_is_not_googles_server_is_not_believed(gcp: GcpService) -> None:
    gcp.spoil("preempted", says("TRUE"))

    problem = problem_of("gcp", MetadataServer(gcp.url))

    assert problem is not None
    assert "not Google's metadata server" in problem


# ---------------------------------------------------------------- Azure

EVENTS: dict[str, tuple[dict[str, Any], bool]] = {
    # what is changed in the event → whether it is about this machine's eviction
    "this machine's": ({}, True),
    "written otherwise": ({"Resources": ["TRAINERS_4"]}, True),
    "with others": ({"Resources": ["trainers_1", "trainers_4"]}, True),
    "another machine's": ({"Resources": ["trainers_5"]}, False),
    "nobody's": ({"Resources": []}, False),
    "no list": ({"Resources": "trainers_4"}, False),
    "no names": ({"Resources": [None, 4, {}]}, False),
    "a reboot": ({"EventType": "Reboot"}, False),
    "a freeze": ({"EventType": "Freeze"}, False),
    "no type": ({"EventType": None}, False),
    "a number for an id": ({"EventId": 7}, False),
    "no id": ({"EventId": ""}, False),
}


@pytest.mark.parametrize(("changes", "is_ours"), EVENTS.values(), ids=EVENTS)
def test_only_the_eviction_of_this_machine_is_of_interest(
    azure: AzureService, changes: dict[str, Any], is_ours: bool
) -> None:
    azure.evict(**changes)
    azure.events.append("no event")  # type: ignore[arg-type]

    found = look(Azure(MetadataServer(azure.url)))

    assert [each.event for each in found] == (["E-1"] if is_ours else [])
    assert all(request.headers["metadata"] == "true" for request in azure.requests)


def test_the_name_of_the_machine_is_asked_for_once_and_only_when_it_matters(
    azure: AzureService,
) -> None:
    source = Azure(MetadataServer(azure.url))
    look(source)
    assert azure.asked("compute/name") == []
    azure.evict()

    look(source)
    look(source)

    assert len(azure.asked("compute/name")) == 1


@pytest.mark.parametrize("fault", [status(500), says(""), says("x" * 300), hangs])
def test_without_its_name_a_machine_believes_no_event_and_asks_again(
    azure: AzureService, fault: Fault
) -> None:
    azure.evict()
    azure.spoil("compute/name", fault)
    source = Azure(MetadataServer(azure.url, 1.0))

    with pytest.raises(MetadataError):
        look(source)

    assert [found.event for found in look(source)] == ["E-1"]


AZURE_DEADLINES: dict[str, tuple[dict[str, Any], float | None]] = {
    "as it says": ({}, 30),
    "the other form": ({"NotBefore": "2999-01-01T00:00:00Z"}, 900),
    "long ago": ({"NotBefore": "Mon, 19 Sep 2016 18:29:47 GMT"}, 2),
    "begun": ({"EventStatus": "Started", "NotBefore": ""}, 2),
    "empty": ({"NotBefore": ""}, None),
    "absurd": ({"NotBefore": "Mon, 99 Sep 2016 18:29:47 GMT"}, None),
    "a list": ({"NotBefore": ["x"]}, None),
}


@pytest.mark.parametrize(("changes", "seconds"), AZURE_DEADLINES.values(), ids=AZURE_DEADLINES)
def test_an_eviction_is_not_before_its_time(
    azure: AzureService, changes: dict[str, Any], seconds: float | None
) -> None:
    azure.evict(**changes)

    (found,) = look(Azure(MetadataServer(azure.url)))

    if seconds is None:
        assert found.deadline is None
    else:
        assert is_early(found.deadline, found.at + seconds)


@pytest.mark.usefixtures("impatient")
def test_an_eviction_that_begins_early_is_told_again(azure: AzureService) -> None:
    azure.evict(in_seconds=60)
    with Listener("azure", azure) as listener:
        listener.wait_for(1)
        azure.evict(EventStatus="Started", NotBefore="")

        first, second = listener.wait_for(2)
        asked = len(azure.requests)
        wait_until(lambda: len(azure.requests) > asked + 2, what="more questions")

    assert len(listener.heard) == 2
    assert isinstance(first, Preemption)
    assert isinstance(second, Preemption)
    assert first.deadline - second.deadline > 50


def test_the_first_answer_of_azure_may_take_long(azure: AzureService) -> None:
    def late(connection: socket.socket, over: threading.Event) -> None:
        over.wait(0.5)
        says('{"DocumentIncarnation": 1, "Events": []}')(connection, over)

    azure.spoil("scheduledevents", late, times=2)
    source = Azure(MetadataServer(azure.url, 0.1))

    assert look(source) == []
    with pytest.raises(MetadataError, match=r"no answer came within 0\.1 s"):
        look(source)


def test_an_eviction_is_acknowledged_when_it_is_said_so_and_not_before(
    azure: AzureService,
) -> None:
    azure.evict("E-ours")
    azure.evict("E-theirs", Resources=["trainers_5"])
    azure.evict("E-both", Resources=["trainers_4", "trainers_5"])
    azure.evict("E-reboot", EventType="Reboot")
    source = Azure(MetadataServer(azure.url))
    look(source)
    assert azure.started() == []

    source.acknowledge()

    (request,) = azure.asked("scheduledevents", "POST")
    assert json.loads(request.body) == {"StartRequests": [{"EventId": "E-ours"}]}
    assert request.headers["metadata"] == "true"
    assert request.headers["content-type"] == "application/json"


def test_an_event_that_is_withdrawn_is_not_acknowledged(azure: AzureService) -> None:
    azure.evict()
    source = Azure(MetadataServer(azure.url))
    look(source)
    azure.events.clear()
    look(source)

    source.acknowledge()

    assert azure.started() == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [status(500), hangs, resets], ids=["500", "hangs", "resets"])
def test_an_acknowledgement_that_fails_is_only_logged(
    azure: AzureService, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    azure.evict()
    with Listener("azure", azure, answer_seconds=0.3) as listener:
        listener.wait_for(1)
        azure.spoil("scheduledevents", fault, times=99)

        listener.watch.acknowledge()

    assert azure.started() == ["E-1"]
    assert "azure was not told that all is saved" in caplog.text


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_others_want_to_hear_of_nothing(cloud: str) -> None:
    with SERVICES[cloud]() as service:
        announce(service)
        source = SOURCES[cloud](MetadataServer(service.url))
        look(source)
        asked = len(service.requests)

        source.acknowledge()

        assert len(service.requests) == asked


# ---------------------------------------------------------------- runner doctor


def doctors_finding(tmp_path: Path, *clouds: str) -> Finding:
    preemption = {"notices": list(clouds)}
    job = {"name": "a", "command": ["true"], "workdir": str(tmp_path), "preemption": preemption}
    return machine.notices(Job.model_validate(job))


def test_the_doctor_asks_each_cloud_once(
    tmp_path: Path, aws: AwsService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URL_VARIABLE, aws.url)

    good, mixed = (doctors_finding(tmp_path, *clouds) for clouds in (["aws"], ["aws", "gcp"]))

    assert (good.verdict, good.facts) == (Verdict.OK, "the metadata service of aws answers")
    assert mixed.verdict is Verdict.WARN
    assert mixed.facts.startswith("gcp: the metadata service at 127.0.0.1:")
    assert "status 401" in mixed.facts
    assert "preemption.notices" in mixed.remedy


def test_the_doctor_asks_nobody_who_is_not_named(
    tmp_path: Path, aws: AwsService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URL_VARIABLE, aws.url)

    finding = doctors_finding(tmp_path)

    assert (finding.verdict, aws.requests) == (Verdict.OK, [])


# ---------------------------------------------------------------- what is pure

MEMORIES: dict[str, tuple[list[Found], list[bool]]] = {
    "the same": ([Found("e", "1", 0, 9), Found("e", "1", 1, 10)], [True, False]),
    "the same, the clock jumped": ([Found("e", "1", 0, 9), Found("e", "1", 1, 3)], [True, False]),
    "sooner": ([Found("e", "1", 0, 9), Found("e", "2", 1, 5)], [True, True]),
    "hardly sooner": ([Found("e", "1", 0, 9), Found("e", "2", 1, 8.5)], [True, False]),
    "later": ([Found("e", "1", 0, 9), Found("e", "2", 1, 15)], [True, False]),
    "later, and that one has passed": (
        [Found("e", "1", 0, 9), Found("e", "2", 10, 99)],
        [True, True],
    ),
    "to and fro": (
        [Found("e", "1", 0, 9), Found("e", "2", 1, 5), Found("e", "1", 2, 9)],
        [True, True, False],
    ),
    "two events": ([Found("e", "1", 0, 9), Found("f", "1", 0, 9)], [True, True]),
    "no longer any time": ([Found("e", "1", 0, 9), Found("e", "2", 1)], [True, False]),
    "advice again": (
        [Found("r", "1", 0), Found("r", "1", 1), Found("r", "2", 2)],
        [True, False, True],
    ),
}


@pytest.mark.parametrize(("found", "told"), MEMORIES.values(), ids=MEMORIES)
def test_a_thing_is_told_once_and_again_when_it_comes_nearer(
    found: list[Found], told: list[bool]
) -> None:
    memory = Memory()

    assert [memory.is_new(each) for each in found] == told


@pytest.mark.parametrize(
    ("left", "counted"), [(50, 50), (2, 2), (1, 2), (-1, 2), (-1e9, 2), (120, 120), (1e12, 120)]
)
def test_a_deadline_lies_within_what_is_possible(left: float, counted: float) -> None:
    answer = Answer(200, {}, b"", at=1000.0, time_of_day=5e9)

    assert deadline_of(answer, 5e9 + left, 120.0) == 1000 + counted


NOON = datetime(2026, 1, 2, 12, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026-01-02T12:00:00Z", NOON),
        ("2026-01-02T14:00:00+02:00", NOON),
        ("2026-01-02T12:00:00", NOON),
        ("2026-01-02T12:00:00.500Z", NOON + 0.5),
        ("Fri, 02 Jan 2026 12:00:00 GMT", NOON),
        ("Fri, 02 Jan 2026 12:00:00", NOON),
        ("", None),
        ("soon", None),
        ("2026-13-02T12:00:00Z", None),
        ("Fri, 02 Jan 99999999999999 12:00:00 GMT", None),
        (None, None),
        (1767355200, None),
    ],
)
def test_a_time_of_day_is_read_in_both_forms(text: object, seconds: float | None) -> None:
    assert time_of_day(text) == seconds


class Canned(MetadataServer):
    """Gives the same answer to everything."""

    def __init__(self, body: bytes, headers: dict[str, str]) -> None:
        super().__init__("http://nowhere.invalid")
        self.answer = Answer(200, headers, body, 1000.0, 5e9)

    def ask(self, *_: Any, **__: Any) -> Answer:
        return self.answer


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["terminate", "Preempt", "vm", "Started", "2026-01-01T00:00:00Z"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["action", "time", "noticeTime", "Events", "EventId", "EventType",
                         "Resources", "NotBefore", "EventStatus"]),
        inner,
    ),
    max_leaves=12,
)  # fmt: skip
BODIES = st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode())


@settings(deadline=None)
@given(body=BODIES, etag=st.text(max_size=20), date=st.text(max_size=30))
def test_whatever_is_answered_it_is_understood_or_an_error(
    body: bytes, etag: str, date: str
) -> None:
    headers = {"metadata-flavor": "Google", "etag": etag, "date": date}
    new: list[Callable[[MetadataServer], Source]] = [*SOURCES.values()]
    for make in new:
        try:
            found = look(make(Canned(body, headers)))
        except MetadataError:
            continue
        for each in found:
            assert each.at == 1000.0
            assert each.deadline is None or 2 <= each.deadline - each.at <= 900
