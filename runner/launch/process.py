"""The trainer as a process on this machine: what it inherits, how it starts, how it ends.

It gets a session of its own, default signal dispositions, an empty signal mask, no open files but
its output, and an environment without the supervisor's cloud credentials. It does not die with the
supervisor: it notices by the board, and can leave at a boundary.

Its exit code is read without taking it (`WNOWAIT`), and the process is waited for only when nothing
of its tree is left. Until then it is at least a zombie, so its number stays its own: no signal can
reach a stranger, and its session is recognised.

The command may be a shell, or a script that forks and exits. The process that attaches is the
trainer then: signals go to it, and the attempt lives as long as it does.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Self

from runner.errors import RunnerError, UsageError
from runner.launch.cgroup import AttemptGroup
from runner.launch.cpu import session_seconds
from runner.launch.process_tree import (
    MARK_VARIABLE,
    ProcessEntry,
    Tree,
    end,
    mark_prefix,
    members,
    open_pidfd,
    read_entry,
    read_table,
    send_to,
)
from runner.memory import Memory, limited_memory

CREDENTIAL_VARIABLES = (
    # AWS: https://docs.aws.amazon.com/sdkref/latest/guide/environment-variables.html
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_CREDENTIAL_EXPIRATION",
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_CONTAINER_CREDENTIALS_*",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN*",
    "AWS_BEARER_TOKEN_*",
    # Google: https://cloud.google.com/docs/authentication/application-default-credentials
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_CREDENTIALS",
    "GOOGLE_OAUTH_ACCESS_TOKEN",
    "GOOGLE_API_KEY",
    "CLOUDSDK_AUTH_*",
    "CLOUDSDK_CONFIG",
    # Azure: https://learn.microsoft.com/azure/developer/python/sdk/authentication/overview
    "AZURE_CLIENT_SECRET",
    "AZURE_CLIENT_CERTIFICATE_*",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_USERNAME",
    "AZURE_PASSWORD",
    "AZURE_CONFIG_DIR",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_TOKEN",
    "ARM_CLIENT_SECRET",
    "ARM_ACCESS_KEY",
    # S3-compatible stores and the cluster itself
    "MINIO_ACCESS_KEY",
    "MINIO_SECRET_KEY",
    "MINIO_ROOT_USER",
    "MINIO_ROOT_PASSWORD",
    "B2_APPLICATION_KEY",
    "B2_APPLICATION_KEY_ID",
    "KUBECONFIG",
)
"""What the supervisor does not hand down; a final `*` stands for any ending.

