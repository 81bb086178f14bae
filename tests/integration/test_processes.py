"""Whatever stands between the supervisor and its trainer, and whatever happens to either of them.

Shells, forks and namespaces; streams that are closed; supervisors that are killed or frozen; loader
workers that are told to end. Real processes and real signals, and the same bits in the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import psutil
import pytest
from limits import LIMIT, MB, eater, limited_group, run_in
from nodes import PROGRAMS, RUNNER, Node, Started, has_noticed, is_running, start
from waiting import wait_until

from runner.launch.process_tree import read_table

STEPS = 24
TRAINS = str(PROGRAMS / "trains.py")
HEARS = str(PROGRAMS / "hears_signals.py")


def finish(node: Node, job: str) -> str:
    """Start it once more, to its end; the digest of what it ended with."""
    node.gate.touch()
    done = node.run("run", job)
    assert done.code == 0, done.err
    return node.digest()


# ---------------------------------------------------------------- what stands in between


@pytest.mark.parametrize("first", ["exec", "true;"])
def test_signals_reach_the_script_behind_a_shell(node: Node, first: str) -> None:
    """A shell would die of them: it is the process that has attached that is meant."""
    command = ["bash", "-c", f"{first} '{sys.executable}' '{HEARS}'; exit $?"]
    supervisor = start(node, node.job(*command), "ready")

    supervisor.send_signal(signal.SIGHUP)
    supervisor.wait_for("heard SIGHUP")
    supervisor.send_signal(signal.SIGUSR2)

    assert supervisor.wait() == 0, supervisor.err
    assert "heard SIGUSR2\nfinished\n" in supervisor.out
    assert len(node.records()) == 1


NEVER_TICKS = """
import sys
from runner import cli
from runner.supervisor import loop

