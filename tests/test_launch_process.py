from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import psutil
import pytest
from waiting import wait_until

from runner.errors import UsageError
from runner.launch import process_tree
from runner.launch.process import UNKNOWN_EXIT, TrainerProcess, build_environment
from runner.launch.process_tree import (
    MARK_VARIABLE,
    ProcessEntry,
    Tree,
    members,
    read_entry,
    read_mark,
    read_table,
    send_to,
)
from runner.supervisor.reaper import PR_SET_CHILD_SUBREAPER, become_subreaper, reap_orphans

PROGRAMS = Path(__file__).parent / "child_programs"
WAITS = [sys.executable, str(PROGRAMS / "waits.py")]


class Trainers:
    """Starts child programs as trainers; `output` is what they have printed so far."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.started: list[TrainerProcess] = []
        self._outputs: dict[int, Path] = {}

    def start(
        self, *command: str, env: dict[str, str] | None = None, ready: bool = True
    ) -> TrainerProcess:
        program = [*command]
        if program[0].endswith(".py"):
            program = [sys.executable, str(PROGRAMS / program[0]), *program[1:]]
        path = self._folder / f"output-{len(self.started)}"
        with path.open("wb") as file:
            trainer = TrainerProcess.start(
                program,
                cwd=self._folder,
                env=dict(os.environ) if env is None else env,
                stdout=file.fileno(),
                stderr=file.fileno(),
            )
        self.started.append(trainer)
        self._outputs[trainer.pid] = path
        if ready:
            self.wait_for(trainer, "ready")
        return trainer

    def wait_for(self, trainer: TrainerProcess, text: str, times: int = 1) -> None:
        wait_until(
            lambda: self.output(trainer).count(text) == times, what=f"{times} times {text!r}"
        )

    def output(self, trainer: TrainerProcess) -> str:
        return self._outputs[trainer.pid].read_text()

    def daemons(self, trainer: TrainerProcess) -> list[int]:
        lines = [line.split() for line in self.output(trainer).splitlines()]
        return [int(words[1]) for words in lines if words[0] == "daemon"]


@pytest.fixture
def subreaper() -> Iterator[None]:
    assert become_subreaper()
    yield
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, *[ctypes.c_ulong(0)] * 4)


@pytest.fixture
def trainers(tmp_path: Path, subreaper: None) -> Iterator[Trainers]:
    all_of_them = Trainers(tmp_path)
    yield all_of_them
    for trainer in all_of_them.started:
        trainer.kill_tree()
        trainer.close()
    reap_orphans(())


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def exit_code(trainer: TrainerProcess) -> int:
    """Wait for the end of the trainer, reaping all the time as the supervisor's loop would."""

    def ended() -> list[int]:
        reap_orphans([trainer.pid])
        code = trainer.poll()
        return [] if code is None else [code]

    return wait_until(ended, what="the trainer to end")[0]


