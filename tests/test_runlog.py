"""What a run says goes three ways, and its end is in the store."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slots import RUN, RefusingStore
from waiting import wait_until

from runner.checkpoint.attempts import Ledger
from runner.checkpoint.logs import StoredLogs
from runner.errors import Fenced
from runner.logs.files import LocalLogs, LogLimits
from runner.logs.lines import Record, parse
from runner.logs.reading import LogReader, Source
from runner.store import DirectoryStore, Store
from runner.supervisor import runlog, shipping
from runner.supervisor.runlog import RunLog

LIMITS = LogLimits(1 << 20, 4)
log = logging.getLogger("runner.of.this.test")


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture(autouse=True)
def messages_are_heard() -> Iterator[None]:
    log.setLevel(logging.INFO)
    yield
    log.setLevel(logging.NOTSET)


MakeLog = Callable[..., RunLog]


@pytest.fixture
def make(tmp_path: Path, store: DirectoryStore) -> MakeLog:
    def make(
        limits: LogLimits = LIMITS,
        store: Store = store,
        check_fence: Callable[[], None] = lambda: None,
        may_ship: Callable[[], bool] = lambda: True,
    ) -> RunLog:
        return RunLog(tmp_path / "logs", limits, StoredLogs(store, RUN), check_fence, may_ship)

    return make


def records(*sources: Source) -> list[Record]:
    text = b"".join(LogReader().advance(sources))
    parsed = [parse(line) for line in text.split(b"\n")[:-1]]
    return [record for record in parsed if record is not None]


def print_in(run_log: RunLog, text: bytes) -> None:
    """One trainer's life, that prints this."""
    pipes = run_log.pipes()
    os.write(pipes.stdout, text)
    pipes.launched()
    run_log.drain()


def test_messages_and_output_are_in_one_file_each_with_its_attempt(
    make: MakeLog, tmp_path: Path, store: DirectoryStore
) -> None:
    run_log = make()
    run_log.start()
    log.info("before the first attempt")
    run_log.begin(3)
    print_in(run_log, b"hello\n")
    log.warning("it failed:\nbadly")
    run_log.begin(4)
    print_in(run_log, b"hello again\n")
    run_log.finish(10, ship=True)
    log.info("after all")

    here = records(LocalLogs(tmp_path / "logs"))
    assert [(r.attempt, r.stream, r.text) for r in here] == [
        (3, "run", b"before the first attempt"),
        (3, "out", b"hello"),
        (3, "run", b"it failed:"),
        (3, "run", b"badly"),
        (4, "out", b"hello again"),
    ]
    assert records(StoredLogs(store, RUN)) == here


