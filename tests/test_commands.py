"""The words of the command line: each command is there, alone and among all, and says the same."""

from __future__ import annotations

import contextlib
import io
import sys

import pytest

from runner import __version__
from runner.cli.app import application

COMMANDS = (
    *("submit", "run", "status", "logs", "stop", "wait", "simulate", "render", "doctor"),
    *("report", "ui", "track", "promote", "schema"),
)


def said(*words: str) -> tuple[int, str]:
    """What a call without a job prints, and its exit code."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            application(*words[:1])(words)
        except SystemExit as ended:
            return int(ended.code or 0), out.getvalue()
    raise AssertionError("it returned")


def test_all_are_named_where_none_is_called() -> None:
    code, text = said("--help")

    assert code == 0
    listed = [line.split()[0] for line in text.partition("Commands:\n")[2].splitlines()]
    assert sorted(listed) == sorted([*COMMANDS, "checkpoints"])


@pytest.mark.parametrize("command", COMMANDS)
def test_one_that_is_built_alone_is_what_it_is_among_all(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["runner"])
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        application()([command, "--help"])

    assert said(command, "--help") == (0, out.getvalue())
    assert f" {command} [OPTIONS]" in out.getvalue()


@pytest.mark.parametrize(
    ("words", "tells"),
    [
        (["rnu"], "No such command 'rnu'. Did you mean 'run'?"),
        (["run"], "Missing argument 'JOB'"),
        (["run", "job.yaml", "--nwe"], "No such option: --nwe"),
        (["checkpoints", "lst"], "No such command 'lst'"),
        (["--verbose"], "No such option: --verbose"),
    ],
)
def test_a_word_that_is_none_is_a_usage_error(words: list[str], tells: str) -> None:
    code, text = said(*words)

    assert code == 2
    assert tells in text


def test_the_version_is_told() -> None:
    assert said("--version") == (0, f"runner {__version__}\n")
