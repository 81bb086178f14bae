"""The page of a run, in a real Chromium: what it shows, and that nothing in it can do anything.

Most of it with made-up runs; one real run with a crash shows that page and `-o json` agree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, DRIVER, MISSING, Browser
from made_runs import finished, record
from nodes import Node, nodes_in

from runner.points import Point
from runner.views.curves import Curves
from runner.views.html import Html, join, tag, verbatim
from runner.views.overview import overview
from runner.views.page import page

needs_chromium = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason=MISSING)
EVIL = "\"'><script>document.title='caught'</script><img src=x onerror=\"document.title='caught'\">"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture(autouse=True)
def _as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "browser" in request.fixturenames:
        seen = request.getfixturevalue("browser")
        seen.prefer("light")
        seen.resize(1080)


def written(folder: Path, document: dict[str, Any]) -> str:
    path = folder / "report.html"
    path.write_text(page(document), "utf-8")
    return path.as_uri()


@pytest.fixture
def document() -> dict[str, Any]:
    return overview(*finished())


# ---------------------------------------------------------------- markup


def test_what_is_not_markup_is_text() -> None:
    made = tag("td", EVIL, tag("b", 3, None, [" & ", 1.5]), class_="a\"b'", title=None, hidden=True)
    assert "<script" not in made
    assert "<img" not in made
    assert made.startswith('<td class="a&quot;b&#x27;" hidden>')
    assert made.endswith("<b>3 &amp; 1.5</b></td>")
    assert join([Html("<i></i>"), "<i>"]) == "<i></i>&lt;i&gt;"


@pytest.mark.parametrize("content", ["a</style>b", "<!-- a"])
def test_a_style_cannot_be_left(content: str) -> None:
    with pytest.raises(ValueError, match="cannot stand"):
        verbatim("style", content)


class Parsed(HTMLParser):
    """All elements of a page, and what of it could ask for or run anything."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.suspicious: list[str] = []
        self.feed(text)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(name)
        self.suspicious += [
            f"<{name} {key}={value!r}>"
            for key, value in attributes
            if key.startswith("on") or key in ("src", "href", "style", "srcdoc", "action", "data")
        ]


def test_a_page_is_one_file_that_asks_for_nothing(document: dict[str, Any]) -> None:
    parsed = Parsed(page(document))
    assert parsed.suspicious == []
    assert not {"script", "link", "iframe", "object", "embed", "img", "form"} & set(parsed.tags)


def hostile() -> dict[str, Any]:
    """Everything that comes from outside is an attack."""
    facts, details = finished()
    curves = Curves()
    curves.take([Point(1, step, 0, 1e9 + step, {EVIL: step / 2, "\u202eloss": 1.0})
                 for step in range(9)])  # fmt: skip
    evil = record(1, 0, 4, 120, end_step=9, saved_step=4, outcome="failed", cause=EVIL)
    facts = replace(
        facts,
        records=(replace(evil, node=EVIL), replace(evil, attempt=2, outcome=EVIL)),
        newest_values=curves.newest,
        status={**facts.status, "run_id": EVIL, "phase": EVIL, "cause": EVIL, "store": EVIL},
        document={"job": {"name": EVIL, EVIL: ["</pre>", EVIL]}, "provenance": {EVIL: EVIL}},
    )
    row = {**details.checkpoints[0], "name": EVIL, "triggers": [EVIL], "kept_because": [EVIL],
           "sound": False, "problem": EVIL, "created_at": EVIL, "validated": EVIL,
           "validation": {"reason": EVIL}}  # fmt: skip
    saves = [replace(details.saves[0], triggers=(EVIL,))]
    made = replace(details, curves=list(curves.traces()), checkpoints=[row], saves=saves,
                   quarantine={EVIL: EVIL})  # fmt: skip
    return overview(facts, made)


def test_a_hostile_run_adds_no_element(document: dict[str, Any]) -> None:
    parsed = Parsed(page(hostile()))
    assert parsed.suspicious == []
    assert set(parsed.tags) <= set(Parsed(page(document)).tags) | {"h3"}


# ---------------------------------------------------------------- in a browser


@needs_chromium
def test_nothing_is_asked_for_and_nothing_is_complained_of(
    browser: Browser, tmp_path: Path, document: dict[str, Any]
) -> None:
    browser.requests()
    url = written(tmp_path, document)

    browser.open(url)

    assert browser.run("return document.title") == "rul-fd001 · run"
    assert browser.requests() == [url]
    assert browser.messages() == []


