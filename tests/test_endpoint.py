"""What the supervisor answers over HTTP, with real connections."""

from __future__ import annotations

import http.client
import http.server
import json
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from nodes import Node, Started
from prometheus_client.parser import text_string_to_metric_families
from waiting import wait_until

from runner.supervisor import endpoint
from runner.supervisor.endpoint import Endpoint, Pulse, Sources

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def metrics(accept: str) -> tuple[bytes, str]:
    return f"asked for {accept}\n".encode(), "text/plain"


@pytest.fixture
def serve() -> Iterator[Callable[..., Endpoint]]:
    with ExitStack() as stack:

        def start(port: int = 0, pulse: Pulse | None = None, host: str = "127.0.0.1") -> Endpoint:
            sources = Sources(metrics, lambda: {"step": 7})
            started = Endpoint(host, port, pulse or Pulse(), sources)
            started.start()
            stack.callback(started.close)
            return started

        yield start


def get(address: str, path: str, accept: str = "") -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", path, headers={"Accept": accept})
        reply = connection.getresponse()
        return reply.status, reply.headers["Content-Type"], reply.read()
    finally:
        connection.close()


def test_each_path_is_answered(serve: Callable[..., Endpoint]) -> None:
    address = serve().address

    assert get(address, "/metrics?x=1", "a/b") == (200, "text/plain", b"asked for a/b\n")
    assert get(address, "/healthz")[::2] == (200, b"ok\n")
    status, kind, content = get(address, "/status.json")
    assert (status, kind, json.loads(content)) == (200, "application/json", {"step": 7})
    assert get(address, "/")[0] == 404


def test_one_connection_serves_many_scrapes(serve: Callable[..., Endpoint]) -> None:
    connection = http.client.HTTPConnection(serve().address, timeout=10)

    for _ in range(3):
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"ok\n"
    connection.close()


def test_a_loop_that_does_not_come_round_is_not_healthy(
    serve: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    pulse = Pulse()
    address = serve(pulse=pulse).address
    monkeypatch.setattr(endpoint, "STUCK_SECONDS", -1.0)

    assert get(address, "/healthz")[0] == 503
    monkeypatch.setattr(endpoint, "STUCK_SECONDS", 60.0)
    assert get(address, "/healthz")[0] == 200


def test_a_supervisor_that_is_ending_is_healthy_however_long_that_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pulse = Pulse()
    now = endpoint.time.monotonic()
    monkeypatch.setattr(endpoint.time, "monotonic", lambda: now + 1e4)

    assert pulse.silent_seconds > 9e3
    pulse.over()
    assert pulse.silent_seconds == 0


def test_an_occupied_port_is_a_warning(
    serve: Callable[..., Endpoint], caplog: pytest.LogCaptureFixture
) -> None:
    first = serve()
    port = int(str(first.address).rsplit(":", 1)[1])

    with caplog.at_level(logging.WARNING):
        second = serve(port)

    assert second.address is None
    assert f"127.0.0.1:{port} cannot be listened on" in caplog.text
    assert get(first.address, "/healthz")[0] == 200


def test_an_address_that_is_not_this_machines_is_a_warning(
    serve: Callable[..., Endpoint], caplog: pytest.LogCaptureFixture
) -> None:
    assert serve(host="192.0.2.1").address is None
    assert "choose another metrics.port" in caplog.text


def test_clients_that_stand_still_keep_nobody_out_for_ever(
    serve: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint._Handler, "timeout", 0.05)
    address = serve().address
    host, port = str(address).rsplit(":", 1)
    silent = [socket.create_connection((host, int(port))) for _ in range(endpoint._MOST_CLIENTS)]

    def is_answered() -> bool:
        try:
            return get(address, "/healthz")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    wait_until(is_answered, what="a place among the clients")
    for client in silent:
        client.close()


def test_it_ends_at_once_and_frees_its_port(serve: Callable[..., Endpoint]) -> None:
    first = serve()
    address = str(first.address)
    port = int(address.rsplit(":", 1)[1])

    first.close()

    wait_until(lambda: serve(port).address == address, what="the port to be free")


# A real run


class Gateway(http.server.BaseHTTPRequestHandler):
    """Takes what is pushed, as a Pushgateway does: POST replaces what has the same names."""

    taken: list[tuple[str, str, bytes]] = []

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.taken.append((self.command, self.path, content))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def address_of(node: Node) -> Callable[[Started], str]:
    def find(supervisor: Started) -> str:
        prefix = "runner: metrics are served on http://"
        supervisor.wait_for(prefix, where="err")
        line = next(line for line in supervisor.err.splitlines() if line.startswith(prefix))
        return line.removeprefix(prefix).removesuffix("/metrics")

    return find


def samples(content: bytes) -> dict[str, Any]:
    families = text_string_to_metric_families(content.decode())
    return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}


def test_a_run_is_asked_while_it_goes_on(node: Node, address_of: Callable[[Started], str]) -> None:
    job = node.training(params={"befalls": {"1": {"3": "wait"}}}, metrics={"port": 0})
    supervisor = node.start("run", job)
    address = address_of(supervisor)
    supervisor.wait_for("step 3")

    assert get(address, "/healthz")[0] == 200
    status = json.loads(get(address, "/status.json")[2])
    assert (status["run_id"], status["phase"], status["attempt"]) == ("job", "running", 1)
    assert status["step"] == 2
    plain = samples(get(address, "/metrics")[2])
    assert plain["runner_step",] == 2
    assert plain["runner_phase", "running"] == 1
    assert plain["runner_phase", "backoff"] == 0
    modern, kind, content = get(address, "/metrics", OPENMETRICS)
    assert (modern, kind.split(";")[0]) == (200, OPENMETRICS.split(";")[0])
    assert content.endswith(b"# EOF\n")
    assert node.spool().status()["metrics"] == address

    node.gate.touch()
    assert supervisor.wait() == 0


def test_it_answers_before_there_is_anything_to_restore(
    node: Node, address_of: Callable[[Started], str]
) -> None:
    job = node.training(params={"befalls": {"1": {"0": "import"}}}, metrics={"port": 0})
    supervisor = node.start("run", job)
    address = address_of(supervisor)
    supervisor.wait_for("importing")

    status = json.loads(get(address, "/status.json")[2])
    assert (status["step"], get(address, "/healthz")[0]) == (0, 200)

    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait() == 75


def test_two_runs_on_one_port_both_run(node: Node, address_of: Callable[[Started], str]) -> None:
    first = node.start(
        "run", node.training("first", params={"befalls": {"1": {"1": "wait"}}}, metrics={"port": 0})
    )
    port = int(address_of(first).rsplit(":", 1)[1])

    second = node.run("run", node.training("second", metrics={"port": port}))

    assert second.code == 0
    assert f"127.0.0.1:{port} cannot be listened on" in second.err
    node.gate.touch()
    assert first.wait() == 0


def test_a_short_run_leaves_its_metrics_with_a_pushgateway(node: Node) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Gateway) as gateway:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{gateway.server_port}/push"
        job = node.training(metrics={"port": "off", "pushgateway": url})

        assert node.run("run", job).code == 0
        gateway.shutdown()

    [(_, path, content)] = Gateway.taken
    assert path == "/push/metrics/job/job/run_id/job"
    assert samples(content)["runner_step",] == 24
    assert samples(content)["runner_phase", "succeeded"] == 1


def test_a_pushgateway_that_is_not_there_is_a_warning(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"

    ended = node.run("run", node.job("true", metrics={"port": "off", "pushgateway": url}))

    assert ended.code == 0
    assert f"the Pushgateway at {url} did not take the metrics" in ended.err
