"""The command line: which run is meant, whether it may go on, and what is printed about it.

Commands that only look, or refuse, are called in this process. What starts a supervisor is a
process of its own, mostly with a trainer that needs no torch.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import PROGRAMS, Node, is_running, nodes_in
from slots import commit, snapshot
from waiting import wait_until

from runner.checkpoint.attempts import Ledger
from runner.checkpoint.manifest import Manifest
from runner.supervisor import index, lookup

ROW_KEYS = [
    *("run_id", "phase", "live", "step", "epoch", "epochs", "batch", "attempt", "activity"),
    *("cause", "saved_step", "last_checkpoint", "store", "pid"),
]
STATUS_KEYS = [
    *ROW_KEYS,
    *("total_steps", "progress_ratio", "seconds_per_step", "eta_seconds", "metric", "value"),
    *("saved_at", "saved_seconds_ago", "node", "preemptions", "failures", "lost_steps"),
    *("grace_seconds", "emergency_seconds", "headroom_seconds", "goodput_ratio"),
    *("wall_seconds", "started_at", "seen_at"),
]
CHECKPOINT_KEYS = [
    *("name", "step", "epoch", "attempt", "save", "triggers", "bytes", "healthy", "validated"),
    *("pinned", "created_at", "metrics", "validation"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node with a run `job` of 24 steps in two epochs that has finished: a store to look at."""
    with nodes_in(tmp_path_factory.mktemp("finished")) as new:
        node = new("node")
        done = node.run("run", trained(node))
        assert done.code == 0, done.err
        (node.folder / "printed").write_text(done.out)
        yield node


def trained(node: Node, name: str = "job", **keys: Any) -> str:
    """A job with checkpoints at step 8 and at the best ends of its epochs."""
    checkpoint = {
        "every": {"minutes": 600},
        "snapshot_every": {"steps": 1},
        "keep": {"last": 99, "best": {"metric": "val_loss", "count": 2}},
    }
    keys = {"params": {"befalls": {"1": {"8": "save"}}}, **keys}
    return node.training(name, checkpoint=checkpoint, **keys)


@pytest.fixture(scope="module")
def printed(finished: Node) -> list[str]:
    """What the trainer of the finished run has printed."""
    return (finished.folder / "printed").read_text().splitlines()


