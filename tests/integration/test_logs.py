"""Logs of real runs: floods, readers that stand still, full disks, and what outlives the node."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nodes import PROGRAMS, RUNNER, Node
from slots import small_disk
from waiting import wait_until

from runner.checkpoint.logs import StoredLogs
from runner.logs.files import LocalLogs

PRINTS = str(PROGRAMS / "prints.py")
LINES = 300_000
FLOOD_BYTES = 82 * LINES


def said(text: str) -> list[str]:
    """What the trainer has printed, out of a log."""
    return [line for line in text.splitlines() if not line.startswith("runner: ")]


def python(node: Node, code: str, **keys: Any) -> str:
    """A job whose trainer is this code."""
    path = node.folder / "script.py"
    path.write_text(code)
    return node.job("python", str(path), **keys)


def log_folder(node: Node) -> LocalLogs:
    (folder,) = (node.folder / "home" / "logs").glob("*")
    return LocalLogs(folder)


def peak_memory(pid: int) -> int:
    """The most that a process has had in memory so far, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


# ---------------------------------------------------------------- floods


def test_a_flood_of_lines_neither_holds_the_trainer_up_nor_fills_the_memory(node: Node) -> None:
    told, alone = node.folder / "told", node.folder / "alone"
    subprocess.run([sys.executable, PRINTS, str(LINES), str(alone)], stdout=subprocess.DEVNULL)
    job = node.job("python", PRINTS, str(LINES), str(told), logs={"max_size": "256M"})
    supervisor = node.start("run", job)
    supervisor.wait_for("supervisor process")
    at_first, peak = peak_memory(supervisor.pid), 0

    def is_over() -> bool:
        nonlocal peak
        try:
            peak = max(peak, peak_memory(supervisor.pid))
        except (AssertionError, OSError):
            return True
        return supervisor.process.poll() is not None

    wait_until(is_over, 60, "the end of the flood")
    assert supervisor.wait() == 0

    with_runner, without = json.loads(told.read_text()), json.loads(alone.read_text())
    print(f"with {with_runner}, without {without}, memory +{(peak - at_first) / 1e6:.0f} MB")
    assert LINES / with_runner["seconds"] > 30_000, "on a machine that does much else"
    assert with_runner["slowest"] < 2.0
    assert peak - at_first < 64 << 20
    assert supervisor._out.stat().st_size > FLOOD_BYTES * 0.9
    kept = node.start("logs", "job", "--stream", "out")
    assert kept.wait() == 0
    assert len(kept.out.splitlines()) == 1 + LINES, "the file has all of them"


def test_a_line_of_a_hundred_megabytes_passes_and_is_kept(node: Node) -> None:
    size = 100_000_000
    code = f"import os\nfor _ in range({size // 100_000}): os.write(1, b'x' * 100_000)\nprint()"
    supervisor = node.start("run", python(node, code, logs={"max_size": "256M"}))

    assert supervisor.wait() == 0
    assert supervisor._out.stat().st_size == size + 1
    kept = node.start("logs", "job", "--stream", "out")
    assert kept.wait() == 0
    assert kept._out.read_bytes() == b"x" * size + b"\n"


def test_what_the_limit_does_not_hold_goes_and_the_newest_stays(node: Node) -> None:
    told = node.folder / "told"
    job = node.job("python", PRINTS, "20000", str(told), logs={"max_size": "256Ki", "files": 4})
    assert node.run("run", job).code == 0

    kept = log_folder(node).spans()
    assert sum(span.end - span.begin for span in kept) <= 256 << 10
    assert len(kept) <= 5
    stored = StoredLogs(node.store, "job").spans()
    assert sum(span.end - span.begin for span in stored) <= 256 << 10
    logs = node.call("logs", "job")
    assert "are not kept any more" in logs.err
    assert "step 0019999 " in said(logs.out)[-1]


