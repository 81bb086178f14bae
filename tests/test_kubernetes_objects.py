"""The objects of a run: golden files, the published schemas, and what must hold of every pod."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from golden import kubernetes as golden
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import Node
from servers import kubectl as kubectl_of_tests

from runner.errors import JobError
from runner.job import Job, load_job
from runner.launch.kubernetes import objects, pod, profiles
from runner.launch.kubernetes.names import object_name

VERSIONS = ("1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
KUSTOMIZATIONS = ("base", *(f"overlays/{name}" for name in profiles.PROFILES))
OF_RUNS = ("ConfigMap", "Job")


def job_of(**changes: Any) -> Job:
    return Job.model_validate({**golden.SMALL, **changes})


def spec_of(job: Job) -> dict[str, Any]:
    spec: dict[str, Any] = objects.render(job, "small").job["spec"]
    return spec


def pod_of(job: Job) -> dict[str, Any]:
    spec: dict[str, Any] = spec_of(job)["template"]["spec"]
    return spec


def problems_of(job: Job) -> tuple[str, ...]:
    with pytest.raises(JobError) as caught:
        objects.render(job, "small")
    return caught.value.problems


# ---------------------------------------------------------------------------- whole


@pytest.mark.parametrize(
    ("path", "content"), list(golden.all_files()), ids=lambda value: getattr(value, "stem", "")
)
def test_the_objects_are_exactly_those_of_the_golden_file(path: Path, content: str) -> None:
    assert path.read_text() == content, "look at the difference, then say `make golden`"


def all_documents() -> Iterator[tuple[str, dict[str, Any]]]:
    paths = [golden.REFERENCE.with_name("rbac.yaml"), *sorted(golden.FOLDER.glob("*.yaml"))]
    for path in (golden.REFERENCE, *paths):
        for document in yaml.safe_load_all(path.read_text()):
            yield f"{path.stem} {document['kind']}", document


@pytest.mark.parametrize("version", VERSIONS)
def test_all_objects_are_valid_in_every_version_of_kubernetes(version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for _, document in all_documents():
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_would_find_a_wrong_key() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    job = objects.render(job_of(), "small").job
    job["spec"]["podFailurePolicies"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[0], strict=True)


# ---------------------------------------------------------------------------- k8s/


def built(folder: str) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of a folder of `k8s/`."""
    kubectl = kubectl_of_tests.find()
    if kubectl is None:
        pytest.skip("there is no kubectl")
    command = [kubectl, "kustomize", str(golden.ROOT / "k8s" / folder)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return list(yaml.safe_load_all(text))


def of_runs(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in documents if each["kind"] in OF_RUNS}


def test_render_prints_the_reference_manifests(node: Node) -> None:
    rendered = node.run("render", str(golden.ROOT / "jobs" / "rul.yaml"))

    assert rendered.code == 0
    assert rendered.out == golden.REFERENCE.read_text()
    assert "the store is a directory (runs)" in rendered.err


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_kustomize_builds_what_render_prints(folder: str) -> None:
    documents = built(folder)
    name = folder.removeprefix("overlays/")
    overrides = {} if folder == "base" else {("kubernetes", "profile"): name}
    job = load_job(golden.ROOT / "jobs" / "rul.yaml", overrides=overrides)

    assert of_runs(documents) == of_runs(objects.render(job, job.name).objects)
    assert sorted({each["kind"] for each in documents} - set(OF_RUNS)) == [
        "Role",
        "RoleBinding",
        "ServiceAccount",
    ]


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_what_kustomize_builds_is_valid(folder: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in built(folder):
        for version in (VERSIONS[0], VERSIONS[-1]):
            kubernetes_validate.validate(document, version, strict=True)


def test_the_monitor_selects_what_the_pods_bear() -> None:
    (monitor,) = (each for each in built("monitoring") if each["kind"] == "PodMonitor")
    template = spec_of(job_of())["template"]
    wanted = monitor["spec"]["selector"]["matchLabels"]

    assert wanted.items() <= template["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (port,) = template["spec"]["containers"][0]["ports"]
    assert endpoint["port"] == port["name"]


# ---------------------------------------------------------------------------- the job file


_VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text()
    | st.floats(-1e30, 1e30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    params=st.dictionaries(st.text(), _VALUES, max_size=4), words=st.lists(st.text(), max_size=3)
)
def test_the_pod_reads_the_job_that_was_submitted(
    tmp_path_factory: pytest.TempPathFactory, params: dict[str, Any], words: list[str]
) -> None:
    try:
        job = job_of(params=params, command=["python", *words])
    except ValueError:
        return  # no job has such params
    path = tmp_path_factory.mktemp("pod") / "job.yaml"
    path.write_text(objects.job_file(job), encoding="utf-8")

    read = load_job(path)

    assert json.dumps(read.params) == json.dumps(job.params)
    assert (read.command, read.store, read.launcher) == (job.command, job.store, "process")


def test_what_only_the_cluster_needs_is_not_in_the_pods_file() -> None:
    document = yaml.safe_load(objects.job_file(golden.jobs()["full"][0]))
    beyond = {"image", "user", "launcher", "kubernetes", "workdir"} & document.keys()
    assert beyond == set()
    assert document["resources"] == {"memory_guard": "90%"}
    assert document["metrics"]["host"] == "0.0.0.0"


# ---------------------------------------------------------------------------- the Job


def test_pod_failures_are_judged_in_this_order() -> None:
    rules = spec_of(job_of(restart={"never": [9, 75]}))["podFailurePolicy"]["rules"]

    assert [rule["action"] for rule in rules] == ["FailJob", "Ignore", "Ignore"]
    assert rules[0]["onExitCodes"]["values"] == [2, 9, 70, 76], "75 is never final"
    assert rules[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert rules[2]["onExitCodes"]["values"] == [75]


def test_a_job_for_kueue_is_created_suspended() -> None:
    rendered = objects.render(job_of(kubernetes={"queue": "spot"}), "small")

    assert rendered.job["spec"]["suspend"] is True
    assert rendered.job["metadata"]["labels"][objects.QUEUE_LABEL] == "spot"
    assert "suspend" not in spec_of(job_of())


def test_the_pod_waits_for_the_grace_and_a_margin() -> None:
    job = job_of(preemption={"grace": "100s"}, kubernetes={"margin": "7s"})
    assert pod_of(job)["terminationGracePeriodSeconds"] == 107


def environment_of(job: Job) -> dict[str, str]:
    (container,) = pod_of(job)["containers"]
    return {each["name"]: each["value"] for each in container["env"]}


GRACES = {
    "nobody says": ({}, "60s", 60, None),
    "as long as there is": ({"profile": "eks-spot"}, "60s", 60, None),
    "EKS": ({"profile": "eks-spot"}, "5m", 120, "karpenter.sh"),
    "GKE": ({"profile": "gke-spot"}, "30s", 15, "cloud.google.com"),
    "GKE, configured": ({"profile": "gke-spot", "platform_grace": "2m"}, "60s", 60, None),
    "AKS": ({"profile": "aks-spot"}, "60s", 30, "learn.microsoft.com"),
    "said by the job": ({"platform_grace": "20s"}, "60s", 20, "kubernetes.platform_grace"),
}


@pytest.mark.parametrize(("section", "grace", "real", "source"), GRACES.values(), ids=GRACES)
def test_the_run_is_planned_for_the_grace_that_there_really_is(
    section: dict[str, Any], grace: str, real: int, source: str | None
) -> None:
    job = job_of(preemption={"grace": grace}, kubernetes=section)

    assert environment_of(job)["RUNNER_GRACE_SECONDS"] == str(real)
    assert pod_of(job)["terminationGracePeriodSeconds"] == real + 10
    warning = profiles.grace_warning(job)
    assert warning is None if source is None else warning is not None and source in warning


# ---------------------------------------------------------------------------- the pod


def volume(spec: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (each for each in spec["volumes"] if each["name"] == name)
    return found


def mebibytes(text: str) -> int:
    return int(text.removesuffix("Mi"))


def test_the_spool_has_room_for_every_slot_and_counts_as_memory() -> None:
    small, large = (
        pod_of(
            job_of(
                checkpoint={"max_state": "10Gi", "slots": slots},
                resources={"memory": "32Gi", "shm": "2Gi"},
            )
        )
        for slots in (0, 3)
    )
    spool = volume(large, "spool")["emptyDir"]
    assert spool["medium"] == "Memory"
    room = mebibytes(spool["sizeLimit"])
    assert 0.9 * room >= 3 * 10 * 1024, "what `slots_that_fit` wants to see"
    memory = [
        mebibytes(each["containers"][0]["resources"]["requests"]["memory"])
        for each in (small, large)
    ]
    assert memory[1] == 32 * 1024 + 2 * 1024 + room
    assert memory[1] - memory[0] == room - mebibytes(
        volume(small, "spool")["emptyDir"]["sizeLimit"]
    )
    assert large["containers"][0]["resources"]["limits"]["memory"] == f"{memory[1]}Mi"


def test_no_shell_stands_before_the_supervisor() -> None:
    (container,) = pod_of(job_of())["containers"]
    assert container["command"][:3] == ["runner", "run", "/etc/runner/job.yaml"]
    assert "args" not in container


def test_the_pod_has_no_rights() -> None:
    spec = pod_of(job_of())
    (container,) = spec["containers"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_probes_ask_the_supervisor() -> None:
    (container,) = pod_of(job_of(metrics={"port": 9500}))["containers"]
    assert container["ports"] == [{"name": "metrics", "containerPort": 9500, "protocol": "TCP"}]
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert "readinessProbe" not in container, "nobody is sent to it"


def test_every_key_of_the_section_is_obeyed() -> None:
    """What is said of each in the full golden job appears in its objects."""
    text = (golden.FOLDER / "full.yaml").read_text()
    for value in ("team-a", "full", "store-keys", "tracker", "Always", "registry", "/app",
                  "checkpoints", "spot-queue", "research", "eu-west-1a", "p5.48xlarge",
                  "example.com/owner", "604800", "2592000"):  # fmt: skip
        assert value in text, value
    assert set(golden.FULL["kubernetes"]) | {"platform_grace"} == {
        field.alias or name
        for name, field in type(golden.jobs()["full"][0].kubernetes).model_fields.items()
    }


# ---------------------------------------------------------------------------- names, bad input


NAMES = {
    "rul-fd001": "rul-fd001",
    "a" * 52: "a" * 52,
    "Rul_FD.001": "rul-fd-001-",
    "a" * 53: "a" * 43 + "-",
    "x.": "x-",
}


@pytest.mark.parametrize(("run_id", "start"), NAMES.items())
def test_a_run_id_becomes_a_dns_label(run_id: str, start: str) -> None:
    name = object_name(run_id)
    assert name.startswith(start)
    assert len(name) <= 52
    assert (name == run_id) == (run_id == start)


def test_two_run_ids_never_share_a_name() -> None:
    assert object_name("a.b") != object_name("a_b")


def test_a_name_that_is_not_the_run_id_is_said() -> None:
    (warning,) = objects.render(job_of(), "My.Run").warnings
    assert "the Job's name is my-run-" in warning


def test_what_a_pod_is_not_given_is_said_once_each(node: Node) -> None:
    own = {"store": "s3://bucket/runs", "image": "registry.example/rul:1"}
    own["checkpoint"] = {"max_state": "1Gi"}  # type: ignore[assignment]
    given = {"mounts": ["/data/a", {"source": "cache", "target": "/c"}], "network": "none"}
    plain = node.job("python", "x.py", name="plain", **(own | {"metrics": {}}))
    path = node.job("python", "x.py", name="asks", **(own | given | {"metrics": {}}))

    submit = ("submit", path, "--launcher", "kubernetes", "--dry-run")
    for command in (("render", path), submit):
        said = node.call(*command)
        assert said.code == 0, said.err
        mounts, network = said.err.splitlines()
        assert "mounts are left out (/data/a, cache): " in mounts
        assert "kubernetes.claims" in mounts
        assert "network: none is left out: " in network
        assert "NetworkPolicy" in network
        assert "/data/a" not in said.out
    assert node.call("render", plain).err == ""


def test_a_directory_on_a_claim_lasts() -> None:
    section = {"claims": {"disk": "/mnt/runs"}}
    assert objects.lasting_store(job_of(store="/mnt/runs/x", kubernetes=section))
    assert not objects.lasting_store(job_of(store="/mnt/runsx", kubernetes=section))
    assert not objects.lasting_store(job_of(store="runs", kubernetes=section))


BAD = {
    "no image": ({"image": None}, "image"),
    "no largest state": ({"checkpoint": {}}, "checkpoint.max_state"),
    "GPUs by their index": ({"resources": {"gpus": [0, 1]}}, "resources.gpus"),
    "any port": ({"metrics": {"port": 0}}, "metrics.port"),
    "a mount twice": ({"kubernetes": {"claims": {"a": "/x", "b": "/x"}}}, "kubernetes.claims"),
    "a mount over ours": ({"kubernetes": {"claims": {"a": "/tmp"}}}, "kubernetes.claims"),
    "a secret": ({"env": {"AWS_SECRET_ACCESS_KEY": "abc"}}, "env.AWS_SECRET_ACCESS_KEY"),
    "too much": ({"params": {"x": "y" * 1_000_001}}, "the job file"),
}


@pytest.mark.parametrize(("changes", "key"), BAD.values(), ids=BAD)
def test_what_a_cluster_cannot_run_is_refused(changes: dict[str, Any], key: str) -> None:
    (problem,) = problems_of(job_of(**changes))
    assert problem.startswith(key)
    assert "abc" not in problem


def test_a_section_that_is_wrong_is_refused_with_its_key(node: Node) -> None:
    path = node.job("python", "x.py", kubernetes={"namespace": "A_b", "profil": "gke-spot"})
    refused = node.call("render", path)

    assert refused.code == 2
    assert "kubernetes.namespace: expected a DNS label" in refused.err
    assert "did you mean kubernetes.profile?" in refused.err
    assert pod.CONTAINER == "runner"
