"""`runner ui`: all runs of a store, live, for this machine alone; over HTTP and in a browser."""

from __future__ import annotations

import http.client
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

import pytest
from browser import CHROMIUM, DRIVER, MISSING, Browser
from nodes import PROGRAMS, Node, nodes_in
from slots import commit, snapshot
from waiting import wait_until

from runner.checkpoint.attempts import Ledger
from runner.errors import UsageError
from runner.store import open_store
from runner.supervisor.lookup import Where
from runner.views.server import Pages, Server, check_loopback, names_loopback

needs_chromium = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason=MISSING)


def begin(folder: Path, name: str, *steps: int) -> Ledger:
    """A run in a directory store with hand-made checkpoints."""
    store = open_store(str(folder))
    ledger = Ledger(store, name, "owner")
    ledger.begin({"run_id": name, "job": {"name": name}})
    ledger.claim("node")
    for save, step in enumerate(steps, 1):
        commit(store, snapshot(1, save, step), name)
    return ledger


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("store")
    begin(made, "first", 40, 80).update(outcome="succeeded", end_step=80)
    begin(made, "second", 10)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server("127.0.0.1", 0, Pages(Where(str(folder)))) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(
    server: Server, path: str, method: str = "GET", **headers: str
) -> tuple[int, Mapping[str, str], str]:
    port = int(server.server_address[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(
            method, path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read().decode()
    finally:
        connection.close()


def test_all_runs_are_listed_and_each_has_its_page(server: Server) -> None:
    status, headers, text = ask(server, "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert 'href="/run/first"' in text
    assert 'href="/run/second"' in text
    assert ask(server, "/run/first")[0] == 200
    rows = json.loads(ask(server, "/runs.json")[2])
    assert {row["run_id"]: row["phase"] for row in rows} == {
        "first": "succeeded",
        "second": "running",
    }


def test_the_document_is_that_of_the_report(server: Server, folder: Path, node: Node) -> None:
    served = json.loads(ask(server, "/run/first.json")[2])
    printed = node.call("report", "first", "--store", str(folder), "-o", "json").json
    for part in ("attempts", "checkpoints", "saves", "curves"):
        assert served[part] == printed[part]
    assert served["run"]["saved_step"] == printed["run"]["saved_step"] == 80


@pytest.mark.parametrize(
    "path", ["/run/third", "/run/", "/run/..", "/run/%2e%2e%2ffirst", "/run/first/..", "/x",
             "/run/%00", "/run/<script>.json", "//x", "/run/a%0d%0aSet-Cookie:x"],
)  # fmt: skip
def test_what_is_not_there_is_said_and_harmless(server: Server, path: str) -> None:
    status, headers, text = ask(server, path.replace("<", "%3C").replace(">", "%3E"))
    assert status == 404
    assert "<script>." not in text
    assert "Set-Cookie" not in headers


def test_only_reading_is_answered(server: Server) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(server, "/", method)[0] == 501
    status, headers, text = ask(server, "/", "HEAD")
    assert (status, text) == (200, "")
    assert int(headers["Content-Length"]) > 1000


def test_nothing_is_sent_again_that_has_not_changed(server: Server) -> None:
    _, headers, text = ask(server, "/?part")
    assert text.startswith("<header>")
    again = ask(server, "/?part", If_None_Match=headers["ETag"])
    assert (again[0], again[2]) == (304, "")


def test_a_page_may_run_nothing_but_its_own_script(server: Server) -> None:
    _, headers, _ = ask(server, "/run/first")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers


NAMES = {
    "127.0.0.1:80": True,
    "localhost:80": True,
    "LOCALHOST:80": True,
    "127.0.0.1": True,
    "[::1]:80": True,
    "127.8.8.8:80": True,
    "127.0.0.1:81": False,
    "evil.example:80": False,
    "127.0.0.1.evil.example:80": False,
    "localhost.evil.example:80": False,
    "evil@127.0.0.1:80": False,
    "127.0.0.1:80/x": False,
    "10.0.0.1:80": False,
    "0.0.0.0:80": False,
    "127.0.0.1:port": False,
    "": False,
    None: False,
}


@pytest.mark.parametrize(("header", "fits"), NAMES.items(), ids=map(str, NAMES))
def test_who_asks_must_know_whom(header: str | None, fits: bool) -> None:
    assert names_loopback(header, 80) is fits


def test_a_page_from_elsewhere_cannot_read_along(server: Server) -> None:
    port = server.server_address[1]
    status, _, text = ask(server, "/", Host=f"evil.example:{port}")
    assert status == 403
    assert "first" not in text
    assert ask(server, "/runs.json", Host=f"localhost:{port}")[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_others_are_never_served(host: str) -> None:
    with pytest.raises(UsageError, match="this machine alone"):
        check_loopback(host)


def test_a_port_that_is_taken_is_said(server: Server, node: Node) -> None:
    port = str(server.server_address[1])
    refused = node.call("ui", "--port", port)
    assert refused.code == 2
    assert "choose another --port" in refused.err
    assert node.call("ui", "--host", "0.0.0.0").code == 2


def test_a_store_that_fails_is_said_and_the_server_goes_on(server: Server) -> None:
    with mock.patch.object(Pages, "run", side_effect=OSError("the disk is on fire")):
        status, _, text = ask(server, "/run/first")
    assert status == 503
    assert "the disk is on fire" in text
    assert ask(server, "/run/first")[0] == 200


def test_many_may_look_at_once(server: Server) -> None:
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(server, "/run/first")[0]))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 20


# ---------------------------------------------------------------- in a browser

_SAVED_STEP = "return document.querySelector('data[data-path=\"run.saved_step\"]').value"
_CLASS = "return document.body.className"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@needs_chromium
def test_a_list_leads_to_a_run_and_back(server: Server, browser: Browser) -> None:
    browser.open(server.address)
    assert browser.run("return document.querySelector('h1').textContent") == "2 runs"
    browser.run("document.querySelector('a[href=\"/run/first\"]').click()")
    wait_until(lambda: browser.run("return document.title") == "first", what="the page of the run")
    browser.run("document.querySelector('.eyebrow a').click()")
    wait_until(lambda: browser.run("return document.title") == "Runs", what="the list")
    wrong = [m for m in browser.messages() if "favicon" not in m]
    assert wrong == []


@needs_chromium
def test_a_page_follows_its_run_and_keeps_what_was_opened(tmp_path: Path, browser: Browser) -> None:
    begin(tmp_path / "store", "job", 10)
    pages = Pages(Where(str(tmp_path / "store")))
    with Server("127.0.0.1", 0, pages) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            browser.open(f"{server.address}run/job")
            browser.run("document.querySelector('details').open = true")
            browser.run("document.querySelector('main').dataset.mine = 'yes'")

            commit(open_store(str(tmp_path / "store")), snapshot(1, 2, 20), "job")

            wait_until(
                lambda: browser.run(_SAVED_STEP) == "20", 30, "the step that was saved since"
            )
            assert browser.run("return document.querySelector('details').open") is True
            assert browser.run("return document.querySelector('main').dataset.mine") == "yes"
            with mock.patch.object(Pages, "run", side_effect=OSError("away")):
                wait_until(lambda: browser.run(_CLASS) == "stale", 30, "a mark that it is old")
            wait_until(lambda: browser.run(_CLASS) == "", 30, "the mark to go")
        finally:
            server.shutdown()
            thread.join()


def test_the_command_says_where_and_ends_when_it_is_told(tmp_path: Path) -> None:
    with nodes_in(tmp_path) as new:
        node = new("node")
        job = node.job("python", str(PROGRAMS / "ends.py"), "0")
        assert node.run("run", job).code == 0
        serving = node.start("ui", "--port", "0")
        serving.wait_for("http://127.0.0.1:")
        host = serving.out.strip().removeprefix("http://").rstrip("/")
        connection = http.client.HTTPConnection(host, timeout=20)
        connection.request("GET", "/run/job.json")
        document = json.load(connection.getresponse())
        connection.close()
        serving.send_signal(signal.SIGINT)

        assert serving.wait() == 130
        assert document["run"]["phase"] == "succeeded"
        assert "Traceback" not in serving.err
