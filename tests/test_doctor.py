"""`runner doctor`: one line for everything that could fail, and exit 2 when something would."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from buckets import Bucket, new_bucket
from nodes import PROGRAMS, Node
from servers.ceph import Gateway
from slots import commit, snapshot

from runner.doctor import machine, server
from runner.doctor.finding import Finding, Verdict, size_text
from runner.doctor.probes import Probes
from runner.job import Job
from runner.store import DirectoryStore, S3Options
from runner.store.credentials import CredentialSource

CHECKS_OF_A_DIRECTORY = [
    *("command", "gpu", "notices", "spool", "list", "write", "read", "conditional writes"),
    *("delete", "store", "throughput", "memory", "emergency save"),
]


def examined(node: Node, job: str, *options: str) -> dict[str, dict[str, Any]]:
    """The findings by their checks; the exit code has to agree with them."""
    called = node.call("doctor", job, *options, "-o", "json")
    findings = called.json["findings"]
    failed = any(finding["verdict"] == "FAIL" for finding in findings)
    assert (called.code, called.json["ok"]) == ((2, False) if failed else (0, True))
    assert len({finding["check"] for finding in findings}) == len(findings)
    return {finding["check"]: finding for finding in findings}


# ---------------------------------------------------------------- a directory


def test_each_check_of_a_job_is_one_line(node: Node) -> None:
    told = node.call("doctor", node.job("true"))

    lines = [line.split(None, 1) for line in told.out.splitlines()]
    assert (told.code, told.err) == (0, "")
    assert [rest.split("  ")[0] for _, rest in lines] == CHECKS_OF_A_DIRECTORY
    assert {verdict for verdict, _ in lines} <= {"ok", "warn"}


def test_the_same_is_said_for_programs(node: Node) -> None:
    found = examined(node, node.job("true"))

    assert list(found) == CHECKS_OF_A_DIRECTORY
    assert set(found["list"]) == {"check", "verdict", "facts", "remedy"}
    assert "MB/s" in found["throughput"]["facts"] or "GB/s" in found["throughput"]["facts"]
    assert found["throughput"]["facts"].endswith("with 33.6 MB in 4 parts")
    assert "not known before the first" in found["emergency save"]["facts"]


def test_the_entry_point_of_a_validation_is_looked_at(node: Node) -> None:
    def said_of(entrypoint: str) -> dict[str, Any]:
        checkpoint = {"validate": {"entrypoint": entrypoint}}
        job = node.job("true", workdir=str(PROGRAMS), checkpoint=checkpoint)
        return examined(node, job)["validation"]

    assert said_of("judges:val_loss")["verdict"] == "ok"
    assert "judges has no 'val'" in said_of("judges:val")["facts"]


def test_looking_leaves_nothing_in_the_store_and_starts_nothing(node: Node) -> None:
    node.store_folder.mkdir()

    examined(node, node.job("touch", "started"))

    assert list(node.store_folder.rglob("*")) == []
    assert not (node.folder / "started").exists()
    assert node.spools() == []


def test_the_newest_checkpoint_tells_what_an_emergency_save_takes(node: Node) -> None:
    moment = {"productive_seconds": 50.0, "snapshot_seconds": 0.25, "scope": "full"}
    saved = commit(node.store, snapshot(1, 1, **moment), "job")
    commit(node.store, snapshot(1, 2, step=101, scope="weights"), "job")

    fits = examined(node, node.job("true", preemption={"grace": "30s"}))
    too_long = examined(node, node.job("true", preemption={"grace": "700ms"}))
    of_another_run = examined(node, node.job("true"), "--run-id", "other")

    assert fits["emergency save"]["verdict"] == "ok"
    assert "step 0.50 s + snapshot 0.25 s + store 0.00 s" in fits["emergency save"]["facts"]
    assert f"{saved.nbytes} bytes" in fits["emergency save"]["facts"]
    assert "2 slots of" in fits["memory"]["facts"]
    assert too_long["emergency save"]["verdict"] == "FAIL"
    assert "does NOT fit" in too_long["emergency save"]["facts"]
    assert of_another_run["emergency save"]["verdict"] == "warn"


def test_what_would_fail_is_said_and_the_rest_is_still_looked_at(node: Node) -> None:
    (node.folder / "a-file").write_text("")
    node.environment["RUNNER_SPOOL_ROOT"] = str(node.folder / "nowhere")

    no_store = examined(node, node.job("no-such-program", store="a-file"))
    no_spool = examined(node, node.job("true"))

    assert no_store["command"]["verdict"] == "FAIL"
    assert "no program 'no-such-program'" in no_store["command"]["facts"]
    assert no_store["store"]["verdict"] == "FAIL"
    assert "is not a directory" in no_store["store"]["facts"]
    assert no_spool["spool"]["verdict"] == "FAIL"
    assert "RUNNER_SPOOL_ROOT" in no_spool["spool"]["remedy"]
    assert no_spool["throughput"]["verdict"] == "ok"


def test_a_spool_that_is_not_in_memory_is_warned_of(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNNER_SPOOL_ROOT", str(tmp_path))
    for kind, verdict in (("ext4", Verdict.WARN), ("tmpfs", Verdict.OK), (None, Verdict.WARN)):
        monkeypatch.setattr(machine, "file_system_of", lambda folder, kind=kind: kind)

        (finding,) = machine.spool(job, "job", str(tmp_path / "store"))

        assert (kind, finding.verdict) == (kind, verdict)


def test_the_kind_of_a_file_system_is_that_of_the_nearest_mount_point() -> None:
    assert machine.file_system_of(Path("/proc")) == "proc"
    assert machine.file_system_of(Path("/proc/sys/kernel")) == "proc"
    assert machine.file_system_of(Path("/")) != "proc"


def test_a_job_file_that_is_wrong_is_no_finding(node: Node) -> None:
    (node.folder / "wrong.yaml").write_text("name: job\n")

    wrong = node.call("doctor", "wrong.yaml")

    assert (wrong.code, wrong.out) == (2, "")
    assert "command: is missing" in wrong.err


# ---------------------------------------------------------------- memory


@pytest.fixture
def job() -> Job:
    return Job.model_validate({"name": "job", "command": ["true"], "checkpoint": {"slots": 2}})


@pytest.mark.parametrize(
    ("available", "state_bytes", "verdict", "said"),
    [
        (10_000, 4_000, Verdict.OK, "2 slots of 4 kB fit"),
        (5_000, 4_000, Verdict.WARN, "of 2 slots of 4 kB there is room for 1"),
        (4_000, 4_000, Verdict.WARN, "a snapshot of 4 kB goes to the disk at "),
        (0, 10**18, Verdict.FAIL, "make room"),
        (10_000, None, Verdict.OK, "enough for 2 slots of 4.5 kB; the state's size is not known"),
    ],
)
def test_memory_for_the_slots_is_compared_with_the_state(
    job: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    available: int,
    state_bytes: int | None,
    verdict: Verdict,
    said: str,
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda folder: available)
    monkeypatch.setenv("RUNNER_SPOOL_ROOT", str(tmp_path))

    (finding,) = machine.memory(job, "job", str(tmp_path / "store"), state_bytes)

    assert finding.verdict is verdict
    assert said in finding.as_line()


# ---------------------------------------------------------------- GPUs

NVIDIA = {
    "two of a kind": (
        "echo 'NVIDIA H200, 570.86.15, 143771'; echo 'NVIDIA H200, 570.86.15, 143771'",
        Verdict.OK,
        "2 × NVIDIA H200 (140 GiB), driver 570.86.15",
    ),
    "two kinds": (
        "echo 'A, 5.1, 1024'; echo 'B, 5.1, 2048'",
        Verdict.OK,
        "1 × A (1 GiB), 1 × B (2 GiB), driver 5.1",
    ),
    "memory that is not told": ("echo 'A, 5.1, [N/A]'", Verdict.OK, "1 × A, driver 5.1"),
    "no device": ("echo No devices were found; exit 6", Verdict.WARN, "No devices were found"),
    "nothing": ("true", Verdict.WARN, "no GPU seen"),
}


@pytest.mark.parametrize(("script", "verdict", "said"), NVIDIA.values(), ids=NVIDIA)
def test_gpus_are_told_as_nvidia_smi_tells_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, verdict: Verdict, said: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    (finding,) = machine.gpu()

    assert finding.verdict is verdict
    assert said in finding.facts


def test_without_nvidia_smi_no_gpu_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    (finding,) = machine.gpu()

    assert (finding.verdict, "no GPU seen" in finding.facts) == (Verdict.WARN, True)


# ---------------------------------------------------------------- stores that are not what they say


class TwoWinners(DirectoryStore):
    """Lets every writer of a key win."""

    def create(self, key: str, data: bytes) -> bool:
        self.replace(key, data)
        return True


class Forgetful(DirectoryStore):
    """Gives other bytes back than were stored."""

    def fetch(self, key: str, offset: int, into: memoryview) -> None:
        super().fetch(key, offset, into)
        into[0] ^= 1


def test_a_store_in_which_two_writers_win_is_refused(tmp_path: Path) -> None:
    findings = {f.check: f for f in Probes(TwoWinners(tmp_path), True).permissions()}

    assert findings["conditional writes"].verdict is Verdict.FAIL
    assert "conditional_writes: off" in findings["conditional writes"].remedy
    assert findings["delete"].verdict is Verdict.OK


def test_doing_without_conditional_writes_is_a_warning(tmp_path: Path) -> None:
    findings = {f.check: f for f in Probes(DirectoryStore(tmp_path), False).permissions()}

    assert findings["conditional writes"].verdict is Verdict.WARN


def test_a_store_that_gives_other_bytes_back_is_refused(tmp_path: Path) -> None:
    probes = Probes(Forgetful(tmp_path), True)

    (finding,) = probes.speed()

    assert finding.verdict is Verdict.FAIL
    assert "came back with other bytes" in finding.facts
    assert probes.upload_bytes_per_second is None
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- who asks, and when

NOW = datetime.now(UTC)
SOURCES = {
    "none": (None, Verdict.FAIL, "boto3 finds none"),
    "for ever": (CredentialSource("the environment"), Verdict.OK, "from the environment"),
    "for hours": (
        CredentialSource("a role", NOW + timedelta(hours=5)),
        Verdict.OK,
        "from a role, valid until ",
    ),
    "not for long": (
        CredentialSource("a role", NOW + timedelta(minutes=5)),
        Verdict.WARN,
        "from a role, valid until ",
    ),
}


@pytest.mark.parametrize(("source", "verdict", "said"), SOURCES.values(), ids=SOURCES)
def test_it_is_told_where_credentials_come_from_and_when_they_end(
    monkeypatch: pytest.MonkeyPatch,
    source: CredentialSource | None,
    verdict: Verdict,
    said: str,
) -> None:
    monkeypatch.setattr(server, "credential_source", lambda: source)

    (finding,) = server.credentials(S3Options())

    assert finding.verdict is verdict
    assert said in finding.facts


@pytest.mark.parametrize(
    ("skew_seconds", "verdict", "said"),
    [
        (2.0, Verdict.OK, "agrees"),
        (-90.0, Verdict.WARN, "90 s behind"),
        (1000.0, Verdict.FAIL, "1000 s ahead"),
    ],
)
def test_a_clock_that_is_wrong_is_found_before_the_server_refuses(
    monkeypatch: pytest.MonkeyPatch, skew_seconds: float, verdict: Verdict, said: str
) -> None:
    monkeypatch.setattr(server, "_skew_seconds", lambda options: skew_seconds)

    (finding,) = server.clock(S3Options())

    assert (finding.verdict, said in finding.facts) == (verdict, True)


def test_the_line_of_a_finding_is_one_line() -> None:
    finding = Finding("check", Verdict.FAIL, "two\nlines", "do this")

    assert finding.as_line() == "FAIL  check               two lines; do this"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (33_554_432, "33.6 MB"),
     (999_999, "1 MB"), (150e9, "150 GB"), (12e12, "12.0 TB")],
)  # fmt: skip
def test_sizes_are_told_with_a_unit(nbytes: float, text: str) -> None:
    assert size_text(nbytes) == text


# ---------------------------------------------------------------- S3


@pytest.fixture
def bucket(gateway: Gateway) -> Iterator[Bucket]:
    with new_bucket(gateway) as bucket:
        yield bucket


@pytest.mark.ceph
def test_a_store_on_s3_is_tried_with_everything_a_run_needs(node: Node, bucket: Bucket) -> None:
    told = node.call("doctor", node.job("true", **bucket.keys))
    found = examined(node, node.job("true", **bucket.keys))

    assert told.err == ""
    for secret in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[secret] not in told.out
    assert list(found) == [
        *("command", "gpu", "notices", "credentials", "server", "clock", "spool", "list", "write"),
        *("read", "conditional writes", "delete", "clean up", "store", "throughput", "memory"),
        "emergency save",
    ]
    assert found["credentials"]["facts"] == "from the environment (AWS_ACCESS_KEY_ID)"
    assert found["server"]["facts"] == bucket.endpoint
    assert {f["verdict"] for name, f in found.items() if name not in ("gpu", "emergency save")} == {
        "ok"
    }
    assert bucket.objects() == {}


@pytest.mark.ceph
@pytest.mark.parametrize(
    ("action", "check", "verdict"),
    [
        ("s3:ListBucket", "list", "FAIL"),
        ("s3:PutObject", "write", "FAIL"),
        ("s3:GetObject", "read", "FAIL"),
        ("s3:DeleteObject", "delete", "FAIL"),
        ("s3:ListBucketMultipartUploads", "clean up", "warn"),
    ],
)
def test_a_permission_that_is_missing_is_named(
    node: Node, bucket: Bucket, action: str, check: str, verdict: str
) -> None:
    bucket.deny(action)

    found = examined(node, node.job("true", **bucket.keys))

    assert found[check]["verdict"] == verdict
    assert action in found[check]["facts"]
    failed = [name for name, finding in found.items() if finding["verdict"] == "FAIL"]
    if check == "read" and "conditional writes" in failed:
        assert action in found["conditional writes"]["facts"]
        failed.remove("conditional writes")  # who has won is read where an answer was lost
    assert failed == ([check] if verdict == "FAIL" else [])


@pytest.mark.ceph
def test_a_server_that_is_not_there_and_an_object_in_the_way_are_found(
    node: Node, bucket: Bucket
) -> None:
    bucket.put("some/prefix", b"an object")

    in_the_way = examined(node, node.job("true", **bucket.keys))
    nowhere = examined(
        node, node.job("true", store=bucket.url, s3={"endpoint": "http://127.0.0.1:9"})
    )
    no_bucket = examined(
        node,
        node.job("true", store=f"s3://{bucket.name}-2", s3={"endpoint": bucket.endpoint}),
    )

    assert "is an object, where a prefix is expected" in in_the_way["store"]["facts"]
    assert nowhere["server"]["verdict"] == "FAIL"
    assert "nothing listens on port 9" in nowhere["server"]["facts"]
    assert no_bucket["list"]["verdict"] == "FAIL"
    assert "there is no bucket" in no_bucket["list"]["facts"]
