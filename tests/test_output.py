"""What a trainer prints passes through as it is, is kept, and never holds the trainer up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_until

from runner.logs.lines import parse
from runner.logs.sink import Patience
from runner.supervisor import output
from runner.supervisor.output import STDERR, STDOUT, Output, PassThrough


class Ends:
    """What an output hands on: bytes by descriptor, and what is kept."""

    def __init__(self) -> None:
        self.passed: dict[int, bytes] = {STDOUT: b"", STDERR: b""}
        self.file = b""

    def pass_on(self, target: int, data: bytes) -> None:
        self.passed[target] += data

    def keep(self, attempt: int, data: bytes) -> None:
        assert attempt == 7
        self.file += data

    def kept(self, stream: str) -> bytes:
        """What was kept of a stream, as it was printed."""
        parsed = [parse(line) for line in self.file.split(b"\n")[:-1]]
        return b"".join(r.text + r.end for r in parsed if r is not None and r.stream == stream)


@pytest.fixture
def ends() -> Ends:
    return Ends()


@contextlib.contextmanager
def opened(ends: Ends) -> Iterator[Output]:
    out = Output(7, ends.keep, ends.pass_on)
    yield out
    out.launched()
    assert out.drain(10)


PRINTED: dict[str, tuple[bytes, bytes]] = {
    "lines": (b"one\ntwo\n", b"three\n"),
    "nothing": (b"", b""),
    "no newline at the end": (b"one\ntwo", b"three"),
    "binary rubbish": (bytes(range(256)).replace(b"\r", b"") * 50, b"\xff\0\n\xfe"),
    "a huge line": (b"x" * 3_000_000, b"y" * 1_000_000 + b"\n"),
}


@pytest.mark.parametrize(("out", "err"), PRINTED.values(), ids=PRINTED)
def test_both_streams_pass_through_and_are_kept(ends: Ends, out: bytes, err: bytes) -> None:
    with opened(ends) as pipes:
        for descriptor, data in ((pipes.stdout, out), (pipes.stderr, err)):
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]

    assert ends.passed == {STDOUT: out, STDERR: err}
    assert (ends.kept("out"), ends.kept("err")) == (out, err)


def test_a_progress_bar_passes_through_untouched(ends: Ends) -> None:
    bar = b"".join(b"\r%d%%" % n for n in range(101)) + b"\n"
    with opened(ends) as pipes:
        os.write(pipes.stderr, bar)

    assert ends.passed[STDERR] == bar
    assert ends.kept("err").endswith(b"100%\n")
    assert len(ends.file) < len(bar) / 2


def test_what_was_printed_one_after_the_other_is_kept_in_that_order(ends: Ends) -> None:
    with opened(ends) as pipes:
        for number in range(20):
            descriptor = (pipes.stdout, pipes.stderr)[number % 2]
            os.write(descriptor, b"%d\n" % number)
            wait_until(lambda n=number: b" %d\n" % n in ends.file, what=f"line {number}")  # type: ignore[misc]

    kept = [line.split(b" ")[2:] for line in ends.file.split(b"\n")[:-1]]
    assert kept == [[(b"out", b"err")[n % 2], b"%d" % n] for n in range(20)]


def test_what_is_printed_passes_through_at_once(ends: Ends) -> None:
    with opened(ends) as pipes:
        os.write(pipes.stdout, b"no newline yet")
        wait_until(lambda: ends.passed[STDOUT], 0.4, "what was printed")


def test_the_beginning_of_a_line_is_kept_before_its_end_comes(ends: Ends) -> None:
    with opened(ends) as pipes:
        os.write(pipes.stdout, b"Password: ")
        wait_until(lambda: b"out+ Password: \n" in ends.file, 5, "the beginning of the line")


def test_no_descriptor_is_left(ends: Ends) -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - numbers, not paths
    for _ in range(5):
        with opened(ends):
            pass

    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_where_no_descriptor_is_left_nothing_is_either(ends: Ends) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    highest = os.dup(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 3, hard))
    taken = [highest]
    try:
        with pytest.raises(OSError, match="Too many open files"):
            Output(7, ends.keep, ends.pass_on)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)

    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# ---------------------------------------------------------------- what it passes through to

# The descriptors 1 and 2 of a process are what this is about, so it takes a process.
PROGRAM = """
import sys
from runner.supervisor.output import PassThrough
through = PassThrough()
for line in sys.stdin.buffer:
    target, _, data = line.partition(b" ")
    through.write(int(target), data)
