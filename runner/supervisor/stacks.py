"""Where a trainer that does not move is stuck: what the system and py-spy know of it.

The stacks of all Python threads are dumped by the trainer itself, when it is sent SIGRTMIN. That
does not work before it has attached, nor while it is stopped, and shows nothing of native code; a
py-spy beside this Python or on the PATH does (https://github.com/benfred/py-spy).
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

_OWN_SECONDS = 1.0  # for the trainer to write its own stacks
_NATIVE_SECONDS = 15.0  # for py-spy: it has to read the symbols of all libraries

_STATES = {
    "R": "running",
    "S": "waiting",
    "D": "in a system call that cannot be interrupted",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "dead",
}


def seconds_needed() -> float:
    """How long to wait for the stacks of a trainer that is going to be killed."""
    return _OWN_SECONDS if native_tool() is None else _OWN_SECONDS + _NATIVE_SECONDS


def show(pid: int, when_shown: Callable[[], None]) -> None:
    """Write into the log where the threads of a process are; py-spy works in the background.

    `when_shown` is called after py-spy has ended, from a thread; without a py-spy, never.
    """
    log.info("%s", thread_states(pid))
    tool = native_tool()
    if tool is None:
        return

    def look() -> None:
        log.info("%s", native_stacks(pid, tool))
        when_shown()

    threading.Thread(target=look, name="stacks", daemon=True).start()


def native_tool() -> str | None:
    """The py-spy that is installed, if there is one."""
    beside = str(Path(sys.executable).parent)
    return shutil.which("py-spy", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))


def native_stacks(pid: int, tool: str, timeout_seconds: float = _NATIVE_SECONDS) -> str:
    """The stacks of all threads, native frames too; or a sentence that says why there are none."""
    command = [tool, "dump", "--native", "--pid", str(pid)]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=timeout_seconds, check=False, text=True
        )
    except subprocess.TimeoutExpired:
        return f"py-spy has not shown the stacks of process {pid} in {timeout_seconds:g} s"
    except OSError as error:
        return f"py-spy cannot be started: {error}"
    if done.returncode:
        why = done.stderr.partition("\nStack backtrace")[0].strip()  # of py-spy itself
        return f"py-spy cannot look into process {pid}: {why or done.returncode}"
    return done.stdout


def thread_states(pid: int) -> str:
    """What the threads of a process are doing, as the system sees it."""
    states: Counter[str] = Counter()
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            stat = (thread / "stat").read_text(errors="replace")
            states[stat[stat.rindex(")") + 2]] += 1
    except OSError:
        pass  # it, or a thread of it, has just ended
    told = ", ".join(f"{count} {_STATES.get(s, s)}" for s, count in states.most_common())
    return f"process {pid} has threads: {told or 'none'}"
