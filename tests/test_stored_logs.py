"""The log in a store: what is new goes there, once, and comes back from there on another node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from counting import counted_requests
from slots import RUN, RefusingStore

from runner.checkpoint.logs import StoredLogs
from runner.errors import StoreError
from runner.logs.files import LocalLogs, LogLimits, LogWriter
from runner.logs.lines import records
from runner.logs.reading import LogReader
from runner.store import DirectoryStore, Store

TIME = b"2026-11-21T10:00:00.123Z"
PLENTY = 1 << 30
LIMITS = LogLimits(64 << 20, 8)


def always() -> bool:
    return True


def text(attempt: int, first: int, after: int, width: int = 7) -> bytes:
    numbers = range(first, after)
    return b"".join(records(TIME, attempt, "out", b"%0*d" % (width, n)) for n in numbers)


@pytest.fixture
def directory(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.ceph)])
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "directory":
        found: Store = request.getfixturevalue("directory")
        return found
    open_s3: Callable[..., Store] = request.getfixturevalue("open_s3")
    return open_s3()


@pytest.fixture
def writer(tmp_path: Path) -> LogWriter:
    return LogWriter(tmp_path / "here", LIMITS)


@pytest.fixture
def here(tmp_path: Path) -> LocalLogs:
    return LocalLogs(tmp_path / "here")


def read_all(store: Store, *others: Any) -> bytes:
    return b"".join(LogReader().advance([*others, StoredLogs(store, RUN)]))


def test_another_node_reads_what_was_stored_piece_by_piece(
    store: Store, writer: LogWriter, here: LocalLogs
) -> None:
    stored = StoredLogs(store, RUN)
    assert stored.ship(here, PLENTY, 9, always) == 0
    written = b""
    for attempt, first in ((1, 0), (1, 100), (2, 0), (2, 100), (2, 200)):
        block = text(attempt, first, first + 100)
        writer.write(attempt, block)
        written += block
        assert stored.ship(here, PLENTY, 9, always) == len(block)
    writer.close()

    assert stored.ship(here, PLENTY, 9, always) == 0, "all of it is there"
    assert read_all(store) == written
    assert [span.begin for span in stored.spans()] == [0, 4400, 0, 4400, 8800]


def test_another_supervisor_goes_on_where_the_one_before_was_killed(
    store: Store, writer: LogWriter, here: LocalLogs
) -> None:
    writer.write(1, text(1, 0, 10))
    StoredLogs(store, RUN).ship(here, PLENTY, 1, always)
    writer.write(1, text(1, 10, 20))
    writer.write(2, text(2, 0, 10))

    moved = StoredLogs(store, RUN).ship(here, PLENTY, 2, always)

    assert moved == len(text(1, 10, 20) + text(2, 0, 10))
    assert read_all(store) == text(1, 0, 20) + text(2, 0, 10)


def test_what_is_not_here_any_more_is_read_from_the_store(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = LogWriter(tmp_path / "here", LogLimits(8000, 4))
    here = LocalLogs(tmp_path / "here")
    for number in range(0, 600, 60):
        small.write(1, text(1, number, number + 60))
        StoredLogs(store, RUN).ship(here, PLENTY, 1, always)
    small.close()
    (first, *_) = here.spans()
    assert first.begin > 0

    assert read_all(store, here) == text(1, 0, 600)
    assert "not kept any more" not in caplog.text


def test_the_oldest_is_deleted_when_there_is_too_much(
    store: Store, writer: LogWriter, here: LocalLogs
) -> None:
    stored = StoredLogs(store, RUN)
    for attempt in range(1, 12):
        writer.write(attempt, text(attempt, 0, 20))
        stored.ship(here, 5000, attempt, always)

    size = len(text(1, 0, 20))
    assert [span.attempt for span in stored.spans()] == list(range(12 - 5000 // size, 12))


@pytest.mark.ceph
def test_a_round_costs_a_listing_and_a_write_for_what_is_new(
    open_s3: Callable[..., Store], writer: LogWriter, here: LocalLogs
) -> None:
    stored = StoredLogs(open_s3(), RUN)
    counts = []
    for number in range(20):
        writer.write(1, text(1, number, number + 1))
        with counted_requests() as count:
            stored.ship(here, PLENTY, 1, always)
        counts.append(count[0])

    assert set(counts) == {2}


def test_many_bytes_go_in_stretches_and_give_way_between_them(
    directory: DirectoryStore, writer: LogWriter, here: LocalLogs
) -> None:
    whole = text(1, 0, 60_000, 100)
    writer.write(1, whole)
    stored, answers = StoredLogs(directory, RUN), [True, True, False]

    moved = stored.ship(here, PLENTY, 1, lambda: answers.pop(0))

    assert 0 < moved < len(whole)
    assert len(stored.spans()) == 2
    assert stored.ship(here, PLENTY, 1, always) == len(whole) - moved
    assert read_all(directory) == whole


def test_only_whole_lines_are_stored(directory: DirectoryStore, here: LocalLogs) -> None:
    here.folder.mkdir()
    whole = text(1, 0, 3)
    (here.folder / "000001-000000000000.log").write_bytes(whole[:-5])
    stored = StoredLogs(directory, RUN)

    assert stored.ship(here, PLENTY, 1, always) == len(text(1, 0, 2))
    assert stored.ship(here, PLENTY, 1, always) == 0
    (here.folder / "000001-000000000000.log").write_bytes(whole)
    assert stored.ship(here, PLENTY, 1, always) == len(text(1, 2, 3))


def test_attempts_that_are_newer_are_left_alone(
    directory: DirectoryStore, writer: LogWriter, here: LocalLogs
) -> None:
    for attempt in (1, 2, 3):
        writer.write(attempt, text(attempt, 0, 10))
    stored = StoredLogs(directory, RUN)
    stored.ship(here, PLENTY, 3, always)

    stored.ship(here, 0, 2, always)

    assert [span.attempt for span in stored.spans()] == [3]
    stored.ship(here, PLENTY, 1, always)
    assert [span.attempt for span in stored.spans()] == [1, 3]


def test_what_is_stored_is_never_written_again(
    directory: DirectoryStore, writer: LogWriter, here: LocalLogs
) -> None:
    stored = StoredLogs(directory, RUN)
    folder = directory.root / RUN / "logs"
    seen: dict[str, int] = {}
    for number in range(5):
        writer.write(1, text(1, number, number + 1))
        stored.ship(here, PLENTY, 1, always)
        now = {path.name: path.stat().st_ino for path in folder.iterdir()}
        assert seen.items() <= now.items()
        seen = now
    assert len(seen) == 5


def test_names_that_are_none_are_passed_over(directory: DirectoryStore) -> None:
    for name in ("000001-000000000000.log", "x", "000001-000000000009-000000000003.log"):
        directory.replace(f"{RUN}/logs/{name}", b"x")

    assert StoredLogs(directory, RUN).spans() == []


@pytest.mark.parametrize("method", ["children", "replace", "delete"])
def test_a_store_that_refuses_is_an_error_and_loses_nothing(
    directory: DirectoryStore, writer: LogWriter, here: LocalLogs, method: str
) -> None:
    refusing = RefusingStore(directory, [method])
    writer.write(1, text(1, 0, 10))

    with pytest.raises(StoreError):
        StoredLogs(refusing, RUN).ship(here, 0, 1, always)

    StoredLogs(directory, RUN).ship(here, PLENTY, 1, always)
    assert read_all(directory) == text(1, 0, 10)
