"""The command line: parse, call, and map errors to exit codes."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from runner.exitcodes import INTERRUPTED, PREEMPTED, USAGE

_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED}
_SUPERVISORS_LIBRARIES = ("typer", "click", "pydantic", "yaml", "watchdog", "rich", "boto3")
_TOO_EARLY = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMIN)  # nothing runs that could save


def main() -> None:
    """Run the command of `sys.argv`.

    A signal that comes before there is anything to save ends it with the code that it asks for,
    and no traceback: importing the rest takes a fifth of a second. A supervisor has handlers of
    its own.
    """
    known = [signal.SIG_DFL, signal.default_int_handler]
    if sys.argv[1:2] in (["run"], ["submit"]):
        known.append(signal.SIG_IGN)  # as for a background job of a shell: obeyed all the same
    mine = [signum for signum in _CODES if signal.getsignal(signum) in known]
    for signum in mine:
        signal.signal(signum, _leave)
    for signum in _TOO_EARLY:
        if signal.getsignal(signum) is signal.SIG_DFL:
            signal.signal(signum, _pass_over)  # a handler: being ignored would be inherited
    try:
        from runner.cli.app import main as run

        for signum in mine:
            signal.signal(signum, _end)
        run()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _SUPERVISORS_LIBRARIES:
            raise
        sys.stderr.write(
            f"runner: {error.name} is not installed: the command needs more than a training script "
            "does; pip install 'runner[supervisor]'\n"
        )
        sys.exit(USAGE)


def _leave(signum: int, frame: FrameType | None) -> None:
    """While modules are imported: an exception might end in the `except:` of any of them."""
    os._exit(_CODES[signal.Signals(signum)])


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(_CODES[signal.Signals(signum)])


def _pass_over(signum: int, frame: FrameType | None) -> None:
    """What is asked for cannot be done yet, and is no reason to die."""