def everything(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---------------------------------------------------------------- which run is meant


def test_the_run_is_named_like_the_job_unless_another_id_or_a_new_one_is_asked_for(
    node: Node,
) -> None:
    job = node.job("true")
    runs = [
        node.run("run", job),
        node.run("run", job, "--new"),
        node.run("submit", job, "--new"),
        node.run("run", job, "--run-id", "Other.Run_1"),
    ]

    assert [done.code for done in runs] == [0] * 4
    assert sorted(node.store.children("")) == ["Other.Run_1", "job", "job-2", "job-3"]
    assert [len(node.records(run_id)) for run_id in ("job", "job-2", "Other.Run_1")] == [1, 1, 1]


def test_a_finished_run_says_so_and_nothing_is_written(finished: Node) -> None:
    job = trained(finished)
    before = everything(finished.store_folder)

    for command in ("run", "submit"):
        again = finished.call(command, job)
        assert (again.code, again.out) == (0, "")
        assert "run job is finished; --new" in again.err

    assert everything(finished.store_folder) == before


@pytest.mark.parametrize(
    "run_id", ["", "a/b", "..", "-x", ".hidden", "a" * 64, "ümlaut", "a b", "a\n"]
)
def test_a_run_id_that_cannot_be_a_folder_is_refused(node: Node, run_id: str) -> None:
    refused = node.call("run", node.job("true"), f"--run-id={run_id}")

    assert refused.code == 2
    assert "run id" in refused.err
    assert not node.store_folder.exists()


def test_a_changed_job_is_refused_with_what_differs_until_it_is_accepted(node: Node) -> None:
    """A run that was interrupted: its trainer ends with 75 at first, then with 0."""
    script = "test -e done || { touch done; kill -INT $PPID; sleep 60; }"

    def job(**keys: Any) -> str:
        return node.job("bash", "-c", script, preemption={"grace": "2s"}, **keys)

    assert node.run("run", job(params={"lr": 0.1, "size": 8})).code == 130
    changed = job(params={"lr": 0.2, "depth": 2, "size": 8}, env={"A": "b"})
    before = everything(node.store_folder)

    refused = node.call("run", changed)

    assert refused.code == 2
    assert [line for line in refused.err.splitlines() if line.startswith("  ")] == [
        "  params.lr: 0.1 -> 0.2",
        "  params.depth: (not set) -> 2",
    ]
    assert "--update" in refused.err
    assert "--new" in refused.err
    assert everything(node.store_folder) == before
    assert node.run("run", changed, "--update").code == 0
    document = json.loads((node.store_folder / "job" / "run.json").read_text())
    assert document["job"]["params"] == {"lr": 0.2, "depth": 2, "size": 8}
    assert [record.outcome for record in node.records()] == ["interrupted", "succeeded"]


def test_how_a_run_is_run_may_change_between_attempts(finished: Node) -> None:
    """The command and the params make a run what it is; the rest does not."""
    job = finished.training(
        preemption={"grace": "5s"}, env={"OTHER": "1"}, params={"befalls": {"1": {"8": "save"}}}
    )

    assert "finished" in finished.call("run", job).err
    other = finished.call("run", job, "-p", "epochs=3")
    assert other.code == 2
    assert "params.epochs: (not set) -> 3" in other.err


def test_a_param_of_the_command_line_overrides_the_jobs(node: Node) -> None:
    job = node.job("bash", "-c", "echo $RUNNER_PARAMS", params={"lr": 0.1, "nested": {"x": 1}})

    done = node.run("run", job, "-p", "nested.x=[1, 2]", "-p", "name=two words")

    assert json.loads(done.out) == {"lr": 0.1, "nested": {"x": [1, 2]}, "name": "two words"}


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def refusals(node: Node) -> dict[str, tuple[list[str], str]]:
    """Arguments that are wrong, and what must be said about them."""
    (node.folder / "a-file").write_text("")
    (node.folder / "pkg").mkdir()
    (node.folder / "pkg" / "train.py").write_text("")
    (node.folder / "pkg" / "runner.py").write_text("")
    (node.folder / "text.yaml").write_text("name: job\ncommand: [true]\nchekpoint: {}\n")
    fine = node.job("true")
    on_s3 = node.job("true", name="e", store="s3://bucket", s3={"ca_bundle": "certificates.pem"})
    return {
        "no job file": (["run", "nowhere.yaml"], "nowhere.yaml"),
        "a key that is none": (["run", "text.yaml"], "text.yaml:3: chekpoint"),
        "no program": (["run", node.job("no-such-program", name="a")], "no-such-program"),
        "no script": (["run", node.job("python", "nowhere.py", name="b")], "nowhere.py"),
        "no module": (["run", node.job("python", "-m", "nowhere.x", name="c")], "nowhere"),
        "a shadow": (["run", node.job("python", "pkg/train.py", name="d")], "runner.py"),
        "another launcher": (["run", fine, "--launcher", "docker"], "launcher"),
        "a store below a file": (["run", fine, "--store", "a-file/below"], "is not a directory"),
        "a store that is a file": (["run", fine, "--store", "a-file"], "is not a directory"),
        "a store elsewhere": (["run", fine, "--store", "gs://bucket/x"], "gs:/"),
        "a bucket that is none": (
            ["run", fine, "--store", "s3://Bucket/x"],
            "'Bucket' cannot be a",
        ),
        "certificates that are not there": (["run", on_s3], "certificates.pem"),
        "a param without a value": (["run", fine, "-p", "lr"], "KEY=VALUE"),
        "an option that is none": (["run", fine, "--nwe"], "--nwe"),
        "a command that is none": (["runn", fine], "runn"),
        "a step of no run": (["run", fine, "--from", "8"], "does not exist"),
        "a path to nothing": (["run", fine, "--from", "./pkg"], "neither a checkpoint nor a run"),
        "a url": (
            ["run", fine, "--from", "https://x/run"],
            "expected a path, or s3://bucket/prefix/",
        ),
        "a bucket for a run": (["run", fine, "--from", "s3://bucket"], "not a bucket"),
        "a bucket of odd name": (["run", fine, "--from", "s3://b/run"], "'b' cannot be a bucket"),
        "a server of no store": (["status", "--s3-region", "x"], "need --store s3://"),
        "components of nothing": (["run", fine, "--components", "model"], "--from"),
        "a plan without a unit": (["simulate", fine, "--preempt", "after=20"], "after=20"),
        "a plan without a step": (["simulate", fine, "--preempt", "step=0"], "step=0"),
        "a plan of another kind": (["simulate", fine, "--preempt", "epoch=3"], "epoch=3"),
        "a grace without a unit": (["simulate", fine, "--grace", "30"], "--grace 30"),
        "a speed of nothing": (["simulate", fine, "--speedup", "0"], "--speedup"),
        "a trace that is none": (["simulate", fine, "--trace", "text.yaml"], "text.yaml"),
        "no trace": (["simulate", fine, "--trace", "nowhere.json"], "nowhere.json"),
        "a run that is none": (["status", "nowhere"], "nowhere"),
        "logs of none": (["logs", "nowhere"], "nowhere"),
        "the end of none": (["stop", "nowhere"], "nowhere"),
        "waiting for none": (["wait", "nowhere"], "nowhere"),
        "checkpoints of none": (["checkpoints", "ls", "nowhere"], "nowhere"),
        "a run that is not in the store": (["status", "job", "--store", "elsewhere"], "elsewhere"),
    }


def test_what_is_wrong_is_said_and_nothing_is_written(
    node: Node, refusals: dict[str, tuple[list[str], str]]
) -> None:
    before = everything(node.folder)
    for name, (arguments, said) in refusals.items():
        refused = node.call(*arguments)

        assert (name, refused.code, refused.out) == (name, 2, "")
        assert said in refused.err, name
        assert everything(node.folder) == before, name
        assert not node.store_folder.exists(), name
        assert node.spools() == [], name


def test_a_store_without_permission_is_refused(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so the question itself is answered here."""
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)

    refused = node.call("run", node.job("true"))

    assert refused.code == 2
    assert "no permission" in refused.err


def test_a_dry_run_checks_and_writes_nothing(node: Node) -> None:
    job = node.job("true", params={"lr": 0.1})
    before = everything(node.folder)

    dry = node.call("submit", job, "--dry-run", "-p", "lr=0.2")
    wrong = node.call("submit", node.job("no-such-program", name="wrong"), "--dry-run")
    (node.folder / "wrong.json").unlink()

    assert (dry.code, dry.json["params"], dry.err) == (0, {"lr": 0.2}, "")
    assert (wrong.code, wrong.out) == (2, "")
    assert everything(node.folder) == before
    assert not node.store_folder.exists()


# ---------------------------------------------------------------- what a run begins from


def lines_with(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_fine_tuning_begins_at_step_0_with_the_weights_of_another_run(
    finished: Node, printed: list[str]
) -> None:
    job = trained(finished, "tuned", params={"befalls": {"1": {"3": "wait"}}, "epochs": 1})
    path = str(finished.store_folder / "job")
    before = everything(finished.store_folder / "job")
    arguments = ("run", job, "--from", path, "--components", "model")

    supervisor = finished.start(*arguments)
    supervisor.wait_for("step 3")
    supervisor.send_signal(signal.SIGTERM)
    finished.wait_until_asked("tuned")
    finished.gate.touch()

    assert supervisor.wait() == 75
    trained_weights = [line for line in printed if line.startswith("weights")][-1]
    assert lines_with(supervisor.out, "ready") == ["ready at 0 in attempt 1"]
    assert lines_with(supervisor.out, "weights") == [trained_weights]
    assert lines_with(supervisor.out, "step")[0] == "step 1"
    document = json.loads((finished.store_folder / "tuned" / "run.json").read_text())
    assert (document["from"], document["components"]) == (path, ["model"])

    again = finished.run(*arguments)  # as a cluster does after a preemption

    assert again.code == 0
    assert lines_with(again.out, "ready") == ["ready at 3 in attempt 2"]
    assert finished.newest("tuned").moment.step == 12
    assert everything(finished.store_folder / "job") == before
    other = finished.call("run", job, "--from", path, "--components", "model,optimizer")
    assert (other.code, "needs --new" in other.err) == (2, True)


def test_a_new_run_can_begin_where_another_one_was(finished: Node) -> None:
    at_8 = next(m for m in finished.manifests() if m.moment.step == 8)
    job = trained(finished, "branched")

    done = finished.run("run", job, "--from", str(finished.checkpoint(at_8)))

    assert done.code == 0
    assert lines_with(done.out, "ready") == ["ready at 8 in attempt 1"]
    assert finished.digest("branched") == finished.digest("job")


def test_a_run_goes_back_to_a_step_or_to_its_best_checkpoint(tmp_path: Path) -> None:
    with nodes_in(tmp_path) as new:
        node = new("node")
        job = trained(node)
        assert node.run("run", job).code == 0
        losses = {m.moment.step: m.moment.metrics.get("val_loss") for m in node.manifests()}
        best = 12 if (losses[12] or 0) <= (losses[24] or 0) else 24
        digest = node.digest()

        back = node.run("run", job, "--from", "8")
        to_best = node.run("run", job, "--from", "best")

        assert (back.code, to_best.code) == (0, 0)
        assert lines_with(back.out, "ready") == ["ready at 8 in attempt 2"]
        assert lines_with(to_best.out, "ready") == [f"ready at {best} in attempt 3"]
        assert node.digest() == digest


def test_a_beginning_that_is_not_there_is_refused_before_anything_is_written(
    finished: Node,
) -> None:
    path = str(finished.store_folder / "job")
    damaged = finished.folder / "damaged"
    before = everything(finished.store_folder)
    job, other = trained(finished), trained(finished, "other")
    without_best = finished.training("other-job", params={"befalls": {"1": {"8": "save"}}})

    for arguments, said in {
        ("run", job, "--from", "9"): "'9'",
        ("run", job, "--from", "step-000000008-a0009-s001"): "did you mean",
        ("run", job, "--from", path): "needs --new",
        ("run", job, "--from", "8", "--components", "model"): "--components",
        ("run", other, "--from", path, "--components", "modle"): "did you mean model",
        ("run", other, "--from", str(damaged)): "neither",
        ("run", without_best, "--run-id", "job", "--from", "best"): "best",
    }.items():
        refused = finished.call(*arguments)
        assert (arguments, refused.code, refused.out) == (arguments, 2, "")
        assert said in refused.err, arguments

    assert everything(finished.store_folder) == before


# ---------------------------------------------------------------- looking at a run


def test_facts_go_to_stdout_and_have_a_regular_shape(finished: Node) -> None:
    status = finished.call("status", "job", "-o", "json")
    rows = finished.call("checkpoints", "ls", "job", "-o", "json")
    shown = finished.call("checkpoints", "show", "job", "-o", "json")
    verified = finished.call("checkpoints", "verify", "job", "-o", "json")
    schema = finished.call("schema")

    for called in (status, rows, shown, verified, schema):
        assert (called.code, called.err) == (0, "")
    assert list(status.json) == STATUS_KEYS
    assert [status.json[key] for key in ("run_id", "phase", "step", "epoch", "attempt")] == [
        *("job", "succeeded", 24, 2, 1)
    ]
    assert [status.json[key] for key in ("live", "saved_step", "pid")] == [False, 24, None]
    assert [list(row) for row in rows.json] == [CHECKPOINT_KEYS] * 3
    assert [(row["step"], row["epoch"]) for row in rows.json] == [(24, 2), (12, 1), (8, 0)]
    newest = rows.json[0]
    assert re.fullmatch(r"step-000000024-a0001-s\d{3}", newest["name"])
    assert "final" in newest["triggers"]
    assert (newest["attempt"], newest["healthy"], newest["pinned"]) == (1, True, False)
    assert newest["bytes"] > 1000
    assert set(newest["metrics"]) == {"train_loss", "val_loss"}
    assert shown.json["step"] == 24
    names = {file["name"] for file in shown.json["files"]}
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} <= names
    assert [(row["name"], row["sound"], row["problem"]) for row in verified.json] == [
        (row["name"], True, "") for row in rows.json
    ]
    assert {file["name"]: file["compared"] for file in verified.json[0]["files"]} == {
        "manifest.json": "its own digest",
        **dict.fromkeys(names, "size, all bytes"),
    }
    assert schema.json["title"] == "Job"


def test_the_same_facts_are_there_for_people(finished: Node) -> None:
    status = finished.call("status", "job").out
    rows = finished.call("checkpoints", "ls", "job").out.splitlines()
    shown = finished.call("checkpoints", "show", "job", "8").out
    verified = finished.call("checkpoints", "verify", "job", "latest").out.splitlines()

    assert re.search(r"^phase +succeeded$", status, re.MULTILINE)
    assert re.search(r"^pid +-$", status, re.MULTILINE)
    assert rows[0].split()[:3] == ["name", "step", "epoch"]
    assert [row.split()[1] for row in rows[1:]] == ["24", "12", "8"]
    assert re.search(r"^step +8$", shown, re.MULTILINE)
    assert re.search(r"^file +model\.safetensors \d+ bytes [0-9a-f]{64}$", shown, re.MULTILINE)
    newest = finished.newest()
    assert [re.split("  +", line) for line in verified] == [
        ["checkpoint", "name", "size", "compared", "sound", "problem"],
        [newest.name, "manifest.json", str(len(newest.to_json())), "its own digest", "yes"],
        *(
            [newest.name, file.name, str(file.size), "size, all bytes", "yes"]
            for file in newest.files
        ),
    ]


def test_a_checkpoint_says_where_it_comes_from(finished: Node) -> None:
    provenance = finished.call("checkpoints", "show", "job", "-o", "json").json["provenance"]
    shown = finished.call("checkpoints", "show", "job").out

    assert provenance["params"]["epochs"] == 2
    assert provenance["job"]["command"][-1].endswith("trains.py")
    assert provenance["seeds"] == {"torch": 7}
    assert provenance["environment"]["OMP_NUM_THREADS"] == "1"
    assert provenance["model"]["model"]["parameters"] == 65
    assert {"git", "packages", "python", "torch", "cuda", "cudnn", "driver", "gpus", "cpu", "host",
            "settings"} <= set(provenance)  # fmt: skip
    assert re.search(r"^model +model: torch.nn.*Sequential, 65 parameters", shown, re.MULTILINE)
    assert "      0: Linear(in_features=6, out_features=8, bias=True)  56" in shown
    run = json.loads((finished.store_folder / "job" / "run.json").read_text())
    assert run["submitted"]["checkpoint"] != run["job"]["checkpoint"]  # without the defaults
    assert run["submitted"]["name"] == run["job"]["name"] == "job"


def test_what_two_checkpoints_differ_in_is_told(finished: Node) -> None:
    told = finished.call("checkpoints", "diff", "job:8", "job", "-o", "json").json
    text = finished.call("checkpoints", "diff", "job:8", ":24", "--no-tensors").out

    assert [told["before"], told["after"]] == [
        f"job:{next(m.name for m in finished.manifests() if m.moment.step == step)}"
        for step in (8, 24)
    ]
    assert {fact["section"] for fact in told["facts"]} == {"place", "metrics"}
    weights = [t["name"] for t in told["tensors"] if t["file"] == "model.safetensors"]
    assert weights == ["0.bias", "0.weight", "3.bias", "3.weight"]
    assert all(t["norm"] > 0 for t in told["tensors"])
    assert "  step: 8 -> 24" in text
    assert "tensors" not in text


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [("jb", "job", "there is no run 'jb' on this machine; did you mean job"),
     ("zzz", "job", "there is no run 'zzz' on this machine; name its store with --store"),
     ("job", "job:9", "there is no checkpoint '9' of run job"),
     ("job:lates", ":8", "did you mean")],
)  # fmt: skip
def test_nothing_is_compared_with_what_is_not_there(
    finished: Node, one: str, other: str, message: str
) -> None:
    called = finished.call("checkpoints", "diff", one, other)

    assert (called.code, called.out) == (2, "")
    assert message in called.err


def test_a_checkpoint_is_found_by_step_by_name_and_as_the_best(finished: Node) -> None:
    def shown(*which: str) -> dict[str, Any]:
        document = finished.call("checkpoints", "show", "job", *which, "-o", "json").json
        assert isinstance(document, dict)
        return document

    by_step = shown("8")
    name = next(m.name for m in finished.manifests() if m.moment.step == 8)
    best = min(
        (m for m in finished.manifests() if "val_loss" in m.moment.metrics),
        key=lambda m: m.moment.metrics["val_loss"],
    )

    assert shown(name) == by_step
    assert shown("latest") == shown() == shown("24")
    assert shown("best")["step"] == best.moment.step
    digest = finished.call("checkpoints", "show", "job", "--digest")
    assert digest.out == finished.digest() + "\n"
    as_json = finished.call("checkpoints", "show", "job", "--digest", "-o", "json").json
    assert as_json == {"name": finished.newest().name, "digest": finished.digest()}


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["status", "jb"], "job"),
        (["checkpoints", "ls", "jobb"], "job"),
        (["checkpoints", "show", "job", "7"], None),
        (["checkpoints", "show", "job", "step-000000008-a0001-s999"], "step-000000008-a0001"),
        (["checkpoints", "verify", "job", "25"], "24"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(
    finished: Node, arguments: list[str], near: str | None
) -> None:
    wrong = finished.call(*arguments)

    assert (wrong.code, wrong.out) == (2, "")
    assert arguments[-1] in wrong.err
    if near is not None:
        assert f"did you mean {near}" in wrong.err


def test_the_runs_of_a_machine_and_of_a_store_are_listed(finished: Node) -> None:
    here = finished.call("status", "-o", "json")
    there = finished.call("status", "--store", str(finished.store_folder), "-o", "json")

    assert "job" in [row["run_id"] for row in here.json]
    assert sorted(row["run_id"] for row in here.json) == sorted(row["run_id"] for row in there.json)
    text = finished.call("status").out.splitlines()
    assert text[0].split() == [
        *("run_id", "phase", "step", "epoch", "attempt", "saved_step", "store")
    ]
    assert len(text) == 1 + len(here.json)


def test_a_machine_without_runs_has_none_to_list(node: Node) -> None:
    assert node.call("status", "-o", "json").json == []
    assert len(node.call("status").out.splitlines()) == 1


def test_the_logs_are_what_the_trainer_printed(finished: Node, printed: list[str]) -> None:
    logs = finished.call("logs", "job", "--stream", "out", "--stream", "err")
    whole = finished.call("logs", "job")

    assert (logs.code, logs.err) == (0, "")
    assert logs.out.splitlines() == printed
    said = [line for line in whole.out.splitlines() if not line.startswith("runner: ")]
    assert said == printed
    assert len(whole.out.splitlines()) > len(printed), "the supervisor has its say, too"
    followed = finished.call("logs", "job", "--follow")
    assert followed.out == whole.out, "it is over: nothing to follow"


def test_a_run_that_is_over_cannot_be_stopped_and_need_not_be_waited_for(finished: Node) -> None:
    stopped = finished.call("stop", "job")
    waited = finished.call("wait", "job")

    assert (stopped.code, stopped.out) == (2, "")
    assert "not live" in stopped.err
    assert (waited.code, waited.out) == (0, "succeeded\n")


# ---------------------------------------------------------------- made-up checkpoints


@pytest.fixture
def made_up(node: Node) -> list[Manifest]:
    """A run `job` with three checkpoints that no trainer has made."""
    Ledger(node.store, "job", "0123456789abcdef").begin({"run_id": "job"})
    moments = [
        {"metrics": {"loss": 1.0}},
        {"metrics": {"loss": float("nan"), "other": float("inf")}, "healthy": False},
        {"metrics": {}},
    ]
    return [
        commit(node.store, snapshot(1, save, **moment), "job")
        for save, moment in enumerate(moments, start=1)
    ]


def test_a_flipped_bit_is_found(node: Node, made_up: list[Manifest]) -> None:
    store = ("--store", str(node.store_folder))
    assert node.call("checkpoints", "verify", "job", *store).code == 0
    path = node.checkpoint(made_up[1]) / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)

    everything_verified = node.call("checkpoints", "verify", "job", "-o", "json", *store)
    one = node.call("checkpoints", "verify", "job", made_up[1].name, *store)

    assert (everything_verified.code, one.code) == (1, 1)
    found = {row["name"]: (row["sound"], row["problem"]) for row in everything_verified.json}
    assert found[made_up[0].name] == found[made_up[2].name] == (True, "")
    assert found[made_up[1].name][0] is False
    assert "optimizer.safetensors" in found[made_up[1].name][1]
    assert re.search(r"optimizer\.safetensors .* no  +has other bytes", one.out)


@pytest.mark.parametrize("damage", ["no file", "no manifest", "a manifest that is none"])
def test_what_is_missing_is_found(node: Node, made_up: list[Manifest], damage: str) -> None:
    folder = node.checkpoint(made_up[0])
    match damage:
        case "no file":
            (folder / "model.safetensors").unlink()
        case "no manifest":
            (folder / "manifest.json").unlink()
        case _:
            (folder / "manifest.json").write_text("{}")

    verified = node.call(
        "checkpoints", "verify", "job", "-o", "json", "--store", str(node.store_folder)
    )

    assert verified.code == 1
    sound = {row["name"]: row["sound"] for row in verified.json}
    assert sound == {made_up[2].name: True, made_up[1].name: True, made_up[0].name: False}


def test_metrics_that_are_not_finite_are_still_json(node: Node, made_up: list[Manifest]) -> None:
    rows = node.call("checkpoints", "ls", "job", "-o", "json", "--store", str(node.store_folder))

    assert rows.code == 0
    assert rows.json[1]["metrics"] == {"loss": "nan", "other": "inf"}
    assert [row["healthy"] for row in rows.json] == [True, False, True]


def test_a_run_of_which_nothing_is_sound_never_begins_anew(
    node: Node, made_up: list[Manifest]
) -> None:
    for manifest in made_up:
        (node.checkpoint(manifest) / "state.json").write_text("{}")

    done = node.run("run", node.training())

    # The script may be starting meanwhile; what it must not get is a state to begin with.
    assert (done.code, lines_with(done.out, "ready")) == (70, [])
    assert "none of them is sound" in done.err
    assert len(list((node.store_folder / "job" / "quarantine").iterdir())) == 3


# ---------------------------------------------------------------- a live run


def test_a_live_run_is_seen_followed_and_stopped(node: Node) -> None:
    job = node.job("python", str(PROGRAMS / "waits.py"), preemption={"grace": "2s"})
    detached = node.run("submit", job, "--detach")

    assert (detached.code, detached.out) == (0, "")
    status = node.call("status", "job", "-o", "json").json
    assert (status["live"], list(status)) == (True, STATUS_KEYS)
    assert f"process {status['pid']}" in detached.err
    assert is_running(status["pid"])
    following, waiting = (
        node.start("logs", "job", "-f", "--stream", "out"),
        node.start("wait", "job"),
    )
    following.wait_for("ready")
    second, other_way = node.call("run", job), node.run("submit", job, "--detach")
    for refused in (second, other_way):
        assert refused.code == 2
        assert "is live on this machine" in refused.err

    stopped = node.run("stop", "job")

    assert (stopped.code, stopped.out) == (0, "stopped at step 0, nothing is saved\n")
    assert waiting.wait() == 130
    assert waiting.out == "stopped\n"
    assert following.wait() == 0
    assert following.out == "ready\n"
    assert len(node.records()) == 1
    wait_until(lambda: not node.processes(), what="the end of the detached supervisor")


def test_a_stop_that_was_meant_for_an_earlier_supervisor_stops_no_later_one(node: Node) -> None:
    spool = node.spool().path
    spool.mkdir(mode=0o700)
    (spool / "stop").touch()

    done = node.run("run", node.job("echo", "hello"))

    assert (done.code, done.out) == (0, "hello\n")


def test_a_store_is_the_same_whatever_way_leads_there(node: Node) -> None:
    (node.folder / "link").symlink_to(node.store_folder)
    job = node.job("sleep", "60", preemption={"grace": "2s"}, store="sub/../../store")
    supervisor = node.start("run", job)
    wait_until(lambda: node.spool().status(), what="the supervisor")

    for store in ("link", "../store", str(node.store_folder)):
        assert node.call("status", "job", "--store", store, "-o", "json").json["live"] is True
        assert "is live" in node.call("run", job, "--store", store).err
    assert node.run("stop", "job", "--store", "link").code == 0
    assert supervisor.wait() == 130


def test_an_unreadable_entry_of_the_index_is_passed_over(node: Node) -> None:
    runs = Path(node.environment[index.HOME_VARIABLE]) / "runs"
    runs.mkdir(parents=True)
    (runs / "torn.json").write_text('{"run_id": "to')
    (runs / "list.json").write_text("[]")
    (runs / "strange.json").write_text('{"run_id": "x"}')

    assert node.call("status", "-o", "json").json == []


def test_a_store_that_is_out_of_reach_does_not_hide_the_other_runs(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "_OVERVIEW_SECONDS", 0.3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    assert node.run("run", node.job("true")).code == 0
    runs = Path(node.environment[index.HOME_VARIABLE]) / "runs"
    entry = json.loads(next(runs.iterdir()).read_text())
    entry |= {"store": "s3://bucket/x", "s3": {"endpoint": "http://127.0.0.1:9", "new": 1}}
    for number in (1, 2):
        (runs / f"away-{number}.json").write_text(json.dumps(entry | {"run_id": f"away-{number}"}))

    listed = node.call("status", "-o", "json")

    assert listed.code == 0
    assert {row["run_id"]: row["phase"] for row in listed.json} == {
        "job": "succeeded",
        "away-1": "unknown",
        "away-2": "unknown",
    }
    assert [list(row) for row in listed.json] == [ROW_KEYS] * 3
    assert listed.err.count("nothing is known of the runs in s3://bucket/x") == 1


# ---------------------------------------------------------------- secrets


def test_no_secret_is_written_anywhere(node: Node) -> None:
    secrets = {
        "HF_TOKEN": "hf_qGkqGkqGkqGkqGkqGkqGkqGk",
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "DB_PASSWORD": "correct horse",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    }
    job = node.training(
        command=[
            *("bash", "-c", f"exec python3 '{PROGRAMS / 'trains.py'}' --api-key=argument-secret"),
        ],
        env={"HF_TOKEN": secrets["HF_TOKEN"], "DB_PASSWORD": secrets["DB_PASSWORD"]},
        params={"epochs": 1, "tracker": {"api_key": "param-secret-1"}, "token": "param-secret-2"},
    )
    outside = {name: secrets[name] for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
    path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}

    done = node.run("run", job, env={**outside, **path})

    assert done.code == 0, done.err
    assert node.newest().moment.step == 12
    values = [*secrets.values(), "argument-secret", "param-secret-1", "param-secret-2"]
    written = everything(node.store_folder) | everything(node.folder / "home")
    assert any(name.endswith("run.json") for name in written)
    assert any(name.endswith("manifest.json") for name in written)
    assert any("/attempts/" in name for name in written)
    for secret in values:
        leaks = [name for name, content in written.items() if secret.encode() in content]
        assert (secret, leaks) == (secret, [])
        assert secret not in done.err
    again = node.call("run", job)
    assert "finished" in again.err, "masked values are the same run"
