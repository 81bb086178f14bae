from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import runner
from runner.errors import JobError, UsageError
from runner.job import (
    S3,
    Job,
    check_launchable,
    check_run_id,
    differences,
    job_as_submitted,
    job_schema,
    load_job,
    parse_param,
    resolved_command,
    shadowing_file,
)
from runner.store import S3Options

MINIMAL = "name: a\ncommand: [python, train.py]\n"

COMPLETE = """
name: rul-fd001
command: [python, -m, jobs.rul.train]
workdir: sub
params: {subset: FD001, epochs: 30, lr: 1e-3,
  optimizer: {betas: [0.9, 0.999]}, note: null, deep: {x: [null]}}
env: {OMP_NUM_THREADS: "2", EMPTY: ""}
launcher: process
store: ../runs
checkpoint:
  every: {steps: 500, minutes: 2.5, epochs: 1}
  snapshot_every: {steps: 4}
  slots: 3
  validate: {entrypoint: "jobs.rul.validate:check", every: 5, timeout: 5m, tolerance: 0.01,
    metrics: {val_rmse: 0.5}}
  keep: {last: 5, best: {metric: val_rmse, mode: max, count: 2}, every: {epochs: 10}}
preemption: {grace: 2m, notices: [aws, azure]}
restart: {failures: 0, backoff: {initial: 250ms, max: 1h}, hang_timeout: 1.5h, never: [2, 78]}
health: {metrics: [train_loss], restore: healthy}
metrics: {port: 9500, host: 0.0.0.0, pushgateway: "http://pushgateway:9091/"}
cost: {per_hour: 1.2}
"""

Load = Callable[..., Job]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write a job file into a folder of its own and load it from there."""

    def write_and_load(text: str | bytes, **options: Any) -> Job:
        path = tmp_path / "job.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_job(path, **{"workdir": tmp_path, **options})

    return write_and_load


def problems_of(load: Load, text: str | bytes, **options: Any) -> list[str]:
    """The problems' texts, from the file's name on."""
    with pytest.raises(JobError) as caught:
        load(text, **options)
    assert all("\n" not in problem for problem in caught.value.problems)
    return [re.sub(r"^\S*(?=job\.yaml)", "", problem) for problem in caught.value.problems]


# What a job says


def test_a_job_of_two_keys_gets_the_documented_defaults(load: Load, tmp_path: Path) -> None:
    job = load(MINIMAL)

    assert job.name == "a"
    assert job.command == ("python", "train.py")
    assert job.workdir == tmp_path
    assert (job.params, job.env, job.launcher) == ({}, {}, "process")
    assert (job.store, job.store_path) == ("runs", tmp_path / "runs")
    assert job.checkpoint.every is None  # auto
    assert job.checkpoint.snapshot_every is None  # auto
    assert job.checkpoint.slots == 2
    assert job.checkpoint.keep.last == 3
    assert job.checkpoint.keep.best is None
    assert job.checkpoint.keep.every is None
    assert (job.preemption.grace_seconds, job.preemption.notices) == (30, ())
    assert (job.restart.failures, job.restart.never) == (5, (2,))
    assert job.restart.backoff.initial_seconds == 1
    assert job.restart.backoff.max_seconds == 60
    assert job.restart.hang_timeout_seconds == 600
    assert (job.health.metrics, job.health.restore) == ((), "warn")
    assert (job.checkpoint.compression, job.checkpoint.weights_every, job.s3) == (None, None, None)
    assert job.outputs.max_size_bytes == 2**30
    assert (job.logs.max_size_bytes, job.logs.files) == (64 << 20, 8)
    assert (job.metrics.host, job.metrics.port, job.metrics.is_served) == ("127.0.0.1", 9400, True)
    assert (job.metrics.pushgateway, job.cost) == (None, None)


def test_every_key_is_read(load: Load, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()

    job = load(COMPLETE)

    assert job.name == "rul-fd001"
    assert job.workdir == tmp_path / "sub"
    assert job.params["lr"] == 0.001
    assert job.params["optimizer"] == {"betas": [0.9, 0.999]}
    assert job.params["note"] is None
    assert job.env == {"OMP_NUM_THREADS": "2", "EMPTY": ""}
    assert job.store_path == tmp_path / "sub" / ".." / "runs"
    every = job.checkpoint.every
    assert (every.steps, every.minutes, every.epochs) == (500, 2.5, 1)
    assert job.checkpoint.snapshot_every.steps == 4
    assert job.checkpoint.slots == 3
    validation = job.checkpoint.validation
    assert validation is not None
    assert (validation.entrypoint, validation.every) == ("jobs.rul.validate:check", 5)
    assert (validation.timeout_seconds, validation.tolerance) == (300.0, 0.01)
    assert validation.metrics == {"val_rmse": 0.5}
    keep = job.checkpoint.keep
    assert keep.last == 5
    assert keep.best is not None
    assert (keep.best.metric, keep.best.mode, keep.best.count) == ("val_rmse", "max", 2)
    assert keep.every is not None
    assert keep.every.epochs == 10
    assert (job.preemption.grace_seconds, job.preemption.notices) == (120, ("aws", "azure"))
    assert (job.restart.failures, job.restart.never) == (0, (2, 78))
    assert job.restart.backoff.initial_seconds == 0.25
    assert job.restart.backoff.max_seconds == 3600
    assert job.restart.hang_timeout_seconds == 5400
    assert (job.health.metrics, job.health.restore) == (("train_loss",), "healthy")
    assert (job.metrics.host, job.metrics.port) == ("0.0.0.0", 9500)
    assert job.metrics.pushgateway == "http://pushgateway:9091"
    assert job.cost is not None
    assert job.cost.per_hour == 1.2


IN_A_CONTAINER = """
name: a
command: [python, train.py]
launcher: docker
image: registry.example:5000/team/rul:1.0@sha256:{digest}
network: bridge
user: 1000
mounts: [/data, {{source: files, target: /files, writable: true}}]
resources: {{gpus: [0, GPU-8a56], cpus: 0.5, memory: 32Gi, shm: 8Gi}}
credentials: pass
"""


def test_every_key_of_a_trainer_in_a_container_is_read(load: Load) -> None:
    job = load(IN_A_CONTAINER.format(digest="ab" * 32))

    assert job.image == f"registry.example:5000/team/rul:1.0@sha256:{'ab' * 32}"
    assert (job.network, job.user, job.credentials) == ("bridge", "1000:1000", "pass")
    assert [(m.source, m.target, m.writable) for m in job.mounts] == [
        ("/data", None, False),
        ("files", "/files", True),
    ]
    assert job.resources.gpus == ("0", "GPU-8a56")
    assert (job.resources.cpus, job.resources.memory, job.resources.shm) == (0.5, 2**35, 2**33)
    assert Job.model_validate(job_as_submitted(job)) == job


def test_something_may_be_mounted_below_the_workdir(load: Load) -> None:
    mounts = "mounts: [{source: x, target: //runner/workdir/x}, {source: y, target: /runners}]"
    job = load(f"{MINIMAL}launcher: docker\nimage: rul\n{mounts}\n")

    assert [m.target for m in job.mounts] == ["/runner/workdir/x", "/runners"]


def test_a_trainer_in_a_container_gets_little_unless_it_is_said(load: Load) -> None:
    job = load(f"{MINIMAL}launcher: docker\nimage: rul\n")

    assert (job.network, job.user, job.mounts, job.credentials) == ("none", None, (), "withhold")
    assert (job.resources.gpus, job.resources.cpus, job.resources.memory) == (0, None, None)


def test_a_container_needs_an_image(load: Load) -> None:
    (problem,) = problems_of(load, f"{MINIMAL}launcher: docker\n")

    assert problem.endswith("image: is missing: launcher: docker needs it")


@pytest.mark.parametrize(
    "image", ["rul", "rul:1.0", "team/rul", "localhost:5000/a/b:x", "sha256:" + "0" * 64]
)
def test_an_image_is_named_as_engines_name_them(load: Load, image: str) -> None:
    assert load(f"{MINIMAL}image: {image}\n").image == image


ON_S3 = """
name: a
command: [x]
store: s3://some-bucket/a/prefix/
s3:
  endpoint: http://storage.example:9000/
  region: eu-central-1
  addressing: path
  sse: aws:kms
  kms_key: alias/checkpoints
  storage_class: STANDARD_IA
  role: arn:aws:iam::123456789012:role/training
  ca_bundle: certificates.pem
  conditional_writes: off
