"""The first thing that runs in the trainer's container: print into the supervisor's pipes.

    python -I -S inside.py SPOOL COMMAND [ARGUMENT ...]

What the trainer prints goes past the engine, through two named pipes in the spool: nothing is lost
or held up when the engine is slow, rotates a log, or dies. It is mounted as one file and imports
nothing but the standard library, so it works in any image with a Python.

If the command cannot be executed, that is said in the container's own log, and the exit code is 127
(no such command) or 126, as a shell's. If nobody reads the pipes, the supervisor has died while the
engine was starting this: then there is nobody to end it later either, so it ends at once, with 75.
"""

import errno
import os
import sys

_START_AGAIN = 75  # EX_TEMPFAIL


def main() -> None:
    spool, command = sys.argv[1], sys.argv[2:]
    own = os.dup(2)
    os.set_inheritable(own, False)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        try:
            pipe = os.open(f"{spool}/{name}", os.O_WRONLY | os.O_NONBLOCK)  # or it would wait
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            os.write(own, b"nobody reads what is printed here: the supervisor is gone\n")
            os._exit(_START_AGAIN)
        os.set_blocking(pipe, True)
        os.dup2(pipe, descriptor)
        os.close(pipe)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(own, f"cannot execute {command[0]!r}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


if __name__ == "__main__":
    main()
