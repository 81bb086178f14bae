"""What a page is put together from: values with their place in the document, tables, sections."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runner.views.html import Child, Html, tag
from runner.views.words import MISSING, number_text, plain, tone_of


def value(document: Any, path: str, show: Callable[[Any], str]) -> Html:
    """What lies at a path of the document, as `show` writes it, and as it is."""
    found = document
    for key in path.split("."):
        found = found[int(key) if isinstance(found, list) else key]
    return tag("data", show(found), value=_machine_readable(found), data_path=path)


def of_run(run: Mapping[str, Any], key: str, show: Callable[[Any], str]) -> Html:
    """The same of the document's `run`."""
    return value({"run": run}, f"run.{key}", show)


def _machine_readable(found: Any) -> str:
    return found if isinstance(found, str) else json.dumps(found)


def outside(text: object) -> Html:
    """A text that is not ours: on its own, so that its direction does not turn ours round."""
    return tag("bdi", plain(text))


def table(
    columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Child]], *, label: str
) -> Html:
    """A table that becomes a list of cards where it is narrow. A column is a name and a class."""
    heads = (tag("th", name, class_=class_ or None, scope="col", role="columnheader")
             for name, class_ in columns)  # fmt: skip
    body = []
    for row in rows:
        cells = []
        for number, ((name, class_), cell) in enumerate(zip(columns, row, strict=True)):
            said = {"class_": class_ or None, "data_label": name if number else None}
            if number:
                cells.append(tag("td", cell, role="cell", **said))
            else:
                cells.append(tag("th", cell, role="rowheader", scope="row", **said))
        body.append(tag("tr", *cells, role="row"))
    return tag(
        "table",
        tag("thead", tag("tr", *heads, role="row"), role="rowgroup"),
        tag("tbody", *body, role="rowgroup"),
        class_="cards",
        role="table",
        aria_label=label,
    )


def chip(phase: str) -> Html:
    """The phase of a run in its colour."""
    return tag("span", plain(phase), class_=f"chip {tone_of(phase) or 'calm'}")


def section(title: str, note: Child, *content: Child) -> Html:
    about = None if note is None else tag("p", note, class_="note")
    return tag("section", tag("h2", title), about, *content)


def plain_table(
    columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Child]], *, label: str
) -> Html:
    """A small table that is a table at any width."""
    heads = (tag("th", name, class_=class_ or None, scope="col") for name, class_ in columns)
    lines = [
        tag(
            "tr",
            *(
                tag("td", cell, class_=class_ or None)
                for (_, class_), cell in zip(columns, row, strict=True)
            ),
        )
        for row in rows
    ]
    return tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *lines), aria_label=label)


def day(at: str | None) -> str:
    """`2026-11-21 10:00:01 UTC`."""
    return MISSING if not at else f"{at[:19].replace('T', ' ')} UTC"


def logged_text(logged: float | str | None) -> str:
    return logged if isinstance(logged, str) else number_text(logged)