checkpoint: {compression: zstd, weights_every: {epochs: 1}}
outputs: {max_size: 500M}
logs: {max_size: 1Gi, files: 16}
"""


def test_every_key_of_a_store_on_s3_is_read(load: Load) -> None:
    job = load(ON_S3)

    assert job.store == "s3://some-bucket/a/prefix"
    assert job.s3 is not None
    assert job.s3.model_dump() == {
        "endpoint": "http://storage.example:9000",
        "region": "eu-central-1",
        "addressing": "path",
        "sse": "aws:kms",
        "kms_key": "alias/checkpoints",
        "storage_class": "STANDARD_IA",
        "role": "arn:aws:iam::123456789012:role/training",
        "ca_bundle": "certificates.pem",
        "conditional_writes": False,
    }
    assert job.checkpoint.compression == "zstd"
    assert job.checkpoint.weights_every is not None
    assert job.checkpoint.weights_every.epochs == 1
    assert job.outputs.max_size_bytes == 500_000_000
    assert (job.logs.max_size_bytes, job.logs.files) == (1 << 30, 16)
    with pytest.raises(ValueError, match="no directory"):
        _ = job.store_path


def test_the_keys_of_a_store_on_s3_are_the_options_of_the_store() -> None:
    assert list(S3.model_fields) == [field.name for field in dataclasses.fields(S3Options)]
    assert S3Options(**S3().model_dump()) == S3Options()


@pytest.mark.parametrize(
    ("written", "read"),
    {
        "s3://bucket": "s3://bucket",
        "s3://bucket/": "s3://bucket",
        "s3://bucket/a/b/": "s3://bucket/a/b",
        "s3://my.bucket-1/Ümlaut x": "s3://my.bucket-1/Ümlaut x",
        f"s3://{'b' * 63}/{'a' * 512}": f"s3://{'b' * 63}/{'a' * 512}",
    }.items(),
)
def test_a_bucket_and_prefix_have_one_spelling(load: Load, written: str, read: str) -> None:
    assert load(f"{MINIMAL}store: {written}\n").store == read


@pytest.mark.parametrize(
    ("written", "meant"),
    [("on", True), ("off", False), ("Off", False), ("'off'", False), ("true", True),
     ("false", False)],
)  # fmt: skip
def test_on_and_off_are_switches_as_text_and_as_booleans(
    load: Load, written: str, meant: bool
) -> None:
    s3 = load(f"{MINIMAL}store: s3://bucket\ns3: {{conditional_writes: {written}}}\n").s3

    assert s3 is not None
    assert s3.conditional_writes is meant


@pytest.mark.parametrize("written", ["off", "'off'", "false", "OFF"])
def test_compression_can_be_off_in_every_spelling(load: Load, written: str) -> None:
    job = load(f"{MINIMAL}checkpoint: {{compression: {written}}}\n")

    assert job.checkpoint.compression is None


@pytest.mark.parametrize(
    ("written", "nbytes"), [("8Gi", 8 << 30), ("'4096'", 4096), ("0M", 0), ("3k", 3000)]
)
def test_a_size_is_read_in_bytes(load: Load, written: str, nbytes: int) -> None:
    assert load(f"{MINIMAL}outputs: {{max_size: {written}}}\n").outputs.max_size_bytes == nbytes


def test_naming_one_interval_replaces_the_default_one(load: Load) -> None:
    every = load(MINIMAL + "checkpoint: {every: {steps: 5}}").checkpoint.every

    assert (every.steps, every.minutes, every.epochs) == (5, None, None)


def test_a_command_given_as_text_is_split_like_a_shell_does(load: Load) -> None:
    job = load("name: a\ncommand: python train.py --tag 'two words' \"\"\n")

    assert job.command == ("python", "train.py", "--tag", "two words", "")


def test_a_home_folder_is_expanded_in_paths(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home" / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    job = load(MINIMAL + "workdir: ~/work\nstore: ~/runs\n")

    assert job.workdir == tmp_path / "home" / "work"
    assert job.store_path == tmp_path / "home" / "runs"


def test_without_a_workdir_the_current_folder_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.yaml").write_text(MINIMAL)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert load_job(tmp_path / "job.yaml").workdir == tmp_path / "elsewhere"


def test_a_job_cannot_be_changed(load: Load) -> None:
    job = load(MINIMAL)

    with pytest.raises(pydantic.ValidationError):
        job.checkpoint.slots = 4


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("5", 5), ("-5", -5), ("+5", 5), ("0", 0), ("0x1F", 31), (str(2**64 - 1), 2**64 - 1),
        ("1e-3", 0.001), ("1.0e3", 1000.0), ("1.", 1.0), (".5", 0.5), ("-2.5E+2", -250.0),
        ("true", True), ("FALSE", False), ("null", None), ("~", None),
        ("nan", "nan"), ("y", "y"), ("1.2.3", "1.2.3"), ("FD001", "FD001"), ("'yes'", "yes"),
        ('"010"', "010"), ("[1, [2]]", [1, [2]]), ("{a: {b: c}}", {"a": {"b": "c"}}),
        ("|-\n  two\n  lines", "two\nlines"),
    ],
)  # fmt: skip
def test_params_mean_what_yaml_1_2_says(load: Load, written: str, value: Any) -> None:
    read = load(f"{MINIMAL}params:\n x: {written}\n").params["x"]

    assert (read, type(read)) == (value, type(value))


def test_a_byte_order_mark_and_comments_are_no_problem(load: Load) -> None:
    assert load(b"\xef\xbb\xbf# a job\n---\n" + MINIMAL.encode() + b"...\n").name == "a"


@pytest.mark.parametrize(
    ("written", "meant"),
    [("95%", 0.95), ("50%", 0.5), ("99%", 0.99), ("on", 0.95), ("true", 0.95), ("off", 0.0)],
)
def test_the_memory_guard_is_a_share_or_a_switch(load: Load, written: str, meant: float) -> None:
    job = load(f"{MINIMAL}resources: {{memory_guard: {written}}}\n")

    assert job.resources.memory_guard == meant
    assert Job.model_validate(job_as_submitted(job)) == job
    assert load(MINIMAL).resources.memory_guard == 0.95


@pytest.mark.parametrize("written", ["off", "Off", "false"])
def test_the_endpoint_can_be_off_in_every_spelling(load: Load, written: str) -> None:
    job = load(f"{MINIMAL}metrics: {{port: {written}}}\n")

    assert not job.metrics.is_served
    assert job_as_submitted(job)["metrics"] == {"port": "off", "host": "127.0.0.1"}
    assert Job.model_validate(job_as_submitted(job)) == job


# What is refused, and how it is said

REFUSED = {
    # in the file → what the message has to say, after `job.yaml:3: `
    "metrics: {port: 65536}": "metrics.port: expected a port from 0 to 65535 (0: any that is free",
    "metrics: {port: true}": "metrics.port: expected a port from 0 to 65535",
    "metrics: {host: a b}": "metrics.host: expected an address of this machine",
    "metrics: {pushgateway: gateway}": "metrics.pushgateway: expected the URL of a Pushgateway",
    "metrics: {pushgateway: 'http://u:p@g'}": "metrics.pushgateway: expected a URL without cred",
    "cost: {per_hour: 0}": "cost.per_hour: expected more than 0, got 0",
    "cost: {}": "cost.per_hour: is missing",
    "comand: x": "comand: is not a key of a job; did you mean command?",
    "Store: x": "Store: is not a key of a job; did you mean store?",
    "grace: 5s": "grace: is not a key of a job; did you mean preemption.grace?",
    "colour: x": "colour: is not a key of a job; valid here: name, command, workdir",
    "image: X": "image: expected an image, such as registry.example/team/rul:1.0, got 'X'",
    "image: 'rul:'": "image: expected an image",
    "image: rul@sha256:12": "image: expected an image",
    "network: 'a b'": "network: expected none, bridge, host, or the name of a network, got 'a b'",
    "user: root": 'user: expected the numbers of a user and a group, such as "1000:1000"',
    "user: -1": "user: expected the numbers of a user and a group",
    "user: '4294967295'": "user: expected the numbers of a user and a group",
    "user: true": "user: expected the numbers of a user and a group",
    "mounts: /data": "mounts: expected a list, such as [a, b], got '/data'",
    "mounts: [5]": "mounts[0]: expected a mapping with keys among source, target, writable",
    "mounts: ['/a:/b']": "mounts[0].source: expected a path without ':'; where it goes is said by",
    "mounts: [{source: a, target: b}]": "mounts[0].target: expected an absolute path in the cont",
    "mounts: [{source: a, target: /}]": "mounts[0].target: expected an absolute path in the cont",
    "mounts: [{source: a, target: //}]": "mounts[0].target: expected an absolute path in the cont",
    "mounts: [{source: a, target: /runner}]": "mounts[0].target: expected a path that is not in /r",
    "mounts: [{source: a, target: /runner/spool/x}]": "mounts[0].target: expected a path that is",
    "mounts: [{source: a, target: //runner/slots}]": "mounts[0].target: expected a path that is",
    "mounts: [{source: a, target: /runner/workdir}]": "mounts[0].target: expected a path that is",
    "mounts: [/runner/outputs]": "mounts[0]: expected a path that is not in /runner",
    "mounts: [{source: a, write: true}]": "mounts[0].write: is not a key of a job; did you mean mo",
    "mounts: [/a, {source: b, target: /a}]": "mounts: expected each target once",
    "credentials: keep": "credentials: expected 'withhold' or 'pass', got 'keep'",
    "resources: {gpus: -1}": "resources.gpus: expected how many, such as 2, or which ones, such as",
    "resources: {gpus: all}": "resources.gpus: expected how many, such as 2, or which ones, such a",
    "resources: {gpus: []}": "resources.gpus: expected how many, such as 2, or which ones",
    "resources: {gpus: [0, 0]}": "resources.gpus: expected each GPU once",
    "resources: {gpus: [true]}": "resources.gpus: expected how many, such as 2, or which ones",
    "resources: {cpus: 0}": "resources.cpus: expected more than 0, got 0",
    "resources: {memory: 8}": "resources.memory: expected a size such as 8Gi",
    "resources: {memory: 1Mi}": "resources.memory: expected 6Mi or more, got '1Mi'",
    "resources: {shm: much}": "resources.shm: expected a size such as 8Gi",
    "resources: {memory_guard: 49%}": "resources.memory_guard: expected a share from 50% to 99%",
    "resources: {memory_guard: 100%}": "resources.memory_guard: expected a share from 50% to 99%",
    "resources: {memory_guard: 0.95}": "resources.memory_guard: expected a share from 50% to 99%",
    "preemption: {grace_seconds: 5.0}": "preemption.grace_seconds: is not a key",
    "checkpoint: {keep: {best: {metrics: a, metric: b}}}": "keep.best.metrics: is not a key of a"
    " job; did you mean checkpoint.keep.best.metric?",
    "checkpoint: {every: automatic}": "checkpoint.every: expected auto, or a mapping with keys am",
    "checkpoint: {snapshot_every: {}}": "checkpoint.snapshot_every.steps: is missing",
    "checkpoint: {every: {}}": "checkpoint.every: expected at least one of steps, minutes and ep",
    "checkpoint: {every: {steps: 0}}": "checkpoint.every.steps: expected 1 or more, got 0",
    "checkpoint: {every: {steps: 1.0}}": "every.steps: expected a whole number, got 1.0",
    "checkpoint: {every: {steps: '5'}}": "every.steps: expected a whole number, got '5'",
    "checkpoint: {every: {steps: true}}": "every.steps: expected a whole number, got true",
    "checkpoint: {every: {steps: 1e3}}": "every.steps: expected a whole number, got 1e3",
    "checkpoint: {every: {steps: 99999999999}}": "every.steps: expected 1000000000 or less",
    "checkpoint: {every: {minutes: 0}}": "every.minutes: expected more than 0, got 0",
    "checkpoint: {every: {minutes: true}}": "every.minutes: expected a number, got true",
    "checkpoint: {every: {minutes: '1'}}": "every.minutes: expected a number, got '1'",
    "checkpoint: {every: {minutes: .nan}}": "every.minutes: expected a finite number",
    "checkpoint: {every: {epochs: -1}}": "every.epochs: expected 1 or more, got -1",
    "checkpoint: {every: {steps: , minutes: 1}}": "every.steps: has no value",
    "checkpoint: {snapshot_every: 5}": "snapshot_every: expected auto, or a mapping with keys",
    "checkpoint: {validate: {every: 2}}": "checkpoint.validate.entrypoint: is missing",
    "checkpoint: {validate: {entrypoint: check}}": "checkpoint.validate.entrypoint: expected"
    " module:function, such as jobs.rul.validate:check, got 'check'",
    'checkpoint: {validate: {entrypoint: "a:b", metrics: {loss: -1}}}':
        "checkpoint.validate.metrics.loss: expected 0.0 or more, got -1",
    'checkpoint: {validate: {entrypoint: "a:b", tolerance: 1.5}}':
        "checkpoint.validate.tolerance: expected 1.0 or less, got 1.5",
    'checkpoint: {validate: {entrypoint: "a:b", evry: 2}}': "checkpoint.validate.evry: is not a"
    " key of a job; did you mean checkpoint.validate.every?",
    "checkpoint: {slots: -1}": "checkpoint.slots: expected 0 or more, got -1",
    "checkpoint: {slots: 9}": "checkpoint.slots: expected 8 or less, got 9",
    "checkpoint: {keep: {last: 0}}": "checkpoint.keep.last: expected 1 or more, got 0",
    "checkpoint: {keep: {best: {}}}": "checkpoint.keep.best.metric: is missing",
    "checkpoint: {keep: {best: {metric: a, mode: most}}}": "mode: expected 'min' or 'max', got 'mo",
    "checkpoint: {keep: {best: {metric: a, mode: no}}}": "mode: can be read as text or, in YAML 1.",
    "checkpoint: {keep: {best: {metric: ''}}}": "keep.best.metric: expected text, not nothing",
    "checkpoint: {keep: {every: {}}}": "checkpoint.keep.every.epochs: is missing",
    "checkpoint:": "checkpoint: has no value; give one, or leave the key out",
    "preemption: {grace: -1s}": "grace: expected a duration above zero, such as 250ms, 30s, 10m, 2",
    "preemption: {grace: 0s}": "preemption.grace: expected a duration above zero",
    "preemption: {grace: 30}": "preemption.grace: expected a duration above zero",
    "preemption: {grace: [30s]}": "preemption.grace: expected a duration above zero",
    "preemption: {notice: [aws]}": "preemption.notice: is not a key of a job; did you mean",
    "preemption: {notices: aws}": "preemption.notices: expected a list, such as [a, b], got 'aws'",
    "preemption: {notices: [AWS]}": "notices[0]: expected 'aws', 'gcp' or 'azure', got 'AWS'",
    "preemption: {notices: [aws, gcp, 3]}": "notices[2]: expected 'aws', 'gcp' or 'azure', got 3",
    "preemption: {notices: [gcp, gcp]}": "preemption.notices: expected each cloud once",
    "restart: {failures: -1}": "restart.failures: expected 0 or more, got -1",
    "restart: {backoff: {initial: 2m}}": "restart.backoff: expected initial (2m) to be at most max",
    "restart: {hang_timeout: 9999d}": "restart.hang_timeout: expected a duration above zero",
    "restart: {never: 2}": "restart.never: expected a list",
    "restart: {never: [1, 0]}": "restart.never[1]: expected 1 or more, got 0",
    "restart: {never: [256]}": "restart.never[0]: expected 255 or less, got 256",
    "health: {restore: maybe}": "health.restore: expected 'warn' or 'healthy', got 'maybe'",
    "health: {metrics: loss}": "health.metrics: expected a list, such as [a, b], got 'loss'",
    "health: {metrics: [1]}": "health.metrics[0]: expected text, got 1; put it in quotes",
    "launcher: slurm": "launcher: expected 'process', 'docker' or 'kubernetes', got 'slurm'",
    "store: file:///x": "store: expected a directory or s3://bucket/prefix, not a place on file://",
    "store: gs://bucket/x": "store: expected a directory or s3://bucket/prefix, not a place on gs:",
    "store: s3:/bucket/x": "store: expected a directory or s3://bucket/prefix, not a place on s3:/",
    "store: s3://": "store: expected s3://bucket/prefix, got 's3://'",
    "store: s3:///x": "store: expected s3://bucket/prefix, got 's3:///x'",
    "store: s3://Bucket/x": "store: 'Bucket' cannot be a bucket: expected 3 to 63 lower-case lett",
    "store: s3://ab/x": "store: 'ab' cannot be a bucket: expected 3 to 63 lower-case letters",
    "store: s3://a..b/x": "store: 'a..b' cannot be a bucket: expected 3 to 63 lower-case letters",
    "store: s3://-abc/x": "store: '-abc' cannot be a bucket: expected 3 to 63 lower-case letters",
    "store: s3://storage:9000/x": "store: 'storage:9000' cannot be a bucket",
    "store: s3://10.0.0.1/x": "store: '10.0.0.1' cannot be a bucket: it is an address",
    "store: s3://bucket/a//b": "store: the prefix 'a//b' has an empty part, '.' or '..'",
    "store: s3://bucket/../b": "store: the prefix '../b' has an empty part, '.' or '..'",
    'store: "s3://bucket/a\\tb"': "store: the prefix contains a control character",
    f"store: s3://bucket/{'a' * 513}": "store: expected a prefix of at most 512 bytes",
    "s3: {region: eu-west-1}": "s3: expected only with a store that is s3://bucket/prefix",
    "checkpoint: {compression: gzip}": "checkpoint.compression: expected zstd or off, got 'gzip'",
    "checkpoint: {compression: on}": "checkpoint.compression: expected zstd or off, got 'on'",
    "checkpoint: {compression: true}": "checkpoint.compression: expected zstd or off, got true",
    "checkpoint: {compression: 0}": "checkpoint.compression: expected zstd or off, got 0",
    "checkpoint: {weights_every: auto}": "weights_every: expected a mapping with keys among steps",
    "checkpoint: {weights_every: {}}": "checkpoint.weights_every: expected at least one of steps",
    "checkpoint: {weights_evry: {steps: 1}}": "did you mean checkpoint.weights_every?",
    "outputs: {max_size: 1GB}": "outputs.max_size: expected a size such as 8Gi, 512Mi, 500M or 40",
    "outputs: {max_size: 1024}": "outputs.max_size: expected a size such as 8Gi, 512Mi, 500M or",
    "outputs: {max_size: -1}": "outputs.max_size: expected a size such as 8Gi",
    "logs: {max_size: 64}": "logs.max_size: expected a size such as 8Gi",
    "logs: {files: 1}": "logs.files: expected",
    "logs: {file: 8}": "logs.file: is not a key of a job; did you mean logs.files?",
    "outputs: {size: 1Gi}": "outputs.size: is not a key of a job; did you mean outputs.max_size?",
    "store: ''": "store: expected text, not nothing",
    "store: 5": "store: expected text, got 5; put it in quotes",
    'store: "a\\0b"': "store: expected text without NUL characters",
    "workdir: nowhere": "workdir: there is no directory ",
    "workdir: job.yaml": "workdir: ",
    "workdir: ''": "workdir: expected text, not nothing",
    "workdir: 5": "workdir: expected a directory, as text",
    'workdir: "a\\0b"': "workdir: expected text without NUL characters",
    "workdir: ~no-such-user/x": "workdir: expected a directory: ",
    "params: [a]": "params: expected a mapping",
    "params: {1: a}": "params: a key is text: put '1' in quotes",
    "params: {on: a}": "params: a key is text: put 'on' in quotes",
    "params: {[a]: b}": "params: a key is text, not a list",
    "params: {x: .nan}": "params.x: expected a finite number",
    "params: {x: -.inf}": "params.x: expected a finite number",
    "params: {x: 1e999}": "params.x: expected a finite number",
    "params: {x: 18446744073709551616}": "params.x: expected a number of at most 64 bits",
    f"params: {{x: {'9' * 5000}}}": "params.x: expected a number of at most 64 bits",
    "params: {x: yes}": "params.x: can be read as text or, in YAML 1.1, as true or false",
    "params: {x: 010}": "params.x: can be read as a number or, in YAML 1.1, as an octal number",
    "params: {x: 08}": "params.x: can be read as a number or, in YAML 1.1, as text",
    "params: {x: 0o17}": "params.x: can be read as a number or, in YAML 1.1, as text",
    "params: {x: 1_000}": "params.x: can be read as text or, in YAML 1.1, as a number",
    "params: {x: 1:30}": "params.x: can be read as text or, in YAML 1.1, as a number",
    "params: {x: 2024-01-01}": "params.x: can be read as text or, in YAML 1.1, as a date",
    "params: {x: [{y: 1, y: 2}]}": "params.x[0].y: is given twice, in line 3 and in line 3",
    "params: {x: &a 1}": "params.x: anchors (&name) are not read",
    "params: {x: *a}": "params.x: aliases (*name) are not read",
    "params: {<<: {a: 1}}": "params: merge keys (<<) are not read",
    "params: {x: !!python/object/apply:os.system [ls]}": "params.x: tags (!name) are not read",
    "params: {x: !!str 5}": "params.x: tags (!name) are not read",
    'params: {x: "\\ud800"}': "params.x: is not Unicode text",
    'params: {"\\ud800": x}': "params: is not Unicode text",
    "params: {'a b': .nan}": "params.'a b': expected a finite number",
    f"params: {'[' * 40}{']' * 40}": "is nested deeper than 32 levels",
    "env: {A: 1}": "env.A: expected text; put it in quotes",
    "env: {A: on}": "env.A: can be read as text or",
    "env: {A: }": "env.A: has no value",
    "env: [A]": "env: expected a mapping",
    'env: {"A=B": x}': "env: expected names of environment variables, got 'A=B'",
    'env: {A: "\\0"}': "env.A: expected text without NUL characters",
    "env: {RUNNER_ATTEMPT: '1'}": "env: RUNNER_ATTEMPT: names that begin with RUNNER_ are set by",
    "name: b": "name: is given twice, in line 1 and in line 3",
    "--- {}": "a second document begins here; a job file holds one",
    "x: [1": "is not YAML: while parsing a flow sequence",
    "\tx: 1": "is not YAML: while scanning for the next token found character",
    "x: \x07": "is not YAML: contains the character '\\x07'",
    'x: "\\UFFFFFFFF"': "is not YAML: ",
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), REFUSED.items(), ids=[key[:60] for key in REFUSED])
def test_what_cannot_be_obeyed_is_refused_with_its_line_and_key(
    load: Load, line: str, message: str
) -> None:
    (problem,) = problems_of(load, MINIMAL + line + "\n")

    assert re.match(r"job\.yaml:[34]: ", problem)
    assert message in problem


REFUSED_ON_S3 = {
    "s3: {bucket: x}": "s3.bucket: is not a key of a job; valid here: endpoint, region",
    "s3: {endpont: x}": "s3.endpont: is not a key of a job; did you mean s3.endpoint?",
    "s3: yes please": "s3: expected a mapping with keys among endpoint, region, addressing, sse",
    "s3: {endpoint: storage:9000}": "s3.endpoint: expected the URL of a server, such as https://",
    "s3: {endpoint: 'ftp://storage'}": "s3.endpoint: expected the URL of a server, such as https:",
    "s3: {endpoint: 'https://'}": "s3.endpoint: expected the URL of a server",
    "s3: {endpoint: 'https://x:99999'}": "s3.endpoint: expected the URL of a server",
    "s3: {endpoint: 'https://x/bucket'}": "s3.endpoint: expected only a server; the bucket and",
    "s3: {endpoint: 'http://s3.amazonaws.com'}": "s3.endpoint: expected https: AWS is not spoken t",
    "s3: {endpoint: 'HTTP://S3.eu-west-1.AmazonAWS.com/'}": "s3.endpoint: expected https: AWS is n",
    "s3: {region: EU}": "s3.region: expected a region, such as eu-central-1, got 'EU'",
    "s3: {addressing: host}": "s3.addressing: expected 'auto', 'path' or 'virtual', got 'host'",
    "s3: {sse: kms}": "s3.sse: expected 'AES256' or 'aws:kms', got 'kms'",
    "s3: {kms_key: abc}": "s3.kms_key: expected only with sse: aws:kms",
    "s3: {sse: AES256, kms_key: abc}": "s3.kms_key: expected only with sse: aws:kms",
    "s3: {storage_class: cold}": "s3.storage_class: expected a storage class, such as STANDARD_IA",
    "s3: {role: training}": "s3.role: expected the ARN of a role, got 'training'",
    "s3: {ca_bundle: ''}": "s3.ca_bundle: expected text, not nothing",
    "s3: {conditional_writes: maybe}": "s3.conditional_writes: expected on or off, got 'maybe'",
    "s3: {conditional_writes: yes}": "s3.conditional_writes: can be read as text or, in YAML 1.1",
    "s3: {conditional_writes: 1}": "s3.conditional_writes: expected on or off, got 1",
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), REFUSED_ON_S3.items(), ids=REFUSED_ON_S3)
def test_what_cannot_be_obeyed_about_s3_is_refused(load: Load, line: str, message: str) -> None:
    (problem,) = problems_of(load, f"{MINIMAL}store: s3://bucket/x\n{line}\n")

    assert problem.startswith("job.yaml:4: ")
    assert message in problem


@pytest.mark.parametrize(
    "line",
    [
        "s3: {access_key: hush-hush}",
        "s3: {access_key_id: hush-hush}",
        "s3: {aws_secret_access_key: hush-hush}",
        "s3: {session_token: hush-hush}",
        "s3: {accesskey: hush-hush, endpoint: 'https://x'}",
        "s3: {profile: hush-hush}",
        "s3: {endpoint: 'https://user:hush-hush@storage.example'}",
        "aws_secret_access_key: hush-hush",
    ],
)
def test_credentials_are_refused_without_being_repeated_and_told_where_they_belong(
    load: Load, line: str
) -> None:
    (problem,) = problems_of(load, f"{MINIMAL}store: s3://bucket/x\n{line}\n")

    assert problem.startswith("job.yaml:4: ")
    assert "hush" not in problem
    assert "boto3 finds them in AWS_ACCESS_KEY_ID" in problem


def test_credentials_in_a_store_are_not_repeated(load: Load) -> None:
    (problem,) = problems_of(load, f"{MINIMAL}store: s3://user:hush-hush@bucket/x\n")

    assert "hush" not in problem
    assert "expected s3://bucket/prefix" in problem


NAMES = ["A", "a_b", "-a", "a-", "a.b", "a b", "a" * 64, '"a\\n"', "é", '""']


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_dns_label_is_refused(load: Load, name: str) -> None:
    (problem,) = problems_of(load, f"name: {name}\ncommand: [x]\n")

    assert problem.startswith("job.yaml:1: name: expected a DNS label")


@pytest.mark.parametrize("name", ["a", "0", "a-b", "rul-fd001", "a" * 63, "a--b"])
def test_a_dns_label_is_a_name(load: Load, name: str) -> None:
    assert load(f'name: "{name}"\ncommand: [x]\n').name == name


@pytest.mark.parametrize(
    ("command", "message"),
    {
        "[]": "command: expected at least the program to start",
        "''": "command: expected at least the program to start",
        "['']": "command: expected at least the program to start",
        "a 'b": "command: No closing quotation",
        "{a: b}": "command: expected a list",
        "5": "command: expected a list",
        "[sleep, 5]": "command[1]: expected text, got 5; put it in quotes",
        "[x, --lr, 1.10]": "command[2]: expected text, got 1.10; put it in quotes",
        "[x, --flag, on]": "command[2]: can be read as text or, in YAML 1.1, as true or false",
        "[x, [y]]": "command[1]: expected text",
        '[x, "\\0"]': "command[1]: expected text without NUL characters",
    }.items(),
)
def test_a_command_that_cannot_be_run_is_refused(load: Load, command: str, message: str) -> None:
    (problem,) = problems_of(load, f"name: a\ncommand: {command}\n")

    assert problem.startswith(f"job.yaml:2: {message}")


WHOLE_FILES = {
    "empty": (b"", "job.yaml:1: the file is empty"),
    "only comments": (b"# nothing\n\n", "job.yaml:1: the file is empty"),
    "an empty document": (b"---\n", "job.yaml:1: the file is empty"),
    "a list": (b"- a\n", "job.yaml:1: expected a mapping"),
    "a word": (b"a\n", "job.yaml:1: expected a mapping"),
    "latin-1": (b"name: a\n# caf\xe9\n", "job.yaml:2: is not UTF-8 text (byte 0xe9)"),
    "utf-16": ("name: a".encode("utf-16"), "job.yaml:1: is not UTF-8 text (byte 0xff)"),
    "too large": (b"# " + b"x" * 1024 * 1024, "job.yaml:1: is over 1 MiB"),
}


@pytest.mark.parametrize(("content", "message"), WHOLE_FILES.values(), ids=WHOLE_FILES)
def test_a_file_that_holds_no_job_is_refused(load: Load, content: bytes, message: str) -> None:
    (problem,) = problems_of(load, content)

    assert problem.startswith(message)


def test_a_bomb_of_aliases_is_refused_before_it_grows(load: Load) -> None:
    bomb = "x0: &x0 [a, a]\n"
    bomb += "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 30))

    assert any("aliases" in problem for problem in problems_of(load, bomb))


def test_all_problems_of_a_file_are_reported_together_in_its_order(load: Load) -> None:
    text = "name: A\nstoer: x\npreemption:\n  grace: 5\nparams: {x: yes, y: .inf}\nname: b\n"

    problems = problems_of(load, text)

    places = [re.match(r"job\.yaml:(\d+): ([\w.]+)", problem) for problem in problems]
    assert [place and place.groups() for place in places] == [
        ("1", "name"),
        ("1", "command"),
        ("2", "stoer"),
        ("4", "preemption.grace"),
        ("5", "params.x"),
        ("5", "params.y"),
        ("6", "name"),
    ]


def test_a_flood_of_problems_is_cut_off_and_counted(load: Load) -> None:
    problems = problems_of(load, MINIMAL + "".join(f"x{n}: 1\n" for n in range(500)))

    assert len(problems) == 101
    assert problems[-1] == "job.yaml: and 400 more problems"


def test_values_of_the_environment_do_not_appear_in_messages(load: Load) -> None:
    secrets = ["31415926", "0271828", "3_1", "27.18", "true"]
    text = MINIMAL + "env:\n" + "".join(f"  K{n}: {s}\n" for n, s in enumerate(secrets))

    problems = problems_of(load, text + f"  L: {'8' * 30}\n")

    assert len(problems) == len(secrets) + 1
    assert not [p for p in problems for s in [*secrets[:-1], "8" * 30] if s in p]


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "loop", "NUL"])
def test_what_is_no_file_is_a_usage_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a\0b" if kind == "NUL" else "job.yaml")
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "loop":
        path.symlink_to(path)

    with pytest.raises(UsageError) as caught:
        load_job(path)

    assert not isinstance(caught.value, JobError)
    assert tmp_path.name in str(caught.value)


ODD_PIECES = st.sampled_from(
    [
        "{", "}", "[", "]", ": ", "- ", "? ", "&a ", "*a", "!!x ", "!", "%YAML 9\n", "---\n", "|",
        ">\n", '"', "'", '"\\ud800"', '"\\UFFFFFFFF"', "\t", "\n", "\r", "\x85", "\u2028", "\x00",
        "<<", "=", "1e400", "010", "~/x", "name: ", "command: ", "params: ", "env: ", "workdir: ",
        "store: ", "checkpoint: ", "restart: ", "{a: b}", "a", "9" * 30, ",", "#", "@", "\ufeff",
    ]
)  # fmt: skip
ODD_FILES = st.one_of(
    st.binary(),
    st.text().map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(ODD_PIECES).map(lambda pieces: "".join(pieces).encode()),
    st.tuples(st.integers(0, len(COMPLETE)), st.lists(ODD_PIECES, max_size=4)).map(
        lambda cut: (COMPLETE[: cut[0]] + "".join(cut[1]) + COMPLETE[cut[0] :]).encode()
    ),
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ODD_FILES)
@example(b'"\\UFFFFFFFF"')
@example(b"params: 0x")
@example(b"? [a, *b]\n: c")
def test_no_file_is_answered_with_anything_but_a_job_or_its_problems(
    load: Load, content: bytes
) -> None:
    try:
        job = load(content)
    except UsageError:
        return
    assert Job.model_validate(json.loads(json.dumps(job_as_submitted(job)))) == job


# The command line over the file


def test_the_command_line_wins_over_the_file(load: Load, tmp_path: Path) -> None:
    text = (
        MINIMAL
        + "params: {epochs: 30, optimizer: {name: sgd}}\nstore: s3://x/y\nlauncher: docker\n"
    )
    given_params = {"epochs": 5, "optimizer.lr": 0.1, "new.deep.key": [1]}

    job = load(text, params=given_params, store="elsewhere", launcher="process")

    assert job.params == {
        "epochs": 5,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "new": {"deep": {"key": [1]}},
    }
    assert job.store_path == tmp_path / "elsewhere"


def test_another_store_of_the_command_line_has_no_use_for_how_to_reach_s3(load: Load) -> None:
    elsewhere = load(ON_S3, store="s3://other-bucket/x")

    assert load(ON_S3, store="runs").s3 is None
    assert elsewhere.store == "s3://other-bucket/x"
    assert elsewhere.s3 == load(ON_S3).s3


def test_a_key_that_the_file_spells_with_a_dot_is_replaced(load: Load) -> None:
    job = load(MINIMAL + 'params: {"a.b": 1}\n', params={"a.b": 2})

    assert job.params == {"a.b": 2}


def test_values_given_as_params_are_not_changed_by_loading(load: Load) -> None:
    given_params = {"a": {"b": 1}, "a.c": 2}

    assert load(MINIMAL, params=given_params).params == {"a": {"b": 1, "c": 2}}
    assert given_params == {"a": {"b": 1}, "a.c": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "gs://x"}, "--store: store: expected a directory or s3://bucket/prefix"),
        ({"store": "s3://x"}, "--store: store: 'x' cannot be a bucket"),
        ({"store": ""}, "--store: store: expected text, not nothing"),
        ({"store": "\udcff"}, "--store: store: is not Unicode text"),
        (
            {"launcher": "slurm"},
            "--launcher: launcher: expected 'process', 'docker' or 'kubernetes'",
        ),
        ({"params": {"x.y": 1}}, "-p x.y: params.x.y: params.x is not a mapping"),
        ({"params": {"\udcff": 1}}, "params: "),
        ({"params": {"z": float("nan")}}, "params: z is not a finite number"),
        ({"params": {"z": [{"y": (1,)}]}}, "params: z[0].y is a tuple, which JSON does not have"),
        ({"params": {"z": {1: 2}}}, "params: z is a dict, which JSON does not have"),
        ({"params": {".".join("a" * 40): 1}}, "is nested deeper than 32 levels"),
    ],
)
def test_a_wrong_value_of_the_command_line_is_refused_by_its_option(
    load: Load, options: dict[str, Any], message: str
) -> None:
    (problem,) = problems_of(load, MINIMAL + "params: {x: 1}\n", **options)

    assert message in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs=5", ("epochs", 5)),
        ("optimizer.lr=1e-3", ("optimizer.lr", 0.001)),
        ("flag=true", ("flag", True)),
        ("note=null", ("note", None)),
        ("subset=FD001", ("subset", "FD001")),
        ("glob=*.csv", ("glob", "*.csv")),
        ("all=*", ("all", "*")),
        ("text=a: b # c", ("text", "a: b # c")),
        ("expr=a=b", ("expr", "a=b")),
        ("q='010'", ("q", "010")),
        ('q="yes"', ("q", "yes")),
        ('q=""', ("q", "")),
        ("betas=[0.9, 0.999]", ("betas", [0.9, 0.999])),
        ("opt={lr: 1}", ("opt", {"lr": 1})),
    ],
)
def test_a_param_is_split_and_read(text: str, expected: tuple[str, Any]) -> None:
    key, value = parse_param(text)

    assert (key, value, type(value)) == (*expected, type(expected[1]))


@pytest.mark.parametrize(
    "text",
    [
        "", "epochs", "=5", "a..b=1", ".a=1", "a.=1", "a=", "a=yes", "a=010", "a=.inf", "a=[1",
        'a="', "a='b' c", "a=[*b]", "a={b: 1, b: 2}", "a={1: 2}", "a=5\n", 'a="\\ud800"',
        "a=" + "[" * 99,
    ],
)  # fmt: skip
def test_a_param_that_cannot_be_read_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"^-p "):
        parse_param(text)


@given(st.text())
@example('"\\UFFFFFFFF"')
@example("*")
def test_no_param_is_answered_with_anything_but_a_value_or_a_usage_error(text: str) -> None:
    try:
        key, value = parse_param(f"k={text}")
    except UsageError:
        return
    assert key == "k"
    assert json.loads(json.dumps(value)) == value


# What is stored, compared and published


def test_a_submitted_job_comes_back_equal_from_plain_json(load: Load, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for text in (MINIMAL, COMPLETE, ON_S3):
        job = load(text)

        stored = json.dumps(job_as_submitted(job), allow_nan=False)

        assert ("null" in stored) == ("null" in text)
        assert Job.model_validate(json.loads(stored)) == job


def test_a_submitted_job_has_the_names_and_units_of_the_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()

    plain = job_as_submitted(load(COMPLETE))

    assert plain["preemption"] == {"grace": "2m", "notices": ["aws", "azure"]}
    assert plain["restart"]["backoff"] == {"initial": "250ms", "max": "1h"}
    assert plain["restart"]["hang_timeout"] == "90m"
    assert plain["params"]["note"] is None
    assert plain["params"]["deep"] == {"x": [None]}
    assert plain["command"] == ["python", "-m", "jobs.rul.train"]
    assert plain["workdir"] == str(tmp_path / "sub")


def test_changing_a_submitted_job_does_not_change_the_job(load: Load) -> None:
    job = load(MINIMAL + "params: {a: [1]}\n")

    job_as_submitted(job)["params"]["a"].append(2)

    assert job.params == {"a": [1]}


SUBMITTED = {"command": ["python", "a.py"], "params": {"epochs": 5, "opt": {"lr": 0.1}}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"workdir": "/elsewhere", "store": "x", "env": {"A": "b"}}, []),
        ({"params": {"opt": {"lr": 0.1}, "epochs": 5}}, []),
        ({"params": {"epochs": 9, "opt": {"lr": 0.1}}}, ["params.epochs: 5 -> 9"]),
        ({"params": {"epochs": 5.0, "opt": {"lr": 0.1}}}, ["params.epochs: 5 -> 5.0"]),
        ({"params": {"epochs": 5, "opt": {"lr": 0.2}}}, ["params.opt.lr: 0.1 -> 0.2"]),
        ({"params": {"epochs": 5}}, ['params.opt: {"lr": 0.1} -> (not set)']),
        (
            {"params": {"epochs": "5", "opt": {"lr": 0.1, "b": None}, "c": True}},
            [
                'params.epochs: 5 -> "5"',
                "params.opt.b: (not set) -> null",
                "params.c: (not set) -> true",
            ],
        ),
        ({"command": ["python", "a b.py"]}, ["command: python a.py -> python 'a b.py'"]),
    ],
)
def test_a_changed_run_is_described_key_by_key(change: dict[str, Any], expected: list[str]) -> None:
    assert differences(SUBMITTED, {**SUBMITTED, **change}) == expected


def test_one_and_true_are_different_params() -> None:
    assert differences({"params": {"a": 1}}, {"params": {"a": True}}) == ["params.a: 1 -> true"]


def parts_of(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    yield from schema["$defs"].values()


def test_the_schema_names_and_describes_every_key_and_no_other() -> None:
    schema = job_schema()

    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["name", "command"]
    assert set(schema["properties"]) == set(Job.model_fields)
    for part in parts_of(schema):
        assert part["additionalProperties"] is False
        for key, value in part["properties"].items():
            target = schema["$defs"][value["$ref"].split("/")[-1]] if "$ref" in value else value
            assert target.get("description"), key
    assert set(schema["$defs"]["Restart"]["properties"]) == {
        "failures",
        "backoff",
        "hang_timeout",
        "store_timeout",
        "never",
    }


def test_the_schema_refuses_what_the_file_may_not_say() -> None:
    schema = job_schema()

    grace = schema["$defs"]["Preemption"]["properties"]["grace"]
    assert (grace["type"], grace["default"]) == ("string", "30s")
    assert re.search(grace["pattern"], "1.5h")
    notices = schema["$defs"]["Preemption"]["properties"]["notices"]
    assert notices["items"]["enum"] == ["aws", "gcp", "azure"]
    assert (notices["type"], notices["uniqueItems"], notices["default"]) == ("array", True, [])
    store = schema["properties"]["store"]["pattern"]
    assert [bool(re.search(store, s)) for s in ("s3://bucket/x", "/runs", "a:b", "gs://x/y")] == [
        *(True, True, True, False)
    ]
    size = schema["$defs"]["Outputs"]["properties"]["max_size"]
    assert (size["type"], size["default"]) == ("string", "1Gi")
    switch = schema["$defs"]["S3"]["properties"]["conditional_writes"]
    assert switch["anyOf"] == [{"type": "boolean"}, {"enum": ["on", "off"]}]
    assert schema["$defs"]["Every"]["minProperties"] == 1
    assert not re.search(grace["pattern"], "0s")
    assert not re.search(grace["pattern"], "-1s")
    assert "null" not in json.dumps(schema)


def test_the_example_and_the_defaults_of_the_schema_are_a_valid_job(tmp_path: Path) -> None:
    schema = job_schema()
    defaults = {k: v["default"] for k, v in schema["properties"].items() if "default" in v}

    for job in schema["examples"]:
        bare = {**job, "workdir": str(tmp_path)}
        assert Job.model_validate({**defaults, **bare}) == Job.model_validate(bare)


@pytest.mark.parametrize("text", ["a", "0", "A.b_c-d", "a" * 63, "rul-fd001"])
def test_a_good_run_id_is_returned(text: str) -> None:
    assert check_run_id(text) == text


@pytest.mark.parametrize(
    "text", ["", ".", "..", ".a", "-a", "a/b", "a\n", "\na", "a" * 64, "é", "a b"]
)
def test_a_bad_run_id_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="cannot be a run id"):
        check_run_id(text)


# Whether it can start


def job_in(folder: Path, *command: str, **env: str) -> Job:
    return Job(name="a", command=command, workdir=folder, env=env)


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("word", ["python", "python3"])
def test_python_is_the_one_that_runs_runner(tmp_path: Path, word: str) -> None:
    command = resolved_command(job_in(tmp_path, word, "train.py"))

    assert command == [sys.executable, "train.py"]


def test_a_program_is_found_in_the_path_or_by_its_place_in_the_workdir(tmp_path: Path) -> None:
    program = write(tmp_path / "bin" / "train", "#!/bin/sh\n")
    program.chmod(0o755)

    by_place = resolved_command(job_in(tmp_path, "./bin/train", "x"))
    by_path = resolved_command(job_in(tmp_path, "train", PATH=str(tmp_path / "bin")))

    assert [Path(by_place[0]).samefile(program), *by_place[1:]] == [True, "x"]
    assert by_path == [str(program)]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("no-such-program", "there is no program 'no-such-program' in PATH"),
        ("./missing", "there is no program './missing' in "),
        ("./plain", "there is no program './plain' in .* that can be executed"),
        ("./folder", "there is no program './folder' in "),
        ("plain", r"for the file in the workdir, write \./plain"),
    ],
)
def test_a_program_that_is_not_there_is_named(tmp_path: Path, word: str, message: str) -> None:
    write(tmp_path / "plain").chmod(0o644)
    (tmp_path / "folder").mkdir()

    for check in (resolved_command, check_launchable):
        with pytest.raises(JobError, match=f"^command: .*{message}"):
            check(job_in(tmp_path, word))


LAUNCHABLE = {
    "a script": ["python", "train.py"],
    "a script after options": ["python", "-u", "-W", "error", "-X", "dev", "-Wignore", "train.py"],
    "a script with arguments": ["python", "train.py", "-m", "missing"],
    "a module in the workdir": ["python", "-m", "train"],
    "a package in the workdir": ["python", "-um", "pkg.sub.train"],
    "an installed module": ["python", "-mjson.tool"],
    "code": ["python", "-c", "print(1)", "missing.py"],
    "standard input": ["python", "-"],
    "a program": ["sh", "-c", "missing.py"],
    "a module that another python may have": [sys.executable, "-m", "only_there"],
}


@pytest.mark.parametrize("command", LAUNCHABLE.values(), ids=LAUNCHABLE)
def test_what_can_start_is_let_through(tmp_path: Path, command: list[str]) -> None:
    write(tmp_path / "train.py")
    (tmp_path / "pkg").mkdir()

    check_launchable(job_in(tmp_path, *command))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["python", "missing.py"], "there is no script 'missing.py'"),
        (["python", "-u", "missing.py"], "there is no script 'missing.py'"),
        ([sys.executable, "missing.py"], "there is no script 'missing.py'"),
        (["python", "-X", "dev", "missing.py"], "there is no script 'missing.py'"),
        (["python", "-m", "no_such_module.train"], "there is no module 'no_such_module.train'"),
        (["python", "-m"], "there is no module ''"),
        (["python", "-m", ".relative"], "there is no module '.relative'"),
    ],
)
def test_what_cannot_start_is_refused_by_name(
    tmp_path: Path, command: list[str], message: str
) -> None:
    with pytest.raises(JobError, match=re.escape(f"command: {message}")):
        check_launchable(job_in(tmp_path, *command))


def test_a_module_is_looked_for_in_the_python_path_of_the_job(tmp_path: Path) -> None:
    write(tmp_path / "src" / "only_here" / "__init__.py")

    check_launchable(job_in(tmp_path, "python", "-m", "only_here.train", PYTHONPATH="src"))


def test_a_workdir_that_has_gone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    job = job_in(tmp_path / "gone", "python", "-c", "")
    check_launchable(job)

    (tmp_path / "gone").rmdir()

    with pytest.raises(JobError, match=r"^workdir: there is no directory"):
        check_launchable(job)


OTHER = "who = 'another'\n"
SHADOWS: dict[str, tuple[dict[str, str], list[str], str | None]] = {
    # files beside train.py → the command → what is in the way
    "nothing": ({}, ["python", "train.py"], None),
    "a file beside the script": ({"runner.py": OTHER}, ["python", "train.py"], "runner.py"),
    "a file beside a module": ({"runner.py": OTHER}, ["python", "-m", "train"], "runner.py"),
    "a package": ({"runner/__init__.py": OTHER}, ["python", "train.py"], "runner"),
    "a folder of other files": ({"runner/data.txt": ""}, ["python", "train.py"], None),
    "a script elsewhere": (
        {"runner.py": OTHER, "sub/train.py": ""},
        ["python", "sub/train.py"],
        None,
    ),
    "a file beside a script elsewhere": (
        {"sub/runner.py": OTHER, "sub/train.py": ""},
        ["python", "sub/train.py"],
        "sub/runner.py",
    ),
    "a copy of this package": (
        {"runner/__init__.py": Path(runner.__file__).read_text()},
        ["python", "train.py"],
        None,
    ),
}


@pytest.mark.parametrize(("files", "command", "shadow"), SHADOWS.values(), ids=SHADOWS)
def test_what_would_be_imported_in_place_of_runner_is_refused(
    tmp_path: Path, files: dict[str, str], command: list[str], shadow: str | None
) -> None:
    for name, text in {"train.py": "", **files}.items():
        write(tmp_path / name, text)
    job = job_in(tmp_path, *command)

    assert shadowing_file(job) == (tmp_path / shadow if shadow else None)

    if shadow:
        with pytest.raises(JobError, match="would be imported in place of the package"):
            check_launchable(job)
    else:
        check_launchable(job)
    # Python itself agrees.
    for script in tmp_path.rglob("train.py"):
        script.write_text("import runner\nprint(getattr(runner, 'who', 'this'))\n")
    child = subprocess.run(
        resolved_command(job), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert child.stdout == ("another\n" if shadow else "this\n")


def test_a_shadow_is_also_found_through_links_and_the_python_path(tmp_path: Path) -> None:
    shadow = write(tmp_path / "real" / "runner.py", OTHER)
    write(tmp_path / "real" / "train.py")
    (tmp_path / "train.py").symlink_to("real/train.py")
    write(tmp_path / "plain.py")

    assert shadowing_file(job_in(tmp_path, "python", "train.py")) == shadow
    assert shadowing_file(job_in(tmp_path, "python", "plain.py")) is None
    assert shadowing_file(job_in(tmp_path, "python", "plain.py", PYTHONPATH="real")) == shadow
    assert shadowing_file(job_in(tmp_path, "torchrun", "real/train.py")) == shadow


def test_checking_a_job_imports_nothing_of_it(tmp_path: Path) -> None:
    write(tmp_path / "bad_pkg" / "__init__.py", "raise SystemExit('was imported')")
    before = copy.copy(sys.path)

    check_launchable(job_in(tmp_path, "python", "-m", "bad_pkg.train"))

    assert "bad_pkg" not in sys.modules
    assert sys.path == before


def test_the_module_is_imported_without_torch_boto3_or_numpy() -> None:
    code = "import sys, runner.job; print({'torch', 'boto3', 'numpy', 'typer'} & {*sys.modules})"

    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )

    assert child.stdout == "set()\n"


def test_auto_is_what_is_said_by_saying_nothing(load: Load) -> None:
    job = load(MINIMAL + "checkpoint: {every: auto, snapshot_every: auto}\n")

    assert job == load(MINIMAL)
    assert Job.model_validate(job_as_submitted(job)) == job
