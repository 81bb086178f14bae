"""A run that is watched in a real terminal: what is seen, and that it costs the run nothing."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from nodes import RUNNER, Node
from terminals import Terminal
from waiting import wait_until

from runner.views.live import can_show_view, wants_color


def terminal(node: Node, *arguments: str, columns: int = 80, **env: str) -> Terminal:
    """`runner` in a terminal of its own."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("RUNNER_", "NO_COLOR"))}
    mine |= {"TERM": "xterm-256color", **node.environment, **env}
    return Terminal([RUNNER, *arguments], env=mine, cwd=node.folder, columns=columns)


def below(lines: list[str]) -> list[str]:
    """The view: what stands from the run's name on."""
    begin = max(number for number, line in enumerate(lines) if line.startswith("job   "))
    return lines[begin:]


def test_a_view_stands_below_what_the_run_prints_until_it_ends(node: Node) -> None:
    """Its trainer fails once, and waits in its second life until it is looked at."""
    job = node.training(
        checkpoint={"every": {"steps": 4}, "snapshot_every": {"steps": 1}},
        params={"befalls": {"1": {"3": "raise"}, "2": {"9": "wait"}}},
    )
    with terminal(node, "submit", job) as seen:
        seen.wait_for("saved step 8")
        lines = seen.wait_for("step 8/24")
        wait_until(lambda: below(seen.lines()) == seen.lines()[-5:], 10, "the view to be last")
        view = below(seen.lines())
        assert view[0].startswith("job   running   epoch 0/2   attempt 2 on ")
        assert view[1] == "━" * 27 + "─" * 53
        assert view[2].startswith("step 8/24   33.3 %   eta ")
        assert view[3].startswith("train_loss ") or "train_loss " in view[2]
        assert "0 preemptions   1 failure   0 steps lost" in "\n".join(view)
        assert re.search(r"saved step 8, \S+ m?s ago   emergency save \S+ m?s of 30 s", view[-1])
        assert any(line.startswith("step 9") for line in lines)

        node.gate.touch()

        assert seen.wait() == 0
        everything = seen.everything()
    assert [n for n in range(1, 25) if everything.count(f"step {n}") == 1 + (n == 3)] == [
        *range(1, 25)
    ]
    assert below(everything)[0].startswith("job   succeeded   epoch 2/2")
    assert below(everything)[1] == "━" * 80
    assert sum(line.startswith("job   ") for line in everything) == 1
    assert b"\x1b[32m" in seen.received


def test_a_narrow_terminal_and_one_without_colours(node: Node) -> None:
    job = node.job("bash", "-c", "printf 'one\\ntwo'; until test -e gate; do sleep 0.01; done")
    with terminal(node, "submit", job, columns=40, NO_COLOR="1") as seen:
        seen.wait_for("nothing saved yet")
        wait_until(lambda: "two" in seen.lines(), 20, "what was printed")
        lines = seen.lines()
        view = below(lines)
        assert max(map(len, lines)) <= 40
        assert lines[lines.index("one") + 1] == "two"
        assert view[0].startswith("job   ")
        assert lines[-len(view) - 1] == "two"

        seen.resize(60, 24)
        node.gate.touch()
        assert seen.wait() == 0
        everything = seen.everything()
    assert everything.count("two") == 1
    assert not re.search(rb"\x1b\[[0-9;]*3[0-9][0-9;]*m", seen.received)


def test_a_terminal_that_stands_still_does_not_hold_up_the_run(node: Node) -> None:
    job = node.job("bash", "-c", "for n in {1..200000}; do echo line $n of very many; done")
    with terminal(node, "submit", job) as seen:
        seen.wait_for("line")
        seen.stand_still(True)
        wait_until(lambda: node.records() and node.records()[-1].outcome, 60, "the end of the run")
        assert node.records()[-1].outcome == "succeeded"
        seen.stand_still(False)
        assert seen.wait() == 0
    log = node.call("logs", "job", "--stream", "out").out.splitlines()
    assert (log[-1], len(log)) == ("line 200000 of very many", 200_000)


def test_plain_is_lines_and_nothing_else(node: Node) -> None:
    job = node.job("bash", "-c", "echo hello")
    with terminal(node, "submit", job, "--plain") as seen:
        assert seen.wait() == 0
    assert b"\x1b" not in seen.received
    lines = seen.everything()
    assert "hello" in lines
    assert [line for line in lines if line.startswith("runner: succeeded: step 0")]


def test_without_a_terminal_there_are_lines_and_they_are_not_in_the_log(node: Node) -> None:
    job = node.job("bash", "-c", "echo hello")
    done = node.run("submit", job)
    assert (done.code, done.out) == (0, "hello\n")
    assert "runner: succeeded: step 0" in done.err
    assert "succeeded: step" not in node.call("logs", "job").out


def test_run_shows_neither(node: Node) -> None:
    done = node.run("run", node.job("bash", "-c", "echo hello"))
    assert done.code == 0
    assert "preemptions" not in done.err


def test_status_goes_on_looking_until_the_end(node: Node) -> None:
    job = node.job("bash", "-c", "until test -e gate; do sleep 0.01; done")
    supervisor = node.start("run", job)
    wait_until(lambda: node.spool().status(), what="the supervisor")
    with terminal(node, "status", "job", "-w") as seen:
        seen.wait_for("nothing saved yet")
        node.gate.touch()
        assert seen.wait() == 0
    assert supervisor.wait() == 0
    assert below(seen.lines())[0].startswith("job   succeeded")
    again = node.call("status", "job", "-w")
    assert (again.code, len(again.out.splitlines())) == (0, 1)
    assert again.out.startswith("succeeded: step 0")
    assert node.call("status", "job", "-w", "-o", "json").json["phase"] == "succeeded"
    assert node.call("status", "-w").code == 2


class Stream:
    """What a view is to be shown on."""

    def __init__(self, terminal: bool, encoding: str | None) -> None:
        self.encoding, self._terminal = encoding, terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(
    ("stream", "name", "fits"),
    [
        (Stream(True, "utf-8"), "xterm-256color", True),
        (Stream(True, "utf-8"), "dumb", False),
        (Stream(True, "utf-8"), "", False),
        (Stream(True, "ascii"), "xterm", False),
        (Stream(True, None), "xterm", False),
        (Stream(False, "utf-8"), "xterm", False),
    ],
)
def test_a_view_needs_a_terminal_that_can(
    stream: Any, name: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", name)
    assert can_show_view(stream) is fits


def test_colours_are_a_matter_of_taste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color()
    monkeypatch.setenv("NO_COLOR", "")
    assert wants_color()


def test_looking_at_a_run_loads_nothing_heavy(modules_of: Callable[[str], set[str]]) -> None:
    loaded = modules_of("import runner.views.live, runner.views.server")
    assert loaded & {"torch", "numpy", "boto3"} == set()


@pytest.fixture
def modules_of() -> Callable[[str], set[str]]:
    import subprocess

    def modules(statements: str) -> set[str]:
        program = f"import sys\n{statements}\nprint(*sys.modules)"
        found = subprocess.check_output([sys.executable, "-c", program], text=True)
        return set(found.split())

    return modules
