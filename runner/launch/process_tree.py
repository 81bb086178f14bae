"""Which processes the trainer has started, directly or not, and how to be rid of all of them.

Linux forgets who started a process once its parent has ended, so membership is decided by what it
cannot forget. In this order, for each process of one reading of `/proc`:

    the trainer itself                                     belongs to it
    in the supervisor's session                            does not: nobody can join a session
                                                           from outside, and the trainer left ours
    was there before the trainer                           does not
    a descendant of a member, or in the trainer's session  belongs to it
    has this trainer's mark in its environment             belongs to it
    a child of ours with another mark of ours              does not: another trainer's
    a child of ours                                        belongs to it: we are a child subreaper,
                                                           so it is an orphan that was adopted

Processes are identified by process id *and* start time, and signals go through a pidfd that was
checked against both, so that a number in use by somebody else now is left alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.launch.cgroup import AttemptGroup

MARK_VARIABLE = "RUNNER_TREE"
"""Set in the trainer's environment and inherited by whatever it starts: `SUPERVISOR.SERIAL`."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.001, 0.05

Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ProcessEntry:
    """One line of the process table, read in one piece; `start_ticks` counts from the boot."""

    pid: int
    parent: int
    group: int
    session: int
    start_ticks: int
    state: str
    threads: int = 1

    @property
    def identity(self) -> Identity:
        return self.pid, self.start_ticks

    @property
    def alive(self) -> bool:
        """Whether it still runs: a zombie with threads has only lost its first one."""
        return self.state not in "ZX" or self.threads > 1


@dataclass(frozen=True, slots=True)
class Tree:
    """What is known about a trainer's tree from the moment it was started.

    `before` are the processes that existed then. While the trainer has not been waited for, it is
    at least a zombie, and its process id, which is its session's too, is not given away again.
    """

    trainer: Identity
    supervisor_pid: int
    supervisor_session: int
    mark: str
    supervisor_mark: str | None = None
    before: frozenset[Identity] = frozenset()

    def shields(self, entry: ProcessEntry) -> bool:
        """Whether this process cannot be the trainer's, whoever its parent is now."""
        return entry.session == self.supervisor_session or entry.identity in self.before

    def is_of_another(self, mark: str | None) -> bool:
        """Whether a mark is that of another trainer of ours, or of ourselves."""
        if mark is None or mark == self.mark:
            return False
        return mark == self.supervisor_mark or mark.startswith(self.mark.rpartition(".")[0] + ".")


def mark_prefix(entry: ProcessEntry) -> str:
    """What the marks of all trainers of one supervisor begin with."""
    return f"{entry.pid}-{entry.start_ticks}"


def read_entry(pid: int) -> ProcessEntry | None:
    """One process, or None if it is gone. See proc_pid_stat(5) for the fields.

    OSError if that cannot be told, for want of a file descriptor above all: it is no proof of an
    end.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError:  # of another user, where /proc hides those
        return None
    fields = text[text.rindex(b")") + 2 :].split()  # the name before it may hold anything
    return ProcessEntry(
        pid=pid,
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        start_ticks=int(fields[19]),
        state=fields[0].decode(),
        threads=int(fields[17]),
    )


def read_table() -> dict[int, ProcessEntry]:
    """Every process that can be seen, zombies too."""
    entries = (read_entry(int(name)) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208
    return {entry.pid: entry for entry in entries if entry is not None}


def read_mark(pid: int) -> str | None:
    """The mark in the environment with which a process began, None where there is none to read."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone, or another user's
        return None
    _, found, rest = (b"\0" + environment).partition(f"\0{MARK_VARIABLE}=".encode())
    return rest.partition(b"\0")[0].decode(errors="replace") if found else None


def members(
    table: Mapping[int, ProcessEntry],
    tree: Tree,
    mark_of: Callable[[int], str | None] = read_mark,
    spare: Collection[int] = (),
) -> list[ProcessEntry]:
    """The trainer and all that it has started, parents first, dead ones included. Pure."""
    children: dict[int, list[ProcessEntry]] = defaultdict(list)
    for entry in table.values():
        children[entry.parent].append(entry)

    def may_belong(entry: ProcessEntry) -> bool:
        return not tree.shields(entry) and entry.pid not in spare

    trainer = table.get(tree.trainer[0])
    is_reused = trainer is not None and trainer.identity != tree.trainer

    def is_root(entry: ProcessEntry) -> bool:
        if entry.session == tree.trainer[0] and not is_reused:
            return True
        if entry.start_ticks < tree.trainer[1]:
            return False
        mark = mark_of(entry.pid)
        if mark == tree.mark:
            return True
        return entry.parent == tree.supervisor_pid and not tree.is_of_another(mark)

    found: dict[int, ProcessEntry] = {}

    def walk(entry: ProcessEntry) -> None:
        queue = [entry]
        for each in queue:
            if each.pid not in found and may_belong(each):
                found[each.pid] = each
                queue.extend(children[each.pid])

    if trainer is not None and not is_reused:
        walk(trainer)
    for entry in table.values():
        if entry.pid not in found and may_belong(entry) and is_root(entry):
            walk(entry)
    return list(found.values())


