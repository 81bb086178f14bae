"""The command line: parse, call, print, and turn errors into exit codes.

Facts go to stdout, progress and logs to stderr. `-o json` prints facts for programs.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Annotated

import typer

from runner import __version__, exitcodes
from runner.cli import checkpoints, doctor, logs, looking, rendering, running, tracking, views
from runner.cli.common import print_json
from runner.errors import RunnerError, StoreDenied, StoreUnfit, UsageError

_NO_RETRY_HELPS = (UsageError, StoreDenied, StoreUnfit)
_CODES: dict[int, int] = {
    signal.SIGINT: exitcodes.INTERRUPTED,
    signal.SIGTERM: exitcodes.PREEMPTED,
}
_TIDYING_SECONDS = 10.0


def schema() -> None:
    """Print the JSON Schema of the job file."""
    from runner.job import job_schema

    print_json(job_schema())


_COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        *(running.submit, running.run, looking.status, logs.logs, looking.stop, looking.wait),
        *(running.simulate, rendering.render, doctor.doctor, views.report, views.ui),
        *(tracking.track, tracking.promote, schema),
    )
}


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"runner {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Run training jobs that survive preemption, bit for bit."""


def application(called: str | None = None) -> typer.Typer:
    """The command line; of the one command that is called alone, if it is known beforehand.

    To build them all takes 20 ms, for which every trainer would wait.
    """
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        callback=_options,
    )
    for name, command in _COMMANDS.items():
        if called == name or called not in _COMMANDS:
            app.command()(command)
    if called not in _COMMANDS:
        app.add_typer(checkpoints.app, name="checkpoints")
    return app


def main() -> None:
    """The console script: no traceback for an error that was raised on purpose or by the system."""
    _have_standard_streams()
    logging.basicConfig(
        level=logging.INFO, format="runner: %(message)s", stream=sys.stderr, force=True
    )
    for library in ("boto3", "botocore", "urllib3"):  # which credentials were found is for doctor
        logging.getLogger(library).setLevel(logging.WARNING)
    if sys.argv[1:2] in (["run"], ["submit"]):
        _end_early_on_signals()
    try:
        application(*sys.argv[1:2])()
    except RunnerError as error:
        typer.echo(f"runner: {error}", err=True)
        wrong = isinstance(error, _NO_RETRY_HELPS)
        sys.exit(exitcodes.USAGE if wrong else exitcodes.GIVEN_UP)
    except OSError as error:
        typer.echo(f"runner: the system refuses: {error}", err=True)
        sys.exit(exitcodes.GIVEN_UP)


def _have_standard_streams() -> None:
    """A stream that was closed would be the next file that is opened, and be printed into."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number


def _end_early_on_signals() -> None:
    """Until the supervisor listens to signals there is nothing to save: leave with the right code.

    Otherwise a preemption in the first tenths of a second would look like a crash. The first signal
    is raised, so that what was made to look around, such as a container, is removed. With the next
    one it is left where it is, and after some seconds too: what is raised may get lost in code of
    others that catches everything.
    """

    def leave_now(signum: int, frame: FrameType | None, code: int | None = None) -> None:
        os._exit(_CODES[signum] if code is None else code)

    def leave(signum: int, frame: FrameType | None) -> None:
        code = _CODES[signum]
        for each in _CODES:
            signal.signal(each, leave_now)
        signal.signal(signal.SIGALRM, partial(leave_now, code=code))
        signal.setitimer(signal.ITIMER_REAL, _TIDYING_SECONDS)
        raise SystemExit(code)

    for signum in _CODES:
        signal.signal(signum, leave)