through.flush(10)
through.close()
"""


def passed_through(
    given: bytes, stdout: int, stderr: int, program: str = PROGRAM
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", program], input=given, stdout=stdout, stderr=stderr, timeout=60
    )


def test_both_descriptors_are_served(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        done = passed_through(b"1 one\n2 two\n1 three\n", out.fileno(), err.fileno())

    assert done.returncode == 0
    assert (tmp_path / "out").read_bytes() == b"one\nthree\n"
    assert (tmp_path / "err").read_bytes() == b"two\n"


def test_where_both_are_the_same_their_order_is_kept(tmp_path: Path) -> None:
    given = b"".join(b"%d line %d\n" % (1 + n % 2, n) for n in range(1000))
    with (tmp_path / "both").open("wb") as both:
        passed_through(given, both.fileno(), both.fileno())

    assert (tmp_path / "both").read_bytes() == b"".join(b"line %d\n" % n for n in range(1000))


def test_one_that_is_closed_gets_nothing_nor_does_what_was_opened_instead(tmp_path: Path) -> None:
    other = tmp_path / "other"
    program = f"""
import os, sys
os.open({str(other)!r}, os.O_WRONLY | os.O_CREAT)
{PROGRAM}"""
    command = ["bash", "-c", 'exec "$@" >&-', "bash", sys.executable, "-c", program]
    done = subprocess.run(command, input=b"1 one\n2 two\n", stderr=subprocess.PIPE, timeout=60)

    assert (done.returncode, done.stderr) == (0, b"two\n")
    assert other.read_bytes() == b""


def test_a_reader_that_is_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = passed_through(b"1 one\n1 two\n", writing, subprocess.DEVNULL)
    os.close(writing)

    assert done.returncode == 0


def test_one_that_somebody_made_non_blocking_gets_everything() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    given, got = b"".join(b"1 %050d\n" % n for n in range(20_000)), b""

    def read() -> None:
        nonlocal got
        while chunk := os.read(reading, 1 << 16):
            got += chunk

    thread = threading.Thread(target=read)
    thread.start()
    done = passed_through(given, writing, subprocess.DEVNULL)
    os.close(writing)
    thread.join(20)
    os.close(reading)

    assert done.returncode == 0
    assert got == given.replace(b"1 ", b"")


def test_a_reader_that_stands_still_holds_nobody_up_for_long_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(output, "_PATIENCE", Patience(0.3, 0.1))
    reading, writing = os.pipe()
    saved = os.dup(1)
    os.dup2(writing, 1)
    try:
        through = PassThrough()
    finally:
        os.dup2(saved, 1)
    os.close(saved)
    monkeypatch.setattr(output.os, "write", _written_to({STDOUT: writing}, os.write))
    began = time.monotonic()
    for _ in range(1000):
        through.write(STDOUT, b"x" * 65_536)
    assert time.monotonic() - began < 5.0

    got = b""
    os.set_blocking(reading, True)
    while b"the reader is too slow" not in got:
        got = got[-100:] + os.read(reading, 1 << 20)
    through.write(STDOUT, b"and on it goes")
    while not got.endswith(b"and on it goes"):
        got += os.read(reading, 1 << 20)
    through.close()
    for descriptor in (reading, writing):
        os.close(descriptor)
    assert b" bytes dropped: the reader is too slow\nand on it goes" in got


def _written_to(places: dict[int, int], write: object) -> object:
    def elsewhere(target: int, data: memoryview) -> int:
        return write(places.get(target, target), data)  # type: ignore[operator,no-any-return]

    return elsewhere
