"""`runner logs`: what is printed of a log, and when following it ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from nodes import Node
from slots import RefusingStore
from waiting import wait_until

from runner.checkpoint.attempts import Ledger
from runner.checkpoint.logs import StoredLogs
from runner.logs.files import LocalLogs, LogLimits, LogWriter
from runner.logs.lines import records, stamp
from runner.spool import Spool
from runner.supervisor import following
from runner.supervisor.following import read_log
from runner.supervisor.index import Entry, remember
from runner.supervisor.lookup import KnownRun

LIMITS = LogLimits(1 << 20, 4)
LONG_AGO, NOW = datetime(2026, 1, 1, tzinfo=UTC), datetime.now(UTC)


class Logged:
    """A run `job` on a node, of which there are records and a log, and no supervisor."""

    def __init__(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        self.node = node
        self.ledger = Ledger(node.store, "job", "owner")
        self.ledger.begin({"run_id": "job", "job": {}})
        self.folder = node.folder / "logs"
        self.writer = LogWriter(self.folder, LIMITS)
        self.run = KnownRun("job", node.store, node.spool(), self.folder)
        monkeypatch.setenv("RUNNER_HOME", node.environment["RUNNER_HOME"])
        spool = str(node.spool().path)
        remember(Entry("job", node.store.url, spool, str(self.folder), NOW.isoformat()))

    def say(
        self, attempt: int, stream: str, text: bytes, mark: bytes = b"", at: datetime = NOW
    ) -> None:
        self.writer.write(attempt, records(stamp(at.timestamp()), attempt, stream, text, mark))

    def ship(self) -> None:
        StoredLogs(self.node.store, "job").ship(LocalLogs(self.folder), 1 << 30, 99, lambda: True)


@pytest.fixture
def logged(node: Node, monkeypatch: pytest.MonkeyPatch) -> Logged:
    return Logged(node, monkeypatch)


@pytest.fixture
def said(logged: Logged) -> Logged:
    """Two attempts, in which everything occurs that can."""
    logged.say(1, "run", b"attempt 1 begins", at=LONG_AGO)
    logged.say(1, "out", b"epoch 1", at=LONG_AGO)
    logged.say(1, "err", b" 10%", b"~", at=LONG_AGO)
    logged.say(1, "err", b"100%", at=LONG_AGO)
    logged.say(1, "out", b"epoch ", b"+")
    logged.say(2, "run", b"attempt 2 begins")
    logged.say(2, "out", b"one, ", b"+")
    logged.say(2, "out", b"two")
    logged.say(2, "err", b"\xff\xfe")
    return logged


PRINTED: dict[str, tuple[list[str], str]] = {
    "all": (
        [],
        (
            "runner: attempt 1 begins\nepoch 1\n 10%\r100%\nepoch \nrunner: attempt 2 begins\n"
            "one, two\n\\xff\\xfe\n"
        ),
    ),
    "one stream": (["--stream", "out"], "epoch 1\nepoch \none, two\n"),
    "two streams": (["--stream", "out", "--stream", "run", "--attempt", "2"],
        "runner: attempt 2 begins\none, two\n"),
    "one attempt": (["--attempt", "1"], "runner: attempt 1 begins\nepoch 1\n 10%\r100%\nepoch "),
    "another attempt": (["--attempt", "3"], ""),
    "the last minutes": (["--since", "60m", "--stream", "out"], "epoch \none, two\n"),
    "since a time": (["--since", "2026-01-01T00:00:00+00:00", "--attempt", "1", "--stream", "out"],
        "epoch 1\nepoch "),
    "since after all": (["--since", "2100-01-01T00:00:00Z"], ""),
}  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), PRINTED.values(), ids=PRINTED)
def test_a_log_is_printed_as_it_was(said: Logged, options: list[str], expected: str) -> None:
    called = said.node.start("logs", "job", *options)

    assert called.wait() == 0
    out = called._out.read_bytes().decode(errors="backslashreplace")
    assert out == expected
    assert called.err == ""


def test_with_times_it_is_printed_as_the_file_has_it(said: Logged) -> None:
    called = said.node.start("logs", "job", "-t")
    assert called.wait() == 0

    files = b"".join(path.read_bytes() for path in sorted(said.folder.iterdir()))
    assert called._out.read_bytes() == files


def test_programs_get_an_object_for_each_line(said: Logged) -> None:
    called = said.node.call("logs", "job", "-o", "json")

    rows = [json.loads(line) for line in called.out.splitlines()]
    assert rows[2] == {
        "time": "2026-01-01T00:00:00.000Z",
        "attempt": 1,
        "stream": "err",
        "text": " 10%",
        "end": "\r",
    }
    assert [(row["text"], row["end"]) for row in rows[-2:]] == [("two", "\n"), ("\\xff\\xfe", "\n")]


WRONG: dict[str, tuple[list[str], str]] = {
    "a stream": (["--stream", "stdout"], "--stream stdout: expected one of out, err, run"),
    "a time": (["--since", "yesterday"], "--since yesterday: expected a duration such as"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_meant_is_refused(said: Logged, options: list[str], message: str) -> None:
    called = said.node.call("logs", "job", *options)

    assert (called.code, called.out) == (2, "")
    assert message in called.err


def test_a_reader_that_has_seen_enough_is_no_error(logged: Logged) -> None:
    for number in range(20_000):
        logged.say(1, "out", b"line %d" % number)
    out = logged.node.folder / "head"
    command = 'runner logs job | head -n 2 > "$OUT"; exit ${PIPESTATUS[0]}'
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **logged.node.environment, "PATH": path, "OUT": str(out)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, timeout=60)

    assert (done.returncode, done.stderr) == (0, b"")
    assert out.read_bytes() == b"line 0\nline 1\n"


def test_another_machine_reads_it_from_the_store(
    said: Logged, new_node: Callable[[str], Node]
) -> None:
    said.ship()
    store = str(said.node.store_folder)

    there = new_node("other").call("logs", "job", "--store", store, "-o", "json")

    assert (there.code, there.err) == (0, "")
    assert there.out == said.node.call("logs", "job", "-o", "json").out


def test_a_store_that_is_out_of_reach_leaves_what_is_here(
    said: Logged, caplog: pytest.LogCaptureFixture
) -> None:
    said.run = KnownRun(
        "job", RefusingStore(said.node.store, ["children"]), said.run.spool, said.folder
    )  # type: ignore[arg-type]

    read = b"".join(read_log(said.run, None, follow=False))

    assert read.count(b"\n") == 9
    assert "what the store has of the log cannot be read" in caplog.text


# ---------------------------------------------------------------- following


@pytest.fixture
def followed(
    logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., list[bytes]]]:
    """Follows the run on a thread; what it has read so far, and b"END" in the end."""
    monkeypatch.setattr(following, "_STORE_SECONDS", 0.02)
    monkeypatch.setattr(following, "_LOCAL_SECONDS", 0.005)
    threads: list[threading.Thread] = []
    stop = threading.Event()

    def follow(attempt: int | None = None, run: KnownRun | None = None) -> list[bytes]:
        got: list[bytes] = []

        def read() -> None:
            for block in read_log(run or logged.run, attempt, follow=True):
                if stop.is_set():
                    return
                got.extend(line.rpartition(b" ")[2] for line in block.split(b"\n")[:-1])
            got.append(b"END")

        threads.append(threading.Thread(target=read))
        threads[-1].start()
        return got

    yield follow
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the run's record was looked at."""
    looks, look = [0], following._has_ended

    def counted(run: KnownRun, attempt: int | None) -> bool:
        looks[0] += 1
        return look(run, attempt)

    monkeypatch.setattr(following, "_has_ended", counted)
    return looks