def test_a_reader_that_stands_still_does_not_end_the_run(node: Node) -> None:
    told = node.folder / "told"
    job = node.job("python", PRINTS, str(LINES), str(told), logs={"max_size": "256M"})
    reading, writing = os.pipe()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RUNNER_")}
    process = subprocess.Popen(
        [RUNNER, "run", job],
        cwd=node.folder,
        env=environment | node.environment,
        stdout=writing,
        stderr=writing,
    )
    os.close(writing)
    try:
        assert process.wait(60) == 0
    finally:
        os.close(reading)

    print(json.loads(told.read_text()))
    assert json.loads(told.read_text())["seconds"] < 30
    kept = node.start("logs", "job", "--stream", "out")
    assert kept.wait() == 0
    assert len(kept.out.splitlines()) == 1 + LINES


# ---------------------------------------------------------------- attempts, supervisors, nodes

TWICE = """
import os, pathlib, threading
attempt = os.environ["RUNNER_ATTEMPT"]
print("attempt", attempt, flush=True)
gate = pathlib.Path("gate" + attempt)
while not gate.exists():
    threading.Event().wait(0.001)
print("end of", attempt, flush=True)
raise SystemExit(0 if attempt == "3" else 1)
"""


def test_following_goes_on_across_attempts_and_supervisors_until_the_run_ends(node: Node) -> None:
    job = python(node, TWICE, preemption={"grace": "400ms"})
    first = node.start("run", job)
    first.wait_for("attempt 1")
    following = node.start("logs", "job", "-f", "--stream", "out")
    following.wait_for("attempt 1")
    (node.folder / "gate1").touch()
    following.wait_for("attempt 2")
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 75
    second = node.start("run", job)
    following.wait_for("attempt 3")
    (node.folder / "gate3").touch()

    assert second.wait() == 0
    assert following.wait() == 0
    assert following.out == "attempt 1\nend of 1\nattempt 2\nattempt 3\nend of 3\n"


def test_a_detached_run_keeps_its_output_in_the_log_alone(node: Node) -> None:
    job = python(node, TWICE)
    for attempt in (1, 2, 3):
        (node.folder / f"gate{attempt}").touch()
    detached = node.run("submit", job, "--detach")
    following = node.start("logs", "job", "-f", "--stream", "out")
    assert (detached.code, following.wait()) == (0, 0)

    assert following.out.endswith("attempt 3\nend of 3\n")
    (messages,) = (node.folder / "home" / "detached").iterdir()
    assert f"its messages are in {messages}" in detached.err
    assert "attempt 3" not in messages.read_text()
    assert "runner: " in messages.read_text()
    wait_until(lambda: not node.processes(), what="the end of the detached supervisor")


def test_the_log_outlives_the_node(new_node: Callable[[str], Node]) -> None:
    first, second = new_node("first"), new_node("second")
    assert first.run("run", python(first, "print('one'); raise SystemExit(2)")).code == 2
    store = str(first.store_folder)

    there = second.call("logs", "job", "--store", store)

    assert (there.code, there.err) == (0, "")
    assert said(there.out) == ["one"]
    assert there.out == first.call("logs", "job").out


def test_what_a_killed_supervisor_had_not_stored_its_successor_stores(node: Node) -> None:
    job = python(node, TWICE)
    supervisor = node.start("run", job)
    supervisor.wait_for("attempt 1")
    files = node.folder / "home" / "logs"
    wait_until(lambda: any("attempt 1" in f.read_text() for f in files.rglob("*.log")), what="it")
    supervisor.process.kill()
    supervisor.wait()
    for attempt in (2, 3):
        (node.folder / f"gate{attempt}").touch()
    assert node.run("run", job).code == 0

    stored = StoredLogs(node.store, "job")
    texts = b"".join(stored.read(span, span.begin, 1 << 20) for span in stored.spans())
    printed = [line.split(b" ", 3)[3] for line in texts.splitlines() if b" out " in line]
    assert printed == [b"attempt 1", b"attempt 2", b"end of 2", b"attempt 3", b"end of 3"]


def test_a_disk_that_is_full_of_logs_ends_no_run(node: Node) -> None:
    with small_disk(node.folder / "home", "256k") as home:
        told = node.folder / "told"
        done = node.run("run", node.job("python", PRINTS, "20000", str(told)))
        assert (home / "logs").is_dir()

        assert done.code == 0
        assert "is not kept for now" in done.err
        assert len(said(done.out)) == 1 + 20_000
        logs = node.call("logs", "job")
        assert said(logs.out)[:2] == said(done.out)[:2]
