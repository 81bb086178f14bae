"""The first thing that runs in the trainer's process: undo what it inherited, become the command.

    python -I -S trampoline.py ERROR_FD CGROUP COMMAND [ARGUMENT ...]

`exec` keeps ignored signals ignored and blocked ones blocked, so a trainer started by `nohup`, by
a shell without job control, or from a supervisor's thread that blocks signals would be deaf to
them. `subprocess` can only undo this with `preexec_fn`, which runs Python between fork and exec
and may deadlock in a program with threads; here it happens after an exec, where nothing is shared.

The process id, the session and the working directory are those of the trainer already. If the
command cannot be executed, its errno is written to ERROR_FD as decimal digits and the exit code is
127; otherwise ERROR_FD is closed by the exec and nothing was written.

Every start of a trainer waits for this, so it imports little: `contextlib` alone takes 6 ms.
"""

import os
import signal
import sys


def original_environment() -> dict[bytes, bytes]:
    """The environment as it was given: Python may add LC_CTYPE to `os.environ` (PEP 538)."""
    with open("/proc/self/environ", "rb") as file:  # noqa: PTH123 - pathlib takes 5 ms to import
        pairs = (entry.partition(b"=") for entry in file.read().split(b"\0") if entry)
        return {name: value for name, _, value in pairs}


def enter(group: str) -> None:
    """Move into a cgroup, whose folder is given; "" is to stay. All that is started here follows.

    Where it cannot be entered, the process table has to do.
    """
    if group:
        try:
            descriptor = os.open(f"{group}/cgroup.procs", os.O_WRONLY)
            try:
                os.write(descriptor, b"0")
            finally:
                os.close(descriptor)
        except OSError:
            pass


def main() -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:  # noqa: SIM105 - see above
            signal.signal(number, signal.SIG_DFL)
        except OSError:
            pass
    signal.pthread_sigmask(signal.SIG_SETMASK, [])

    error_fd, group, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    enter(group)
    os.set_inheritable(error_fd, False)
    try:
        os.execvpe(command[0], command, original_environment())
    except OSError as error:
        os.write(error_fd, str(error.errno).encode())
        os._exit(127)


if __name__ == "__main__":
    main()
