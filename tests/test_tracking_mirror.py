"""A tracker is sent everything, in order, and nothing twice; whatever it answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from runner.checkpoint.attempts import Ledger
from runner.checkpoint.logs import StoredLogs
from runner.checkpoint.manifest import Moment
from runner.checkpoint.persist import Persister
from runner.checkpoint.retention import Keep
from runner.errors import TrackerError, TrackerRefused
from runner.logs.files import LocalLogs
from runner.points import Point
from runner.store import DirectoryStore
from runner.tracking.base import About, Reading, Shown
from runner.tracking.mirror import Mirror, Record, Settings
from runner.wallclock import utc_now

RUN = "run"


class Book:
    """A tracker on paper. It keeps what it is sent, and can fail in the middle of it."""

    def __init__(self, *, tells: bool = True) -> None:
        self.readings: list[Reading] = []
        self.tags: dict[str, str] = {}
        self.shown: list[Shown] = []
        self.files: dict[str, list[str]] = {}
        self.ended: list[str | None] = []
        self.about: About | None = None
        self.known: list[str | None] = []
        self.fails_after: int | None = None
        self.refuses: set[str] = set()
        self._tells = tells

    def begin(self, about: About, known: str | None) -> str:
        self.about = about
        self.known.append(known)
        return known or "the-id"

    def sent(self) -> Mapping[str, int]:
        newest: dict[str, int] = {}
        for reading in self.readings if self._tells else ():
            newest[reading.name] = max(reading.step, newest.get(reading.name, -1))
        return newest

    def log(self, readings: Sequence[Reading]) -> None:
        if any(reading.name in self.refuses for reading in readings):
            raise TrackerRefused("not this one")
        for reading in readings:
            if self.fails_after is not None:
                self.fails_after -= 1
                if self.fails_after < 0:
                    self.fails_after = None
                    raise ConnectionError("gone in the middle")
            self.readings.append(reading)

    def note(self, tags: Mapping[str, str]) -> None:
        self.tags.update(tags)

    def show(self, checkpoint: Shown) -> None:
        self.shown.append(checkpoint)
        if checkpoint.files is not None:
            self.files[checkpoint.name] = sorted(path.name for path in checkpoint.files.iterdir())

    def end(self, outcome: str | None) -> None:
        self.ended.append(outcome)

    def steps(self, name: str) -> list[int]:
        return [reading.step for reading in self.readings if reading.name == name]


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    store = DirectoryStore(tmp_path / "store")
    job = {"name": "job", "params": {"lr": 0.1, "model": {"width": 8}}, "command": ["python", "x"]}
    Ledger(store, RUN, "").begin({"run_id": RUN, "created_at": utc_now(), "job": job})
    return store


def log_points(folder: Path, attempt: int, steps: range, **more: float) -> None:
    folder.mkdir(exist_ok=True)
    lines = [Point(attempt, step, 0, 1e9 + step, {"loss": 1 / step, **more}) for step in steps]
    with (folder / f"{attempt:06d}-{0:012d}.jsonl").open("ab") as file:
        file.writelines(point.to_line() for point in lines)


def mirror_of(store: DirectoryStore, points: Path, book: Book, **settings: str) -> Mirror:
    record = Record(store, RUN, points)
    return Mirror(record, "book", lambda: book, Settings(settings, points, points))


def save(store: DirectoryStore, ledger: Ledger, number: int, *triggers: str) -> str:
    assert ledger.record is not None
    moment = Moment(ledger.record.attempt, number, 10 * number, 0, 0, triggers=triggers)
    files = {"state.json": memoryview(b"{}"), "model.safetensors": memoryview(b"\0" * 64)}
    return Persister(store, ledger, Keep(last=99)).persist(moment, files).name


def test_what_is_trained_again_is_not_sent_again(store: DirectoryStore, tmp_path: Path) -> None:
    book, points = Book(tells=False), tmp_path / "points"
    mirror = mirror_of(store, points, book)
    log_points(points, 1, range(1, 13))
    mirror.advance()
    log_points(points, 2, range(9, 21))  # attempt 1 was killed, and step 8 was the last one saved
    mirror.advance()

    assert book.steps("loss") == list(range(1, 21))


def test_another_supervisor_goes_on_where_the_last_one_ended(
    store: DirectoryStore, tmp_path: Path
) -> None:
    book, here, there = Book(tells=False), tmp_path / "here", tmp_path / "there"
    log_points(here, 1, range(1, 10))
    mirror_of(store, here, book).end()
    log_points(there, 2, range(8, 15))
    mirror_of(store, there, book).end()

    assert book.known == [None, "the-id"]
    assert book.steps("loss") == list(range(1, 15))


def test_a_sender_that_was_killed_before_it_noted_what_it_sent_sends_nothing_twice(
    store: DirectoryStore, tmp_path: Path
) -> None:
    book, points = Book(), tmp_path / "points"
    log_points(points, 1, range(1, 10))
    mirror = mirror_of(store, points, book)
    mirror.begin()
    mirror._send_points()  # and no note of it in the store
    log_points(points, 1, range(10, 12))
    mirror_of(store, points, book).advance()

    assert book.steps("loss") == list(range(1, 12))


def test_a_sender_that_is_killed_sends_nothing_twice_to_a_tracker_that_does_not_tell(
    store: DirectoryStore, tmp_path: Path
) -> None:
    book, points = Book(tells=False), tmp_path / "points"
    log_points(points, 1, range(1, 10))
    mirror = mirror_of(store, points, book)
    mirror.begin()
    mirror._send_points()  # and no note of it in the store
    log_points(points, 1, range(10, 12))
    mirror_of(store, points, book).advance()

    assert book.steps("loss") == list(range(1, 12))


def test_what_a_lost_node_had_not_sent_is_known_from_the_store(
    store: DirectoryStore, tmp_path: Path
) -> None:
    book, here, there = Book(tells=False), tmp_path / "here", tmp_path / "there"
    log_points(here, 1, range(1, 6))
    mirror_of(store, here, book).end()
    log_points(here, 1, range(6, 10))
    stored = StoredLogs(store, RUN, "metrics", ".jsonl")
    assert stored.ship(LocalLogs(here, ".jsonl"), 1 << 20, 1, lambda: True)
    log_points(there, 2, range(8, 15))
    mirror_of(store, there, book).end()

    assert book.steps("loss") == list(range(1, 15))


def test_what_is_lost_with_a_nodes_files_is_written_into_others(
    store: DirectoryStore, tmp_path: Path
) -> None:
    lost, found, here, there = Book(), Book(tells=False), tmp_path / "here", tmp_path / "there"
    log_points(here, 1, range(1, 10))
    mirror_of(store, here, lost, mode="offline").end()
    log_points(there, 1, range(1, 10))  # as they come back from the store
    mirror_of(store, there, found, mode="offline").end()
    log_points(there, 2, range(8, 15))
    mirror_of(store, there, found, mode="offline").end()

    assert found.known == ["the-id", "the-id"]
    assert found.steps("loss") == list(range(1, 15))


def test_a_last_word_that_takes_too_long_makes_nothing_be_sent_twice(
    store: DirectoryStore, tmp_path: Path
) -> None:
    book, here, there = Book(tells=False), tmp_path / "here", tmp_path / "there"
    log_points(here, 1, range(1, 10))
    mirror = mirror_of(store, here, book)
    mirror.advance()
    log_points(here, 1, range(10, 12))
    book.end = lambda outcome: sys.exit("killed")  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        mirror.end()
    log_points(there, 2, range(11, 15))
    mirror_of(store, there, book).advance()

    assert book.steps("loss") == list(range(1, 15))


@pytest.mark.parametrize("arrived", [0, 1, 700, 999])
def test_a_batch_that_fails_in_the_middle_is_completed(
    store: DirectoryStore, tmp_path: Path, arrived: int
) -> None:
    book, points = Book(), tmp_path / "points"
    log_points(points, 1, range(1, 1001))
    mirror = mirror_of(store, points, book)
    book.fails_after = arrived
    with pytest.raises(ConnectionError):
        mirror.advance()
    mirror.advance()

    assert book.steps("loss") == list(range(1, 1001))


def test_one_value_that_is_refused_for_good_holds_nothing_up(
    store: DirectoryStore, tmp_path: Path
) -> None:
    book, points = Book(), tmp_path / "points"
    log_points(points, 1, range(1, 40), bad=1.0)
    book.refuses = {"bad"}
    mirror = mirror_of(store, points, book)
    mirror.advance()

    assert book.steps("loss") == list(range(1, 40))
    assert len(mirror.refused) == 39
    assert mirror.refused[0] == "bad at step 1: not this one"


def test_values_that_json_lacks_are_sent_as_what_they_are(
    store: DirectoryStore, tmp_path: Path
) -> None:
    book, points = Book(), tmp_path / "points"
    log_points(points, 1, range(1, 2), bad=float("nan"))
    mirror_of(store, points, book).advance()

    assert str(book.readings[1].value) == "nan"


def test_params_and_places_are_told_without_secrets(store: DirectoryStore, tmp_path: Path) -> None:
    book = Book()
    mirror_of(store, tmp_path / "points", book).advance()

    assert book.about is not None
    assert book.about.params == {"lr": "0.1", "model.width": "8"}
    assert book.about.tags["runner.place"] == f"{store.url}/{RUN}"
    assert book.about.key.startswith(f"{store.url}/{RUN}@")


def test_each_checkpoint_is_shown_once_and_the_best_with_its_files(
    store: DirectoryStore, tmp_path: Path
) -> None:
    book = Book()
    ledger = Ledger(store, RUN, "owner")
    ledger.claim("node-a")
    names = [save(store, ledger, 1, "interval"), save(store, ledger, 2, "best", "interval")]
    mirror_of(store, tmp_path / "points", book, upload="best").end()
    names.append(save(store, ledger, 3, "interval"))
    ledger.update(outcome="succeeded")
    mirror_of(store, tmp_path / "points", book, upload="best").end()

    assert [shown.name for shown in book.shown] == names
    assert book.shown[0].uri == f"{store.url}/{RUN}/checkpoints/{names[0]}"
    assert book.shown[0].manifest["step"] == 10
    assert book.files == {names[1]: ["manifest.json", "model.safetensors", "state.json"]}
    assert book.tags["runner.host"] == "node-a"
    assert book.ended == [None, "succeeded"]


def test_a_run_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrackerError, match="there is no run run"):
        mirror_of(DirectoryStore(tmp_path), tmp_path, Book()).advance()