They open the store and the cloud account. Keys of services that a training script talks to itself
(trackers, model hubs) are not among them.
"""

RESERVED_PREFIX = "RUNNER_"

UNKNOWN_EXIT = 255
"""The exit code of a trainer for which somebody else has waited: a failure, never a success."""

_NOT_EXECUTABLE = (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR, errno.ELOOP)
_TRAMPOLINE = str(Path(__file__).with_name("trampoline.py"))
_serials = itertools.count(1)


def build_environment(
    parent: Mapping[str, str],
    own: Mapping[str, str],
    job_env: Mapping[str, str],
    *,
    pass_credentials: bool = False,
) -> dict[str, str]:
    """The trainer's environment. Pure.

    `parent` is what the supervisor has; credentials in it are left out (`CREDENTIAL_VARIABLES`),
    unless `pass_credentials`. `job_env` overrides it and is taken as it is: what a user names in
    the job file is meant. `own` are the `RUNNER_*` variables; names with this prefix in the other
    two are left out, so that neither the job nor an outer run can pose as this supervisor.
    """
    inherited = {
        name: value
        for name, value in parent.items()
        if pass_credentials
        or not any(fnmatchcase(name, pattern) for pattern in CREDENTIAL_VARIABLES)
    }
    merged = {**inherited, **job_env}
    return {
        **{name: value for name, value in merged.items() if not name.startswith(RESERVED_PREFIX)},
        **own,
    }


class TrainerProcess:
    """One life of the trainer on this machine, and all the processes that it starts.

    Start, `kill_tree` and `reap_orphans` belong into one thread. As a context manager it kills the
    tree and closes the handle at the end.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        tree: Tree,
        handle: int | None,
        group: AttemptGroup | None = None,
    ) -> None:
        self._process, self._tree, self._handle, self._group = process, tree, handle, group
        self._code: int | None = None
        self._attached: ProcessEntry | None = None
        self._attached_code: int | None = None
        self._asked_about = process.pid
        self._waited_for = False
        self._tree_has_ended = False
        self._lock = threading.Lock()  # between sending a signal and giving the number back

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: int | None = None,
        stderr: int | None = None,
        groups: Path | None = None,
    ) -> TrainerProcess:
        """Start `command` without a shell; return when it executes.

        `command[0]` is looked up on the PATH of `env`, or relative to `cwd` if it has a separator.
        `stdout` and `stderr` are file descriptors, None is to share ours; stdin is empty. `groups`
        is a cgroup (v2) in which one is made for it, where that can be.
        Raises UsageError if there is no such command or directory, and OSError if the machine
        cannot start one more process. Nothing runs after an error.
        """
        if not command:
            raise UsageError("the command is empty: name at least a program in `command`")
        mine = read_entry(os.getpid())
        if mine is None:
            raise RunnerError("/proc is not mounted: processes cannot be told apart without it")
        mark = f"{mark_prefix(mine)}.{next(_serials)}"
        before = frozenset(entry.identity for entry in read_table().values())
        group = AttemptGroup.make(mark, groups)
        try:
            entered = "" if group is None else str(group.folder)
            process = _spawn(command, cwd, {**env, MARK_VARIABLE: mark}, stdout, stderr, entered)
        except BaseException:
            if group is not None:
                group.remove()
            raise
        try:
            trainer = read_entry(process.pid)
        except OSError:
            process.kill()
            process.wait()
            raise
        tree = Tree(
            # None if somebody has waited for it already; no process has started before 0.
            trainer=trainer.identity if trainer else (process.pid, 0),
            supervisor_pid=mine.pid,
            supervisor_session=mine.session,
            mark=mark,
            supervisor_mark=os.environ.get(MARK_VARIABLE),
            before=before,
        )
        return cls(process, tree, open_pidfd(process.pid), group)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def pids(self) -> list[int]:
        """The processes whose exit codes belong to this object: the caller must not reap them."""
        return [self.pid] if self._attached is None else [self.pid, self._attached.pid]

    def follow(self, pid: int) -> None:
        """This process has attached: if it outlives the one that was started, its end counts.

        Nothing happens if it is that one, or not of this tree.
        """
        if pid in (0, self._asked_about):
            return
        table = read_table()
        self._asked_about = pid
        found = [entry for entry in members(table, self._tree) if entry.pid == pid and entry.alive]
        with self._lock:
            self._attached = found[0] if found else None

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs. Can be asked again.

        Of the process that was started; or, if that ended first, of the one that has attached. If
        nobody can tell that one's, because another process has waited for it: `UNKNOWN_EXIT`.
        """
        with self._lock:
            if self._code is None:
                self._code = self._read_exit_code()
                if self._code is not None and not self._attached_lives():
                    self._attached = None  # a shell that has waited for its script: its code counts
            if self._code is None or self._attached is None:
                return self._code
            if self._attached_code is None:
                self._attached_code = self._read_attached_code(self._attached)
            return self._attached_code

    def leaves_session(self) -> bool:
        """Whether processes in the trainer's own session outlive it, daemons aside."""
        table = read_table().values()
        return any(entry.session == self.pid and entry.alive for entry in table)

    def _attached_lives(self) -> bool:
        if self._attached is None:
            return False
        now = read_entry(self._attached.pid)
        return now is not None and now.identity == self._attached.identity and now.alive

    def _read_attached_code(self, attached: ProcessEntry) -> int | None:
        if self._attached_lives():
            return None
        now = read_entry(attached.pid)
        if now is None or now.identity != attached.identity or now.parent != os.getpid():
            return UNKNOWN_EXIT
        try:
            ended = os.waitid(os.P_PID, attached.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return UNKNOWN_EXIT
        return None if ended is None else _code_of(ended)

    def _read_exit_code(self) -> int | None:
        try:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            self._number_is_free(UNKNOWN_EXIT)
            return UNKNOWN_EXIT
        return None if ended is None else _code_of(ended)

    def send_signal(self, signum: int) -> None:
        """Send a signal to the trainer alone, not to what it has started; nothing once it ended."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, signum)
            elif not self._waited_for:
                os.kill(self.pid, signum)

    def send_signal_to(self, pid: int, signum: int) -> bool:
        """Send a signal to one process of the tree; False if this number is none of theirs."""
        for entry in members(read_table(), self._tree):
            if entry.pid == pid and entry.alive:
                send_to(entry, signum)
                return True
        return False

    def pid_here(self, pid: int) -> int:
        """The same number: this trainer sees the process table that we see."""
        return pid

    def cpu_seconds(self) -> float:
        """What the processes in its session have used of the CPU."""
        return session_seconds(self.pid)

    def memory(self) -> Memory | None:
        """Of the cgroup that we and the trainer are in, or the nearest above it with a limit."""
        return limited_memory()

    @property
    def failure(self) -> None:
        """`start` tells at once."""

    def killed_for_memory(self) -> None:
        """The machine's own counts tell."""

    def kill_tree(
        self,
        signum: int = signal.SIGKILL,
        *,
        timeout_seconds: float = 10.0,
        spare: Collection[int] = (),
    ) -> list[int]:
        """Signal the trainer and everything it started, wherever that has hidden; wait for the end.

        Returns when nothing is left, or after `timeout_seconds` with the process ids seen last:
        another signal than SIGKILL can be ignored, a process inside of a device's system call
        dies late, and one of another user is not ours to kill. Call it again then.
        Other children of ours are not touched if they are in our session or were there before;
        name those in `spare` that were started later with a session of their own.
        `poll` answers after it as before. Finding every daemon takes a child subreaper.
        """
        if self._tree_has_ended:
            return []
        self.poll()  # what has ended by itself keeps its own code
        remaining = end(
            self._tree, signum, timeout_seconds=timeout_seconds, spare=spare, group=self._group
        )
        if remaining:
            return remaining
        with self._lock:
            code = self._code = self._read_exit_code() if self._code is None else self._code
            if code is None:  # a debugger is attached and hears of it first
                return [self.pid]
            if self._attached is not None and self._attached_code is None:
                self._attached_code = -signum
            if not self._waited_for:
                os.waitid(os.P_PID, self.pid, os.WEXITED)
                self._number_is_free(code)
            self._tree_has_ended = True
        if self._group is not None:
            self._group.remove()
        return []

    def _number_is_free(self, code: int) -> None:
        self._waited_for = True
        self._process.returncode = code  # so that `subprocess` never waits for this number

    def close(self) -> None:
        """Give the handle back. The processes are not touched."""
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill_tree()
        self.close()


def _spawn(
    command: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    stdout: int | None,
    stderr: int | None,
    group: str,
) -> subprocess.Popen[bytes]:
    """Start the trampoline in a new session and wait until it has become the command."""
    error_reader, error_writer = os.pipe()
    with open(error_reader, "rb") as errors:  # noqa: PTH123 - a descriptor, not a path
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", _TRAMPOLINE, str(error_writer), group, *command],
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                pass_fds=[error_writer],
            )
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise UsageError(
                f"cannot start in the directory {cwd}: {error.strerror}; see `workdir`"
            ) from error
        finally:
            os.close(error_writer)
        problem = errors.read()
    if not problem:
        return process
    process.wait()
    number = int(problem)
    if number not in _NOT_EXECUTABLE:
        raise OSError(number, os.strerror(number), command[0])
    raise UsageError(
        f"cannot execute {command[0]!r} in {cwd}: {os.strerror(number)}; `command` begins with a "
        "program on the PATH, or with a path relative to `workdir`"
    )


def _code_of(ended: os.waitid_result) -> int:
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