def family(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


# ---------------------------------------------------------------- what the trainer gets


def test_credentials_stay_with_the_supervisor_and_everything_else_is_handed_down() -> None:
    kept = {"PATH": "/bin", "AWS_REGION": "eu-west-1", "HF_TOKEN": "tracker's", "LANG": "C"}
    secret = {
        "AWS_ACCESS_KEY_ID": "1",
        "AWS_SECRET_ACCESS_KEY": "2",
        "AWS_SESSION_TOKEN": "3",
        "AWS_PROFILE": "4",
        "AWS_SHARED_CREDENTIALS_FILE": "5",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "6",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "7",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": "8",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": "9",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "10",
        "GOOGLE_APPLICATION_CREDENTIALS": "11",
        "AZURE_CLIENT_SECRET": "12",
        "AZURE_STORAGE_CONNECTION_STRING": "13",
    }
    own = {"RUNNER_RUN_ID": "rul"}

    assert build_environment({**kept, **secret}, own, {}) == {**kept, **own}
    passed = build_environment({**kept, **secret}, own, {}, pass_credentials=True)
    assert passed == {**kept, **secret, **own}


def test_the_job_overrides_what_is_inherited_but_not_what_the_runner_says() -> None:
    environment = build_environment(
        {"LANG": "C", "RUNNER_SPOOL": "/of/an/outer/run"},
        {"RUNNER_RUN_ID": "rul", "RUNNER_ATTEMPT": "3"},
        {"LANG": "de_DE", "AWS_PROFILE": "meant", "RUNNER_ATTEMPT": "99", "RUNNER_X": "y"},
    )

    assert environment == {
        "LANG": "de_DE",
        "AWS_PROFILE": "meant",
        "RUNNER_RUN_ID": "rul",
        "RUNNER_ATTEMPT": "3",
    }


def test_no_credentials_are_in_the_environment_of_a_real_child(
    trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-value")
    trainer = trainers.start("waits.py", env=build_environment(os.environ, {"RUNNER_X": "1"}, {}))

    environment = Path(f"/proc/{trainer.pid}/environ").read_bytes()

    assert b"RUNNER_X=1" in environment.split(b"\0")
    assert b"a-secret-value" not in environment


def test_the_environment_is_the_one_given_and_the_mark_of_the_tree(trainers: Trainers) -> None:
    trainer = trainers.start("cat", "/proc/self/environ", env={"ONLY": "this"}, ready=False)

    assert exit_code(trainer) == 0
    names = [entry.partition("=")[0] for entry in trainers.output(trainer).split("\0") if entry]
    assert sorted(names) == sorted(["ONLY", MARK_VARIABLE])


@pytest.mark.parametrize("env", [{}, {"A": "b"}, {f"X{MARK_VARIABLE}": "another"}], ids=str)
def test_the_mark_is_found_wherever_it_stands(trainers: Trainers, env: dict[str, str]) -> None:
    mark = read_mark(trainers.start("waits.py", env=env).pid)

    assert mark is not None
    assert mark.startswith(f"{os.getpid()}-")


def test_the_trainer_leads_a_session_of_its_own_with_nothing_open_but_its_output(
    trainers: Trainers,
) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    stdin = os.dup(0)
    os.dup2(reader, 0)
    try:
        trainer = trainers.start("waits.py")
        files = {file.name: file.readlink() for file in Path(f"/proc/{trainer.pid}/fd").iterdir()}
    finally:
        os.dup2(stdin, 0)
        for descriptor in (stdin, reader, writer):
            os.close(descriptor)

    assert os.getsid(trainer.pid) == os.getpgid(trainer.pid) == trainer.pid
    assert sorted(files) == ["0", "1", "2"]
    assert files["0"] == Path("/dev/null")


def test_arguments_pass_no_shell(trainers: Trainers) -> None:
    trainer = trainers.start("printf", "%s|", "$HOME", "a b", "*", "; exit 4", "-c", ready=False)

    assert exit_code(trainer) == 0
    assert trainers.output(trainer) == "$HOME|a b|*|; exit 4|-c|"


@pytest.mark.parametrize(
    "command", [["no-such-program"], ["./no-such-file"], ["/etc/hostname"], ["/etc"], []]
)
def test_a_command_that_cannot_be_executed_is_the_users_error(
    command: list[str], tmp_path: Path
) -> None:
    before = psutil.Process().children()

    with pytest.raises(UsageError, match=command[0] if command else "empty"):
        TrainerProcess.start(command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})

    assert psutil.Process().children() == before


def test_a_missing_directory_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        TrainerProcess.start(WAITS, cwd=tmp_path / "nowhere", env={})


def test_ignored_and_blocked_signals_are_not_inherited(trainers: Trainers) -> None:
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGRTMIN}
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers | {signal.SIGCHLD})
    try:
        trainer = trainers.start("cat", "/proc/self/status", ready=False)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers | {signal.SIGCHLD})
        for number, handler in previous.items():
            signal.signal(number, handler)

    assert exit_code(trainer) == 0
    status = dict(line.split(":", 1) for line in trainers.output(trainer).splitlines())
    # 32 and 33 belong to the C library, which lets nobody change them: see nptl(7).
    own = ~(0b11 << 31)
    assert int(status["SigIgn"], 16) & own == 0
    assert int(status["SigBlk"], 16) & own == 0


# ---------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("how", "code"),
    {"0": 0, "3": 3, "255": 255, "SIGKILL": -9, "SIGSEGV": -11, "SIGTERM": -15}.items(),
)
def test_the_exit_code_is_right_while_orphans_are_reaped(
    trainers: Trainers, how: str, code: int
) -> None:
    for _ in range(3):
        trainer = trainers.start("ends.py", how, ready=False)

        assert exit_code(trainer) == code
        assert trainer.kill_tree() == []
        assert trainer.poll() == code
        assert not psutil.pid_exists(trainer.pid)


