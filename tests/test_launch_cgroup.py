"""A cgroup for one attempt: where one may be made, who is in it, and that it ends all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_until

from runner.launch.cgroup import AttemptGroup, own_group, remove_empty
from runner.launch.local import _has_a_supervisor
from runner.launch.process import TrainerProcess
from runner.launch.process_tree import mark_prefix, read_entry
from runner.supervisor.reaper import become_subreaper

PROGRAMS = Path(__file__).parent / "child_programs"

PURE = "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"
HYBRID = (
    "31 23 0:28 / {root} rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "35 31 0:32 / {root}/memory rw,relatime - cgroup cgroup rw,memory\n"
    "41 31 0:38 / {root}/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
)
HOSTS = "41 31 0:38 /docker/abc {root} rw,relatime - cgroup2 cgroup2 rw\n"

PLACES: dict[str, tuple[str, str, str | None]] = {
    # mounts, membership, and the folder below the root, None for none
    "a container with v2": (PURE.replace("/sys/fs/cgroup", "{root}"), "0::/\n", ""),
    "v1 and v2 side by side": (HYBRID, "4:memory:/x\n0::/\n", "unified"),
    "a service whose cgroup is systemd's": (
        PURE.replace("/sys/fs/cgroup", "{root}"),
        "0::/system.slice/a.service\n",
        None,
    ),
    "v1 alone": (HYBRID.splitlines()[1] + "\n", "4:memory:/x\n", None),
    "the host's hierarchy, seen from its middle": (HOSTS, "0::/\n", None),
    "nothing": ("", "", None),
}


@pytest.mark.parametrize(("mounts", "membership", "expected"), PLACES.values(), ids=PLACES)
def test_where_a_group_may_be_made(
    tmp_path: Path, mounts: str, membership: str, expected: str | None
) -> None:
    root = tmp_path / "cgroup"
    for folder in (root, root / "unified", root / "system.slice" / "a.service"):
        folder.mkdir(parents=True)
        (folder / "cgroup.procs").touch()
    (tmp_path / "mountinfo").write_text(mounts.format(root=root))
    (tmp_path / "membership").write_text(membership)

    found = own_group(tmp_path / "mountinfo", tmp_path / "membership")

    assert found == (None if expected is None else root / expected)


def test_a_group_that_systemd_has_left_to_us_may_be_divided(tmp_path: Path) -> None:
    folder = tmp_path / "user.slice"
    folder.mkdir()
    (folder / "cgroup.procs").touch()
    (tmp_path / "mountinfo").write_text(PURE.replace("/sys/fs/cgroup", str(tmp_path)))
    (tmp_path / "membership").write_text("0::/user.slice\n")
    assert own_group(tmp_path / "mountinfo", tmp_path / "membership") is None

    try:
        os.setxattr(folder, "user.delegate", b"1")
    except OSError:
        pytest.skip("this file system has no extended attributes")

    assert own_group(tmp_path / "mountinfo", tmp_path / "membership") == folder


def test_where_none_can_be_made_there_is_none(tmp_path: Path) -> None:
    assert AttemptGroup.make("1-2.3", None) is None
    assert AttemptGroup.make("1-2.3", tmp_path / "missing") is None
    assert AttemptGroup.make("1-2.3", tmp_path) is None, "it is no cgroup: there is no cgroup.kill"
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- with the kernel


@pytest.fixture
def groups() -> Iterator[Path]:
    parent = own_group()
    if parent is None:
        pytest.skip("no cgroup can be made here: that takes one that is left to us")
    before = set(parent.glob("runner-attempt-*"))
    probe = AttemptGroup.make("probe", parent)
    if probe is None:
        pytest.skip("this kernel has no cgroup.kill")
    probe.remove()
    yield parent
    ours = [
        p for p in set(parent.glob("runner-attempt-*")) - before if f"-{os.getpid()}-" in p.name
    ]
    assert ours == [], "a cgroup is left"


def start(groups: Path, folder: Path, *arguments: str) -> TrainerProcess:
    """Start a child program, and wait until it is ready."""
    assert become_subreaper()
    output = folder / "output"
    with output.open("wb") as file:
        trainer = TrainerProcess.start(
            [sys.executable, *arguments],
            cwd=folder,
            env=dict(os.environ),
            stdout=file.fileno(),
            groups=groups,
        )
    wait_until(lambda: "ready" in output.read_text(), what="it to be ready")
    return trainer


def alive(pid: int) -> bool:
    entry = read_entry(pid)
    return entry is not None and entry.alive


def group_of(pid: int) -> str:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line.removeprefix("0::") for line in lines if line.startswith("0::"))


def test_whatever_an_attempt_starts_is_in_its_group_and_ends_with_it(
    groups: Path, tmp_path: Path
) -> None:
    with start(groups, tmp_path, str(PROGRAMS / "starts_daemons.py"), "3") as trainer:
        lines = (tmp_path / "output").read_text().splitlines()
        daemons = [int(line.split()[1]) for line in lines if line.startswith("daemon")]
        assert len(daemons) == 3
        assert {group_of(pid) for pid in daemons} == {group_of(trainer.pid)}
        assert group_of(trainer.pid).rpartition("/")[2].startswith("runner-attempt-")
        assert group_of(os.getpid()) == "/" + str(groups.relative_to(mount_of(groups))).strip(".")

        assert trainer.kill_tree() == []

        assert not any(map(alive, [trainer.pid, *daemons]))
    assert trainer.poll() == -signal.SIGKILL


def mount_of(groups: Path) -> Path:
    return next(p for p in (groups, *groups.parents) if os.path.ismount(p))


HIDES = """
import os, signal
if os.fork() == 0:
    os.setsid()
    signal.pause()
print("ready", flush=True)
signal.pause()
"""


def test_the_group_finds_whom_the_process_table_does_not_tell(groups: Path, tmp_path: Path) -> None:
    """A stranger by all that the table says, which was put into the group."""
    stranger = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "waits.py")],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    with start(groups, tmp_path, "-c", HIDES) as trainer:
        folder = next(groups.glob(f"runner-attempt-{os.getpid()}-*"))
        (folder / "cgroup.procs").write_text(str(stranger.pid))

        trainer.kill_tree()

    stranger.wait(10)  # it ends by SIGKILL alone; 0 if `kill_tree` has waited for it already
    assert stranger.returncode in (-signal.SIGKILL, 0)


def test_groups_that_a_dead_supervisor_has_left_are_removed(groups: Path) -> None:
    left = AttemptGroup.make("left-behind", groups)
    assert left is not None
    (left.folder / "made-by-its-trainer").mkdir()
    beginning = AttemptGroup.make("just-beginning", groups)
    assert beginning is not None

    remove_empty(groups, spare=lambda mark: mark == "just-beginning")

    assert not left.folder.exists()
    assert beginning.folder.exists()
    beginning.remove()
    remove_empty(None, spare=lambda mark: False)


def test_only_marks_of_supervisors_that_live_are_spared() -> None:
    own = read_entry(os.getpid())
    assert own is not None
    dead = subprocess.Popen(["true"])
    entry = read_entry(dead.pid)
    dead.wait()
    assert entry is not None

    assert _has_a_supervisor(f"{mark_prefix(own)}.1")
    marks = (f"{mark_prefix(entry)}.1", f"{os.getpid()}-1.1", "left-behind", "²-1.1", "")
    assert not any(map(_has_a_supervisor, marks))
