"""Supervised runs from outside: real processes, real signals, and the same bits in the end.

Every script is `trains.py` unless a test says otherwise. It prints each step it begins and waits
for a gate where it is told to, so that a signal meets it at an exact place.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from nodes import PROGRAMS, Node, Started, is_running, start
from waiting import wait_until

from runner.checkpoint.manifest import Manifest

STEPS = 24
TRAINS = str(PROGRAMS / "trains.py")


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


# ---------------------------------------------------------------- asked to end


def test_a_preemption_while_torch_is_imported_has_nothing_to_save(node: Node) -> None:
    job = node.training(params={"befalls": {"1": {"0": "import"}}}, preemption={"grace": "2s"})
    supervisor = start(node, job, "importing")

    supervisor.send_signal(signal.SIGTERM)

    assert supervisor.wait() == 75
    assert node.manifests() == []
    assert not is_running(supervisor.pids()[0])
    assert [(r.outcome, r.end_step) for r in node.records()] == [("preempted", 0)]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_first_moments_has_the_right_code(node: Node, signum: int) -> None:
    """Before anything is written, while the attempt is claimed, or when the trainer starts."""
    job = node.job("sleep", "60", preemption={"grace": "200ms"})
    supervisor = node.start("run", job)
    wait_until(lambda: listens(supervisor.pid, signal.SIGTERM), what="its handlers")

    supervisor.send_signal(signum)

    assert supervisor.wait() == {signal.SIGTERM: 75, signal.SIGINT: 130}[signal.Signals(signum)]
    node.keeps_spool = True  # an empty one may be left, for the next start


def listens(pid: int, signum: int) -> bool:
    """Whether a process has a handler for a signal, see proc_pid_status(5)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signum - 1) & 1)


def test_ctrl_c_is_obeyed_even_where_it_was_inherited_as_ignored(node: Node) -> None:
    job = node.training(params={"befalls": {"1": {"2": "wait"}}})
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for background jobs
    try:
        supervisor = node.start("run", job)
    finally:
        signal.signal(signal.SIGINT, before)
    supervisor.wait_for("step 2")

    ask(node, supervisor, signal.SIGINT)

    assert supervisor.wait() == 130
    assert node.newest().moment.step == 2


def test_sigterm_to_everybody_saves_and_leaves_nobody(node: Node) -> None:
    """As a terminal or a cluster sends it: to the supervisor's group, and to the trainer too."""
    params = {"befalls": {"1": {"5": "wait"}}, "workers": 2, "helpers": True}
    job = node.training(params=params)
    supervisor = start(node, job, "step 5")
    everybody = node.processes()
    trainer, *helpers = supervisor.pids()
    assert {supervisor.pid, trainer, *helpers} < set(everybody)
    assert len(everybody) == 6, "two of them are loader workers"

    os.kill(trainer, signal.SIGTERM)
    os.killpg(supervisor.pid, signal.SIGTERM)
    node.wait_until_asked()
    node.gate.touch()

    assert supervisor.wait() == 75
    assert (node.newest().moment.step, node.newest().moment.triggers) == (5, ("preemption",))
    assert not any(map(is_running, everybody))


# ---------------------------------------------------------------- a trainer that does not obey


def test_a_long_validation_costs_a_preemption_nothing(node: Node, undisturbed: str) -> None:
    job = node.training(params={"befalls": {"1": {"12": "validate"}}}, preemption={"grace": "4s"})
    supervisor = start(node, job, "validating")

    supervisor.send_signal(signal.SIGTERM)

    assert supervisor.wait() == 75
    moment = node.newest().moment
    assert (moment.step, moment.epoch, moment.triggers) == (12, 0, ("preemption",))
    (record,) = node.records()
    assert record.notice_to_durable_seconds is not None
    assert 1 <= record.notice_to_durable_seconds < 4, "a quarter of the grace, then the save"
    assert finish(node, job) == undisturbed


def test_a_frozen_trainer_is_saved_and_killed_in_time(node: Node) -> None:
    params = {"befalls": {"1": {"7": "freeze"}}, "workers": 2, "helpers": True}
    job = node.training(params=params, preemption={"grace": "4s"})
    supervisor = start(node, job, "step 7")
    wait_until(lambda: state_of(supervisor.pids()[0]) == "T", what="the trainer to freeze")
    everybody = node.processes()

    supervisor.send_signal(signal.SIGTERM)

    assert supervisor.wait(timeout=4) == 75
    assert (node.newest().moment.step, node.newest().moment.triggers) == (6, ("preemption",))
    assert not any(map(is_running, everybody))


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_second_ctrl_c_ends_it_at_once(node: Node) -> None:
    job = node.training(params={"befalls": {"1": {"3": "wait"}}})
    supervisor = start(node, job, "step 3")

    supervisor.send_signal(signal.SIGINT)
    node.wait_until_asked()
    supervisor.send_signal(signal.SIGINT)

    assert supervisor.wait(timeout=5) == 130
    assert node.manifests() == []
    node.keeps_spool = True  # the newest snapshot is still there, for a start on this node
    assert "interrupted twice" in supervisor.err