def test_the_owner_can_come_late(trainers: Trainers) -> None:
    trainer = trainers.start("ends.py", "3", ready=False)
    wait_until(lambda: not is_running(trainer.pid), what="the trainer to end")

    wait_until(lambda: reap_orphans([trainer.pid]), what="the orphan behind it to be reaped")

    assert trainer.poll() == 3


def test_an_exit_code_taken_by_somebody_else_is_a_failure(trainers: Trainers) -> None:
    trainer = trainers.start("ends.py", "0", ready=False)
    os.waitpid(trainer.pid, 0)

    assert trainer.poll() == UNKNOWN_EXIT == 255
    trainer.send_signal(signal.SIGKILL)
    assert trainer.kill_tree() == []


def test_daemons_die_also_when_the_exit_code_was_taken(trainers: Trainers) -> None:
    trainer = trainers.start("starts_daemons.py", "2", "0")
    os.waitpid(trainer.pid, 0)

    assert trainer.poll() == UNKNOWN_EXIT
    assert trainer.kill_tree() == []
    assert not any(map(is_running, trainers.daemons(trainer)))


def test_exit_codes_survive_sigchld_inherited_as_ignored() -> None:
    supervisor = [sys.executable, str(PROGRAMS / "takes_an_exit_code.py")]
    output = subprocess.run(
        ["bash", "-c", "trap '' CHLD; exec \"$@\"", "bash", *supervisor, PROGRAMS / "ends.py", "3"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=20,
        check=True,
    ).stdout

    assert output == "code 3\n"


def test_the_trainer_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    supervisor = subprocess.Popen(
        [sys.executable, PROGRAMS / "leaves_its_trainer.py", PROGRAMS / "waits.py"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert supervisor.stdout is not None
    lines = [supervisor.stdout.readline() for _ in range(2)]
    trainer = psutil.Process(next(int(line.split()[1]) for line in lines if "trainer" in line))
    try:
        supervisor.kill()
        supervisor.wait(timeout=10)

        assert trainer.is_running()
        assert trainer.ppid() != supervisor.pid
    finally:
        supervisor.stdout.close()
        trainer.kill()


# ---------------------------------------------------------------- signals


def test_a_signal_reaches_the_trainer_and_not_its_workers(trainers: Trainers) -> None:
    trainer = trainers.start("counts_signals.py", ready=False)
    trainers.wait_for(trainer, "ready", times=2)
    (worker,) = family(trainer.pid)

    sent = [signal.SIGHUP, signal.SIGTERM, signal.SIGINT]
    for number in sent:
        trainer.send_signal(number)
        trainers.wait_for(trainer, f"trainer {number.name}")
    os.kill(worker, signal.SIGUSR2)  # what has arrived before it would have been told before it
    trainers.wait_for(trainer, "worker SIGUSR2")

    told = [line for line in trainers.output(trainer).splitlines() if "worker" in line]
    assert told == ["worker ready", "worker SIGUSR2"]


def test_a_signal_after_the_end_is_no_error(trainers: Trainers) -> None:
    trainer = trainers.start("ends.py", "0", ready=False)
    assert exit_code(trainer) == 0

    trainer.send_signal(signal.SIGTERM)
    trainer.kill_tree()
    trainer.send_signal(signal.SIGTERM)
    trainer.close()
    trainer.send_signal(signal.SIGTERM)


def test_a_number_that_somebody_else_has_by_now_is_left_alone(trainers: Trainers) -> None:
    trainer = trainers.start("waits.py")
    entry = read_entry(trainer.pid)
    assert entry is not None
    stranger = ProcessEntry(
        pid=entry.pid,
        parent=entry.parent,
        group=entry.group,
        session=entry.session,
        start_ticks=entry.start_ticks - 1,
        state="S",
    )

    send_to(stranger, signal.SIGKILL)
    os.kill(trainer.pid, signal.SIGUSR1)  # ends it, too, if nothing has before

    assert exit_code(trainer) == -signal.SIGUSR1


# ---------------------------------------------------------------- the tree

SUPERVISOR, TRAINER = 10, 20
TREE = Tree(
    trainer=(TRAINER, 500),
    supervisor_pid=SUPERVISOR,
    supervisor_session=10,
    mark="10-1.2",
    supervisor_mark="3-1.1",
    before=frozenset({(30, 100), (31, 500)}),
)


def entry(pid: int, parent: int, session: int, start: int = 600, state: str = "S") -> ProcessEntry:
    return ProcessEntry(pid, parent, session, session, start, state)


ALIVE = entry(TRAINER, SUPERVISOR, 20, 500)
DEAD = entry(TRAINER, SUPERVISOR, 20, 500, "Z")
REUSED = entry(TRAINER, 1, 20, 9000)

TABLES: dict[str, tuple[list[ProcessEntry], dict[int, str], set[int]]] = {
    "descendants of the trainer": (
        [ALIVE, entry(21, 20, 20), entry(22, 21, 22), entry(23, 22, 23)],
        {},
        {20, 21, 22, 23},
    ),
    "an orphan in the trainer's session": ([DEAD, entry(21, 10, 20)], {}, {20, 21}),
    "the same, adopted by init": ([DEAD, entry(21, 1, 20)], {}, {20, 21}),
    "an adopted daemon and its children": (
        [DEAD, entry(21, 10, 21), entry(22, 21, 21), entry(23, 22, 23)],
        {},
        {20, 21, 22, 23},
    ),
    "a daemon adopted by init, with the mark": ([DEAD, entry(21, 1, 21)], {21: "10-1.2"}, {20, 21}),
    "a daemon adopted by init, of somebody": ([DEAD, entry(21, 1, 21)], {}, {20}),
    "a trainer's trainer, orphaned": ([DEAD, entry(21, 10, 21)], {21: "21-7.1"}, {20, 21}),
    "a child of ours in our session": ([ALIVE, entry(40, 10, 10), entry(41, 40, 10)], {}, {20}),
    "a child of ours that was there before": (
        [ALIVE, entry(30, 10, 30, 100), entry(31, 10, 31, 500), entry(32, 30, 30)],
        {},
        {20},
    ),
    "an orphan from before": ([ALIVE, entry(33, 10, 33, 400)], {}, {20}),
    "a number from before, used again by a daemon": ([ALIVE, entry(30, 10, 30, 700)], {}, {20, 30}),
    "another trainer of ours": (
        [ALIVE, entry(50, 10, 50), entry(51, 50, 50), entry(52, 10, 52)],
        {50: "10-1.3", 51: "10-1.3", 52: "10-1.3"},
        {20},
    ),
    "a daemon of a tool of ours": ([ALIVE, entry(60, 10, 60)], {60: "3-1.1"}, {20}),
    "a child that is to be spared": ([ALIVE, entry(70, 10, 70), entry(71, 70, 70)], {}, {20}),
    "a trainer whose number is reused": ([REUSED, entry(21, 20, 20)], {}, set()),
    "a reused number, and a daemon": ([REUSED, entry(22, 10, 22)], {}, {22}),
    "the supervisor and strangers": (
        [ALIVE, entry(10, 1, 10, 50), entry(1, 0, 1, 0), entry(2, 1, 2)],
        {},
        {20},
    ),
}


@pytest.mark.parametrize(("table", "marks", "expected"), TABLES.values(), ids=TABLES)
def test_who_belongs_to_the_trainer(
    table: list[ProcessEntry], marks: dict[int, str], expected: set[int]
) -> None:
    found = members({each.pid: each for each in table}, TREE, marks.get, spare=[70])

    assert {each.pid for each in found} == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("state", "threads", "alive"),
    [
        ("R", 1, True),
        ("D", 1, True),
        ("T", 1, True),
        ("Z", 1, False),
        ("X", 1, False),
        ("Z", 3, True),
    ],
)
def test_a_zombie_with_threads_is_alive(state: str, threads: int, alive: bool) -> None:
    assert ProcessEntry(1, 0, 1, 1, 1, state, threads).alive is alive


def test_a_program_may_have_any_name(tmp_path: Path, trainers: Trainers) -> None:
    program = tmp_path / "a) R 1 (b\n"
    program.symlink_to("/bin/sleep")
    trainer = trainers.start(str(program), "60", ready=False)

    found = read_entry(trainer.pid)

    assert found is not None
    assert (found.parent, found.session) == (os.getpid(), trainer.pid)


def of_a_shell(trainers: Trainers) -> tuple[TrainerProcess, Collection[int]]:
    trainer = trainers.start("bash", "-c", f"{' '.join(WAITS)}; exit $?")
    return trainer, family(trainer.pid)


def of_daemons(trainers: Trainers) -> tuple[TrainerProcess, Collection[int]]:
    trainer = trainers.start("starts_daemons.py", "3")
    return trainer, trainers.daemons(trainer)


def of_daemons_left_alone(trainers: Trainers) -> tuple[TrainerProcess, Collection[int]]:
    trainer = trainers.start("starts_daemons.py", "3", "0")
    assert exit_code(trainer) == 0
    return trainer, trainers.daemons(trainer)


def of_forgetful_daemons(trainers: Trainers) -> tuple[TrainerProcess, Collection[int]]:
    trainer = trainers.start("starts_daemons.py", "3", env={**os.environ, "FORGET": "1"})
    daemons = trainers.daemons(trainer)
    wait_until(lambda: not any(map(has_environment, daemons)), what="the daemons to forget")
    return trainer, daemons


def has_environment(pid: int) -> bool:
    return bool(Path(f"/proc/{pid}/environ").read_bytes())


def of_processes_that_ignore_sigterm(trainers: Trainers) -> tuple[TrainerProcess, Collection[int]]:
    trainer = trainers.start("ignores_sigterm.py")
    return trainer, family(trainer.pid)


def of_a_hundred_orphans(trainers: Trainers) -> tuple[TrainerProcess, Collection[int]]:
    trainer = trainers.start("starts_daemons.py", "100", "0")
    daemons = trainers.daemons(trainer)
    assert len(daemons) == 100
    return trainer, daemons


TREES = [
    of_a_shell,
    of_daemons,
    of_daemons_left_alone,
    of_forgetful_daemons,
    of_processes_that_ignore_sigterm,
    of_a_hundred_orphans,
]


@pytest.mark.parametrize("tree", TREES, ids=[tree.__name__ for tree in TREES])
def test_kill_tree_leaves_nothing_alive(
    trainers: Trainers, tree: Callable[[Trainers], tuple[TrainerProcess, Collection[int]]]
) -> None:
    trainer, others = tree(trainers)
    assert others
    assert all(map(is_running, others))

    assert trainer.kill_tree() == []

    assert not any(map(psutil.pid_exists, [trainer.pid, *others]))
    assert trainer.kill_tree() == []


def test_a_tree_that_never_stops_forking_is_caught_without_a_chase(
    trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []

    def counted() -> dict[int, ProcessEntry]:
        looks.append(time.monotonic())
        return read_table()

    monkeypatch.setattr(process_tree, "read_table", counted)
    for _ in range(8):  # now and then, one is caught by luck
        trainer = trainers.start("never_stops_forking.py")
        looks.clear()

        assert trainer.kill_tree() == []

        assert len(looks) < 50
        alive = [each for each in psutil.process_iter() if is_running(each.pid)]
        assert not [each for each in alive if in_session(each.pid, trainer.pid)]


def in_session(pid: int, session: int) -> bool:
    try:
        return os.getsid(pid) == session
    except ProcessLookupError:
        return False


def test_without_a_subreaper_daemons_are_found_by_their_mark(tmp_path: Path) -> None:
    trainers = Trainers(tmp_path)
    trainer = trainers.start("starts_daemons.py", "2", "0")
    with trainer:
        daemons = trainers.daemons(trainer)
        assert all(map(is_running, daemons))

    assert not any(map(is_running, daemons))


def test_it_works_where_there_are_no_pidfds(
    trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    trainer = trainers.start("starts_daemons.py", "2")
    assert trainer.poll() is None

    trainer.send_signal(signal.SIGUSR1)

    assert exit_code(trainer) == -signal.SIGUSR1
    assert trainer.kill_tree() == []
    assert not any(map(psutil.pid_exists, trainers.daemons(trainer)))


def test_bystanders_survive(trainers: Trainers) -> None:
    in_our_session = subprocess.Popen(WAITS, stdout=subprocess.DEVNULL)
    with_own_session = subprocess.Popen(WAITS, stdout=subprocess.DEVNULL, start_new_session=True)
    other_trainer = trainers.start("starts_daemons.py", "1")
    trainer = trainers.start("starts_daemons.py", "2")
    later = subprocess.Popen(WAITS, stdout=subprocess.DEVNULL)
    spared = subprocess.Popen(WAITS, stdout=subprocess.DEVNULL, start_new_session=True)
    third_trainer = trainers.start("starts_daemons.py", "1", "0")
    bystanders = [in_our_session, with_own_session, later, spared]
    survivors = [each.pid for each in bystanders] + [other_trainer.pid]
    survivors += trainers.daemons(other_trainer) + trainers.daemons(third_trainer)
    try:
        assert trainer.kill_tree(spare=[spared.pid]) == []

        assert not any(map(is_running, trainers.daemons(trainer)))
        assert all(map(is_running, survivors))
        assert [each.poll() for each in bystanders] == [None] * 4
    finally:
        for each in bystanders:
            each.kill()
            each.wait()


def test_a_bystander_started_in_the_same_instant_survives(trainers: Trainers) -> None:
    for _ in range(10):  # start times are counted in hundredths of a second
        bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
        trainer = trainers.start("true", ready=False)
        try:
            assert trainer.kill_tree() == []
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()


def test_those_that_ignore_a_signal_are_named_at_the_deadline(trainers: Trainers) -> None:
    trainer = trainers.start("ignores_sigterm.py")
    everybody = {trainer.pid, *family(trainer.pid)}
    started = time.monotonic()

    assert set(trainer.kill_tree(signal.SIGTERM, timeout_seconds=0.2)) == everybody

    assert 0.2 <= time.monotonic() - started < 5
    assert trainer.poll() is None
    assert trainer.kill_tree() == []


def test_one_look_is_enough_to_kill(trainers: Trainers) -> None:
    trainer = trainers.start("starts_daemons.py", "2")
    everybody = [trainer.pid, *trainers.daemons(trainer)]

    assert set(trainer.kill_tree(timeout_seconds=0)) <= set(everybody)

    wait_until(lambda: not any(map(is_running, everybody)), what="all of them to end")


def test_a_look_that_finds_zombies_is_not_taken_for_the_end(trainers: Trainers) -> None:
    trainer = trainers.start("starts_daemons.py", "2", "0")
    assert exit_code(trainer) == 0
    daemons = trainers.daemons(trainer)
    for pid in daemons:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, daemons)), what="the daemons to end")

    assert trainer.kill_tree(timeout_seconds=0) == sorted(daemons)
    assert trainer.kill_tree(timeout_seconds=0) == []


def test_a_softer_signal_reaches_each_of_the_tree_once(trainers: Trainers) -> None:
    trainer = trainers.start("counts_signals.py", ready=False)
    trainers.wait_for(trainer, "ready", times=2)

    trainer.kill_tree(signal.SIGTERM, timeout_seconds=0.2)

    def told() -> list[str]:
        return sorted(line for line in trainers.output(trainer).splitlines() if "SIG" in line)

    wait_until(lambda: len(told()) >= 2, what="both to have been told")
    assert told() == ["trainer SIGTERM", "worker SIGTERM"]


# ---------------------------------------------------------------- orphans


def test_orphans_are_reaped_and_only_they(trainers: Trainers) -> None:
    trainer = trainers.start("starts_daemons.py", "3")
    tool = subprocess.Popen(["bash", "-c", "exit 5"])
    owned = subprocess.Popen(["bash", "-c", "exit 6"], start_new_session=True)
    daemons = trainers.daemons(trainer)
    for pid in [*daemons, trainer.pid]:
        os.kill(pid, signal.SIGKILL)
    everybody = [*daemons, trainer.pid, tool.pid, owned.pid]
    wait_until(lambda: not any(map(is_running, everybody)), what="all of them to end")

    assert sorted(reap_orphans([trainer.pid, owned.pid])) == sorted(daemons)

    assert reap_orphans([trainer.pid, owned.pid]) == []
    assert (tool.wait(), owned.wait(), trainer.poll()) == (5, 6, -signal.SIGKILL)


def test_there_may_be_no_children_at_all() -> None:
    program = "from runner.supervisor.reaper import reap_orphans; print(reap_orphans([]))"

    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"
