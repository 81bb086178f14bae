"""Search hyperparameters with Optuna: each trial is a run, with checkpoints, and resumed like one.

    python -m jobs.search jobs/rul_search.yaml

The study's journal lies beside the runs in the job's store, so the search itself may be preempted:
started again, it goes on with the trials that it had, and a trial that was under way resumes from
its run's newest checkpoint. A pruned trial's run is stopped, and keeps its checkpoints. SIGTERM and
SIGINT are passed on to the run at hand; the exit codes are those of `runner`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from runner.errors import JobError, StoreError, UnknownName, UsageError
from runner.exitcodes import FINISHED, INTERRUPTED, PREEMPTED, USAGE
from runner.job import Job, is_s3, load_job
from runner.supervisor.history import History
from runner.supervisor.lookup import Where, find_run

POLL_SECONDS = 0.5
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Search:
    """What the file says: `space` has for each param `choices`, or `low` and `high`."""

    study: str
    job: str
    metric: str
    trials: int
    space: dict[str, dict[str, Any]]
    direction: str = "minimize"
    params: dict[str, Any] = field(default_factory=dict)
    pruner: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None

    def sample(self, trial: Trial) -> dict[str, Any]:
        """The params of a trial."""
        return {name: suggest(trial, name, about) for name, about in self.space.items()}


def suggest(trial: Trial, name: str, about: dict[str, Any]) -> Any:
    if "choices" in about:
        return trial.suggest_categorical(name, about["choices"])
    whole = isinstance(about["low"], int) and isinstance(about["high"], int)
    return (trial.suggest_int if whole else trial.suggest_float)(name, **about)


class Searcher:
    """Takes trial after trial, until enough have ended or a signal has come."""

    def __init__(self, search: Search, job: Job) -> None:
        self.search, self.job = search, job
        self.signal: int | None = None
        self.run: subprocess.Popen[bytes] | None = None
        store = job.store_path
        store.mkdir(parents=True, exist_ok=True)
        pruner = dict(search.pruner)
        kind = getattr(optuna.pruners, pruner.pop("name", "MedianPruner"))
        self.study = optuna.create_study(
            study_name=search.study,
            storage=JournalStorage(JournalFileBackend(str(store / f"{search.study}.journal"))),
            direction=search.direction,
            sampler=optuna.samplers.TPESampler(seed=search.seed),
            pruner=kind(**pruner),
            load_if_exists=True,
        )

    def go(self) -> int:
        """The exit code."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        self._take_up()
        while self.signal is None and self._ended() < self.search.trials:
            code = self._try_one(self.study.ask())
            if code == USAGE:
                return USAGE
        if self.signal is not None:
            return PREEMPTED if self.signal == signal.SIGTERM else INTERRUPTED
        print(json.dumps({"best": self.study.best_value, "params": self.study.best_params}))
        return FINISHED

    def _take_up(self) -> None:
        """Trials that were under way when the search ended begin again, with the runs they had."""
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)
            if trial.params.keys() == self.search.space.keys():
                run = {"run": trial.user_attrs.get("run", self._run_id(trial.number))}
                self.study.enqueue_trial(trial.params, user_attrs=run)

    def _ended(self) -> int:
        return len(self.study.get_trials(deepcopy=False, states=ENDED))

    def _run_id(self, number: int) -> str:
        return f"{self.search.study}-{number:04d}"

    def _try_one(self, trial: Trial) -> int:
        """Run a trial and tell the study how it ended; one that was preempted has not ended."""
        run_id = trial.user_attrs.get("run") or self._run_id(trial.number)
        trial.set_user_attr("run", run_id)
        params = {**self.search.params, **self.search.sample(trial)}
        options = [word for name, v in params.items() for word in ("-p", f"{name}={json.dumps(v)}")]
        command = [sys.executable, "-m", "runner", "run", self.search.job, "--run-id", run_id]
        self.run = subprocess.Popen([*command, *options], start_new_session=True)
        if self.signal is not None:  # it came before there was a run to pass it on to
            self.run.send_signal(self.signal)
        values, pruned = self._follow(trial, run_id, self.run)
        code = self.run.wait()
        if self.signal is not None and code in (PREEMPTED, INTERRUPTED):
            return code
        if pruned and code in (FINISHED, INTERRUPTED):
            self.study.tell(trial, state=TrialState.PRUNED)
        elif code == FINISHED and values:
            best = min if self.search.direction == "minimize" else max
            self.study.tell(trial, best(values))
        else:
            self.study.tell(trial, state=TrialState.FAIL)
        return code

    def _follow(
        self, trial: Trial, run_id: str, run: subprocess.Popen[bytes]
    ) -> tuple[list[float], bool]:
        """Report each new value of the metric; stop the run of a trial that is not worth it."""
        values: list[float] = []
        news = self._news(run_id)
        pruned = False
        while True:
            is_over = run.poll() is not None  # asked first, so that its last value is not missed
            for step, value in next(news):
                values.append(value)
                trial.report(value, step)
            if is_over:
                return values, pruned
            if not pruned and values and trial.should_prune():
                pruned = True
                run.send_signal(signal.SIGINT)
            time.sleep(POLL_SECONDS)

    def _news(self, run_id: str) -> Iterator[list[tuple[int, float]]]:
        """What was logged since the last time; each step once, however often it was trained."""
        history, newest = None, -1
        while True:
            found = []
            try:
                history = history or History(find_run(run_id, Where(self.job.store)))
                for point in history.advance():
                    if point.step > newest and self.search.metric in point.values:
                        newest = point.step
                        found.append((newest, point.values[self.search.metric]))
            except (UnknownName, StoreError):
                pass  # it has not begun yet
            yield found

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.signal = signum
        if self.run is not None and self.run.poll() is None:
            self.run.send_signal(signum)


def main(path: str) -> int:
    try:
        search = Search(**yaml.safe_load(Path(path).read_text()))
        job = load_job(Path(search.job), params=search.params)
    except (TypeError, OSError, yaml.YAMLError) as error:
        print(f"search: {path}: {error}", file=sys.stderr)
        return USAGE
    except (JobError, UsageError) as error:
        print(f"search: {error}", file=sys.stderr)
        return USAGE
    if is_s3(job.store):
        print("search: the study's journal needs a store that is a directory", file=sys.stderr)
        return USAGE
    return Searcher(search, job).go()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
