"""Checkpoints in words: what one is and where it comes from, and what two of them differ in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_WIDTH = 20
_LONGEST = 100


def described(document: Mapping[str, Any]) -> Iterator[str]:
    """The lines of `runner checkpoints show`, from a manifest with its validation."""
    for key, value in document.items():
        if key == "files":
            for file in value:
                yield _line("file", f"{file['name']} {file['size']} bytes {file['digest']}")
        elif key == "validation":
            yield _line(key, _validation(value))
        elif key == "provenance":
            continue
        else:
            yield _line(key, value if isinstance(value, str) else json.dumps(value))
    yield from _provenance(document["provenance"])


def _line(key: str, value: str) -> str:
    return f"{key:<{_WIDTH}} {value}"


def _validation(validation: Mapping[str, Any] | None) -> str:
    if validation is None:
        return "not tried"
    reason = validation["reason"] and f": {validation['reason']}"
    metrics = ", ".join(f"{name} {value}" for name, value in validation["metrics"].items())
    return f"{validation['verdict']}{reason} ({metrics or 'no metrics'})"


def _provenance(facts: Mapping[str, Any]) -> Iterator[str]:
    """What is known best first; a fact that is not known has no line."""
    told = {"git", "command", "dataset", "packages", "model", "job"}
    if facts.get("git"):
        yield _line("code", _code(facts["git"]))
    if facts.get("command"):
        yield _line("command", " ".join(map(str, facts["command"])))
    for name, data in (facts.get("dataset") or {}).items():
        yield _line("data", f"{name}: {_data(data)}")
    if facts.get("packages"):
        yield _line("packages", f"{len(facts['packages'])}, see -o json")
    for key, value in facts.items():
        if key not in told and value not in (None, {}, []):
            yield from _facts(key, value)
    for name, model in (facts.get("model") or {}).items():
        yield _line("model", f"{name}: {model['class']}, {model['parameters']:,} parameters, "
                    f"{model['trainable']:,} of them trained")  # fmt: skip
        yield from (f"    {line}" for line in model["tree"])


def _facts(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield _line(key, value if isinstance(value, str) else json.dumps(value))
        return
    for inner, item in value.items():
        yield _line(key, f"{inner}: {item if isinstance(item, str) else json.dumps(item)}")


def _code(git: Mapping[str, Any]) -> str:
    if git.get("commit") is None:
        return "unknown: no commit"
    branch = f" on {git['branch']}" if git.get("branch") else ""
    if not git.get("dirty"):
        return f"{git['commit']}{branch}"
    untracked = git.get("untracked_files")
    files = f", {untracked} files git does not know" if untracked else ""
    digest = f" (sha256 {git['diff']}{files})" if git.get("diff") else ""
    return f"{git['commit']}{branch}, and changes{digest}"


def _data(data: Mapping[str, Any]) -> str:
    size = f", {data['files']} files, {data['bytes']} bytes" if "files" in data else ""
    return f"{data['digest']} ({data['kind']}{size}) {data.get('path', '')}".rstrip()


# ---------------------------------------------------------------------------- differences


def compared(
    names: Sequence[str], facts: Iterable[Mapping[str, Any]], tensors: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """The lines of `runner checkpoints diff`."""
    yield f"{names[0]} -> {names[1]}"
    section, empty = "", True
    for change in facts:
        empty = False
        if change["section"] != section:
            section = change["section"]
            yield f"\n{section}"
        if change["key"].endswith(".tree"):
            yield from _trees(change)
            continue
        yield f"  {change['key']}: {_short(change['before'])} -> {_short(change['after'])}"
    if tensors:
        yield "\ntensors"
        yield from _tensors(tensors)
    elif empty:
        yield "no difference"


def _trees(change: Mapping[str, Any]) -> Iterator[str]:
    import difflib

    before, after = change["before"] or [], change["after"] or []
    yield f"  {change['key']}:"
    for line in difflib.unified_diff(before, after, lineterm="", n=1):
        if not line.startswith(("---", "+++", "@@")):
            yield f"    {line}"


def _tensors(tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("name", "what", "norm of difference", "relative", "largest")]
    for tensor in tensors:
        name = f"{tensor['file'].removesuffix('.safetensors')}: {tensor['name']}"
        numbers = (_number(tensor[key]) for key in ("norm", "relative", "largest"))
        rows.append((name, _kinds(tensor["before"], tensor["after"]), *numbers))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells).rstrip()}"


def _kinds(before: Sequence[Any] | None, after: Sequence[Any] | None) -> str:
    one, other = (None if k is None else f"{k[0]} {list(k[1])}" for k in (before, after))
    if one is None or other is None:
        return f"only after, {other}" if one is None else f"only before, {one}"
    return one if one == other else f"{one} -> {other}"


def _number(value: float | str | None) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _short(value: Any) -> str:
    if value is None:
        return "(none)"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
