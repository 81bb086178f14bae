"""HTML that cannot be injected into: whatever is not made by `tag` is text, and is escaped.

    tag("td", run["cause"], class_="cause")     →  <td class="cause">…escaped…</td>

`Html` is the only type that passes as it is, and only this module makes any.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

_VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})


class Html(str):
    """Text that is markup already."""


Child: TypeAlias = "Html | str | int | float | Sequence[Child] | Iterable[Child] | None"


def tag(name: str, /, *children: Child, **attributes: Any) -> Html:
    """An element. Names of attributes: `class_` is class, `data_path` is data-path.

    An attribute that is None or False is left out; True has no value. Children that are None are
    nothing.
    """
    said = "".join(
        f" {_attribute(key)}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{said}>")
    return Html(f"<{name}{said}>{join(children)}</{name}>")


def join(children: Child) -> Html:
    """One after another."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str | int | float):
        return Html(html.escape(str(children)))
    return Html("".join(map(join, children)))


def verbatim(name: str, content: str) -> Html:
    """An element of ours whose content browsers do not read as HTML: a style, a script.

    ValueError if the content could end it.
    """
    if "</" in content or "<!--" in content:
        raise ValueError(f"this cannot stand in <{name}>")
    return Html(f"<{name}>{content}</{name}>")


def source_of(content: str) -> str:
    """How a content security policy names a style or a script of ours: by what it is.

    https://www.w3.org/TR/CSP3/#grammardef-hash-source
    """
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def document(*children: Child, language: str = "en") -> Html:
    """A whole page."""
    return Html(f"<!doctype html>\n{tag('html', *children, lang=language)}\n")


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