loop._TICK_SECONDS = 3600.0
cli.main()
"""


def test_a_crash_is_heard_of_at_once_and_the_next_attempt_begins(node: Node) -> None:
    """Without the supervisor's ticks, which would find out both a moment later."""
    began = node.folder / "began"
    crashes = f"test -e {began} || {{ touch {began}; kill -SEGV $$; }}"
    # Late enough that no other child's end, such as git's, makes the supervisor look around then.
    pause = {"backoff": {"initial": "2s", "max": "2s"}}
    job = node.job("bash", "-c", crashes, restart=pause)

    done = subprocess.run(
        [sys.executable, "-c", NEVER_TICKS, "run", job],
        env={**os.environ, **node.environment},
        cwd=node.folder,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0
    assert [r.outcome for r in node.records()] == ["failed", "succeeded"]


ENDS_DURING_A_LOOK = """
import os, sys, threading
from pathlib import Path
from runner import cli
from runner.supervisor import loop
from runner.supervisor.trainer import Trainer

go, look, quiet = Path(sys.argv.pop()), Trainer.exit_code, []

def look_while_it_ends(self, now, board):
    code = look(self, now, board)
    if code is None and self._handle is not None:
        # Other children's ends would make it look again: git's, of which the queue is empty soon.
        if not any(thread.name == "provenance" for thread in threading.enumerate()):
            quiet.append(now)
        if len(quiet) < 10:
            return None
        loop._TICK_SECONDS = 3600.0
        go.touch()
        os.waitid(os.P_PID, self._handle.pid, os.WEXITED | os.WNOWAIT)
    return code

Trainer.exit_code = look_while_it_ends
cli.main()
"""


def test_a_trainer_that_ends_while_it_is_looked_at_is_looked_at_again(node: Node) -> None:
    """Its signal comes between that look and the next event, and there are no more ticks."""
    go = node.folder / "go"
    job = node.job("bash", "-c", f"until test -e {go}; do :; done; exit 9", restart={"failures": 0})

    done = subprocess.run(
        [sys.executable, "-c", ENDS_DURING_A_LOOK, "run", job, str(go)],
        env={**os.environ, **node.environment},
        cwd=node.folder,
        timeout=60,
        check=False,
    )

    assert done.returncode == 70
    assert [(r.outcome, r.exit_code) for r in node.records()] == [("failed", 9)]


FORKS = {
    "a shell that ends at once": ["bash", "-c", f"'{sys.executable}' '{TRAINS}' & exit 0"],
    "a shell that is replaced": ["bash", "-c", f"'{sys.executable}' '{TRAINS}'"],
    "a shell that waits": ["bash", "-c", f"'{sys.executable}' '{TRAINS}'; exit $?"],
    "a session of its own": ["bash", "-c", f"setsid -w '{sys.executable}' '{TRAINS}'"],
    "a group of its own": ["bash", "-mc", f"'{sys.executable}' '{TRAINS}' & wait $!"],
}


@pytest.mark.parametrize("command", FORKS.values(), ids=FORKS)
def test_the_attempt_lives_as_long_as_what_has_attached(
    node: Node, undisturbed: str, command: list[str]
) -> None:
    """Behind whatever the trainer is: a crash has its code, and a preemption saves its step."""
    befalls = {"1": {"5": "raise"}, "2": {"9": "wait"}}
    job = node.training(command=command, params={"befalls": befalls})
    supervisor = start(node, job, "step 9")

    supervisor.send_signal(signal.SIGTERM)
    node.wait_until_asked()
    node.gate.touch()

    assert supervisor.wait() == 75
    assert finish(node, job) == undisturbed
    assert [(r.start_step, r.end_step, r.outcome, r.exit_code) for r in node.records()] == [
        (0, 4, "failed", 1),
        (4, 9, "preempted", 75),
        (9, STEPS, "succeeded", 0),
    ]


def test_a_child_that_takes_over_before_it_attaches_is_waited_for(node: Node) -> None:
    job = node.job("python", HEARS, params={"fork": True, "count": 1})
    supervisor = start(node, job, "ready")

    supervisor.send_signal(signal.SIGUSR2)

    assert supervisor.wait() == 0, supervisor.err
    assert "finished" in supervisor.out
    assert [(r.outcome, r.exit_code) for r in node.records()] == [("succeeded", 0)]


def test_nothing_of_an_attempt_lives_when_the_next_one_starts(node: Node) -> None:
    befalls = {"1": {"3": "wait", "4": "kill"}, "2": {"0": "import"}}
    job = node.training(params={"befalls": befalls, "workers": 2, "helpers": True})
    supervisor = start(node, job, "step 3")
    everybody = [pid for pid in node.processes() if pid != supervisor.pid]
    assert len(everybody) == 5

    node.gate.touch()
    supervisor.wait_for("importing", times=2)

    assert not any(map(is_running, everybody))
    assert supervisor.wait() == 0


# ---------------------------------------------------------------- as PID 1


@pytest.fixture
def unshare() -> list[str]:
    """A command that runs another one as process 1 of a namespace of its own."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"]).returncode:
        pytest.skip("no namespace of processes can be made here: that takes root")
    return command


def inner(supervisor: Started) -> psutil.Process:
    """Process 1 of the namespace, as it is called outside."""
    children = wait_until(psutil.Process(supervisor.pid).children, what="process 1")
    assert isinstance(children[0], psutil.Process)
    return children[0]


def test_as_process_1_it_reaps_obeys_signals_and_leaves_nobody(
    node: Node, unshare: list[str], undisturbed: str
) -> None:
    orphans = f"for i in 1 2 3; do (setsid sleep 0.05 &) ; done; '{sys.executable}' '{TRAINS}'; :"
    params = {"befalls": {"1": {"5": "wait"}}, "workers": 2, "helpers": True}
    job = node.training(command=["bash", "-c", orphans], params=params)
    supervisor = node.start("run", job, before=unshare)
    supervisor.wait_for("step 5")
    first = inner(supervisor)
    everybody = [process.pid for process in first.children(recursive=True)]
    assert len(everybody) >= 6

    def zombies() -> list[psutil.Process]:
        children = first.children()
        return [child for child in children if child.status() == psutil.STATUS_ZOMBIE]

    wait_until(lambda: not zombies(), what="the orphans to be reaped")
    first.send_signal(signal.SIGTERM)
    node.wait_until_asked()
    node.gate.touch()

    assert supervisor.wait() == 75
    assert not any(map(is_running, everybody))
    assert (node.newest().moment.step, node.newest().moment.triggers) == (5, ("preemption",))
    assert finish(node, job) == undisturbed


# ---------------------------------------------------------------- its own streams


def test_a_log_whose_reader_is_gone_does_not_end_the_run(node: Node, undisturbed: str) -> None:
    """The supervisor goes on, what it says is lost, and its exit code is right."""
    befalls = {"1": {"5": "wait"}}
    job = node.training(params={"befalls": befalls})
    reader, writer = os.pipe()
    gone = node.folder / "gone"
    shell = f'exec "$@" >&{writer} 2>&{writer}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", RUNNER, "run", job],
        cwd=node.folder,
        env={**os.environ, **node.environment},
        pass_fds=[writer],
        start_new_session=True,
    )
    os.close(writer)
    printed = b""
    while b"step 2" not in printed:
        printed += os.read(reader, 1 << 16)
    os.close(reader)
    supervisor = Started(process, gone, gone)
    wait_until(lambda: node.board().step == 4, what="step 5")

    supervisor.send_signal(signal.SIGTERM)
    node.wait_until_asked()
    node.gate.touch()

    assert process.wait(60) == 75
    assert node.newest().moment.step == 5
    assert finish(node, job) == undisturbed
    log = node.call("logs", "job").out
    assert "step 5" in log, "what the trainer printed is kept all the same"


def test_streams_that_are_closed_are_not_mistaken_for_files(node: Node, undisturbed: str) -> None:
    job = node.training()
    supervisor = node.start("run", job, before=["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash"])

    assert supervisor.wait() == 0
    assert node.digest() == undisturbed
    assert node.call("checkpoints", "verify", "job").code == 0
    assert f"finished at {STEPS}" in node.call("logs", "job").out


# ---------------------------------------------------------------- a supervisor that dies


def test_without_a_boundary_the_newest_slot_has_to_do(node: Node, undisturbed: str) -> None:
    job = node.training(params={"befalls": {"1": {"7": "wait"}}})
    killed = start(node, job, "step 7")
    (trainer,) = killed.pids()

    killed.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_running(trainer), 20, "the trainer to leave without a boundary")

    assert finish(node, job) == undisturbed
    assert [r.start_step for r in node.records()] == [0, 6]


def test_a_supervisor_that_is_frozen_is_not_taken_for_dead(node: Node, undisturbed: str) -> None:
    """For longer than a dead one takes to be noticed."""
    job = node.training(params={"befalls": {"1": {"7": "wait"}}})
    supervisor = start(node, job, "step 7")
    (trainer,) = supervisor.pids()
    supervisor.send_signal(signal.SIGSTOP)
    frozen_ns = node.board().supervisor_ns
    wait_until(lambda: time.monotonic_ns() - frozen_ns > 4e9, what="four seconds to pass")

    assert not has_noticed(trainer)
    node.gate.touch()
    wait_until(lambda: node.board().step == STEPS, what="the trainer to go on")
    supervisor.send_signal(signal.SIGCONT)

    assert supervisor.wait() == 0
    assert node.digest() == undisturbed
    assert len(node.records()) == 1


# ---------------------------------------------------------------- loader workers


def workers_of(trainer: int) -> list[int]:
    return [child.pid for child in psutil.Process(trainer).children() if is_running(child.pid)]


def test_loader_workers_that_are_told_to_end_go_on(node: Node, undisturbed: str) -> None:
    job = node.training(params={"befalls": {"1": {"5": "wait"}}, "workers": 2})
    supervisor = start(node, job, "step 5")
    (trainer,) = supervisor.pids()
    workers = workers_of(trainer)
    assert len(workers) == 2

    for pid in [*workers, *workers]:
        os.kill(pid, signal.SIGTERM)
    node.gate.touch()

    assert supervisor.wait() == 0, supervisor.err
    assert node.digest() == undisturbed
    assert [(r.start_step, r.outcome) for r in node.records()] == [(0, "succeeded")]


def test_a_signal_to_every_single_process_loses_nothing(node: Node, undisturbed: str) -> None:
    """As clusters do that know no process groups: workers first."""
    job = node.training(params={"befalls": {"1": {"5": "wait"}}, "workers": 2})
    supervisor = start(node, job, "step 5")
    (trainer,) = supervisor.pids()

    for pid in [*workers_of(trainer), trainer, supervisor.pid]:
        os.kill(pid, signal.SIGTERM)
    node.wait_until_asked()
    node.gate.touch()

    assert supervisor.wait() == 75
    assert node.newest().moment.step == 5
    assert finish(node, job) == undisturbed
    assert [r.outcome for r in node.records()] == ["preempted", "succeeded"]


def test_a_trainer_that_crashes_does_not_wait_for_its_workers(node: Node) -> None:
    """The interpreter ends them by SIGTERM, and waits: they have to obey that one."""
    params = {"befalls": {"1": {"5": "raise"}}, "workers": 2}
    job = node.training(params=params, restart={"failures": 0})

    done = node.run("run", job)

    assert done.code == 70
    (record,) = node.records()
    assert (record.end_step, record.exit_code) == (4, 1)


# ---------------------------------------------------------------- memory that runs out


def test_the_memory_guard_saves_and_ends_the_trainer_first(node: Node) -> None:
    """Each step takes a little more, as a leak does: no step is lost, and nobody is killed."""
    job = eater(node, "on", eats={"1": [5, 4 * MB]}, at_first=450 * MB, steps=120)
    with limited_group(LIMIT) as group:
        supervisor = run_in(group, node, job)
        assert supervisor.wait() == 0, supervisor.err
        assert kills_in(group) == 0

    first, second = node.records()
    assert first.cause is not None
    assert first.cause.startswith("memory: used 8")
    assert first.cause.endswith("of 900 MB")
    assert (first.outcome, first.exit_code) == ("failed", 75)
    assert (second.outcome, second.start_step) == ("succeeded", first.end_step)
    assert "asked to save and to leave" in supervisor.err


def test_the_memory_guard_kills_a_trainer_that_comes_to_no_boundary(node: Node) -> None:
    job = eater(node, "60%", eats={"1": [5, 10 * MB]}, at_once=80, steps=20)
    with limited_group(LIMIT) as group:
        supervisor = run_in(group, node, job)
        assert supervisor.wait() == 0, supervisor.err
        assert kills_in(group) == 0

    first, second = node.records()
    assert str(first.cause).startswith("memory: used")
    assert (first.exit_code, second.start_step) == (-9, 5)
    assert "its newest snapshot stays" in supervisor.err


def test_the_memory_guard_is_not_moved_by_page_cache_or_slots(node: Node) -> None:
    """Each step reads a file twice for which there is no room beside slots of a quarter of it."""
    job = eater(node, "80%", cache=600 * MB, steps=4, state_floats=30_000_000)
    with limited_group(LIMIT) as group:
        supervisor = run_in(group, node, job)
        assert supervisor.wait() == 0, supervisor.err
        peaks = [group / name for name in ("memory.peak", "memory.max_usage_in_bytes")]
        peak = next(int(path.read_text()) for path in peaks if path.exists())
        assert peak > 0.95 * LIMIT, "the kernel had to drop some of the cache"

    assert [(r.outcome, r.cause) for r in node.records()] == [("succeeded", "finished")]


def kills_in(group: Path) -> int:
    names = ("memory.events", "memory.oom_control")
    text = next((group / name).read_text() for name in names if (group / name).exists())
    return int(dict(line.split() for line in text.splitlines())["oom_kill"])


# ---------------------------------------------------------------- other things that run out


def test_a_supervisor_without_free_descriptors_goes_on_when_it_has_some(
    node: Node, undisturbed: str
) -> None:
    """Meanwhile nobody is thought dead because nothing can be opened."""
    befalls = {"1": {"5": "wait", "6": "kill"}}
    job = node.training(params={"befalls": befalls, "workers": 2, "helpers": True})
    supervisor = start(node, job, "step 5")
    trainer, *helpers = supervisor.pids()
    before = resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE, (0, before[1]))
    node.gate.touch()
    wait_until(lambda: not is_running(trainer), what="the trainer to be killed")

    looks = psutil.Process(supervisor.pid).num_ctx_switches().voluntary + 100
    wait_until(
        lambda: psutil.Process(supervisor.pid).num_ctx_switches().voluntary > looks,
        what="the supervisor to look, and to fail at it",
    )
    assert all(map(is_running, helpers))
    assert [r.outcome for r in node.records()] == [None]
    resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE, before)

    assert supervisor.wait() == 0, supervisor.err
    assert not any(map(is_running, helpers))
    assert node.digest() == undisturbed


def test_a_spool_that_somebody_fills_costs_no_result(node: Node, undisturbed: str) -> None:
    """The run ends well with its last state, or it is given up and goes on when there is room."""
    mounted = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(node.memory)]
    if os.geteuid() != 0 or subprocess.run(mounted).returncode:
        pytest.skip("no small tmpfs can be mounted here: that takes root")
    try:
        job = node.training(params={"befalls": {"1": {"5": "wait", "9": "save"}}})
        supervisor = start(node, job, "step 5")
        with (node.memory / "filler").open("wb", buffering=0) as filler:
            fill(filler)
            node.gate.touch()
            while supervisor.process.poll() is None:
                fill(filler)  # whatever becomes free is taken
        (node.memory / "filler").unlink()

        assert supervisor.wait() in (0, 70), supervisor.err
        assert finish(node, job) == undisturbed
    finally:
        subprocess.run(["umount", "-l", str(node.memory)], check=True)


def fill(file: IO[bytes]) -> None:
    """Write until there is no room."""
    with contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_every_process_is_gone_from_the_table_in_the_end(node: Node) -> None:
    """No zombie of a run is left to anybody else."""
    job = node.training(params={"workers": 2, "helpers": True})
    done = node.run("run", job)

    assert done.code == 0
    pids = {int(line.split()[-1]) for line in done.out.splitlines() if " process " in line}
    assert not pids & read_table().keys()
    assert json.loads((node.store_folder / "job" / "outputs" / "metrics.json").read_text())
