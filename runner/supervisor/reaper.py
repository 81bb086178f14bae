"""What a process with adopted children owes them: to take their exit codes, and no others.

A child subreaper (and PID 1) becomes the parent of every orphan below it, and has to wait for them
or they stay zombies. But the exit code of a child that somebody waits for must not be taken: a
trainer's crash would look like a success. So it is looked first (`WNOWAIT`), then waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Collection

from runner.launch.process_tree import read_table

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h; see PR_SET_CHILD_SUBREAPER(2const)


def become_subreaper() -> bool:
    """Have the orphans among all descendants re-parented to this process; tell whether it worked.

    Where SIGCHLD was inherited as ignored, the kernel would throw every exit code away (wait(2)):
    it is set to the default, for which this must be the main thread (ValueError otherwise).
    """
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    arguments = [ctypes.c_ulong(value) for value in (1, 0, 0, 0)]
    return bool(ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, *arguments) == 0)


def reap_orphans(owned: Collection[int]) -> list[int]:
    """Wait for the adopted children that have ended; return their process ids. Never blocks.

    Left to their owners are the children in `owned` and all that are in our own session: what
    `subprocess` has started, in any thread. No orphan of a trainer can be there, because a trainer
    has left it. A child with a session of its own must be in `owned` before this is called, so call
    it from the thread that starts them. It costs one system call while no child has ended. OSError
    if the process table cannot be read just now.
    """
    if not _some_child_has_ended():
        return []
    # waitid(P_ALL) goes on showing the same child until that one is waited for, and an owned one
    # may be left for long: the others have to be found by name.
    own_pid, own_session = os.getpid(), os.getsid(0)
    reaped = []
    for entry in read_table().values():
        if entry.parent != own_pid or entry.alive:
            continue
        if entry.pid in owned or entry.session == own_session:
            continue
        with contextlib.suppress(ChildProcessError):
            if os.waitid(os.P_PID, entry.pid, os.WEXITED | os.WNOHANG) is not None:
                reaped.append(entry.pid)
    return reaped


def _some_child_has_ended() -> bool:
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # there are no children
        return False
