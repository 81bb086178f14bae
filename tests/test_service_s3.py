"""The command line with a store on S3: a run is found, goes on elsewhere, and is kept in order.

Against a real server.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from buckets import Bucket, new_bucket
from nodes import Node, nodes_in
from servers.ceph import Gateway
from servers.faultproxy import Fault, FaultProxy
from waiting import wait_until

from runner.board import Board
from runner.checkpoint.attempts import Ledger
from runner.spool import Spool, spool_path
from runner.supervisor import index

pytestmark = pytest.mark.ceph


@pytest.fixture
def bucket(gateway: Gateway) -> Iterator[Bucket]:
    with new_bucket(gateway) as bucket:
        yield bucket


@pytest.fixture(scope="module")
def finished(
    gateway: Gateway, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Node, Bucket]]:
    """A run `job` of 24 steps in two epochs that has finished: a store to look at."""
    with new_bucket(gateway) as bucket, nodes_in(tmp_path_factory.mktemp("finished")) as new:
        node = new("node")
        done = node.run("run", trained(node, bucket))
        assert done.code == 0, done.err
        yield node, bucket


def trained(node: Node, bucket: Bucket, name: str = "job", **keys: Any) -> str:
    """A job with checkpoints at step 8 and at the best ends of its epochs."""
    checkpoint = {
        "every": {"minutes": 600},
        "snapshot_every": {"steps": 1},
        "keep": {"last": 99, "best": {"metric": "val_loss", "count": 2}},
    }
    keys = {"params": {"befalls": {"1": {"8": "save"}}}, **keys}
    return node.training(name, checkpoint=checkpoint, **{**bucket.keys, **keys})


def steps_of(bucket: Bucket, run_id: str = "job") -> list[int]:
    return [manifest.moment.step for manifest in bucket.archive(run_id).manifests()]


# ---------------------------------------------------------------- a run is found


def test_a_run_on_s3_is_found_by_its_name(finished: tuple[Node, Bucket]) -> None:
    node, bucket = finished

    status = node.call("status", "job", "-o", "json")
    rows = node.call("checkpoints", "ls", "job", "-o", "json")
    shown = node.call("checkpoints", "show", "job", "8", "-o", "json")

    for called in (status, rows, shown):
        assert (called.code, called.err) == (0, "")
    assert (status.json["phase"], status.json["step"]) == ("succeeded", 24)
    assert status.json["store"] == bucket.url
    assert [row["step"] for row in rows.json] == [24, 12, 8]
    assert shown.json["step"] == 8
    assert node.call("wait", "job").out == "succeeded\n"
    assert "ready at 0 in attempt 1" in node.call("logs", "job").out
    assert "is finished" in node.call("run", trained(node, bucket)).err


def test_a_run_on_s3_is_found_by_its_store_from_another_machine(
    finished: tuple[Node, Bucket], new_node: Callable[[str], Node]
) -> None:
    _, bucket = finished
    other = new_node("other")
    named = ("--store", f"{bucket.url}/", "--s3-endpoint", bucket.endpoint, "-o", "json")

    status = other.call("status", "job", *named)
    every = other.call("status", *named)
    rows = other.call("checkpoints", "ls", "job", *named)
    other.environment["AWS_ENDPOINT_URL_S3"] = bucket.endpoint
    by_environment = other.call("status", "job", "--store", bucket.url, "-o", "json")
    unknown = other.call("status", "jib", "--store", bucket.url)

    assert (status.json["phase"], status.json["saved_step"]) == ("succeeded", 24)
    now = {"seen_at", "saved_seconds_ago"}  # of the two looks
    assert {**status.json, **dict.fromkeys(now)} == {**by_environment.json, **dict.fromkeys(now)}
    assert [row["run_id"] for row in every.json] == ["job"]
    assert [row["step"] for row in rows.json] == [24, 12, 8]
    assert (unknown.code, "did you mean job" in unknown.err) == (2, True)


def test_how_to_reach_the_server_is_remembered_for_a_store_that_is_named(
    finished: tuple[Node, Bucket],
) -> None:
    node, bucket = finished

    status = node.call("status", "job", "--store", bucket.url, "-o", "json")

    assert (status.code, status.json["phase"]) == (0, "succeeded")


def test_a_url_that_is_no_store_is_refused(node: Node) -> None:
    refused = node.call("status", "job", "--store", "s3://B/x")

    assert (refused.code, refused.out) == (2, "")
    assert "'B' cannot be a bucket" in refused.err


def test_local_files_of_the_run_lie_in_the_users_state_folder(
    finished: tuple[Node, Bucket],
) -> None:
    node, bucket = finished
    files = Path(node.environment[index.HOME_VARIABLE]) / "files"

    names = [path.name for path in node.folder.rglob("*")]

    assert not [name for name in names if name.startswith("s3:")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(index.HOME_VARIABLE, node.environment[index.HOME_VARIABLE])
        assert index.files_of("job", bucket.url).parent == files
    assert index.files_of("job", "/store") == Path("/store/job")


def test_no_credential_is_written_anywhere_or_given_to_the_trainer(
    node: Node, bucket: Bucket
) -> None:
    job = node.job("bash", "-c", "env; exit 3", restart={"failures": 0}, **bucket.keys)
    secrets = [os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]]

    done = node.run("run", job)

    assert done.code == 70
    assert "RUNNER_RUN_ID=job" in done.out
    home = Path(node.environment[index.HOME_VARIABLE])
    written = {str(path): path.read_bytes() for path in home.rglob("*") if path.is_file()}
    written |= bucket.objects() | {"stderr": done.err.encode(), "stdout": done.out.encode()}
    assert any(name.endswith("run.json") for name in written)
    assert any("/runs/" in name for name in written)
    for secret in secrets:
        assert [name for name, content in written.items() if secret.encode() in content] == []


# ---------------------------------------------------------------- a run goes on


def test_a_run_goes_on_at_the_same_step_on_another_machine(
    new_node: Callable[[str], Node], finished: tuple[Node, Bucket], bucket: Bucket
) -> None:
    first, second = new_node("first"), new_node("second")
    first.keeps_spool = True  # its memory is lost with it
    befalls = {"1": {"8": "save", "10": "wait"}}
    keys = {"params": {"befalls": befalls}, "workdir": str(first.folder.parent)}
    job = trained(first, bucket, **keys)
    supervisor = first.start("run", job)
    supervisor.wait_for("step 10")
    supervisor.send_signal(signal.SIGTERM)
    spool = Spool(spool_path("job", bucket.url, str(first.memory)))
    wait_until(lambda: Board(spool.rank.folder / "board").request_number > 0, what="the request")
    first.gate.touch()
    assert supervisor.wait() == 75, supervisor.err

    done = second.run("run", job)

    assert done.code == 0, done.err
    assert "ready at 10 in attempt 2" in done.out.splitlines()
    assert steps_of(bucket)[0] == 24
    _, other = finished
    mine, undisturbed = bucket.archive(), other.archive()
    assert mine.digest(mine.find("latest")) == undisturbed.digest(undisturbed.find("latest"))


def test_a_simulated_node_that_loses_its_disk_finishes_from_s3(node: Node, bucket: Bucket) -> None:
    node.gate.touch()
    job = trained(node, bucket, preemption={"grace": "20s"})

    report = node.run("simulate", job, "--preempt", "step=10", "--lose-disk", "-o", "json")

    assert report.code == 0, report.err
    attempts = [(a["start_step"], a["lost_steps"], a["cause"]) for a in report.json["attempts"]]
    assert attempts == [(0, 0, "preemption"), (10, 0, "finished")]
    assert steps_of(bucket)[0] == 24


# ---------------------------------------------------------------- another run's checkpoint


def test_a_run_begins_from_another_run_on_s3(finished: tuple[Node, Bucket]) -> None:
    node, bucket = finished
    at_8 = bucket.archive().find("8").name
    beginnings = {
        "from-run": f"{bucket.url}/job/",
        "from-checkpoint": f"{bucket.url}/job/checkpoints/{at_8}",
    }
    for (name, place), step in zip(beginnings.items(), (24, 8), strict=True):
        done = node.run("run", trained(node, bucket, name), "--from", place)

        assert done.code == 0, done.err
        assert f"ready at {step} in attempt 1" in done.out.splitlines()
        document = json.loads(bucket.opened.read(f"{name}/run.json", 1 << 20))
        assert document["from"] == place.rstrip("/")
        assert "is finished" in node.call("run", trained(node, bucket, name), "--from", place).err


@pytest.mark.parametrize(
    ("place", "components", "said"),
    [
        ("{url}/nothing", None, "neither a checkpoint nor a run"),
        ("{url}/job/checkpoints/step-000000008-a0009-s001", None, "neither a checkpoint nor a run"),
        ("s3://{name}-2/x/job", None, "there is no bucket"),
        ("{url}/job", "modle", "did you mean model"),
    ],
)
def test_a_beginning_that_is_not_there_is_refused(
    finished: tuple[Node, Bucket], place: str, components: str | None, said: str
) -> None:
    node, bucket = finished
    options = ["--from", place.format(url=bucket.url, name=bucket.name)]
    options += ["--components", components] if components else []
    before = set(bucket.objects())

    refused = node.call("run", trained(node, bucket, "other"), *options)

    assert (refused.code, refused.out) == (2, "")
    assert said in refused.err
    assert set(bucket.objects()) == before


# ---------------------------------------------------------------- what is saved is looked after


def test_verifying_compares_the_servers_checksums_and_reads_only_when_asked_to(
    finished: tuple[Node, Bucket],
) -> None:
    node, _ = finished

    quick = node.call("checkpoints", "verify", "job", "-o", "json")
    deep = node.call("checkpoints", "verify", "job", "latest", "--deep", "-o", "json")

    assert (quick.code, deep.code) == (0, 0)
    assert [row["sound"] for row in quick.json] == [True] * 3
    for called, compared in ((quick, "size, the store's checksum"), (deep, "size, all bytes")):
        files = [file for row in called.json for file in row["files"]]
        kinds = {file["compared"] for file in files if file["name"] != "manifest.json"}
        assert kinds == {compared}


def test_verifying_finds_what_was_changed_in_the_bucket(node: Node, bucket: Bucket) -> None:
    assert node.run("run", trained(node, bucket)).code == 0
    newest, middle, oldest = bucket.archive().manifests()
    keys = [f"some/prefix/job/checkpoints/{m.name}" for m in (newest, middle, oldest)]
    content = bytearray(bucket.objects()[f"{keys[0]}/optimizer.safetensors"])
    content[len(content) // 2] ^= 4
    bucket.client.put_object(
        Bucket=bucket.name,
        Key=f"{keys[0]}/optimizer.safetensors",
        Body=bytes(content),
        ChecksumAlgorithm="SHA256",
    )
    bucket.client.delete_object(Bucket=bucket.name, Key=f"{keys[1]}/model.safetensors")
    bucket.put(f"{keys[2]}/state.json", b"{}")

    verified = node.call("checkpoints", "verify", "job", "-o", "json")

    assert verified.code == 1
    assert [row["problem"] for row in verified.json] == [
        "optimizer.safetensors has another checksum in the store",
        "model.safetensors is missing",
        f"state.json has 2 bytes instead of {oldest.files[-1].size}",
    ]


def test_cleaning_pinning_and_copying_out_work_on_s3(node: Node, bucket: Bucket) -> None:
    assert node.run("run", trained(node, bucket)).code == 0
    kept = bucket.archive().find("8").name
    ledger = Ledger(bucket.opened, "job", "")
    document = ledger.run()
    assert document is not None
    document["job"]["checkpoint"]["keep"] = {"last": 1}
    ledger.amend(document)
    assert node.call("checkpoints", "pin", "job", "8").out == f"pinned {kept}\n"

    dry = node.call("checkpoints", "gc", "job", "--dry-run", "-o", "json")
    done = node.call("checkpoints", "gc", "job", "-o", "json")

    assert [(row["action"], row["why"]) for row in dry.json] == [
        ("stays", ["newest", "last"]),
        ("would go", ["no rule keeps it"]),
        ("stays", ["pinned"]),
    ]
    assert [row["action"] for row in done.json] == ["stays", "deleted", "stays"]
    assert steps_of(bucket) == [24, 8]
    assert not [key for key in bucket.objects() if "step-000000012" in key]
    assert node.call("checkpoints", "export", "job", "8", "copy").code == 0
    names = {path.name for path in (node.folder / "copy").iterdir()}
    assert {"manifest.json", "model.safetensors", "state.json"} <= names


# ---------------------------------------------------------------- what cannot work


@pytest.mark.parametrize(
    "action", ["s3:PutObject", "s3:GetObject", "s3:DeleteObject", "s3:ListBucket"]
)
def test_a_missing_permission_is_named_before_training_starts(
    node: Node, bucket: Bucket, action: str
) -> None:
    bucket.deny(action)

    for command in ("run", "simulate"):
        refused = node.call(command, node.job("echo", "started", **bucket.keys))

        assert (refused.code, refused.out) == (2, "")
        assert f"the permission {action} is missing" in refused.err
        assert "in the policy of the user or role, or of the bucket" in refused.err
    assert not any("run.json" in key for key in _keys(bucket))


def _keys(bucket: Bucket) -> list[str]:
    bucket.client.delete_bucket_policy(Bucket=bucket.name)
    return list(bucket.objects())


@pytest.fixture
def no_s3_server() -> Iterator[str]:
    """A web server that knows nothing of S3."""
    handler = type("Quiet", (http.server.BaseHTTPRequestHandler,), {"log_message": lambda *_: None})
    handler.do_GET = lambda self: self.send_error(404)  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_what_cannot_work_is_said_before_anything_is_written(
    node: Node, bucket: Bucket, no_s3_server: str
) -> None:
    bucket.put("some/prefix", b"an object")
    here = {"endpoint": bucket.endpoint}
    away = f"s3://{bucket.name}-2/x"
    nobody = f"http://127.0.0.1:{closed_port()}"
    url = f"s3://{bucket.name}/elsewhere"
    wrong_secret = {"AWS_SECRET_ACCESS_KEY": "wrong" * 8}
    nobody_either = {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}
    plain_aws = {"AWS_ENDPOINT_URL_S3": "http://s3.eu-west-1.amazonaws.com"}
    cases: dict[str, tuple[str, dict[str, Any], dict[str, str], str]] = {
        "no bucket": (away, here, {}, "there is no bucket"),
        "an object": (bucket.url, here, {}, "is an object, where a prefix is expected"),
        "a wrong secret": (url, here, wrong_secret, "does not accept the credentials"),
        "nobody listens": (url, {"endpoint": nobody}, {}, "nothing listens on port"),
        "nobody by environment": (
            url,
            {},
            nobody_either,
            "AWS_ENDPOINT_URL_S3 is http://127.0.0.1",
        ),
        "no S3 server": (url, {"endpoint": no_s3_server}, {}, "is no S3 server"),
        "no encryption": (url, {}, plain_aws, "AWS_ENDPOINT_URL_S3: AWS is not spoken to without"),
    }
    for name, (store, s3, environment, said) in cases.items():
        before = dict(node.environment)
        node.environment |= environment
        job = node.job("echo", "started", store=store, s3={"region": "us-east-1", **s3})

        refused = node.call("submit", job)

        node.environment.clear()
        node.environment |= before
        assert (name, refused.code, refused.out) == (name, 2, "")
        assert said in refused.err, name
        assert "wrong" * 8 not in refused.err
        assert node.spools() == [], name
    assert set(bucket.objects()) == {"some/prefix"}


def test_a_server_that_is_busy_for_a_while_is_asked_again(node: Node, bucket: Bucket) -> None:
    port = urlsplit(bucket.endpoint).port
    assert port is not None
    with FaultProxy(port) as proxy:
        for verb in ("GET", "HEAD", "PUT", "DELETE"):
            proxy.add(f"{verb} ", Fault("status", 503))
        proxy.add("PUT .*runner-probe", Fault("drop_response"), after=1)
        s3 = {"endpoint": proxy.url, "region": "us-east-1"}

        done = node.run("run", node.job("echo", "hello", store=bucket.url, s3=s3))

    assert (done.code, done.out) == (0, "hello\n"), done.err
    assert proxy.hits == 5


def test_doing_without_conditional_writes_is_said_at_every_start(
    node: Node, bucket: Bucket
) -> None:
    keys = {**bucket.keys, "s3": {**bucket.keys["s3"], "conditional_writes": "off"}}
    job = node.job("true", **keys)
    for options in ((), ("--new",)):
        done = node.run("run", job, *options)

        assert done.code == 0
        assert "conditional_writes is off" in done.err
    assert "conditional_writes" not in node.run("run", node.job("true", "x", **bucket.keys)).err


def test_a_start_leaves_no_probe_behind(node: Node, bucket: Bucket) -> None:
    assert node.run("run", node.job("true", **bucket.keys)).code == 0

    assert {key.split("/")[2] for key in bucket.objects()} == {"job"}
