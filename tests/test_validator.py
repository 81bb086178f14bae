"""Checkpoints that are tried with the job's function: each kind of damage, and each kind of end."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from nodes import PROGRAMS
from slots import RUN, Snapshot, checkpoint_folder, commit, memory_folder
from waiting import wait_until

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.keeper import marker_of
from runner.checkpoint.manifest import Manifest, Moment
from runner.checkpoint.persist import Persister
from runner.checkpoint.restore import Loaded
from runner.checkpoint.retention import Keep
from runner.checkpoint.validation import Tolerances, Verdict, judge
from runner.errors import UsageError
from runner.job import Job
from runner.launch.process import TrainerProcess
from runner.launch.process_tree import read_entry
from runner.launch.site import ProcessSite
from runner.launch.trial import (
    Answer,
    ProcessTrial,
    read_answer,
    too_late,
    trial_environment,
)
from runner.saves import SaveRecord
from runner.spool import open_slot
from runner.store import DirectoryStore
from runner.supervisor import events
from runner.supervisor.preflight import check_entrypoint
from runner.supervisor.state import Phase, State
from runner.supervisor.validator import Validator, is_quiet, validator_of
from runner.training.capture import TrainingState
from runner.training.validate import call, find

JUDGES = str(PROGRAMS / "judges.py")
RUNNING, SUCCEEDED = State(phase=Phase.RUNNING), State(phase=Phase.SUCCEEDED)


@pytest.fixture
def store() -> Iterator[DirectoryStore]:
    with memory_folder() as folder:
        yield DirectoryStore(folder)


def job_with(entrypoint: str = "judges:val_loss", **keys: Any) -> Job:
    return Job.model_validate(
        {
            "name": "job",
            "command": ["python", "trains.py"],
            "workdir": str(PROGRAMS),
            "env": keys.pop("env", {}),
            "checkpoint": {"validate": {"entrypoint": entrypoint, **keys}},
        }
    )


def a_model() -> torch.nn.Module:
    torch.manual_seed(7)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)
    )


def save(store: DirectoryStore, number: int = 1, damage: Callable[[Any], None] | None = None,
         **moment: Any) -> Manifest:  # fmt: skip
    """A checkpoint of a model with the loss that it has, after `damage` was done to its tensors."""
    model = a_model()
    document, sink = TrainingState({"model": model}, {"seen": 3}).encode({})
    tensors = {n: t.clone() for n, t in sink.files["model.safetensors"].items()}
    loss = find_judge("val_loss")({"model": model.state_dict()}, params={}, state={})
    if damage is not None:
        damage(tensors)
    files = {
        "model.safetensors": safetensors.torch.save(tensors),
        "state.json": json.dumps(document).encode(),
    }
    facts = {"metrics": loss, "epoch": 1, "batch": 0} | moment
    return commit(store, Snapshot(Moment(1, number, 100 * number, **facts), files))


def find_judge(name: str) -> Callable[..., Any]:
    return find(f"tests_judges:{name}")


@pytest.fixture(autouse=True)
def _judges_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("tests_judges", JUDGES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "tests_judges", module)


# ---------------------------------------------------------------- what the process does


def called(store: DirectoryStore, manifest: Manifest, folder: Path, name: str = "val_loss") -> Any:
    """What the function says of a checkpoint, loaded as the process loads it."""
    archive = Archive(store, RUN)
    layout = archive.layout(manifest)
    path = folder / "slot"
    archive.load_into(manifest, layout, memoryview(open_slot(path, layout.nbytes)))
    marker = asdict(marker_of(0, Loaded(manifest, layout), {}))
    return call(find_judge(name), {"marker": marker, "params": {}}, path)


def test_a_good_checkpoint_gives_the_metrics_that_were_logged(
    store: DirectoryStore, tmp_path: Path
) -> None:
    manifest = save(store)

    returned = called(store, manifest, tmp_path)

    assert judge(returned, manifest.moment.metrics, Tolerances()).verdict is Verdict.VALID
    assert set(returned) == set(manifest.moment.metrics) == {"val_loss"}


def test_swapped_tensors_of_equal_shape_show_in_the_metrics(
    store: DirectoryStore, tmp_path: Path
) -> None:
    def swap_rows(tensors: Any) -> None:
        tensors["0.weight"] = tensors["0.weight"].flip(0).contiguous()

    manifest = save(store, damage=swap_rows)

    validation = judge(called(store, manifest, tmp_path), manifest.moment.metrics, Tolerances())

    assert validation.verdict is Verdict.INVALID
    assert validation.reason.startswith("val_loss is ")
    assert "when it was saved" in validation.reason


def test_weights_that_are_nan_show_in_the_forward_pass(
    store: DirectoryStore, tmp_path: Path
) -> None:
    manifest = save(store, damage=lambda tensors: tensors["3.bias"].fill_(torch.nan))

    validation = judge(called(store, manifest, tmp_path), manifest.moment.metrics, Tolerances())

    assert validation.reason == "val_loss is nan"


def test_a_component_is_what_its_state_dict_was(store: DirectoryStore, tmp_path: Path) -> None:
    from runner.spool import Marker
    from runner.training.saved import open_saved, state_dicts

    model = a_model()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    parts = {"model": model, "optimizer": optimizer}
    document, sink = TrainingState(parts, {"seen": 3}).encode({})
    files = {file: safetensors.torch.save(tensors) for file, tensors in sink.files.items()}
    files["state.json"] = json.dumps(document).encode()
    manifest = commit(store, Snapshot(Moment(1, 1, 1, epoch=0, batch=0), files))
    archive, path = Archive(store, RUN), tmp_path / "slot"
    layout = archive.layout(manifest)
    archive.load_into(manifest, layout, memoryview(open_slot(path, layout.nbytes)))
    marker = Marker(**asdict(marker_of(0, Loaded(manifest, layout), {})))

    components, state = state_dicts(open_saved(path, marker))

    assert state == {"seen": 3}
    assert set(components) == set(parts)
    a_model().load_state_dict(components["model"])
    torch.optim.Adam(model.parameters()).load_state_dict(components["optimizer"])
    assert set(components["optimizer"]) == set(optimizer.state_dict())
    assert all(torch.equal(v, components["model"][k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------- at submit

REFUSED = {
    "no such module": ("jugdes:val_loss", "there is no module 'jugdes'"),
    "no such function": ("judges:val_los", "judges has no 'val_los'; did you mean 'val_loss'"),
    "no function": ("judges:a_value", "judges:a_value is no function, but a int"),
    "too few arguments": ("judges:takes_too_little", "cannot be called as check(components, *,"),
    "too many arguments": ("judges:takes_too_much", "missing a required argument: 'more'"),
}  # fmt: skip


def check(job: Job) -> None:
    check_entrypoint(job, ProcessSite(job))


@pytest.mark.parametrize(("entrypoint", "problem"), REFUSED.values(), ids=list(REFUSED))
def test_an_entry_point_that_cannot_be_called_is_refused(entrypoint: str, problem: str) -> None:
    with pytest.raises(UsageError, match="entrypoint: ") as raised:
        check(job_with(entrypoint))

    assert problem in str(raised.value)


def test_an_entry_point_that_can_be_called_is_not_called() -> None:
    check(job_with("judges:val_loss"))


def test_an_entry_point_whose_module_dies_is_refused() -> None:
    with pytest.raises(UsageError, match="it ended with signal SIGSEGV"):
        check(job_with(env={"JUDGE_DIES": "1"}))


# ---------------------------------------------------------------- one process


def test_it_sees_no_credentials_and_no_gpu_and_has_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "RUNNER_SPOOL", "HARMLESS"):
        monkeypatch.setenv(name, "x")

    environment = trial_environment(job_with(env={"OMP_NUM_THREADS": "8"}), "a-run")

    assert not {"AWS_SECRET_ACCESS_KEY", "RUNNER_SPOOL"} & set(environment)
    assert environment["HARMLESS"] == "x"
    assert environment["RUNNER_RUN_ID"] == "a-run"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def trial_in_a_process(job: Job, folder: Path, request: Mapping[str, Any]) -> ProcessTrial:
    return ProcessTrial(job, folder, request, "a-run")


def trial_in(folder: Path, env: dict[str, str], **request: Any) -> ProcessTrial:
    request = {"entrypoint": "judges:val_loss", **request}
    return trial_in_a_process(job_with(env=env), folder, request)


def tried(
    tmp_path: Path, limit: float, over: threading.Event, **env: str
) -> tuple[ProcessTrial, Any]:
    trial = trial_in(tmp_path, env, marker={}, gives_way=True)
    trial.begin()
    return trial, trial.wait(limit, over)


def test_one_that_hangs_is_ended(tmp_path: Path) -> None:
    trial, answer = tried(tmp_path, 0.3, threading.Event(), JUDGE_HANGS="1")

    assert answer.problem == "it took longer than 300ms"
    with pytest.raises(ProcessLookupError):
        os.kill(trial.pid, 0)


def test_whatever_it_has_started_ends_with_it(tmp_path: Path) -> None:
    said = tmp_path / "child"
    over = threading.Event()
    trial = trial_in(tmp_path, {"JUDGE_HAS_A_CHILD": str(said), "JUDGE_HANGS": "1"})
    trial.begin()
    wait_until(lambda: said.exists() and said.read_text(), 30, "a child of its own")
    child = read_entry(int(said.read_text()))
    assert child is not None

    over.set()
    assert trial.wait(60.0, over) is None

    def is_gone() -> bool:
        now = read_entry(child.pid)
        return now is None or now.identity != child.identity or not now.alive

    wait_until(is_gone, 10, "the end of that child")


def test_what_others_have_of_the_processor_is_not_its_time() -> None:
    assert too_late(9.0, 0.0, 10.0) is None
    assert too_late(11.0, 0.0, 10.0) == Answer(problem="it took longer than 10s")
    assert too_late(59.0, 55.0, 10.0) is None
    assert too_late(61.0, 60.0, 10.0) == Answer(unusable="there was no processor for it")


def test_one_that_dies_says_how(tmp_path: Path) -> None:
    _, answer = tried(tmp_path, 60.0, threading.Event(), JUDGE_DIES="1")

    assert answer.problem.startswith("it ended with signal SIGSEGV")


def test_one_that_was_killed_says_nothing_of_the_checkpoint(tmp_path: Path) -> None:
    trial = trial_in(tmp_path, {"JUDGE_HANGS": "1"})
    trial.begin()
    threading.Timer(0.2, os.kill, (trial.pid, signal.SIGKILL)).start()

    answer = trial.wait(60.0, threading.Event())

    assert answer is not None
    assert answer.problem == ""
    assert answer.unusable.startswith("it was ended with signal SIGKILL")


def test_the_end_of_a_trainer_is_not_that_of_a_trial(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out, TrainerProcess.start(
        [sys.executable, "-c", "input()"], cwd=tmp_path, env=dict(os.environ), stdout=out.fileno(),
        stderr=out.fileno(),
    ) as trainer:  # fmt: skip
        trial = trial_in(tmp_path, {"JUDGE_HANGS": "1"})
        trial.begin()
        wait_until(lambda: os.getsid(trial.pid) == trial.pid, 30, "a session of its own")

        trainer.kill_tree()

        entry = read_entry(trial.pid)
        assert entry is not None
        assert entry.alive
    assert trial.wait(0.0, threading.Event()) is not None


def a_fifo(result: Path) -> None:
    os.mkfifo(result)


def a_link(result: Path) -> None:
    result.with_name("elsewhere").write_text('{"metrics": {"val_loss": 0}}')
    result.symlink_to("elsewhere")


ANSWERS: dict[str, Callable[[Path], object]] = {
    "none": lambda result: None,
    "a pipe that nobody writes": a_fifo,
    "a link": a_link,
    "a folder": lambda result: result.mkdir(),
    "too long": lambda result: result.write_text(" " * (2 << 20) + '{"metrics": {}}'),
    "no JSON": lambda result: result.write_text("{"),
    "no object": lambda result: result.write_text("[1]"),
    "no metrics": lambda result: result.write_text("{}"),
    "metrics that are none": lambda result: result.write_text('{"metrics": {"val_loss": []}}'),
    "metrics that are a list": lambda result: result.write_text('{"metrics": [1]}'),
}  # fmt: skip


@pytest.mark.parametrize("leave", ANSWERS.values(), ids=list(ANSWERS))
@pytest.mark.timeout(30)
def test_an_answer_that_is_none_is_not_waited_for_or_believed(
    tmp_path: Path, leave: Callable[[Path], object]
) -> None:
    leave(tmp_path / "result.json")

    answer = read_answer(tmp_path, 3, b"one line\nthe last one\n")

    assert answer == Answer(problem="it ended with exit code 3: the last one")


def test_one_gives_way_at_once(tmp_path: Path) -> None:
    over = threading.Event()
    threading.Timer(0.2, over.set).start()
    begun = time.monotonic()

    _, answer = tried(tmp_path, 60.0, over, JUDGE_HANGS="1")

    assert answer is None
    assert time.monotonic() - begun < 5


# ---------------------------------------------------------------- when

MOMENTS = {
    "training": (State(phase=Phase.RUNNING), True),
    "the last save of a run that has come to its end": (
        State(phase=Phase.DRAINING, goal=Phase.SUCCEEDED), True),
    "the end": (State(phase=Phase.SUCCEEDED), True),
    "a notice, with time to go on": (State(phase=Phase.RUNNING, deadline=5.0), False),
    "the save after SIGTERM": (State(phase=Phase.DRAINING, goal=Phase.PREEMPTED), False),
    "an interrupt": (State(phase=Phase.DRAINING, goal=Phase.INTERRUPTED), False),
    "a hang": (State(phase=Phase.STOPPING), False),
    "a restart": (State(phase=Phase.RESTORING), False),
    "another supervisor": (State(phase=Phase.FENCED), False),
}  # fmt: skip


@pytest.mark.parametrize(("state", "quiet"), MOMENTS.values(), ids=list(MOMENTS))
def test_nothing_is_validated_while_something_is_more_urgent(state: State, quiet: bool) -> None:
    assert is_quiet(state) is quiet


class Supervised:
    """A validator at work, and what it has told."""

    def __init__(self, store: DirectoryStore, folder: Path, **keys: Any) -> None:
        self.told: list[events.Event] = []
        ledger = Ledger(store, RUN, "0123456789abcdef")
        ledger.claim("node")
        self.persister = Persister(store, ledger, Keep(), validates=True)
        job = job_with(**keys)
        found = validator_of(
            job, partial(trial_in_a_process, job), folder / "v", self.persister, self.told.append
        )
        assert found is not None
        self.validator: Validator = found
        self.validator.start()

    def saved(self, manifest: Manifest, state: State = SUCCEEDED, scope: str = "full") -> None:
        moment = manifest.moment
        record = SaveRecord(manifest.name, 1, moment.step, 0.0, moment.triggers, scope=scope)
        self.validator.heard(events.Persisted(0.0, record), state)

    def results(self) -> list[tuple[str, str]]:
        told = [event for event in self.told if isinstance(event, events.Validated)]
        return [(event.checkpoint, event.result) for event in told]

    def wait_for(self, count: int) -> list[tuple[str, str]]:
        wait_until(lambda: len(self.results()) >= count, 60, f"{count} results")
        return self.results()


@pytest.fixture
def supervised(store: DirectoryStore, tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    started: list[Supervised] = []

    def start(**keys: Any) -> Supervised:
        started.append(Supervised(store, tmp_path, **keys))
        return started[-1]

    yield start
    for one in started:
        one.validator.finish(lambda: False)
        assert not one.validator.is_alive()
        assert not (tmp_path / "v").exists()


def test_a_checkpoint_is_tried_after_its_commit(
    store: DirectoryStore, supervised: Callable[..., Supervised]
) -> None:
    good = save(store, 1)
    bad = save(store, 2, damage=lambda tensors: tensors.pop("3.bias"))
    at_work = supervised()

    at_work.saved(good)
    at_work.wait_for(1)
    at_work.saved(bad)

    assert at_work.wait_for(2) == [(good.name, "valid"), (bad.name, "invalid")]
    found = [Archive(store, RUN).validation(manifest.name) for manifest in (good, bad)]
    assert found[0] is not None
    assert found[0].compared["val_loss"].logged == good.moment.metrics["val_loss"]
    assert found[0].entrypoint == "judges:val_loss"
    assert found[1] is not None
    assert "state.json refers to model.safetensors:3.bias, which is not there" in found[1].reason


def test_bytes_that_are_not_those_saved_are_put_away_and_saved_anew(
    store: DirectoryStore, supervised: Callable[..., Supervised]
) -> None:
    manifest = save(store)
    file = checkpoint_folder(store, manifest.name) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    at_work = supervised()

    at_work.saved(manifest)

    assert at_work.wait_for(1) == [(manifest.name, "invalid")]
    assert any(isinstance(event, events.SaveAsked) for event in at_work.told)
    assert Archive(store, RUN).quarantined() == {manifest.name}


def test_where_nothing_can_be_said_there_is_no_verdict(
    store: DirectoryStore, supervised: Callable[..., Supervised]
) -> None:
    manifest = save(store)
    at_work = supervised(entrypoint="judges:not_there_any_more")

    at_work.saved(manifest)

    assert at_work.wait_for(1) == [(manifest.name, "unknown")]
    assert Archive(store, RUN).validation(manifest.name) is None


def test_one_for_which_there_is_no_memory_is_not_begun(
    store: DirectoryStore,
    supervised: Callable[..., Supervised],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runner.supervisor.validator.available_bytes", lambda folder: 512 << 20)
    manifest = save(store)
    at_work = supervised()

    at_work.saved(manifest)

    assert at_work.wait_for(1) == [(manifest.name, "unknown")]
    (told,) = [each for each in at_work.told if isinstance(each, events.Validated)]
    assert told.reason == "it needs 537 MB, and there are 537 MB"


def test_the_weights_alone_are_not_tried(
    store: DirectoryStore, supervised: Callable[..., Supervised]
) -> None:
    at_work = supervised(entrypoint="judges:not_there")
    at_work.saved(save(store), scope="weights")

    at_work.validator.finish(lambda: True)

    assert at_work.results() == []


def test_one_that_gives_way_leaves_no_verdict_and_the_next_is_due(
    store: DirectoryStore, supervised: Callable[..., Supervised]
) -> None:
    first, second = save(store, 1), save(store, 2)
    at_work = supervised(env={"JUDGE_HANGS": "1"}, every=5)
    at_work.saved(first, RUNNING)
    wait_until(lambda: at_work.validator.pids, 10, "the process")

    at_work.validator.heard(events.Notice(0.0, "aws", 120.0), replace(RUNNING, deadline=120.0))

    assert at_work.wait_for(1) == [(first.name, "unknown")]
    assert not at_work.validator.pids
    at_work.saved(second, RUNNING)
    wait_until(lambda: at_work.validator.pids, 10, "the next process")


def test_the_nth_and_the_final_one_are_tried_and_of_those_that_wait_the_newest(
    store: DirectoryStore, supervised: Callable[..., Supervised]
) -> None:
    saves = [save(store, number) for number in range(1, 5)]
    final = save(store, 5, triggers=("final",))
    at_work = supervised(entrypoint="judges:not_there", every=3)
    pressing = replace(RUNNING, deadline=1.0)
    at_work.saved(saves[0], pressing)  # due, and has to wait
    at_work.saved(saves[1], pressing)  # due as well: nothing has come of the first

    at_work.validator.heard(events.Tick(0.0), RUNNING)
    assert at_work.wait_for(1) == [(saves[1].name, "unknown")]

    at_work.saved(final, RUNNING)
    assert at_work.wait_for(2)[1] == (final.name, "unknown")


def test_the_final_one_does_not_wait_for_an_older_one(
    store: DirectoryStore, supervised: Callable[..., Supervised]
) -> None:
    older, final = save(store, 1), save(store, 2, triggers=("final",))
    at_work = supervised(env={"JUDGE_HANGS": "1"}, timeout="1s")
    at_work.saved(older, RUNNING)
    wait_until(lambda: at_work.validator.pids, 10, "the process")

    at_work.saved(final, State(phase=Phase.DRAINING, goal=Phase.SUCCEEDED))

    assert at_work.wait_for(2) == [(older.name, "unknown"), (final.name, "invalid")]


def test_one_is_not_deleted_while_it_is_tried_nor_while_it_waits(
    store: DirectoryStore, supervised: Callable[..., Supervised]
) -> None:
    """Where checkpoints come faster than they are tried, none would ever be found valid."""
    first, second = save(store, 1), save(store, 2)
    at_work = supervised(env={"JUDGE_HANGS": "1"}, every=1)
    at_work.saved(first, RUNNING)
    wait_until(lambda: at_work.validator.pids, 10, "the process")
    at_work.saved(second, RUNNING)
    later = [save(store, number).name for number in range(3, 8)]

    assert at_work.persister.retain() == later[:2]

    at_work.validator.heard(events.Notice(0.0, "aws", 120.0), replace(RUNNING, deadline=120.0))
    assert at_work.wait_for(1) == [(first.name, "unknown")]
    assert at_work.persister.retain() == [first.name]


def test_the_end_waits_for_the_last_one_if_it_may(
    store: DirectoryStore, supervised: Callable[..., Supervised]
) -> None:
    final = save(store, 1, triggers=("final",))
    at_work = supervised(entrypoint="judges:not_there")
    at_work.saved(final)

    at_work.validator.finish(lambda: True)

    assert at_work.results() == [(final.name, "unknown")]