def test_a_message_goes_to_stderr_as_before_and_as_it_is_into_the_file(
    make: MakeLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    handler = logging.StreamHandler(shown)
    handler.setFormatter(logging.Formatter("runner: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        run_log = make()
        run_log.start()
        assert handler not in root.handlers
        run_log.begin(1)
        log.info("while it runs: %d", 5)
        run_log.finish(10, ship=False)
        assert handler in root.handlers
        log.info("afterwards")
    finally:
        root.removeHandler(handler)

    assert shown.getvalue() == "runner: afterwards\n", "the rest went past the stream, to fd 2"
    assert [r.text for r in records(LocalLogs(tmp_path / "logs"))] == [b"while it runs: 5"]


def test_a_stderr_that_stands_still_hangs_no_message_not_even_after_the_end(
    make: MakeLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog, "_FLUSH_SECONDS", 0.1)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, b"x" * 65_536):
            pass
    os.set_blocking(writing, True)
    real = os.dup(2)
    root, shown = logging.getLogger(), os.fdopen(os.dup(writing), "w")
    monkeypatch.setattr(sys, "stderr", shown)
    handler = logging.StreamHandler(shown)
    before = list(root.handlers)
    root.addHandler(handler)
    run_log = make()
    try:
        os.dup2(writing, 2)
        run_log.start()
        run_log.begin(1)
        talking = threading.Thread(target=lambda: [log.warning("a") for _ in range(1000)])
        talking.start()
        talking.join(10)
        assert not talking.is_alive()
        run_log.finish(10, ship=False)
        late = threading.Thread(target=log.warning, args=("after the end",), daemon=True)
        late.start()
        late.join(10)
        assert not late.is_alive()
    finally:
        os.close(reading)
        os.dup2(real, 2)
        root.handlers[:] = before
        with contextlib.suppress(BrokenPipeError):
            shown.close()
        for descriptor in (real, writing):
            os.close(descriptor)


def test_nothing_is_kept_where_the_job_says_so(
    make: MakeLog, tmp_path: Path, store: DirectoryStore
) -> None:
    run_log = make(limits=LogLimits(0, 2))
    run_log.start()
    run_log.begin(1)
    print_in(run_log, b"hello\n")
    run_log.finish(10, ship=True)

    assert not (tmp_path / "logs").exists()
    assert StoredLogs(store, RUN).spans() == []


WAYS = {
    "read along": (LIMITS, True, "hello\n"),
    "detached": (LIMITS, False, ""),
    "detached, and nothing is kept": (LogLimits(0, 2), False, "hello\n"),
}


@pytest.mark.parametrize(("limits", "passes_through", "shown"), WAYS.values(), ids=WAYS)
def test_what_the_trainer_prints_passes_through_where_somebody_reads_along(
    tmp_path: Path,
    store: DirectoryStore,
    capfd: pytest.CaptureFixture[str],
    limits: LogLimits,
    passes_through: bool,
    shown: str,
) -> None:
    stored = StoredLogs(store, RUN)
    run_log = RunLog(
        tmp_path / "logs",
        limits,
        stored,
        lambda: None,
        lambda: True,
        passes_through=passes_through,
    )
    run_log.start()
    run_log.begin(1)
    print_in(run_log, b"hello\n")
    run_log.finish(10, ship=False)

    assert capfd.readouterr().out == shown


def test_what_an_attempt_said_is_stored_when_it_has_ended(
    make: MakeLog, store: DirectoryStore
) -> None:
    run_log = make()
    run_log.start()
    run_log.begin(1)
    print_in(run_log, b"hello\n")
    run_log.attempt_ended()

    wait_until(lambda: records(StoredLogs(store, RUN)), what="the log in the store")
    run_log.finish(10, ship=False)
    assert [r.text for r in records(StoredLogs(store, RUN))] == [b"hello"]


def test_it_is_stored_now_and_then_while_an_attempt_runs(
    make: MakeLog, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "_SHORTEST_SECONDS", 0.01)
    run_log = make()
    run_log.start()
    run_log.begin(1)
    pipes = run_log.pipes()
    for word in (b"one", b"two"):
        os.write(pipes.stdout, word + b"\n")
        wait_until(
            lambda word=word: word in [r.text for r in records(StoredLogs(store, RUN))],  # type: ignore[misc]
            what="the log in the store",
        )
    pipes.launched()
    run_log.drain()
    run_log.finish(10, ship=True)

    assert len(StoredLogs(store, RUN).spans()) == 2


def test_an_emergency_comes_first_and_the_log_in_the_end(
    make: MakeLog,
    store: DirectoryStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(shipping, "_SHORTEST_SECONDS", 0.01)
    asked, away = threading.Semaphore(0), RefusingStore(store, ["children"])

    def may_ship() -> bool:
        asked.release()
        return False

    run_log = make(may_ship=may_ship, store=away)
    run_log.start()
    run_log.begin(1)
    print_in(run_log, b"hello\n")
    run_log.attempt_ended()
    for _ in range(5):
        assert asked.acquire(timeout=10)
    assert StoredLogs(store, RUN).spans() == []
    assert "could not be stored" not in caplog.text, "the store is not even asked"
    away.refused.clear()

    run_log.finish(10, ship=True)

    assert [r.text for r in records(StoredLogs(store, RUN))] == [b"hello"]


def test_a_supervisor_that_was_fenced_off_stores_nothing(
    make: MakeLog, store: DirectoryStore
) -> None:
    old, new = Ledger(store, RUN, "old"), Ledger(store, RUN, "new")
    old.claim("node")
    new.claim("node")
    with pytest.raises(Fenced):
        old.check_fence()
    run_log = make(check_fence=old.check_fence)
    run_log.start()
    run_log.begin(1)
    print_in(run_log, b"hello\n")
    run_log.attempt_ended()
    run_log.finish(10, ship=True)

    assert StoredLogs(store, RUN).spans() == []


def test_a_store_that_refuses_costs_a_warning(
    make: MakeLog, store: DirectoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    run_log = make(store=RefusingStore(store, ["replace"]))  # type: ignore[arg-type]
    run_log.start()
    run_log.begin(1)
    print_in(run_log, b"hello\n")
    run_log.finish(10, ship=True)

    assert "the log could not be stored" in caplog.text


def test_a_store_that_hangs_holds_the_end_up_for_so_long_only(
    make: MakeLog, store: DirectoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    class Hanging(RefusingStore):
        def children(self, prefix: str) -> list[str]:
            release.wait(30)
            return []

    run_log = make(store=Hanging(store))  # type: ignore[arg-type]
    run_log.start()
    run_log.begin(1)
    print_in(run_log, b"hello\n")
    run_log.finish(0.2, ship=True)
    release.set()

    assert "the end of the log is on this node only" in caplog.text


LEFTOVERS = """
import os, sys, threading
from pathlib import Path
from runner.checkpoint.logs import StoredLogs
from runner.logs.files import LogLimits
from runner.store import DirectoryStore
from runner.supervisor.runlog import RunLog

def things():
    files = {link: os.readlink(f"/proc/self/fd/{link}") for link in os.listdir("/proc/self/fd")
             if os.path.lexists(f"/proc/self/fd/{link}")}
    return {thread.name for thread in threading.enumerate()}, files

folder, run = Path(sys.argv[1]), sys.argv[2]
before = things()
for attempt in (1, 2):
    stored = StoredLogs(DirectoryStore(folder / "store"), run)
    run_log = RunLog(folder / "logs", LogLimits(1 << 20, 4), stored, lambda: None, lambda: True)
    run_log.start()
    run_log.begin(attempt)
    pipes = run_log.pipes()
    os.write(pipes.stdout, b"hello\\n")
    pipes.launched()
    run_log.drain()
    run_log.finish(10, ship=True)
for thread in set(threading.enumerate()) - {threading.main_thread()}:
    thread.join(20)
assert things() == before, (before, things())
"""


def test_no_thread_and_no_descriptor_is_left(tmp_path: Path) -> None:
    # In a process of its own: what other tests have left in this one comes and goes as it likes.
    script = [sys.executable, "-c", LEFTOVERS, str(tmp_path), RUN]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)

    assert (done.returncode, done.stdout) == (0, "hello\nhello\n"), done.stderr


def test_a_folder_that_cannot_be_made_does_not_keep_the_output_back(
    make: MakeLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("a file is in the way")
    run_log = make()
    run_log.start()
    run_log.begin(1)
    print_in(run_log, b"hello\n" * 1000)
    run_log.finish(10, ship=True)

    assert "is not kept for now" in caplog.text
