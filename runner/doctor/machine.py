"""What the machine has for a job: its command, the memory for slots, GPUs, a metadata service."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from runner.doctor.finding import Finding, fail, ok, size_text, warn
from runner.errors import JobError, RunnerError
from runner.job import Job, check_launchable, resolved_command
from runner.launch.site import Site
from runner.memory import available_bytes, slots_that_fit
from runner.notices import problem_of
from runner.spool import spool_path
from runner.supervisor.index import SPOOL_ROOT_VARIABLE, files_of
from runner.supervisor.preflight import check_entrypoint

_NVIDIA_SECONDS = 20.0
_NVIDIA_QUERY = "name,driver_version,memory.total"


def command(job: Job) -> Iterator[Finding]:
    """The program is there, and so is what Python is given; nothing is started or imported."""
    try:
        check_launchable(job)
    except JobError as error:
        yield from (fail("command", problem) for problem in error.problems)
        return
    yield ok("command", f"{resolved_command(job)[0]} in {job.workdir}")


def validation(job: Job, site: Site) -> Iterator[Finding]:
    """The function that is to validate is there and can be called; it is imported elsewhere."""
    wanted = job.checkpoint.validation
    if wanted is None:
        return
    try:
        check_entrypoint(job, site)
    except RunnerError as error:
        yield fail("validation", str(error))
    else:
        yield ok("validation", f"{wanted.entrypoint} can be called")


def spool(job: Job, run_id: str, store_url: str) -> Iterator[Finding]:
    """The folder for the spool can be written, and lies in memory."""
    folder = spool_path(run_id, store_url, os.environ.get(SPOOL_ROOT_VARIABLE)).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        problem = "is not a directory" if not folder.is_dir() else "cannot be written"
        remedy = f"mount a memory-backed folder, and name it in {SPOOL_ROOT_VARIABLE}"
        yield fail("spool", f"{folder} {problem}", remedy)
        return
    kind = file_system_of(folder)
    if kind in ("tmpfs", "ramfs"):
        yield ok("spool", f"{folder} is on {kind}")
    else:
        yield warn(
            "spool",
            f"{folder} is on {kind or 'a file system that is not in memory'}",
            f"snapshots are faster in memory: name a tmpfs in {SPOOL_ROOT_VARIABLE}",
        )


def memory(job: Job, run_id: str, store_url: str, state_bytes: int | None) -> Iterator[Finding]:
    """There is memory for the slots, or room on the disk for the one that goes there."""
    folder = spool_path(run_id, store_url, os.environ.get(SPOOL_ROOT_VARIABLE)).parent
    if not folder.is_dir():
        return
    available, wanted = available_bytes(folder), job.checkpoint.slots
    room = f"{size_text(available)} can be held in {folder}"
    if state_bytes is None:
        limit = (
            ""
            if wanted == 0
            else f", enough for {wanted} slots of {size_text(0.9 * available / wanted)}"
        )
        yield ok("memory", f"{room}{limit}; the state's size is not known before the first save")
        return
    fitting = slots_that_fit(wanted, state_bytes, available)
    needed = f"{wanted} slots of {size_text(state_bytes)}"
    if fitting and fitting == wanted:
        yield ok("memory", f"{room}; {needed} fit")
    elif fitting:
        yield warn("memory", f"{room}; of {needed} there is room for {fitting}", "use fewer slots")
    else:
        yield _slot_on_disk(
            files_of(run_id, store_url), state_bytes, room if wanted else "slots: 0"
        )


def gpu() -> Iterator[Finding]:
    """The GPUs and their driver, as nvidia-smi tells. torch is not asked: it takes long to load."""
    program = shutil.which("nvidia-smi")
    if program is None:
        yield warn("gpu", "no GPU seen (nvidia-smi is not there)", "fine for a job on the CPU")
        return
    arguments = [program, f"--query-gpu={_NVIDIA_QUERY}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(
            arguments, capture_output=True, text=True, timeout=_NVIDIA_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield fail(
            "gpu", f"nvidia-smi gives no answer ({type(error).__name__})", "check the driver"
        )
        return
    rows = [line.split(", ") for line in asked.stdout.splitlines() if line.count(", ") == 2]
    if asked.returncode or not rows:
        said = " ".join((asked.stdout + asked.stderr).split())[:200]
        yield warn("gpu", f"no GPU seen; nvidia-smi says: {said}", "fine for a job on the CPU")
        return
    names = [
        f"{name} ({int(mebibytes) / 1024:.0f} GiB)" if mebibytes.isdigit() else name
        for name, _, mebibytes in rows
    ]
    listed = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    yield ok("gpu", f"{listed}, driver {rows[0][1]}")


def notices(job: Job) -> Finding:
    """Each cloud that is to tell of preemptions is asked once whether it does."""
    clouds = job.preemption.notices
    if not clouds:
        return ok("notices", "SIGTERM alone tells of a preemption")
    problems = [f"{cloud}: {problem}" for cloud in clouds if (problem := problem_of(cloud))]
    if problems:
        remedy = "ask from a node of that cloud, or correct preemption.notices"
        return warn("notices", "; ".join(problems), remedy)
    return ok("notices", f"the metadata service of {' and '.join(clouds)} answers")


def _slot_on_disk(folder: Path, state_bytes: int, why: str) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    facts = f"{why}; a snapshot of {size_text(state_bytes)} goes to the disk at {there}"
    if free < state_bytes:
        return fail("memory", f"{facts}, which has {size_text(free)} free", "make room")
    return warn("memory", facts, "saves are slower there; more memory would help")


def file_system_of(folder: Path) -> str | None:
    """Its type, from the longest mount point above it. Source: proc_pid_mountinfo(5)."""
    real, best = folder.resolve(), (-1, "")
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        before, _, after = line.partition(" - ")
        mounted = Path(before.split()[4].encode().decode("unicode_escape"))
        if mounted in (real, *real.parents):
            best = max(best, (len(mounted.parts), after.split()[0]))
    return best[1] or None
