"""A cgroup for one attempt, where one may be made: whatever is started in it is ended in one call.

It is there for what the process table does not tell: members are all that an attempt has started,
however they have hidden, and a kill reaches those too that are being forked at that moment. It has
no limits of its own, and what is used in it counts for the cgroup that it is made in. Source: the
kernel's admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

_PREFIX = "runner-attempt-"


class AttemptGroup:
    """One cgroup (v2) below our own. The trainer enters it before it executes its command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def make(cls, mark: str, parent: Path | None) -> AttemptGroup | None:
        """A new one for the attempt with this mark; None where there may be none."""
        if parent is None:
            return None
        folder = parent / f"{_PREFIX}{mark}"
        try:
            folder.mkdir()
        except OSError:  # read-only, or not ours
            return None
        group = cls(folder)
        if os.access(folder / "cgroup.kill", os.W_OK):  # since Linux 5.14
            return group
        group.remove()
        return None

    def pids(self) -> list[int]:
        """Who is in it, or in a cgroup below it."""
        return [pid for folder in self._folders() for pid in _pids(folder)]

    def kill(self) -> None:
        """SIGKILL to everybody in it at once, also to those that are being forked."""
        with contextlib.suppress(OSError):
            (self.folder / "cgroup.kill").write_text("1")

    def remove(self) -> None:
        """Nobody is in it any more. One that is not empty stays, and so do those above it."""
        for folder in reversed(list(self._folders())):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _folders(self) -> Iterator[Path]:
        """It, and those that the trainer has made below it, parents first."""
        for name, _, _ in os.walk(self.folder):
            yield Path(name)


def own_group(
    mounts: Path = Path("/proc/self/mountinfo"), membership: Path = Path("/proc/self/cgroup")
) -> Path | None:
    """The folder of the cgroup (v2) that this process is in, if others may be made in it.

    That is where we are at the root of what we see, as in a container, or where systemd has said
    that it is left to us: one cgroup has one manager.
    """
    try:
        path = next(
            line.removeprefix("0::")
            for line in membership.read_text().splitlines()
            if line.startswith("0::")
        )
        mount = _mount_point(mounts.read_text())
    except (OSError, StopIteration):
        return None
    if mount is None:
        return None
    folder = mount / path.lstrip("/")
    is_delegated = path == "/" or _has_note(folder, "user.delegate", "trusted.delegate")
    may_write = os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK)
    return folder if is_delegated and may_write else None


def remove_empty(parent: Path | None, spare: Callable[[str], bool]) -> None:
    """Remove what supervisors that were killed have left here, if nobody is in it.

    `spare` is asked by the mark of an attempt: one that is just beginning is not in its group yet.
    """
    for folder in [] if parent is None else parent.glob(f"{_PREFIX}*"):
        if not spare(folder.name.removeprefix(_PREFIX)):
            AttemptGroup(folder).remove()


def _mount_point(mountinfo: str) -> Path | None:
    """Where the root of cgroup v2, as we see it, is mounted. Source: proc_pid_mountinfo(5)."""
    for line in mountinfo.splitlines():
        place, _, kind = line.partition(" - ")
        fields = place.split()
        if kind.split()[:1] == ["cgroup2"] and fields[3] == "/":
            return Path(fields[4].replace("\\040", " "))
    return None


def _pids(folder: Path) -> list[int]:
    try:
        return [int(word) for word in (folder / "cgroup.procs").read_text().split()]
    except OSError:  # gone; or threaded, and then those above it have them
        return []


def _has_note(folder: Path, *names: str) -> bool:
    for name in names:
        with contextlib.suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False