@needs_chromium
def test_a_hostile_run_can_do_nothing(browser: Browser, tmp_path: Path) -> None:
    browser.open(written(tmp_path, hostile()))

    assert "caught" not in browser.run("return document.title").split("script")[0]
    assert browser.run("return document.querySelectorAll('script, img').length") == 0
    assert EVIL in browser.run("return document.querySelector('h1').textContent")
    names = "return [...document.querySelectorAll('h3 bdi')].map(e => e.textContent)"
    assert EVIL in browser.run(names)
    assert browser.messages() == []


def shown(browser: Browser) -> dict[str, str]:
    """What stands in the page, by the path to it in the document."""
    pairs = browser.run(
        "return [...document.querySelectorAll('data')].map(e => [e.dataset.path, e.value])"
    )
    return dict(pairs)


def at(document: dict[str, Any], path: str) -> str:
    found: Any = document
    for key in path.split("."):
        found = found[int(key) if isinstance(found, list) else key]
    return found if isinstance(found, str) else json.dumps(found)


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1080, 400])
def test_it_fits_and_can_be_read(
    browser: Browser, tmp_path: Path, document: dict[str, Any], scheme: str, width: int
) -> None:
    browser.resize(width)
    browser.prefer(scheme)
    browser.open(written(tmp_path, document))

    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run(_CLIPPED) == []
    assert browser.run(_FAINT) == []


# Texts that stick out of what they stand in, at the right or the left of the page.
_CLIPPED = """
const wide = document.documentElement.clientWidth;
return [...document.querySelectorAll("main *")].filter((e) => {
  const box = e.getBoundingClientRect();
  const hidden = getComputedStyle(e).clipPath !== "none" || e.closest("thead");
  return !hidden && box.width > 0 && (box.left < -1 || box.right > wide + 1);
}).map((e) => e.outerHTML.slice(0, 120));
"""
# Texts with less contrast than WCAG 2.2 asks for (1.4.3: 4.5 to 1).
_FAINT = """
function channels(color) { return color.match(/[\\d.]+/g).slice(0, 3).map(Number); }
function luminance(color) {
  const [r, g, b] = channels(color).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(e) {
  for (; e; e = e.parentElement) {
    const color = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(color) && color !== "transparent") return color;
  }
  return "rgb(255, 255, 255)";
}
const found = [];
for (const e of document.querySelectorAll("main *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || e.closest("title")) continue;
  const style = getComputedStyle(e);
  const front = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
  const pair = [luminance(front), luminance(behind(e))].sort((a, b) => b - a);
  const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
  if (contrast < 4.5) found.push([contrast.toFixed(2), e.outerHTML.slice(0, 100)]);
}
return found;
"""


@needs_chromium
def test_dark_is_dark(browser: Browser, tmp_path: Path, document: dict[str, Any]) -> None:
    browser.open(written(tmp_path, document))
    colors = []
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        colors.append(browser.run("return getComputedStyle(document.body).backgroundColor"))

    assert colors == ["rgb(255, 255, 255)", "rgb(20, 23, 28)"]


@needs_chromium
def test_every_figure_says_in_words_what_it_shows(
    browser: Browser, tmp_path: Path, document: dict[str, Any]
) -> None:
    browser.open(written(tmp_path, document))
    labels = browser.run(
        "return [...document.querySelectorAll('svg[role=img]')].map(e => e.ariaLabel)"
    )
    unnamed = browser.run(
        "return [...document.querySelectorAll('svg:not([role=img])')]"
        ".filter(e => !e.ariaHidden && !e.parentElement.closest('svg')).length"
    )
    assert unnamed == 0
    assert any("1,760 steps after" in label for label in labels)
    assert any(label.startswith("train_loss by step") for label in labels)
    assert browser.run("return document.querySelectorAll('table').length") == browser.run(
        "return document.querySelectorAll('table[aria-label]').length"
    )


@needs_chromium
def test_loss_curves_are_drawn_through_the_attempts_with_what_was_made_again_apart(
    browser: Browser, tmp_path: Path, document: dict[str, Any]
) -> None:
    browser.open(written(tmp_path, document))
    ways = browser.run(
        "return [...document.querySelector('figure.wide').querySelectorAll('path')]"
        ".map(e => [e.getAttribute('class'), e.getTotalLength() > 0])"
    )
    assert sorted(ways) == [["way again", True], ["way again", True], ["way dense", True]]
    cuts = "return document.querySelectorAll('figure.wide line.cut').length"
    assert browser.run(cuts) == 3