OUTCOMES = {
    "succeeded": True,
    "stopped": True,
    "interrupted": True,
    "failed": True,
    "preempted": False,
    None: False,
}


@pytest.mark.parametrize(("outcome", "ends"), OUTCOMES.items(), ids=map(str, OUTCOMES))
def test_following_ends_with_the_run_and_not_with_a_supervisor(
    logged: Logged,
    followed: Callable[..., list[bytes]],
    looks: list[int],
    outcome: str | None,
    ends: bool,
) -> None:
    logged.ledger.claim(socket.gethostname())
    logged.say(1, "out", b"one")
    got = followed()
    wait_until(lambda: got == [b"one"], what="the first line")
    logged.say(1, "out", b"two")
    wait_until(lambda: got == [b"one", b"two"], what="the second line")
    logged.ledger.update(outcome=outcome, ended_at=NOW.isoformat())
    if ends:
        wait_until(lambda: got == [b"one", b"two", b"END"], what="the end")
        return
    before = looks[0]
    wait_until(lambda: looks[0] > before + 2, what="another look at the record")
    logged.ledger.claim(socket.gethostname())
    logged.say(2, "out", b"three")
    wait_until(lambda: got == [b"one", b"two", b"three"], what="the next supervisor's line")
    logged.say(2, "out", b"four")
    logged.ledger.update(outcome="succeeded", ended_at=NOW.isoformat())

    wait_until(lambda: got[2:] == [b"three", b"four", b"END"], what="the end")


@pytest.mark.parametrize("is_live", [True, False])
def test_one_attempt_is_followed_to_its_own_end(
    logged: Logged,
    followed: Callable[..., list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    is_live: bool,
) -> None:
    monkeypatch.setattr(KnownRun, "is_live", lambda run: is_live)
    logged.ledger.claim("elsewhere")
    logged.say(1, "out", b"one")
    got = followed(1)
    wait_until(lambda: got == [b"one"], what="the first line")

    if is_live:
        logged.say(2, "out", b"two")
    else:
        logged.ledger.claim("elsewhere")

    wait_until(lambda: got == [b"one", b"END"], what="the end")


def test_a_run_elsewhere_is_followed_through_the_store(
    logged: Logged, followed: Callable[..., list[bytes]], tmp_path: Path
) -> None:
    logged.ledger.claim("elsewhere")
    away = KnownRun("job", logged.node.store, Spool(tmp_path / "no-spool"), tmp_path / "no-logs")
    got = followed(run=away)
    for word in (b"one", b"two"):
        logged.say(1, "out", word)
        logged.ship()
        wait_until(lambda word=word: got[-1:] == [word], what="what was stored")  # type: ignore[misc]

    ended = (datetime.now(UTC) - timedelta(seconds=30)).isoformat()
    logged.ledger.update(outcome="succeeded", ended_at=ended)

    wait_until(lambda: got == [b"one", b"two", b"END"], what="the end")


def test_the_end_elsewhere_waits_for_the_end_of_the_log(
    logged: Logged, followed: Callable[..., list[bytes]], tmp_path: Path
) -> None:
    logged.ledger.claim("elsewhere")
    logged.ledger.update(outcome="succeeded", ended_at=datetime.now(UTC).isoformat())
    away = KnownRun("job", logged.node.store, Spool(tmp_path / "no-spool"), tmp_path / "no-logs")
    got = followed(run=away)
    logged.say(1, "out", b"last")
    threading.Event().wait(0.2)
    assert b"END" not in got
    logged.ship()

    wait_until(lambda: got == [b"last"], what="what was stored late")
