"""What is kept of the saves of a run: a line for each, on this node and in the store."""

from __future__ import annotations

from pathlib import Path

import pytest
from nodes import Node

from runner.logs.files import LocalLogs
from runner.saves import SaveRecord, saves_of
from runner.store import open_store
from runner.supervisor.savelog import SaveLog, local_saves, stored_saves


def record(step: int = 40) -> SaveRecord:
    name = f"step-{step:09d}-a0003-s001"
    return SaveRecord(
        name, 3, step, 1_790_000_000.5, ("best", "interval"), "full", 8_000, 0.01, 0.5
    )


def test_a_line_gives_the_record_back() -> None:
    one = record()
    assert one.to_line().count(b"\n") == 1
    assert SaveRecord.from_line(one.to_line()) == one
    assert one.total_seconds == 0.51
    unknown = SaveRecord("step-000000040-a0003-s001", 3, 40, 1_790_000_000.5)
    assert SaveRecord.from_line(unknown.to_line()) == unknown
    assert unknown.total_seconds is None


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b"[]", b"3", b'{"checkpoint":"x"}', b"\xff", b"[" * 100_000,
     record().to_line().replace(b'"step":40', b'"step":"many"'),
     record().to_line().replace(b'"nbytes":8000', b'"nbytes":1e999')],
)  # fmt: skip
def test_a_line_that_is_no_record_is_passed_over(line: bytes) -> None:
    good = record()
    assert list(saves_of(line.rstrip(b"\n") + b"\n" + good.to_line())) == [good]


def test_lines_are_kept_by_attempt_and_go_into_the_store(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    log = SaveLog(tmp_path / "here", stored_saves(store, "job"))
    log.begin(3)
    log.note(record(40))
    log.note(record(80))
    log.finish()

    shipment = log.shipment
    shipment.stored.ship(shipment.local, shipment.max_bytes, 3, lambda: True)

    for source in (local_saves(tmp_path / "here"), stored_saves(store, "job")):
        (span,) = source.spans()
        assert span.attempt == 3
        assert [r.step for r in saves_of(source.read(span, 0, 1 << 20))] == [40, 80]
    assert LocalLogs(tmp_path / "here").spans() == []


def test_every_save_of_a_run_is_there_also_those_that_were_deleted(node: Node) -> None:
    job = node.training(
        checkpoint={"every": {"steps": 3}, "keep": {"last": 1}, "snapshot_every": {"steps": 1}},
        params={"pace": 0.01},
    )

    assert node.run("run", job).code == 0

    source = stored_saves(node.store, "job")
    blocks = [source.read(span, span.begin, 1 << 20) for span in source.spans()]
    found = [r for block in blocks for r in saves_of(block)]
    kept = {manifest.name for manifest in node.manifests()}
    assert len(found) > len(kept)
    assert kept <= {r.checkpoint for r in found}
    assert found[-1].step == 24
    assert "final" in found[-1].triggers
    assert all(r.persist_seconds is not None and r.persist_seconds > 0 for r in found)
    assert all(r.nbytes > 1000 and r.attempt == 1 for r in found)
    assert [r.time for r in found] == sorted(r.time for r in found)
