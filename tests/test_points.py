from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from runner import points
from runner.points import Point, PointReader, PointWriter, points_of


def point(step: int, attempt: int = 1, **values: float) -> Point:
    return Point(attempt, step, 0, 1_790_000_000.25, values or {"loss": step / 2})


def write(writer: PointWriter, *some: Point) -> None:
    writer.write(b"".join(one.to_line() for one in some))


def test_a_line_gives_the_point_back() -> None:
    one = Point(3, 40, 2, 1_790_000_000.125, {"loss": 0.1, "ümlaut \n": -1e300})
    line = one.to_line()
    assert line.count(b"\n") == 1
    assert Point.from_line(line) == one


def test_what_json_does_not_have_comes_through() -> None:
    line = point(1, a=math.nan, b=math.inf, c=-math.inf).to_line()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = Point.from_line(line)
    assert back is not None
    assert math.isnan(back.values["a"])
    assert (back.values["b"], back.values["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b"[]", b"null", b'{"attempt": 1}', b"\xff\xfe", b"[" * 100_000,
     b'{"attempt":1,"step":1,"epoch":0,"time":0,"values":{"a":"much"}}',
     b'{"attempt":1,"step":1,"epoch":0,"time":0,"values":[1]}'],
)  # fmt: skip
def test_a_line_that_is_no_point_is_passed_over(line: bytes) -> None:
    good = point(5)
    assert list(points_of(line + b"\n" + good.to_line())) == [good]


def test_a_reader_takes_each_line_once_and_in_order(tmp_path: Path) -> None:
    writer, reader = PointWriter(tmp_path, 1), PointReader(tmp_path)
    assert reader.take() == b""
    write(writer, point(1), point(2))
    assert [p.step for p in points_of(reader.take())] == [1, 2]
    assert reader.take() == b""
    write(writer, point(3))
    assert [p.step for p in points_of(reader.take())] == [3]


def test_a_line_that_is_being_written_waits_for_its_end(tmp_path: Path) -> None:
    writer, reader = PointWriter(tmp_path, 1), PointReader(tmp_path)
    line = point(1).to_line()
    writer.write(line[:10])
    assert reader.take() == b""
    writer.write(line[10:])
    assert reader.take() == line


def test_files_that_were_read_are_removed_and_nothing_is_lost_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(points, "_FILE_BYTES", 200)
    writer, reader = PointWriter(tmp_path, 1), PointReader(tmp_path)
    seen = []
    for step in range(100):
        write(writer, point(step))
        if step % 7 == 0:
            seen += [p.step for p in points_of(reader.take())]
    seen += [p.step for p in points_of(reader.take())]
    assert seen == list(range(100))
    assert len(list(tmp_path.iterdir())) == 1, "only the one that may grow"


def test_the_next_attempt_comes_after_what_a_killed_one_has_left(tmp_path: Path) -> None:
    first = PointWriter(tmp_path, 1)
    write(first, point(1))
    first.write(point(2).to_line()[:-5])  # killed in the middle of it
    write(PointWriter(tmp_path, 2), point(1, attempt=2))

    taken = list(points_of(PointReader(tmp_path).take()))

    assert [(p.attempt, p.step) for p in taken] == [(1, 1), (2, 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["points-000002-000000.jsonl"]


def test_where_nobody_reads_memory_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(points, "_FILE_BYTES", 100)
    writer = PointWriter(tmp_path, 1)
    for step in range(200):
        write(writer, point(step))
    assert len(list(tmp_path.iterdir())) <= points._MOST_FILES + 1
    assert [p.step for p in points_of(PointReader(tmp_path).take())][-1] == 199


def test_a_folder_that_is_gone_is_told_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = PointWriter(tmp_path / "gone", 1)
    write(writer, point(1))
    write(writer, point(2))
    assert caplog.text.count("cannot be handed over") == 1
    assert PointReader(tmp_path / "gone").take() == b""
