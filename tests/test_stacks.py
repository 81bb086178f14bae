"""What is shown of a process that does not move. A small program stands in for py-spy."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from waiting import wait_until

from runner.supervisor import stacks


@pytest.fixture
def py_spy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A py-spy on the PATH that says what it was asked."""
    return install(tmp_path, monkeypatch, 'echo "asked: $@"')


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    program = folder / "py-spy"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return program


def test_without_py_spy_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    caplog.set_level(logging.INFO)

    stacks.show(os.getpid(), lambda: pytest.fail("nothing was shown"))

    assert stacks.native_tool() is None
    assert stacks.seconds_needed() < 2
    assert f"process {os.getpid()} has threads: " in caplog.text


def test_what_py_spy_shows_is_logged_and_then_told(
    py_spy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shown = threading.Event()

    stacks.show(4711, shown.set)

    assert shown.wait(10)
    assert "asked: dump --native --pid 4711" in caplog.text
    assert stacks.seconds_needed() > 10


FAILURES = {
    "it is not allowed to": ("echo 'Permission denied' >&2; exit 1", "Permission denied"),
    "it fails without a word": ("exit 3", "cannot look into process 4711: 3"),
    "it hangs": ("exec sleep 60", "in 0.2 s"),
}


@pytest.mark.parametrize(("script", "said"), FAILURES.values(), ids=list(FAILURES))
def test_a_py_spy_that_fails_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    tool = str(install(tmp_path, monkeypatch, script))

    assert said in stacks.native_stacks(4711, tool, timeout_seconds=0.2 if "sleep" in script else 9)


def test_a_py_spy_that_cannot_be_started_is_a_sentence(tmp_path: Path) -> None:
    assert "cannot be started" in stacks.native_stacks(4711, str(tmp_path / "none"))


def test_the_state_of_a_stopped_process_is_told() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        child.send_signal(signal.SIGSTOP)
        try:
            wait_until(lambda: "stopped by a signal" in stacks.thread_states(child.pid))
        finally:
            child.kill()
    assert stacks.thread_states(child.pid).endswith("none")
