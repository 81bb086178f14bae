"""Log files: what was written is read back, within the limit, and a full disk costs lines only."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
from slots import small_disk

from runner.logs import files
from runner.logs.files import LocalLogs, LogLimits, LogWriter, Span
from runner.logs.lines import parse, records

TIME = b"2026-11-21T10:00:00.123Z"
PLENTY = LogLimits(1 << 20, 4)


def line(attempt: int, number: int, width: int = 20) -> bytes:
    return records(TIME, attempt, "out", b"%0*d" % (width, number))


def attempt_log(folder: Path, attempt: int) -> bytes:
    """All that is kept of an attempt, whose files follow upon each other without a gap."""
    logs = LocalLogs(folder)
    spans = [span for span in logs.spans() if span.attempt == attempt]
    assert [span.begin for span in spans[1:]] == [span.end for span in spans[:-1]]
    return b"".join(logs.read(span, span.begin, 1 << 30) for span in spans)


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_each_attempt_has_files_of_its_own(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "logs", PLENTY)
    writer.write(1, line(1, 1))
    writer.write(2, line(2, 1))
    writer.write(2, line(2, 2))
    writer.close()

    assert [path.name for path in sorted((tmp_path / "logs").iterdir())] == [
        "000001-000000000000.log",
        "000002-000000000000.log",
    ]
    assert attempt_log(tmp_path / "logs", 1) == line(1, 1)
    assert attempt_log(tmp_path / "logs", 2) == line(2, 1) + line(2, 2)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_a_full_file_is_followed_by_another_and_the_oldest_goes(
    tmp_path: Path, at_once: int
) -> None:
    limits, size = LogLimits(10_000, 5), len(line(1, 0))
    writer = LogWriter(tmp_path, limits)
    for first in range(0, 2000, at_once):
        writer.write(1, b"".join(line(1, n) for n in range(first, min(first + at_once, 2000))))
        assert total(tmp_path) <= limits.max_bytes
    writer.close()

    kept = attempt_log(tmp_path, 1)
    assert kept == b"".join(line(1, n) for n in range(2000 - len(kept) // size, 2000))
    assert limits.max_bytes * 3 // 5 <= len(kept) <= limits.max_bytes
    assert all(path.stat().st_size <= limits.file_bytes for path in tmp_path.iterdir())
    assert LocalLogs(tmp_path).spans()[-1].end == 2000 * size, "names count what is gone"


def test_the_oldest_attempts_go_first(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, LogLimits(1000, 4))
    for attempt in range(1, 30):
        writer.write(attempt, line(attempt, attempt, 100))
    writer.close()

    kept = [span.attempt for span in LocalLogs(tmp_path).spans()]
    assert kept == list(range(kept[0], 30))
    assert 3 <= len(kept) <= 6


def test_attempts_that_print_next_to_nothing_are_not_files_without_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_MOST_FILES", 5)
    writer = LogWriter(tmp_path, PLENTY)
    for attempt in range(1, 10):
        writer.write(attempt, line(attempt, 0))
    writer.close()

    assert [span.attempt for span in LocalLogs(tmp_path).spans()] == [5, 6, 7, 8, 9]


def test_a_line_that_is_longer_than_a_file_has_one_of_its_own(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, LogLimits(8000, 4))
    written = [line(1, 1), line(1, 2, 3000), line(1, 3)]
    writer.write(1, b"".join(written))
    writer.close()

    logs = LocalLogs(tmp_path)
    assert [logs.read(span, span.begin, 1 << 20) for span in logs.spans()] == written


def test_files_of_a_run_that_was_removed_are_not_taken_for_this_one(tmp_path: Path) -> None:
    before = LogWriter(tmp_path, PLENTY)
    for attempt in (1, 2, 3):
        before.write(attempt, line(attempt, 1))
    before.close()
    writer = LogWriter(tmp_path, PLENTY)
    writer.write(2, line(2, 9))
    writer.close()

    assert [span.attempt for span in LocalLogs(tmp_path).spans()] == [1, 2]
    assert attempt_log(tmp_path, 2) == line(2, 9)


def test_other_files_are_neither_read_nor_removed(tmp_path: Path) -> None:
    for name in ("000001.log", "notes", "000001-1.log", "x000001-000000000000.log"):
        (tmp_path / name).write_text("mine" * 100)
    writer = LogWriter(tmp_path, LogLimits(100, 2))
    for attempt in range(1, 9):
        writer.write(attempt, line(attempt, 1))
    writer.close()

    assert len(list(tmp_path.iterdir())) == 4 + len(LocalLogs(tmp_path).spans())


def test_where_nothing_can_be_written_nothing_is_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("a file is in the way")
    writer = LogWriter(tmp_path / "logs", PLENTY)
    for number in range(100):
        writer.write(1, line(1, number))

    assert [r.levelno for r in caplog.records] == [logging.WARNING], "it is said once"
    assert "is not kept for now" in caplog.text
    assert LocalLogs(tmp_path / "logs").spans() == []


def test_what_a_full_disk_has_cost_is_said_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "small", "128k") as disk:
        monkeypatch.setattr(files, "_RETRY_SECONDS", 0.0)
        filler, folder = disk / "filler", disk / "logs"
        folder.mkdir()
        writer = LogWriter(folder, PLENTY)
        writer.write(1, line(1, 1))
        filler.write_bytes(b"x" * (100 << 10))
        lost = [line(1, 2, 8000), line(1, 3, 8000), line(1, 4, 8000), line(1, 5, 8000)]
        for each in lost:
            writer.write(1, each)
        filler.unlink()
        writer.write(1, line(1, 6))
        writer.close()
        kept = attempt_log(folder, 1)

    parsed = [parse(each) for each in kept.split(b"\n")[:-1]]
    assert kept.startswith(line(1, 1))
    assert kept.endswith(line(1, 6))
    said = [r.text.decode() for r in parsed if r is not None and r.stream == "run"]
    assert len(said) == 1
    assert said[0].endswith("of the log are missing here: No space left on device")
    assert any(r.levelno == logging.WARNING for r in caplog.records)


def test_a_record_that_was_cut_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_RETRY_SECONDS", 0.0)
    writer, write = LogWriter(tmp_path, PLENTY), os.write
    writer.write(1, line(1, 1))
    answers = [10, OSError(errno.ENOSPC, "No space left on device")]

    def reluctant(descriptor: int, data: memoryview) -> int:
        answer = answers.pop(0) if answers else len(data)
        if isinstance(answer, OSError):
            raise answer
        return write(descriptor, data[:answer])

    monkeypatch.setattr(os, "write", reluctant)
    writer.write(1, line(1, 2))
    writer.write(1, line(1, 3))
    writer.close()

    kept = attempt_log(tmp_path, 1).split(b"\n")
    assert kept[0] + b"\n" == line(1, 1)
    assert kept[1] == line(1, 2)[:10]
    assert b"missing here" in kept[2]
    assert kept[3] + b"\n" == line(1, 3)


def test_a_folder_that_is_taken_away_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    writer = LogWriter(folder, LogLimits(200, 2))
    writer.write(1, line(1, 1))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    for number in range(2, 6):
        writer.write(1, line(1, number))
    writer.close()

    spans = LocalLogs(folder).spans()
    assert spans[-1].end == 5 * len(line(1, 1))
    assert attempt_log(folder, 1).endswith(line(1, 5))


def test_reading_what_is_gone_gives_nothing(tmp_path: Path) -> None:
    assert LocalLogs(tmp_path / "none").spans() == []
    assert LocalLogs(tmp_path).read(Span(1, 0, 10), 0, 10) == b""
