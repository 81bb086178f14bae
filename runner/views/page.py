"""A run's document as one HTML file: for people who would rather look than read.

The page asks for nothing: no script, no font, no image from anywhere, and its content security
policy forbids them. Every number that the document has stands in a `<data>` element with the path
to it, so that what is shown can be compared with what `-o json` prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from runner.views.html import Child, Html, document, join, source_of, tag, verbatim
from runner.views.listings import attempts, checkpoints, foot, job
from runner.views.sections import curves, goodput, saves, timeline
from runner.views.tiles import head, tiles
from runner.views.words import plain

_STYLE = resources.files(__package__).joinpath("page.css").read_text("utf-8")
STYLE_SOURCE = source_of(_STYLE)


def page(overview: Mapping[str, Any]) -> Html:
    """The whole page of one run, a file on its own."""
    policy = f"default-src 'none'; style-src '{STYLE_SOURCE}'; base-uri 'none'; form-action 'none'"
    meta = tag("meta", http_equiv="Content-Security-Policy", content=policy)
    return _document(f"{overview['run']['run_id']} · run", tag("main", body(overview)), [meta])


def live(title: str, content: Html, script: str) -> Html:
    """The same as a server shows it, which says in its headers what may run: this script."""
    return _document(title, tag("main", content), [], verbatim("script", script))


def failure(text: str) -> Html:
    """What is shown in place of a page."""
    return join([link("/", "All runs"), tag("h1", "Nothing to show"), tag("p", plain(text))])


def link(path: str, name: str) -> Html:
    return tag("p", tag("a", name, href=path), class_="eyebrow")


def _document(title: str, main: Html, head: Sequence[Html], *after: Html) -> Html:
    return document(
        tag(
            "head",
            tag("meta", charset="utf-8"),
            *head,
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="referrer", content="no-referrer"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", plain(title)),
            verbatim("style", _STYLE),
        ),
        tag("body", main, *after),
    )


def body(overview: Mapping[str, Any], *, above: Child = None) -> Html:
    """What stands in the page, section after section."""
    run = overview["run"]
    return join(
        [
            above,
            head(run),
            tiles(run),
            timeline(overview),
            curves(overview),
            goodput(overview),
            saves(overview),
            checkpoints(overview),
            attempts(overview),
            job(overview),
            foot(run),
        ]
    )
