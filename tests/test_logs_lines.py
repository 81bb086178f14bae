"""What is printed becomes records, and records are read back as what was printed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.logs.lines import Record, Stream, parse, records, stamp

TIME = b"2026-11-21T10:00:00.123Z"
HEAD = TIME + b" 000012 out"
LONG = b"x" * 100_000


def record(text: bytes, mark: bytes = b"") -> bytes:
    return HEAD + mark + b" " + text + b"\n"


def kept(*chunks: bytes, seconds_between: float = 0.0) -> bytes:
    """What the file has of these chunks, each of which was read at once."""
    stream = Stream(12, "out")
    fed = [stream.feed(chunk, TIME, n * seconds_between) for n, chunk in enumerate(chunks)]
    return b"".join(fed) + stream.end(TIME)


def read_back(file: bytes) -> list[Record]:
    parsed = [parse(line) for line in file.split(b"\n")[:-1]]
    assert None not in parsed
    return [record for record in parsed if record is not None]


OUTPUTS: dict[str, tuple[list[bytes], bytes]] = {
    "nothing": ([], b""),
    "a line": ([b"one\n"], record(b"one")),
    "two lines at once": ([b"one\ntwo\n"], record(b"one") + record(b"two")),
    "a line in pieces": ([b"o", b"n", b"e\n"], record(b"one")),
    "empty lines": ([b"\n\n"], record(b"") * 2),
    "no newline at the end": ([b"one\ntw", b"o"], record(b"one") + record(b"two", b"+")),
    "binary rubbish": (
        [b"\0\xff\xfe\n\x1b[0m\0"],
        record(b"\0\xff\xfe") + record(b"\x1b[0m\0", b"+"),
    ),
    "blanks are kept": ([b"  a  b \t\n"], record(b"  a  b \t")),
    "lines that look like records": ([record(b"x")], record(record(b"x")[:-1])),
    "a character in two chunks": (
        ["grün\n".encode()[:3], "grün\n".encode()[3:]],
        record("grün".encode()),
    ),
    "lines that end as on Windows": ([b"one\r\ntwo\r\n"], record(b"one") + record(b"two")),
    "such an end in two chunks": ([b"one\r", b"\ntwo\r\n"], record(b"one") + record(b"two")),
    "only carriage returns": ([b"\r\r\r\n"], record(b"")),
    "a bar in one chunk": ([b"\r 0%\r50%\r100%\n"], record(b"100%")),
    "a bar with text after it": (
        [b"\r50%\rdone: all is well\nnext\n"],
        record(b"done: all is well") + record(b"next"),
    ),
    "a bar, then lines": ([b"a\n\r1%\r2%\nb\n"], record(b"a") + record(b"2%") + record(b"b")),
    "a bar that never ends": ([b"\r1%", b"\r2%"], record(b"1%", b"~") + record(b"2%", b"+")),
    "a bar that begins at the left": (
        [b"1%\r", b"2%\r", b"3%\r", b"\n"],
        record(b"2%", b"~") + record(b"3%"),
    ),
}


@pytest.mark.parametrize(("chunks", "file"), OUTPUTS.values(), ids=OUTPUTS)
def test_what_is_printed_is_kept_line_by_line(chunks: list[bytes], file: bytes) -> None:
    assert kept(*chunks) == file


def test_a_line_that_is_rewritten_a_thousand_times_is_not_a_thousand_lines() -> None:
    states = [b"\r%3d%%|%s|" % (n // 10, "█".encode() * (n // 100)) for n in range(1000)]

    file = read_back(kept(*states, b"\nafter\n", seconds_between=0.05))

    assert [r.text for r in file][-2:] == [states[-1][1:], b"after"]
    assert 8 <= len(file) <= 13, "one every five of fifty seconds"
    assert all(r.end == b"\r" for r in file[:-2])
    assert [r.text for r in file[:-1]] == sorted(r.text for r in file[:-1])


def test_a_bar_that_stands_still_is_shown_in_its_last_state() -> None:
    stream = Stream(12, "out")
    fed = stream.feed(b"\r1%", TIME, 0.0) + stream.feed(b"\r2%", TIME, 1.0)
    assert fed == record(b"1%", b"~")

    assert stream.idle(TIME, 4.9) == b""
    assert stream.idle(TIME, 5.1) == record(b"2%", b"~")
    assert stream.idle(TIME, 50.0) == b"", "nothing is new"
    assert stream.feed(b"\n", TIME, 51.0) == record(b"2%")


def test_the_beginning_of_a_line_is_held_back_for_a_second_only() -> None:
    stream = Stream(12, "out")
    assert stream.feed("wait für".encode()[:-2], TIME, 0.0) == b""
    assert stream.holds_back

    assert stream.idle(TIME, 0.9) == b""
    assert stream.idle(TIME, 1.1) == record(b"wait f", b"+"), "not the half of a character"
    assert stream.feed("ür it".encode()[1:], TIME, 1.2) == b""
    assert stream.feed(b"\n", TIME, 1.3) == record("ür it".encode())
    assert not stream.holds_back


def test_a_beginning_that_is_written_over_later_says_so() -> None:
    stream = Stream(12, "out")
    stream.feed(b"loading", TIME, 0.0)
    made = stream.idle(TIME, 2.0)
    made += stream.feed(b"...\rloaded \rready\n", TIME, 3.0)

    assert made == record(b"loading", b"+") + record(b"...", b"~") + record(b"ready")


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 131_072, 5_000_000])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_huge_line_is_kept_in_pieces_without_loss(size: int, end: bytes) -> None:
    line = ("ab€" * (size // 5 + 1)).encode()[:size] + end
    stream, file, most_held = Stream(12, "out"), b"", 0
    for at in range(0, len(line), 65_536):
        file += stream.feed(line[at : at + 65_536], TIME, 0.0)
        most_held = max(most_held, len(stream._pending))
    file += stream.end(TIME)

    back = read_back(file)
    assert b"".join(r.text + r.end for r in back) == line
    assert most_held <= 65_536
    assert all(len(r.text) <= 2 * 65_536 for r in back)
    for piece in back[:-1]:
        piece.text.decode()


CHUNKS = st.lists(
    st.lists(
        st.sampled_from([b"a", b"bc", b"\n", b" ", b"\0", b"\xff", "€".encode(), b"\xe2", LONG]),
        max_size=8,
    ).map(b"".join),
    max_size=8,
)


@given(CHUNKS, st.lists(st.booleans(), min_size=8, max_size=8))
def test_without_carriage_returns_nothing_is_lost_or_changed(
    chunks: list[bytes], pauses: list[bool]
) -> None:
    stream, file, now = Stream(12, "out"), b"", 0.0
    for chunk, pause in zip(chunks, itertools.cycle(pauses), strict=False):
        file += stream.feed(chunk, TIME, now)
        if pause:
            now += 2.0
            file += stream.idle(TIME, now)
    file += stream.end(TIME)

    assert b"".join(r.text + r.end for r in read_back(file)) == b"".join(chunks)


BARS = st.lists(st.sampled_from([b"\r", b"\r", b"\n", b"x", b"yz", b"\r\n", b"1%"]), max_size=30)


@given(BARS, st.lists(st.integers(1, 5), min_size=30, max_size=30), st.booleans())
def test_the_last_text_of_a_line_that_ended_is_never_lost(
    pieces: list[bytes], sizes: list[int], with_pauses: bool
) -> None:
    whole, chunks = b"".join(pieces), []
    for size in sizes:
        chunks.append(whole[:size])
        whole = whole[size:]
    stream, file, now = Stream(12, "out"), b"", 0.0
    for chunk in chunks:
        file += stream.feed(chunk, TIME, now)
        if with_pauses:
            now += 3.0
            file += stream.idle(TIME, now)

    shown = b"".join(r.text + r.end for r in read_back(file)).split(b"\n")[:-1]
    printed = b"".join(chunks).split(b"\n")[:-1]
    assert [line.rpartition(b"\r")[2] for line in shown] == [
        line.rstrip(b"\r").rpartition(b"\r")[2] for line in printed
    ]


def test_a_message_of_several_lines_is_several_records() -> None:
    made = records(TIME, 3, "run", b"one\ntwo")

    assert [r.text for r in read_back(made)] == [b"one", b"two"]
    assert read_back(made)[0] == Record(TIME.decode(), 3, "run", b"one", b"\n")


NO_RECORDS = {
    "nothing": b"",
    "text": b"Traceback (most recent call last):",
    "cut in the time": TIME[:-3],
    "cut before the text": HEAD,
    "another stream": TIME + b" 000012 log x",
    "no attempt": TIME + b" out x",
}


@pytest.mark.parametrize("line", NO_RECORDS.values(), ids=NO_RECORDS)
def test_what_is_no_record_is_read_as_none(line: bytes) -> None:
    assert parse(line) is None


def test_a_time_is_utc_with_milliseconds() -> None:
    assert stamp(0.0) == b"1970-01-01T00:00:00.000Z"
    assert stamp(1_795_255_200.9996) == b"2026-11-21T10:00:00.999Z"
