"""The wall clock jumps, by hours and both ways: durations and deadlines are not its business."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from nodes import PROGRAMS, Node

from runner.wallclock import parse_time

HOURS = 3600


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes the wall clock of a process jump."""
    if shutil.which("gcc") is None:
        pytest.skip("the clock that jumps is written in C, and there is no gcc")
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    source = PROGRAMS / "clock_that_jumps.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def environment(shim: Path, jumps: Path) -> dict[str, str]:
    return {"LD_PRELOAD": str(shim), "CLOCK_JUMP_FILE": str(jumps)}


@pytest.mark.parametrize("hours", [9, -9])
def test_a_clock_that_jumps_between_two_attempts_changes_nothing(
    node: Node, shim: Path, hours: int
) -> None:
    """Nothing is taken for a hang, a deadline or a newer run, and order is not by time."""
    calm = node.run("run", node.training(name="calm"))
    assert calm.code == 0, calm.err
    jumps = node.folder / "jump"
    jumps.write_text("0")
    job = node.training(params={"befalls": {"1": {"5": "wait", "9": "raise"}}})
    supervisor = node.start("run", job, env=environment(shim, jumps))
    supervisor.wait_for("step 5")

    jumps.write_text(str(hours * HOURS))
    node.gate.touch()

    assert supervisor.wait() == 0, supervisor.err
    first, second = node.records()
    assert (first.outcome, first.exit_code) == ("failed", 1), "by what it raised, and nothing else"
    assert (second.start_step, second.outcome) == (8, "succeeded")
    assert node.digest() == node.digest("calm")
    begun, ended = parse_time(first.started_at), parse_time(first.ended_at)
    assert begun is not None
    assert ended is not None
    assert (ended - begun) / HOURS == pytest.approx(hours, abs=0.1), "the clock has jumped indeed"


@pytest.mark.parametrize("hours", [9, -9])
def test_a_clock_that_jumps_in_the_grace_changes_no_deadline(
    node: Node, shim: Path, hours: int
) -> None:
    jumps = node.folder / "jump"
    jumps.write_text("0")
    job = node.training(params={"befalls": {"1": {"5": "wait"}}}, preemption={"grace": "60s"})
    supervisor = node.start("run", job, env=environment(shim, jumps))
    supervisor.wait_for("step 5")

    supervisor.send_signal(signal.SIGTERM)
    node.wait_until_asked()
    jumps.write_text(str(hours * HOURS))
    node.gate.touch()

    assert supervisor.wait() == 75, supervisor.err
    (record,) = node.records()
    assert (record.saved_step, record.outcome) == (5, "preempted"), "there was time for the step"
    assert record.notice_to_durable_seconds is not None
    assert 0 <= record.notice_to_durable_seconds < 60