# ---------------------------------------------------------------- failures


def test_the_budget_of_failures_ends_with_70_whatever_the_code_was(node: Node) -> None:
    restart = {"failures": 2, "backoff": {"initial": "1ms", "max": "1ms"}}
    job = node.job("bash", "-c", "echo attempt $RUNNER_ATTEMPT; exit 9", restart=restart)

    done = node.run("run", job)

    assert done.code == 70
    assert done.out == "attempt 1\nattempt 2\nattempt 3\n"
    assert [(r.outcome, r.exit_code) for r in node.records()] == [("failed", 9)] * 3
    assert status(node)["phase"] == "failed"
    assert node.call("wait", "job").code == 70


def test_a_command_that_cannot_be_started_is_the_users_error(node: Node) -> None:
    """It was there when the job was checked, and is no program all the same."""
    script = node.folder / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)

    done = node.run("run", node.job("./script"))

    assert done.code == 2
    assert str(script) in done.err


def test_daemons_of_a_finished_trainer_are_not_left(node: Node) -> None:
    job = node.job("python", str(PROGRAMS / "starts_daemons.py"), "2", "0")

    done = node.run("run", job)

    daemons = [int(line.split()[1]) for line in done.out.splitlines() if "daemon" in line]
    assert (done.code, len(daemons)) == (0, 2)
    assert not any(map(is_running, daemons))


def test_a_home_that_cannot_be_written_does_not_stop_a_run(node: Node) -> None:
    (node.folder / "home").write_text("a file")

    done = node.run("run", node.job("echo", "hello"))

    assert (done.code, done.out) == (0, "hello\n")
    assert "not kept" in done.err


# ---------------------------------------------------------------- supervisors that die


def test_a_run_has_one_supervisor_on_a_machine(node: Node) -> None:
    job = node.job("sleep", "60", preemption={"grace": "2s"})
    supervisor = node.start("run", job)
    wait_until(lambda: node.spool().status() is not None, what="the supervisor")

    second = node.call("run", job)

    assert second.code == 2
    assert "is live" in second.err
    assert "runner stop job" in second.err
    assert len(node.records()) <= 1
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait() == 75


def test_a_supervisor_that_was_frozen_finds_itself_fenced_off(
    new_node: Callable[[str], Node], undisturbed: str
) -> None:
    older, newer = new_node("older"), new_node("newer")
    checkpoint = {"every": {"epochs": 1}, "snapshot_every": {"steps": 1}, "keep": {"last": 1}}
    befalls = {"1": {"4": "save", "7": "wait", "9": "save"}}
    params = {"befalls": befalls, "gate": str(older.gate)}
    frozen = start(older, older.training(params=params, checkpoint=checkpoint), "step 7")
    wait_until(lambda: older.records()[-1].saved_step == 4, what="the checkpoint of step 4")
    frozen.send_signal(signal.SIGSTOP)

    supervisor = newer.start("run", newer.training(params=params, checkpoint=checkpoint))
    assert supervisor.wait() == 0
    assert "ready at 4 in attempt 2" in supervisor.out
    before = content(newer.store_folder / "job" / "checkpoints")

    older.gate.touch()
    frozen.send_signal(signal.SIGCONT)

    assert frozen.wait() == 76
    assert "another supervisor" in frozen.err
    assert content(newer.store_folder / "job" / "checkpoints") == before
    assert newer.digest() == undisturbed
    assert newer.records()[-1].outcome == "succeeded"


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---------------------------------------------------------------- checkpoints that are damaged


def test_a_damaged_newest_checkpoint_is_passed_over(node: Node, undisturbed: str) -> None:
    befalls = {"1": {"4": "save", "8": "save", "10": "wait"}}
    job = node.training(params={"befalls": befalls})
    supervisor = start(node, job, "step 10")
    ask(node, supervisor, signal.SIGTERM)
    assert supervisor.wait() == 75
    assert [m.moment.step for m in node.manifests()] == [10, 8, 4]
    damaged = node.newest()
    flip_a_bit(node, damaged)

    assert finish(node, job) == undisturbed

    second = node.records()[1]
    assert (second.start_step, second.outcome) == (8, "succeeded")
    (note,) = (node.store_folder / "job" / "quarantine").iterdir()
    assert note.name == f"{damaged.name}.json"
    assert "model.safetensors" in json.loads(note.read_text())["reason"]
    assert (node.checkpoint(damaged) / "model.safetensors").exists(), "its files stay"


def flip_a_bit(node: Node, manifest: Manifest) -> None:
    path = node.checkpoint(manifest) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
