"""`python train.py` without a supervisor: it saves, stops well and continues all the same.

The children are real processes. They say `ready` in the middle of a step and wait for a line, so
that what befalls them does so at a known place. One run is taken through everything that can
happen; the tests look at its lives.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runner.board import Board
from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import AttemptRecord, Ledger
from runner.spool import Spool, spool_path
from runner.store import DirectoryStore
from tests.waiting import wait_until

# The story that most tests look at is told once, by the first: a dozen starts of a script.
pytestmark = pytest.mark.timeout(600)

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "tests" / "child_programs" / "trains_alone.py"
STEPS = 20
TIMEOUT_SECONDS = 60


class Place:
    """A directory with a store, where scripts are started."""

    def __init__(self, folder: Path, run_id: str | None) -> None:
        self.folder, self.run_id = folder, run_id or SCRIPT.stem
        self.store = DirectoryStore(folder / "store")
        self.archive = Archive(self.store, self.run_id)
        self.spool = spool_path(self.run_id, self.store.url)
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RUNNER_")}
        self.environment = plain | {"PYTHONPATH": str(REPOSITORY), "RUNNER_STORE": "store"}
        if run_id is not None:
            self.environment["RUNNER_RUN_ID"] = run_id

    def start(self, script: Path = SCRIPT, **params: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(script)],
            cwd=self.folder,
            env=self.environment | {"RUNNER_PARAMS": json.dumps(params)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def records(self) -> list[AttemptRecord]:
        return Ledger(self.store, self.run_id, "nobody").records()

    def digest(self) -> str:
        return self.archive.digest(self.archive.manifest(str(self.archive.names()[0])))


@dataclass(frozen=True)
class Ended:
    """A process that is over, and what was in the store then."""

    code: int
    output: list[str]
    errors: str
    newest: Any
    spool_is_there: bool


def finish(place: Place, process: subprocess.Popen[str], before: Sequence[str] = ()) -> Ended:
    """Let it go on to its end; `before` is what it has printed until now."""
    output, errors = process.communicate("\n", timeout=TIMEOUT_SECONDS)
    names = place.archive.names()
    newest = place.archive.manifest(str(names[0])) if names else None
    lines = [*before, *output.splitlines()]
    return Ended(process.returncode, lines, errors, newest, place.spool.exists())


def wait_for_ready(process: subprocess.Popen[str]) -> list[str]:
    """What it has printed before."""
    assert process.stdout is not None
    before = []
    while (line := process.stdout.readline()) != "ready\n":
        assert line, process.communicate(timeout=TIMEOUT_SECONDS)[1]
        before.append(line.rstrip())
    return before


def asked(place: Place) -> bool:
    """Whether the signal has arrived: the board says so."""
    board = Board(place.spool / "rank-00000" / "board")
    return board.request_number > board.answered


def can_be_saved(place: Place) -> bool:
    """Whether there is a state of the attempt at hand, or nothing that keeps it from having one."""
    rank, attempt = Spool(place.spool).rank, len(place.records())
    has_state = any(marker.order[0] == attempt for marker in rank.complete())
    return has_state or not any(rank.folder.glob("slot-*.claimed.json"))


def strike(place: Place, signum: int, *, whole_group: bool = False, **params: Any) -> Ended:
    """Start, wait for the middle of a step, send a signal, and let the script go on."""
    process = place.start(**params)
    before = wait_for_ready(process)
    if whole_group:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    if signum != signal.SIGKILL:
        wait_until(lambda: asked(place), TIMEOUT_SECONDS, "the signal to be noted")
    return finish(place, process, before)


@dataclass(frozen=True)
class Story:
    place: Place
    undisturbed: Place
    lives: dict[str, Ended]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    place = Place(tmp_path_factory.mktemp("disturbed"), "my-run")
    undisturbed = Place(tmp_path_factory.mktemp("undisturbed"), None)
    lives: dict[str, Ended] = {}
    alongside = undisturbed.start()

    process = place.start(wait_at=2)
    wait_for_ready(process)
    lives["second at once"] = finish(place, place.start())
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: asked(place), TIMEOUT_SECONDS, "the signal to be noted")
    lives["terminated"] = finish(place, process)

    lives["interrupted"] = strike(place, signal.SIGINT, whole_group=True, wait_at=5, workers=2)
    lives["killed"] = strike(place, signal.SIGKILL, wait_at=9)

    process = place.start(wait_at=12, fail_at=14)
    before = wait_for_ready(process)
    # On a busy machine its few steps are over before the slots that it began from are free again.
    wait_until(lambda: can_be_saved(place), TIMEOUT_SECONDS, "a state of it, or a slot for one")
    lives["failed"] = finish(place, process, before)
    lives["finished"] = finish(place, place.start())
    lives["started again"] = finish(place, place.start())
    lives["undisturbed"] = finish(undisturbed, alongside)
    yield Story(place, undisturbed, lives)
    for one in (place, undisturbed):
        assert not one.spool.exists()


def test_an_undisturbed_run_saves_under_the_name_of_the_script(story: Story) -> None:
    ended = story.lives["undisturbed"]
    assert ended.code == 0, ended.errors
    assert ended.output == ["from step 0", f"to step {STEPS} outputs 4"]
    assert story.undisturbed.run_id == "trains_alone"
    moment = ended.newest.moment
    assert (moment.step, moment.triggers) == (STEPS, ("final",))
    (record,) = story.undisturbed.records()
    assert (record.outcome, record.end_step, record.exit_code) == ("succeeded", STEPS, None)


def test_sigterm_saves_and_leaves_with_75(story: Story) -> None:
    ended = story.lives["terminated"]
    assert ended.code == 75, ended.errors
    assert (ended.newest.moment.step, ended.newest.moment.triggers) == (3, ("preemption",))
    assert story.place.records()[0].outcome == "preemption"


def test_ctrl_c_saves_and_leaves_with_130_although_it_reaches_the_workers_too(
    story: Story,
) -> None:
    ended = story.lives["interrupted"]
    assert ended.code == 130, ended.errors
    assert ended.output == ["from step 3"]
    assert (ended.newest.moment.step, ended.newest.moment.triggers) == (6, ("interrupt",))
    assert "Traceback" not in ended.errors


def test_after_a_kill_the_run_goes_on_from_what_is_in_memory(story: Story) -> None:
    ended = story.lives["killed"]
    assert ended.code == -signal.SIGKILL
    assert ended.spool_is_there
    assert ended.newest.moment.step == 6, "nothing could be persisted any more"
    (first, *_) = story.lives["failed"].output
    assert int(first.removeprefix("from step ")) > 6


def test_a_script_that_fails_leaves_its_newest_state_behind(story: Story) -> None:
    ended = story.lives["failed"]
    assert ended.code == 1
    assert "RuntimeError: the script itself fails" in ended.errors
    newest = ended.newest.moment
    assert newest.attempt == story.place.records()[-3].attempt, ended.errors
    assert 9 < newest.step <= 14
    assert story.lives["finished"].output[0] == f"from step {newest.step}"


def test_a_copy_under_way_when_the_script_ends_is_saved(tmp_path: Path) -> None:
    place = Place(tmp_path, "my-run")

    ended = finish(place, place.start(SCRIPT.with_name("leaves_a_copy_alone.py")))

    assert ended.code == 0, ended.errors
    assert ended.newest is not None, ended.errors
    assert ended.newest.moment.step == 1


def test_a_run_to_which_all_this_happened_ends_with_the_bits_of_an_undisturbed_one(
    story: Story,
) -> None:
    assert story.lives["finished"].code == 0, story.lives["finished"].errors
    assert story.place.digest() == story.undisturbed.digest()


def test_a_finished_run_continues_as_finished(story: Story) -> None:
    ended = story.lives["started again"]
    assert ended.code == 0, ended.errors
    assert ended.output == [f"from step {STEPS}", f"to step {STEPS} outputs 4"]
    assert "it is finished; set RUNNER_RUN_ID for another run" in ended.errors
    assert ended.newest == story.lives["finished"].newest
    assert story.place.records()[-1].outcome == "succeeded"


def test_the_same_run_twice_at_once_is_refused(story: Story) -> None:
    ended = story.lives["second at once"]
    assert ended.code == 1
    assert "SpoolTaken" in ended.errors
    assert "is in use by another" in ended.errors
    assert ended.output == []


def test_every_life_but_the_refused_one_is_an_attempt(story: Story) -> None:
    records = story.place.records()
    assert [record.attempt for record in records] == [1, 2, 3, 4, 5, 6]
    outcomes = ["preemption", "interrupt", None, "ended", "succeeded", "succeeded"]
    assert [record.outcome for record in records] == outcomes
    assert records[1].resumed_from is not None


def test_the_spool_is_gone_when_the_process_has_ended_by_itself(story: Story) -> None:
    there = {name for name, ended in story.lives.items() if ended.spool_is_there}
    assert there == {"second at once", "killed"}


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("RUNNER_RUN_ID", "../elsewhere", "RUNNER_RUN_ID='../elsewhere'"),
        ("RUNNER_PARAMS", "[1]", "RUNNER_PARAMS must be a JSON object"),
    ],
)
def test_a_variable_that_cannot_be_obeyed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, problem: str
) -> None:
    """In this process: nothing has begun when it is refused."""
    import torch

    import runner
    from runner.errors import UsageError

    monkeypatch.chdir(tmp_path)
    for name in ("RUNNER_SPOOL", "RUNNER_RUN_ID", "RUNNER_PARAMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)

    def script() -> None:
        runner.params()
        runner.attach(model=torch.nn.Linear(1, 1))

    with pytest.raises(UsageError, match=re.escape(problem)):
        script()
    assert list(tmp_path.iterdir()) == []
