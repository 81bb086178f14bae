"""The same runs whatever the trainer runs in: a process of this machine, or a container.

Real supervisors, signals and an engine; every case is run with both launchers, and ends with the
same bits. Some are run with Podman, too, where that is. Scripts are `trains.py` unless a test says
otherwise.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from limits import MB, eater, limited_group, run_in
from nodes import PROGRAMS, Node, Started, has_noticed, is_running, start
from waiting import wait_until

STEPS = 24
TRAINS = str(PROGRAMS / "trains.py")
ENGINES = {"docker": "engine", "podman": "podman"}
"""The fixtures that are engines, by what they run as."""


@pytest.fixture(params=["process", "docker"])
def node(request: pytest.FixtureRequest, new_node: Callable[[str], Node]) -> Node:
    """A machine whose trainers are processes, and one where they are containers."""
    node = new_node("node")
    if request.param != "process":
        node.use(request.getfixturevalue(ENGINES[request.param]))
    return node


with_podman = pytest.mark.parametrize("node", ["process", *ENGINES], indirect=True)


def ask(node: Node, supervisor: Started, signum: int) -> None:
    """Send a signal to a supervisor, and open the gate when the trainer has been asked."""
    supervisor.send_signal(signum)
    node.wait_until_asked()
    node.gate.touch()


def status(node: Node, run_id: str = "job") -> dict[str, object]:
    document = node.call("status", run_id, "-o", "json").json
    assert isinstance(document, dict)
    return document


def finish(node: Node, job: str) -> str:
    """Start it once more, to its end; the digest of what it ended with."""
    node.gate.touch()
    done = node.run("run", job)
    assert done.code == 0, done.err
    assert f"finished at {STEPS}" in done.out
    return node.digest()


@with_podman
def test_whatever_asks_a_run_to_end_it_goes_on_exactly(node: Node, undisturbed: str) -> None:
    """SIGTERM, Ctrl-C and `runner stop`, one after the other, each in the middle of a step."""
    befalls = {"1": {"5": "wait"}, "2": {"9": "wait"}, "3": {"14": "wait"}}
    job = node.training(params={"befalls": befalls})

    supervisor = start(node, job, "step 5")
    ask(node, supervisor, signal.SIGTERM)
    assert supervisor.wait() == 75
    assert (node.newest().moment.step, node.newest().moment.triggers) == (5, ("preemption",))
    assert node.spools() == []

    node.gate.unlink()
    supervisor = start(node, job, "step 9")
    ask(node, supervisor, signal.SIGINT)
    assert supervisor.wait() == 130
    assert (node.newest().moment.step, node.newest().moment.triggers) == (9, ("interrupt",))

    node.gate.unlink()
    supervisor = start(node, job, "step 14")
    stopping = node.start("stop", "job")
    node.wait_until_asked()
    node.gate.touch()
    assert stopping.wait() == 0
    assert stopping.out == "stopped at step 14, saved at step 14\n"
    assert supervisor.wait() == 130
    assert (node.newest().moment.step, node.newest().moment.triggers) == (14, ("interrupt",))

    assert finish(node, job) == undisturbed

    outcomes = [(r.start_step, r.outcome, r.end_step) for r in node.records()]
    assert outcomes == [
        (0, "preempted", 5),
        (5, "interrupted", 9),
        (9, "stopped", 14),
        (14, "succeeded", STEPS),
    ]
    assert all(r.notice_to_durable_seconds is not None for r in node.records()[:3])
    again = node.call("run", job)
    assert (again.code, again.out) == (0, "")
    assert "finished" in again.err


def test_sigusr1_makes_a_checkpoint_and_training_goes_on(node: Node) -> None:
    job = node.training(params={"befalls": {"1": {"5": "wait"}}, "epochs": 1})
    secrets = {"AWS_SECRET_ACCESS_KEY": "a-secret", "GOOGLE_API_KEY": "another-secret"}
    supervisor = start(node, job, "step 5", **secrets)

    assert status(node)["phase"] == "running"
    environment = Path(f"/proc/{node.pid_here(supervisor.pids()[0])}/environ").read_bytes()
    assert b"RUNNER_SPOOL=" in environment
    assert b"secret" not in environment
    supervisor.send_signal(signal.SIGRTMIN)
    wait_until(lambda: "in wait_at_gate" in supervisor.err, what="the trainer's stacks")
    ask(node, supervisor, signal.SIGUSR1)

    assert supervisor.wait() == 0
    saved = [(m.moment.step, m.moment.triggers) for m in node.manifests()]
    assert saved == [(12, ("final",)), (5, ("manual",))]
    assert len(node.records()) == 1
    log = node.call("logs", "job").out
    assert [line for line in log.splitlines() if line and line in supervisor.out] == (
        supervisor.out.splitlines()
    )


@with_podman
def test_a_killed_or_crashed_trainer_goes_on_with_its_newest_snapshot(
    node: Node, undisturbed: str
) -> None:
    befalls = {"1": {"5": "kill"}, "2": {"9": "raise"}}
    job = node.training(params={"befalls": befalls, "workers": 2, "helpers": True})

    done = node.run("run", job)

    assert done.code == 0
    assert node.digest() == undisturbed
    attempts = [(r.start_step, r.end_step, r.outcome, r.exit_code) for r in node.records()]
    assert attempts == [
        (0, 4, "failed", -9),
        (4, 8, "failed", 1),
        (8, STEPS, "succeeded", 0),
    ]
    assert node.records()[0].cause == "the trainer was killed by SIGKILL"
    log = node.call("logs", "job").out
    assert "RuntimeError: raised on purpose" in log
    assert [line for line in log.splitlines() if line.startswith("ready")] == [
        "ready at 0 in attempt 1",
        "ready at 4 in attempt 2",
        "ready at 8 in attempt 3",
    ]


def test_without_slots_in_memory_saves_go_through_one_on_the_disk(
    node: Node, undisturbed: str
) -> None:
    job = node.training(
        params={"befalls": {"1": {"6": "wait", "7": "kill"}, "2": {"9": "wait"}}},
        checkpoint={"slots": 0, "every": {"steps": 4}},
    )
    supervisor = start(node, job, "step 6")
    wait_until(node.manifests, what="the save at step 4")
    node.gate.touch()
    supervisor.wait_for("importing", times=2)
    node.gate.unlink()
    supervisor.wait_for("step 9")
    (slot,) = [path for path in node.folder.parent.rglob(".slots/*") if path.is_file()]
    in_memory = [path for path in node.memory.rglob("slot-*") if path.suffix != ".json"]
    assert [path.resolve() for path in in_memory] == [slot.resolve()]
    ask(node, supervisor, signal.SIGTERM)

    assert supervisor.wait() == 75
    assert [(r.start_step, r.end_step, r.outcome) for r in node.records()] == [
        (0, 6, "failed"),
        (4, 9, "preempted"),
    ]
    assert not slot.exists()
    assert finish(node, job) == undisturbed


@with_podman
def test_a_hung_trainer_behind_a_shell_shows_its_stacks_and_is_started_again(
    node: Node, undisturbed: str
) -> None:
    job = node.training(
        command=["bash", "-c", f"python3 -c pass; '{node.python}' '{TRAINS}'; exit $?"],
        params={"befalls": {"1": {"5": "hang"}, "2": {"11": "wait"}}},
        restart={"hang_timeout": "9s", "backoff": {"initial": "1ms", "max": "1ms"}},
    )
    supervisor = start(node, job, "step 11")
    ask(node, supervisor, signal.SIGTERM)

    assert supervisor.wait() == 75
    assert [(r.outcome, r.cause) for r in node.records()] == [
        ("failed", "hang"),
        ("preempted", "preemption (SIGTERM)"),
    ]
    log = node.call("logs", "job").out
    assert "in hang_for_ever" in log
    assert log.index("step 5") < log.index("in hang_for_ever") < log.index("in attempt 2")
    assert finish(node, job) == undisturbed


@pytest.mark.parametrize(("command", "code"), [("exit 2", 2), ("exit 0", 0)])
def test_some_codes_end_it_at_once(node: Node, command: str, code: int) -> None:
    done = node.run("run", node.job("bash", "-c", command))

    assert done.code == code
    assert [r.exit_code for r in node.records()] == [code]
    assert node.call("wait", "job").code == code


@with_podman
def test_signals_for_the_script_reach_it_and_nothing_else_does(node: Node) -> None:
    job = node.job("python", str(PROGRAMS / "counts_signals.py"), preemption={"grace": "2s"})
    supervisor = start(node, job, "trainer ready")
    supervisor.wait_for("worker ready")

    supervisor.send_signal(signal.SIGHUP)
    supervisor.wait_for("trainer SIGHUP")
    supervisor.send_signal(signal.SIGUSR2)
    supervisor.wait_for("trainer SIGUSR2")
    supervisor.send_signal(signal.SIGRTMIN)  # would be its end: it has never attached
    supervisor.wait_for("runner: the trainer has not attached", where="err")
    supervisor.send_signal(signal.SIGTERM)

    assert supervisor.wait() == 75
    told = [line for line in supervisor.out.splitlines() if "SIG" in line]
    assert told == ["trainer SIGHUP", "trainer SIGUSR2"]
    assert [record.outcome for record in node.records()] == ["preempted"]


@with_podman
def test_what_a_killed_supervisor_left_is_ended_and_continued(node: Node, undisturbed: str) -> None:
    params = {"befalls": {"1": {"7": "wait"}}, "workers": 2, "helpers": True}
    job = node.training(params=params)
    killed = start(node, job, "step 7")
    orphans = node.trainers(killed)
    assert len(orphans) == (5 if node.docker is None else 1)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -9
    assert node.trainers(killed) == orphans
    assert status(node)["phase"] == "lost"

    supervisor = start(node, job, "importing")

    left = set(orphans) & {*node.trainers(supervisor), *node.containers()}
    assert not left, "nothing of them is there when the next one starts"
    assert supervisor.wait() == 0
    assert "in this node's memory" in supervisor.err, supervisor.err
    assert "step 6" not in supervisor.out.splitlines(), "no step is lost but the one at hand"
    assert node.digest() == undisturbed
    assert [(r.start_step, r.outcome) for r in node.records()] == [(0, None), (6, "succeeded")]


def test_a_trainer_whose_supervisor_is_killed_saves_and_leaves(
    node: Node, undisturbed: str
) -> None:
    params = {"befalls": {"1": {"7": "wait"}}, "workers": 2}
    command = ["bash", "-c", f"'{node.python}' '{TRAINS}'; exit $?"]
    job = node.training(command=command, params=params)
    killed = start(node, job, "step 7")
    trainer = node.pid_here(killed.pids()[0])

    killed.send_signal(signal.SIGKILL)
    begun = time.monotonic()
    wait_until(lambda: has_noticed(trainer), 5, "the trainer to notice within 5 s")
    node.gate.touch()
    wait_until(lambda: not is_running(trainer), 5, "the trainer to leave at its next boundary")

    assert time.monotonic() - begun < 7
    assert killed.wait() == -9
    wait_until(lambda: not node.trainers(killed), 15, "its workers to end too")
    assert finish(node, job) == undisturbed
    assert [(r.start_step, r.outcome) for r in node.records()] == [(0, None), (7, "succeeded")]


@contextlib.contextmanager
def limited(node: Node, job: str, nbytes: int) -> Iterator[Started]:
    """A supervisor whose trainer has so much memory: in its own cgroup, or by the job's limit."""
    if node.docker is not None:
        yield node.start("run", job)
        return
    with limited_group(nbytes) as group:
        yield run_in(group, node, job)


def test_a_kill_for_want_of_memory_is_named_with_its_limit(node: Node) -> None:
    limit = 900 * MB
    memory = {} if node.docker is None else {"memory": "900M"}
    job = eater(node, "off", memory, eats={"1": [5, 200 * MB]})
    with limited(node, job, limit) as supervisor:
        assert supervisor.wait() == 0, supervisor.err

    first, second = node.records()
    assert (first.outcome, first.cause, first.exit_code) == ("failed", "out of memory", -9)
    assert second.outcome == "succeeded"
    (line,) = [line for line in supervisor.err.splitlines() if "want of memory" in line]
    assert "900 MB" in line