# ---------------------------------------------------------------- of a real run


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A run of 24 steps that failed in its eleventh, and had saved its seventh."""
    with nodes_in(tmp_path_factory.mktemp("ran")) as new:
        node = new("node")
        job = node.training(
            checkpoint={
                "every": {"steps": 7},
                "snapshot_every": {"steps": 7},
                "keep": {"last": 2, "best": {"metric": "val_loss"}},
            },
            params={"befalls": {"1": {"7": "save", "11": "raise"}}},
        )
        done = node.run("run", job)
        assert done.code == 0, done.err
        yield node


def test_the_document_tells_what_happened(ran: Node) -> None:
    made = ran.call("report", "job", "-o", "json").json

    assert [(a["ended_by"], a["start_step"], a["end_step"]) for a in made["attempts"]] == [
        ("failure", 0, 10),
        ("finished", 7, 24),
    ]
    assert made["run"]["lost_steps"] == made["attempts"][0]["lost_steps"] == 3
    loss = next(curve for curve in made["curves"] if curve["name"] == "train_loss")
    assert [step for step, _ in loss["traces"][0]["again"]] == [8, 9, 10]
    kept = [step for trace in loss["traces"] for step, _ in trace["kept"]]
    assert kept == list(range(1, 25))
    assert {row["name"] for row in made["checkpoints"]} <= {s["checkpoint"] for s in made["saves"]}
    assert all(row["sound"] and row["kept_because"] for row in made["checkpoints"])
    assert made["checkpoints"][0]["kept_because"][:2] == ["newest", "last"]
    assert made["run"]["total_steps"] == 24
    assert made["run"]["metric"] == "train_loss"
    assert made["run"]["emergency_seconds"] > 0


def test_status_and_report_tell_the_same(ran: Node) -> None:
    one = ran.call("status", "job", "-o", "json").json
    two = ran.call("report", "job", "-o", "json").json["run"]

    changing = {"seen_at", "saved_seconds_ago"}
    assert {k: v for k, v in one.items() if k not in changing} == {
        k: v for k, v in two.items() if k not in changing
    }


def test_a_report_from_another_machine_tells_the_same(ran: Node, tmp_path: Path) -> None:
    """The store has all of it: the values, the saves, the records."""
    here = ran.call("report", "job", "-o", "json").json
    other = replace(ran, environment={**ran.environment, "RUNNER_HOME": str(tmp_path)})
    there = other.call("report", "job", "--store", str(ran.store_folder), "-o", "json").json

    for part in ("attempts", "saves", "save_seconds", "curves", "checkpoints", "goodput"):
        assert there[part] == here[part], part


@needs_chromium
def test_the_page_shows_the_numbers_of_the_document(ran: Node, browser: Browser) -> None:
    ran.call("report", "job", "-o", "page.html")
    made = ran.call("report", "job", "-o", "json").json

    browser.open((ran.folder / "page.html").as_uri())

    numbers = shown(browser)
    different = {
        path: (value, at(made, path)) for path, value in numbers.items() if value != at(made, path)
    }
    assert set(different) <= {"run.saved_seconds_ago"}
    needed = {f"run.{key}" for key in ("step", "goodput_ratio", "preemptions", "lost_steps")}
    needed |= {"save_seconds.median", "goodput.parts.0.seconds", "curves.0.last"}
    needed |= {f"attempts.{n}.{key}" for n in (0, 1) for key in ("lost_steps", "end_step")}
    needed |= {f"checkpoints.{n}.bytes" for n in range(len(made["checkpoints"]))}
    assert needed <= set(numbers)
    rows = "return document.querySelectorAll('table[aria-label=Checkpoints] tbody tr').length"
    assert browser.run(rows) == len(made["checkpoints"])


def test_a_damaged_checkpoint_is_told_of(ran: Node) -> None:
    path = ran.checkpoint(ran.newest()) / "model.safetensors"
    sound = path.read_bytes()
    try:
        path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        quick = ran.call("report", "job", "-o", "json").json["checkpoints"][0]
        deep = ran.call("report", "job", "--verify", "-o", "json").json["checkpoints"][0]
        path.write_bytes(sound[:-1])
        short = ran.call("report", "job", "-o", "json").json["checkpoints"][0]
    finally:
        path.write_bytes(sound)

    assert (quick["sound"], quick["compared"]) == (True, "sizes")
    assert (deep["sound"], deep["compared"]) == (False, "all bytes")
    assert "model.safetensors" in deep["problem"]
    assert (short["sound"], short["compared"]) == (False, "sizes")


def test_a_page_is_written_whole_or_not_at_all(ran: Node) -> None:
    assert ran.call("report", "job").out == "job.html\n"
    assert (ran.folder / "job.html").read_text().endswith("</html>\n")
    nowhere = ran.call("report", "job", "-o", "nowhere/page.html")
    assert nowhere.code == 2
    assert "nowhere/page.html cannot be written" in nowhere.err
    assert ran.call("report", "jb").code == 2
    left = [path.name for path in ran.folder.iterdir() if path.name.startswith(".")]
    assert left == []
