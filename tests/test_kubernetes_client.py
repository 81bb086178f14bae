"""The client and what it does, against a server that speaks the API's wire format."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from golden.kubernetes import ROOT, SMALL
from nodes import Called, Node
from servers.kubeapi import Fault, KubeApi, kube_api, status
from waiting import wait_until

pytest.importorskip("kubernetes")

from runner.checkpoint.logs import StoredLogs
from runner.errors import ClusterDenied, ClusterError
from runner.job import Job
from runner.launch.kubernetes import control, objects, reading, state
from runner.launch.kubernetes.answers import RIGHTS, Absent, Taken
from runner.launch.kubernetes.client import Cluster, connect
from runner.launch.kubernetes.control import Step
from runner.launch.kubernetes.state import Phase
from runner.logs import lines
from runner.store import DirectoryStore

RENDERED = objects.render(Job.model_validate(SMALL), "small")


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeApi]:
    with kube_api() as started:
        monkeypatch.setenv("KUBECONFIG", str(started.kubeconfig(tmp_path)))
        yield started


@pytest.fixture
def cluster(api: KubeApi) -> Cluster:
    return connect()


def set_status(api: KubeApi, **values: Any) -> None:
    api.objects.change("Job", "small", lambda job: job.update(status=values))


def finish(api: KubeApi, kind: str, reason: str = "") -> None:
    set_status(api, conditions=[{"type": kind, "status": "True", "reason": reason}])


def add_pod(api: KubeApi, name: str, created: str, code: int | None = None) -> None:
    running = {"running": {}} if code is None else {"terminated": {"exitCode": code}}
    phase = "Running" if code is None else "Failed"
    api.objects.put(
        "Pod",
        {
            "metadata": {
                "name": name,
                "creationTimestamp": created,
                "labels": {"batch.kubernetes.io/job-name": "small"},
            },
            "spec": {},
            "status": {"phase": phase, "containerStatuses": [{"state": running}]},
        },
    )


def submit(cluster: Cluster, *, replace: bool = False, **changes: Any) -> Step:
    job = Job.model_validate({**SMALL, **changes})
    return control.submit(cluster, objects.render(job, "small"), replace=replace)


# ---------------------------------------------------------------------------- submit


def test_what_is_created_is_what_is_rendered(api: KubeApi, cluster: Cluster) -> None:
    assert submit(cluster) is Step.CREATE

    job = cluster.job("small")
    assert job is not None
    assert state.differences(RENDERED.job, job) == []
    sent, wanted = (each["spec"]["template"]["spec"]["containers"] for each in (job, RENDERED.job))
    assert sent == wanted, "the library has left nothing out"
    (config_map,) = api.objects.all("ConfigMap")
    assert config_map["data"] == RENDERED.config_map["data"]
    (owner,) = config_map["metadata"]["ownerReferences"]
    assert owner["uid"] == job["metadata"]["uid"]


def test_submitting_again_does_nothing(api: KubeApi, cluster: Cluster) -> None:
    submit(cluster)
    before = api.objects.version

    assert submit(cluster) is Step.LEAVE
    assert api.objects.version == before


def test_a_finished_run_is_left_as_it_is(api: KubeApi, cluster: Cluster) -> None:
    submit(cluster)
    finish(api, "Complete")

    assert submit(cluster) is Step.FINISHED


def test_a_failed_run_is_deleted_and_created_again(api: KubeApi, cluster: Cluster) -> None:
    submit(cluster)
    finish(api, "Failed")
    first = api.objects.get("Job", "small")
    api.requests.clear()

    assert submit(cluster) is Step.RECREATE

    second = api.objects.get("Job", "small")
    assert first is not None
    assert second is not None
    assert first["metadata"]["uid"] != second["metadata"]["uid"]
    assert api.requests == [
        "get jobs",
        "delete jobs",
        "list jobs",
        "delete configmaps",
        "create configmaps",
        "create jobs",
        "patch configmaps",
    ]


def test_a_job_that_ends_slowly_is_waited_for(api: KubeApi, cluster: Cluster) -> None:
    """Deleted in the foreground, it is there until its pod has saved."""
    submit(cluster)
    finish(api, "Failed")
    api.has_controller = True
    submitting = threading.Thread(target=submit, args=(cluster,))
    submitting.start()
    wait_until(lambda: "watch jobs" in api.requests, 20, "the watch")
    assert api.requests.count("create jobs") == 1

    api.objects.remove("Job", "small")

    submitting.join(20)
    assert api.requests.count("create jobs") == 2


def test_a_job_with_other_content_is_shown_and_kept(api: KubeApi, cluster: Cluster) -> None:
    submit(cluster)
    with pytest.raises(ClusterError) as caught:
        submit(cluster, image="registry.example/team/small:2.0", restart={"failures": 9})

    assert "spec.backoffLimit: 5 -> 9" in str(caught.value)
    assert "small:1.0 -> registry.example/team/small:2.0" in str(caught.value)
    assert "--replace" in str(caught.value)
    assert submit(cluster) is Step.LEAVE, "nothing was changed"


def test_replace_puts_another_job_in_its_place(api: KubeApi, cluster: Cluster) -> None:
    submit(cluster)
    assert submit(cluster, restart={"failures": 9}, replace=True) is Step.RECREATE

    job = api.objects.get("Job", "small")
    assert job is not None
    assert job["spec"]["backoffLimit"] == 9


def test_changed_params_are_a_difference(api: KubeApi, cluster: Cluster) -> None:
    submit(cluster)
    with pytest.raises(ClusterError, match="configMap"):
        submit(cluster, params={"epochs": 3})


def test_somebody_elses_job_is_not_touched(api: KubeApi, cluster: Cluster) -> None:
    api.objects.put("Job", {"metadata": {"name": "small"}, "spec": {}})
    with pytest.raises(ClusterError, match="--run-id"):
        submit(cluster, replace=True)


def test_a_quota_leaves_nothing_half_created(api: KubeApi, cluster: Cluster) -> None:
    api.full.add("jobs")
    with pytest.raises(ClusterError, match="exceeded quota: team") as caught:
        submit(cluster)

    assert not isinstance(caught.value, ClusterDenied)
    assert api.objects.all("ConfigMap") == []


def test_a_missing_right_is_named(api: KubeApi, cluster: Cluster) -> None:
    api.denied.add(("create", "jobs"))
    with pytest.raises(ClusterDenied) as caught:
        submit(cluster)

    assert (caught.value.verb, caught.value.resource) == ("create", "jobs.batch")
    assert "rbac.yaml" in str(caught.value)
    assert api.objects.all("ConfigMap") == []


def test_a_conflict_at_the_last_moment_is_told(api: KubeApi, cluster: Cluster) -> None:
    api.faults.append(Fault("POST jobs", 409, status(409, "AlreadyExists", "there")))
    with pytest.raises(ClusterError, match="somebody else"):
        submit(cluster)


def test_a_server_that_is_busy_is_asked_again(api: KubeApi, cluster: Cluster) -> None:
    busy = status(429, "TooManyRequests", "later")
    api.faults.append(Fault("POST jobs", 429, busy, {"Retry-After": "0"}, times=2))

    assert submit(cluster) is Step.CREATE
    assert api.requests.count("create jobs") == 3


def test_a_server_that_stays_busy_is_an_error(api: KubeApi, cluster: Cluster) -> None:
    busy = status(429, "TooManyRequests", "later")
    api.faults.append(Fault("GET jobs", 429, busy, {"Retry-After": "0"}, times=9))
    with pytest.raises(ClusterError, match="later"):
        cluster.job("small")


# ---------------------------------------------------------------------------- stop, wait, watch


def test_stop_suspends_and_submit_continues(api: KubeApi, cluster: Cluster) -> None:
    submit(cluster)
    set_status(api, active=1, ready=1)
    stopping = threading.Thread(target=control.stop, args=(cluster, "small"))
    stopping.start()
    wait_until(lambda: "watch jobs" in api.requests, 20, "the watch")
    job = api.objects.get("Job", "small")
    assert job is not None
    assert job["spec"]["suspend"] is True
    assert state.phase_of(job) is Phase.ENDING

    set_status(api, active=0)
    stopping.join(20)
    assert not stopping.is_alive()
    assert control.wait(cluster, "small") == (Phase.STOPPED, 130)

    assert submit(cluster) is Step.RESUME
    job = api.objects.get("Job", "small")
    assert job is not None
    assert job["spec"]["suspend"] is False
    assert state.phase_of(job) is Phase.PENDING


def test_a_job_of_kueue_is_deleted_to_stop_it(api: KubeApi, cluster: Cluster) -> None:
    submit(cluster, kubernetes={"queue": "spot"})
    assert state.phase_of(cluster.job("small")) is Phase.QUEUED

    control.stop(cluster, "small")

    assert cluster.job("small") is None


def test_what_is_not_live_cannot_be_stopped(api: KubeApi, cluster: Cluster) -> None:
    with pytest.raises(Absent, match="no job small"):
        control.stop(cluster, "small")
    submit(cluster)
    finish(api, "Complete")
    with pytest.raises(ClusterError, match="succeeded"):
        control.stop(cluster, "small")


ENDS = {
    "complete": ("Complete", "", [], Phase.SUCCEEDED, 0),
    "given up": ("Failed", "PodFailurePolicy", [137, 70], Phase.FAILED, 70),
    "wrong job file": ("Failed", "PodFailurePolicy", [2], Phase.FAILED, 2),
    "a code of the trainer's": ("Failed", "PodFailurePolicy", [3], Phase.FAILED, 3),
    "too many crashes": ("Failed", "BackoffLimitExceeded", [1], Phase.FAILED, 70),
    "its time is over": ("Failed", "DeadlineExceeded", [75], Phase.FAILED, 70),
}


@pytest.mark.parametrize(("kind", "reason", "codes", "phase", "code"), ENDS.values(), ids=ENDS)
def test_wait_ends_as_the_run_did(
    api: KubeApi,
    cluster: Cluster,
    kind: str,
    reason: str,
    codes: list[int],
    phase: Phase,
    code: int,
) -> None:
    submit(cluster)
    for number, exit_code in enumerate(codes):
        add_pod(api, f"small-{number}", f"2026-01-01T00:00:0{number}Z", exit_code)
    finish(api, kind, reason)

    assert control.wait(cluster, "small") == (phase, code)


def ends_while_waited_for(api: KubeApi, cluster: Cluster) -> tuple[Phase, int]:
    """The Job completes after `wait` has begun to watch."""
    found: list[tuple[Phase, int]] = []
    waiting = threading.Thread(target=lambda: found.append(control.wait(cluster, "small")))
    waiting.start()
    wait_until(lambda: api.requests.count("watch jobs") >= 2, 20, "the second watch")
    finish(api, "Complete")
    waiting.join(20)
    return found[0]


def test_a_watch_that_ends_is_begun_again(api: KubeApi, cluster: Cluster) -> None:
    submit(cluster)
    cluster._sleep = lambda seconds: None
    api.watch_seconds = 0.05

    assert ends_while_waited_for(api, cluster) == (Phase.SUCCEEDED, 0)
    assert api.requests.count("list jobs") == 1


def test_a_watch_that_has_expired_looks_at_everything_again(api: KubeApi, cluster: Cluster) -> None:
    submit(cluster)
    api.faults.append(Fault("WATCH events", 410, status(410, "Expired", "too old")))

    assert ends_while_waited_for(api, cluster) == (Phase.SUCCEEDED, 0)
    assert api.requests.count("list jobs") == 2


# ---------------------------------------------------------------------------- the role


def test_the_role_allows_exactly_what_is_asked_for(api: KubeApi, cluster: Cluster) -> None:
    log = ROOT / "Makefile"
    api.log_of = lambda pod: log
    cluster._sleep = lambda seconds: None
    submit(cluster)
    add_pod(api, "small-1", "2026-01-01T00:00:00Z")
    set_status(api, active=1)
    following = cluster.follow_job("small")
    assert next(following) is not None
    api.objects.change("Job", "small", lambda job: job["status"].update(ready=1))
    assert next(following) is not None
    assert cluster.pods("small")
    assert list(cluster.log_lines("small-1", follow=False))
    submit(cluster, replace=True, restart={"failures": 1})
    cluster.change_job("small", {"spec": {"suspend": True}})

    documents = yaml.safe_load_all((ROOT / "k8s" / "base" / "rbac.yaml").read_text())
    role = next(each for each in documents if each["kind"] == "Role")
    allowed = {
        f"{verb} {resource}"
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert set(api.requests) == allowed
    asked = {f"{v} {'/'.join(filter(None, (k.resource, k.subresource)))}" for v, k in RIGHTS}
    assert asked == allowed


# ---------------------------------------------------------------------------- the command line


def call(node: Node, api: KubeApi | None, *arguments: str, **environment: str) -> Called:
    if api is not None:
        environment.setdefault("KUBECONFIG", str(api.kubeconfig(node.folder)))
    node.environment |= environment
    return node.call(*arguments)


def job_file(node: Node, **changes: Any) -> str:
    keys = {"image": "registry.example/x:1", "checkpoint": {"max_state": "1Gi"}, **changes}
    return node.job("python", "x.py", launcher="kubernetes", **keys)


def test_submit_returns_when_the_cluster_has_the_run(node: Node, api: KubeApi) -> None:
    first = call(node, api, "submit", job_file(node))
    again = call(node, api, "submit", job_file(node))

    assert (first.code, first.out) == (0, "job job in namespace default\n")
    assert "the store is a directory" in first.err
    assert "job job is created" in first.err
    assert again.code == 0
    assert "nothing to do" in again.err


def test_status_finds_the_run_by_its_name(node: Node, api: KubeApi) -> None:
    call(node, api, "submit", job_file(node))
    facts = call(node, api, "status", "job", "-o", "json")
    rows = call(node, api, "status", "-o", "json")
    shown = call(node, api, "status", "job")

    assert facts.json["phase"] == "pending"
    assert facts.json["cluster"] == {
        "namespace": "default",
        "job": "job",
        "failed_pods": 0,
        "pods": [],
    }
    assert [(row["run_id"], row["phase"]) for row in rows.json] == [("job", "pending")]
    assert "phase            pending" in shown.out


def test_a_run_id_that_is_no_label_is_found_under_its_derived_name(
    node: Node, api: KubeApi
) -> None:
    submitted = call(node, api, "submit", job_file(node), "--run-id", "My.Run", "-n", "team")
    found = call(node, api, "status", "My.Run", "-o", "json")

    assert "the Job's name is my-run-" in submitted.err
    assert found.json["cluster"]["job"].startswith("my-run-")
    assert found.json["cluster"]["namespace"] == "team"


REFUSALS = {
    "no kubeconfig": ({"KUBECONFIG": "/does/not/exist"}, [], "no cluster is known", "KUBECONFIG"),
    "an unknown context": ({}, ["--context", "prod"], "--context prod", "test"),
    "an unknown namespace": ({}, ["-n", "other"], "there is no namespace other", "--namespace"),
    "a checkpoint of the run": ({}, ["--from", "best"], "--from best", "--new"),
}


@pytest.mark.parametrize(
    ("environment", "options", "problem", "remedy"), REFUSALS.values(), ids=REFUSALS
)
def test_what_cannot_be_submitted_is_exit_code_2(
    node: Node,
    api: KubeApi,
    environment: dict[str, str],
    options: list[str],
    problem: str,
    remedy: str,
) -> None:
    refused = call(node, api, "submit", job_file(node), *options, **environment)

    assert refused.code == 2
    assert problem in refused.err
    assert remedy in refused.err
    assert api.objects.all("Job") == api.objects.all("ConfigMap") == []


def test_an_api_that_nobody_serves_is_exit_code_2(node: Node) -> None:
    with kube_api() as gone:
        kubeconfig = str(gone.kubeconfig(node.folder))
    refused = call(node, None, "submit", job_file(node), KUBECONFIG=kubeconfig)

    assert refused.code == 2
    assert "cannot be reached" in refused.err
    assert "--context" in refused.err


def test_doctor_tells_what_a_cluster_would_refuse(node: Node, api: KubeApi) -> None:
    api.denied.add(("get", "pods/log"))
    found = call(node, api, "doctor", job_file(node), "--profile", "gke-spot", "-o", "json")

    verdicts = {each["check"]: (each["verdict"], each["facts"]) for each in found.json["findings"]}
    assert found.code == 2
    assert verdicts["cluster"][0] == "FAIL"
    assert "get pods/log" in verdicts["cluster"][1]
    assert verdicts["grace"][0] == "warn"
    assert "cloud.google.com" in verdicts["grace"][1]
    assert verdicts["kubernetes"][0] == "warn", "the store is a directory"


def test_a_dry_run_asks_nobody(node: Node) -> None:
    """Nor does it look for a function that need only be in the image."""
    checkpoint = {"max_state": "1Gi", "validate": {"entrypoint": "not.here:check"}}
    job = job_file(node, checkpoint=checkpoint)

    printed = call(node, None, "submit", job, "--dry-run", KUBECONFIG="/nowhere")

    assert printed.code == 0
    assert [each["kind"] for each in printed.json["items"]] == ["ConfigMap", "Job"]


def test_run_is_not_for_this_launcher(node: Node) -> None:
    refused = node.run("run", job_file(node))
    assert refused.code == 2
    assert "--launcher process" in refused.err


def test_taken_and_absent_are_refusals_too() -> None:
    assert issubclass(Taken, ClusterError)
    assert issubclass(Absent, ClusterError)


def test_the_log_is_read_across_pods(api: KubeApi, cluster: Cluster, tmp_path: Path) -> None:
    """Without a store, what the cluster still has of each pod; with `follow`, until the end."""
    submit(cluster)
    logs = {name: tmp_path / name for name in ("small-1", "small-2")}
    logs["small-1"].write_text("runner: run small\nstep 1\n")
    logs["small-2"].write_text("step 2\n")
    api.log_of = logs.get
    add_pod(api, "small-1", "2026-01-01T00:00:00Z", 75)
    add_pod(api, "small-2", "2026-01-01T00:01:00Z")
    set_status(api, active=1)
    found: list[lines.Record] = []

    def follow() -> None:
        blocks = reading.read_log(cluster, "small", None, follow=True, sleep=lambda seconds: None)
        for block in blocks:
            for line in block.splitlines():
                record = lines.parse(line)
                assert record is not None
                found.append(record)

    following = threading.Thread(target=follow)
    following.start()
    wait_until(lambda: len(found) == 3, 20, "the lines there are")
    with logs["small-2"].open("a") as file:
        file.write("finished\n")
    finish(api, "Complete")
    add_pod(api, "small-2", "2026-01-01T00:01:00Z", 0)
    following.join(20)

    assert [(record.stream, record.text) for record in found] == [
        ("run", b"run small"),
        ("out", b"step 1"),
        ("out", b"step 2"),
        ("out", b"finished"),
    ]


def test_what_the_store_has_is_read_up_to_the_newest_pod(
    api: KubeApi, cluster: Cluster, tmp_path: Path
) -> None:
    submit(cluster)
    store = DirectoryStore(tmp_path)
    text = b"2026-01-01T00:00:00.000Z 000001 out old\n2026-01-01T00:01:00.500Z 000002 out new\n"
    store.replace(f"small/logs/000001-{0:012d}-{len(text):012d}.log", text)
    api.log_of = {"small-2": tmp_path / "log"}.get
    (tmp_path / "log").write_text("new\n")
    add_pod(api, "small-2", "2026-01-01T00:01:00Z")
    stored = StoredLogs(store, "small")

    blocks = b"".join(reading.read_log(cluster, "small", stored, follow=False))

    records = [lines.parse(line) for line in blocks.splitlines()]
    assert [record and record.text for record in records] == [b"old", b"new"]