def end(
    tree: Tree,
    signum: int,
    *,
    timeout_seconds: float,
    spare: Collection[int] = (),
    group: AttemptGroup | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[int]:
    """Signal every member until none is left; return the process ids of those seen last.

    Each member gets the signal once, new ones as they appear. Members that were adopted are waited
    for here, the trainer is not. One look that finds nothing is proof: a process that escapes a
    look by forking and exiting leaves a zombie behind, and only we can remove it. A look that fails
    is none. Whoever is in the `group` is a member too, and is killed with it.
    """
    deadline = clock() + timeout_seconds
    pause = FIRST_PAUSE_SECONDS
    seen: set[Identity] = set()
    while True:
        if group is not None and signum == signal.SIGKILL:
            group.kill()
        try:
            found = _look(tree, spare, group)
        except OSError:  # no descriptor is free, for example: the trainer's own group needs none
            if signum == signal.SIGKILL:
                _kill_own_group(tree)
            if clock() >= deadline:
                return [tree.trainer[0]]
            time.sleep(LONGEST_PAUSE_SECONDS)
            continue
        running = [entry for entry in found if entry.alive]
        adopted = [
            entry
            for entry in found
            if entry.parent == tree.supervisor_pid and entry.identity != tree.trainer
        ]
        if not running and not adopted:
            return []
        new = [entry for entry in found if entry.identity not in seen]
        seen.update(entry.identity for entry in new)
        if signum == signal.SIGKILL:
            _kill_groups(new)
        for entry in new:
            if entry.alive:
                send_to(entry, signum)
        for entry in adopted:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, entry.pid, os.WEXITED | os.WNOHANG)
        if clock() >= deadline:
            return sorted({entry.pid for entry in (*running, *adopted)})
        if new:
            pause = FIRST_PAUSE_SECONDS
        else:  # all have been told; what remains is to die
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _look(tree: Tree, spare: Collection[int], group: AttemptGroup | None) -> list[ProcessEntry]:
    table = read_table()
    found = members(table, tree, spare=spare)
    known = {entry.pid for entry in found}
    inside = [] if group is None else group.pids()
    return [*found, *(table[pid] for pid in inside if pid in table and pid not in known)]


def _kill_own_group(tree: Tree) -> None:
    """The trainer leads its group, and has not been waited for: the number is its own."""
    pid = tree.trainer[0]
    if pid > 1 and pid != os.getpgrp():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def send_to(entry: ProcessEntry, signum: int) -> None:
    """Send a signal to this process, and to no other that may have its number by now."""
    with _pidfd(entry.pid) as handle:
        now = read_entry(entry.pid)
        if now is None or now.identity != entry.identity:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if handle is None:
                os.kill(entry.pid, signum)
            else:
                signal.pidfd_send_signal(handle, signum)


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int | None]:
    handle = open_pidfd(pid)
    try:
        yield handle
    finally:
        if handle is not None:
            os.close(handle)


def open_pidfd(pid: int) -> int | None:
    """A descriptor of the process, readable once it has ended; None where there are none.

    Linux has them since 5.3; container runtimes older than that refuse the call.
    """
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _kill_groups(entries: Collection[ProcessEntry]) -> None:
    """Kill whole process groups: no fork inside of a group escapes that, see fork(2), kill(2).

    A group is killed if one of its processes is still there, a zombie too, because that keeps its
    number from being used again. No member is in our session, so none of the groups can be ours;
    a mistake there would be our own end, so it is ruled out once more.
    """
    killed = {0, 1, os.getpgrp()}  # to kill(2), 0 is our own group, and -1 is everybody
    for entry in entries:
        now = read_entry(entry.pid) if entry.group not in killed else None
        if now is not None and (now.identity, now.group) == (entry.identity, entry.group):
            killed.add(entry.group)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(entry.group, signal.SIGKILL)
