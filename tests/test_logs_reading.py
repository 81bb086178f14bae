"""A reader gives every line once, wherever it lies, and finds its place again."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from runner.logs.files import LocalLogs, LogLimits, LogWriter, Span
from runner.logs.lines import records
from runner.logs.reading import LogReader

TIME = b"2026-11-21T10:00:00.123Z"


def text(attempt: int, first: int, after: int) -> bytes:
    """Some of the lines of an attempt; each has 48 bytes."""
    return b"".join(records(TIME, attempt, "out", b"line %07d" % n) for n in range(first, after))


SIZE = len(text(1, 0, 1))


class Parts:
    """A source that has these lines of these attempts, and notes what is read of it."""

    def __init__(self, *parts: tuple[int, int, int], cut: int = 0) -> None:
        self.parts, self.cut = parts, cut
        self.read_spans: list[Span] = []

    def spans(self) -> list[Span]:
        return [Span(a, f * SIZE, e * SIZE - self.cut) for a, f, e in self.parts]

    def read(self, span: Span, begin: int, limit: int) -> bytes:
        self.read_spans.append(span)
        whole = text(span.attempt, 0, -(-span.end // SIZE))
        return whole[begin : min(span.end, begin + limit)]


class Gone(Parts):
    """It is listed, and gone when it is read."""

    def read(self, span: Span, begin: int, limit: int) -> bytes:
        return b""


def read(reader: LogReader, *sources: Parts | LocalLogs) -> bytes:
    return b"".join(reader.advance(sources))


CASES: dict[str, tuple[list[Parts], bytes, int]] = {
    "nothing": ([Parts()], b"", 0),
    "one part": ([Parts((1, 0, 5))], text(1, 0, 5), 0),
    "parts and attempts": (
        [Parts((1, 0, 5), (1, 5, 9), (2, 0, 3))],
        text(1, 0, 9) + text(2, 0, 3),
        0,
    ),
    "two sources with the same": ([Parts((1, 0, 5)), Parts((1, 0, 5))], text(1, 0, 5), 0),
    "the second goes further": ([Parts((1, 0, 5)), Parts((1, 0, 9))], text(1, 0, 9), 0),
    "they overlap": ([Parts((1, 3, 9)), Parts((1, 0, 5))], text(1, 0, 9), 0),
    "each has an attempt": (
        [Parts((2, 0, 2)), Parts((1, 0, 2), (3, 0, 2))],
        text(1, 0, 2) + text(2, 0, 2) + text(3, 0, 2),
        0,
    ),
    "the beginning is gone": ([Parts((1, 4, 6))], text(1, 4, 6), 1),
    "a part in between is gone": ([Parts((1, 0, 2), (1, 4, 6))], text(1, 0, 2) + text(1, 4, 6), 1),
    "one that goes away is in the other": ([Gone((1, 0, 5)), Parts((1, 0, 5))], text(1, 0, 5), 0),
    "a line is being written": ([Parts((1, 0, 5), cut=3)], text(1, 0, 4), 0),
    "a cut line, and the next attempt": (
        [Parts((1, 0, 5), cut=3), Parts((2, 0, 1))],
        text(1, 0, 4) + text(2, 0, 1),
        0,
    ),
}


@pytest.mark.parametrize(("sources", "expected", "gaps"), CASES.values(), ids=CASES)
def test_every_line_is_read_once_and_in_order(
    sources: list[Parts], expected: bytes, gaps: int, caplog: pytest.LogCaptureFixture
) -> None:
    reader = LogReader()

    assert read(reader, *sources) == expected
    assert caplog.text.count("are not kept any more") == gaps
    assert read(reader, *sources) == b"", "all is read"


def test_what_the_first_source_has_is_not_read_from_the_second() -> None:
    second = Parts((1, 0, 5), (1, 5, 7))
    read(LogReader(), Parts((1, 0, 5)), second)

    assert second.read_spans == [Span(1, 5 * SIZE, 7 * SIZE)]


def test_a_reader_of_one_attempt_reads_no_other() -> None:
    source = Parts((1, 0, 5), (2, 0, 3), (3, 0, 2))
    reader = LogReader(2)

    assert read(reader, source) == text(2, 0, 3)
    assert reader.newest_attempt == 3
    assert {span.attempt for span in source.read_spans} == {2}


def test_it_goes_on_where_it_was_while_the_log_grows(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, LogLimits(40 * SIZE, 4))
    reader, local = LogReader(), LocalLogs(tmp_path)
    got = b""
    for number in range(0, 300, 3):
        writer.write(1, text(1, number, number + 3))
        got += read(reader, local)
    for number in range(7):
        writer.write(2, text(2, number, number + 1))
        got += read(reader, local)
    writer.close()

    assert got == text(1, 0, 300) + text(2, 0, 7)


def test_reading_beside_the_writer_loses_no_line(tmp_path: Path) -> None:
    reader, local, got = LogReader(), LocalLogs(tmp_path), b""
    is_over = threading.Event()

    def write() -> None:
        writer = LogWriter(tmp_path, LogLimits(4_000_000, 100))
        for number in range(0, 20_000, 5):
            writer.write(1 + number // 10_000, text(1 + number // 10_000, number, number + 5))
        writer.close()
        is_over.set()

    writing = threading.Thread(target=write)
    writing.start()
    rounds = 0
    while not is_over.is_set():
        got += read(reader, local)
        rounds += 1
    writing.join()
    got += read(reader, local)

    assert rounds > 1
    assert got == text(1, 0, 10_000) + text(2, 10_000, 20_000)


def test_a_line_that_was_not_whole_is_read_when_it_is(tmp_path: Path) -> None:
    path = tmp_path / "000001-000000000000.log"
    reader, local = LogReader(), LocalLogs(tmp_path)
    whole = text(1, 0, 2)
    path.write_bytes(whole[: SIZE + 5])
    assert read(reader, local) == text(1, 0, 1)

    path.write_bytes(whole)

    assert read(reader, local) == text(1, 1, 2)


def test_what_rotates_away_before_it_is_read_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = LogWriter(tmp_path, LogLimits(40 * SIZE, 4))
    reader, local = LogReader(), LocalLogs(tmp_path)
    writer.write(1, text(1, 0, 10))
    assert read(reader, local) == text(1, 0, 10)
    writer.write(1, text(1, 10, 200))
    writer.close()

    got = read(reader, local)

    assert got == text(1, 200 - len(got) // SIZE, 200)
    assert f"{190 * SIZE - len(got)} bytes of the log of attempt 1" in caplog.text
