"""A sink takes what it is offered, holds up nobody for long, and says what it had to drop."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from waiting import wait_until

from runner.logs.sink import Patience, Sink

CAPACITY = 1000
IMPATIENT = Patience(0.0, 0.0)


class Target:
    """Something to write to that can be stopped, and let go on."""

    def __init__(self) -> None:
        self.written: list[tuple[int, bytes]] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.busy = threading.Event()

    def write(self, key: int, data: bytes) -> None:
        self.busy.set()
        assert self.goes_on.wait(30)
        self.written.append((key, data))
        self.busy.clear()

    def stop(self, sink: Sink) -> None:
        """From here on it hangs, with nothing in the buffer but what hangs in it."""
        self.goes_on.clear()
        sink.offer(0, b"")
        sink.offer(1, b"hangs")
        assert self.busy.wait(10)

    @property
    def all(self) -> bytes:
        return b"".join(data for _, data in self.written)


@pytest.fixture
def target() -> Iterator[Target]:
    target = Target()
    yield target
    target.goes_on.set()


def sink_for(target: Target, patience: Patience = IMPATIENT) -> Sink:
    return Sink(
        "test", target.write, lambda n: b"<%d>" % n, capacity_bytes=CAPACITY, patience=patience
    )


def test_everything_comes_out_in_order(target: Target) -> None:
    sink = sink_for(target, Patience(10.0, 1.0))
    offers = [(n % 3, b"%d," % n) for n in range(2000)]
    for key, data in offers:
        sink.offer(key, data)

    assert sink.close(10)
    assert target.all == b"".join(data for _, data in offers)
    by_key = [[d for k, d in target.written if k == key] for key in range(3)]
    assert [b"".join(each) for each in by_key] == [
        b"".join(d for k, d in offers if k == key) for key in range(3)
    ]


def test_what_waits_for_the_same_target_is_written_at_once(target: Target) -> None:
    sink = sink_for(target)
    target.stop(sink)
    for data in (b"a", b"b", b"c"):
        sink.offer(1, data)
    sink.offer(2, b"d")
    target.goes_on.set()

    assert sink.close(10)
    assert target.written == [(1, b"hangs"), (1, b"abc"), (2, b"d")]


def test_what_finds_no_room_is_dropped_and_counted_where_it_would_have_been(target: Target) -> None:
    sink = sink_for(target)
    target.stop(sink)
    sink.offer(1, b"x" * 900)
    for _ in range(50):
        sink.offer(1, b"y" * 100)
    target.goes_on.set()
    assert sink.flush(10)
    sink.offer(1, b"z")

    assert sink.close(10)
    assert target.all == b"hangs" + b"x" * 900 + b"<5000>" + b"z"


def test_after_something_was_dropped_a_smaller_piece_does_not_slip_past_the_gap(
    target: Target,
) -> None:
    sink = sink_for(target)
    target.stop(sink)
    sink.offer(1, b"x" * 900)
    sink.offer(1, b"y" * 100)
    sink.offer(1, b"z" * 10)
    target.goes_on.set()

    assert sink.close(10)
    assert target.all == b"hangs" + b"x" * 900 + b"<110>"


def test_the_buffer_is_bounded_whatever_is_offered(target: Target) -> None:
    sink = sink_for(target)
    target.stop(sink)
    for _ in range(100):
        sink.offer(1, b"y" * 300)

    assert sum(len(data) for _, data in sink._waiting) <= CAPACITY


def test_one_that_is_larger_than_the_buffer_passes_where_nothing_waits(target: Target) -> None:
    sink = sink_for(target)
    sink.offer(1, b"x" * 10 * CAPACITY)

    assert sink.close(10)
    assert target.all == b"x" * 10 * CAPACITY


def test_a_full_buffer_holds_up_whoever_fills_it_until_there_is_room(target: Target) -> None:
    sink = sink_for(target, Patience(60.0, 0.0))
    target.stop(sink)
    sink.offer(1, b"x" * 900)
    offering = threading.Thread(target=sink.offer, args=(1, b"y" * 900))
    offering.start()
    offering.join(0.05)
    assert offering.is_alive(), "it waits"
    target.goes_on.set()

    offering.join(10)
    assert sink.close(10)
    assert target.all == b"hangs" + b"x" * 900 + b"y" * 900


def test_a_target_that_stands_still_costs_its_patience_once(target: Target) -> None:
    sink = sink_for(target, Patience(0.3, 0.1))
    target.stop(sink)
    sink.offer(1, b"x" * 900)
    began = time.monotonic()
    for _ in range(1000):
        sink.offer(1, b"y" * 900)

    assert 0.3 <= time.monotonic() - began < 2.0


def test_a_slow_target_takes_a_share_of_the_time_in_the_long_run(target: Target) -> None:
    slow, release = threading.Event(), threading.Event()

    def write(key: int, data: bytes) -> None:
        slow.set()
        release.wait(0.02)

    patience = Patience(0.2, 0.1)
    sink = Sink("test", write, lambda n: b"", capacity_bytes=CAPACITY, patience=patience)
    began, waited = time.monotonic(), 0.0
    while time.monotonic() - began < 1.5:
        offered = time.monotonic()
        sink.offer(1, b"y" * 600)
        waited += time.monotonic() - offered
        threading.Event().wait(0.0005)
    release.set()

    took = time.monotonic() - began
    assert waited < 0.2 + 0.1 * took + 0.4, "of which the last is for a machine that is busy"
    assert slow.is_set()


def test_what_is_urgent_never_waits_and_has_room_of_its_own(target: Target) -> None:
    sink = sink_for(target, Patience(60.0, 1.0))
    target.stop(sink)
    sink.offer(1, b"x" * 900)
    began = time.monotonic()
    sink.offer(2, b"u" * 500, urgent=True)

    assert time.monotonic() - began < 10
    target.goes_on.set()
    assert sink.close(10)
    assert target.written[-1] == (2, b"u" * 500)


def test_what_is_urgent_is_taken_while_the_rest_is_dropped(target: Target) -> None:
    sink = sink_for(target)
    target.stop(sink)
    sink.offer(1, b"x" * 990)
    sink.offer(1, b"lost" * 10)
    sink.offer(1, b"!", urgent=True)
    target.goes_on.set()

    assert sink.close(10)
    assert target.all == b"hangs" + b"x" * 990 + b"!<40>"


def test_flush_and_close_say_whether_they_were_in_time(target: Target) -> None:
    sink = sink_for(target)
    assert sink.flush(0)
    target.stop(sink)

    assert not sink.flush(0.01)
    assert not sink.close(0.01)
    target.goes_on.set()
    wait_until(lambda: sink.close(0), what="the end of the sink")
    assert target.all == b"hangs"


def test_after_its_end_it_takes_nothing(target: Target) -> None:
    sink = sink_for(target)
    assert sink.close(10)
    sink.offer(1, b"late", urgent=True)

    assert target.all == b""
