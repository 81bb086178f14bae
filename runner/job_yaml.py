"""Read YAML into plain values, remembering the line of every key and all that is wrong.

Only what a job file needs is read: one document of mappings, lists and scalars. Anchors, aliases,
merge keys and tags are refused, so a file cannot grow when it is read and cannot name a class.
Scalars mean what YAML 1.2 says (`1e-3` is a number); those that YAML 1.1, which many tools still
speak, takes for something else (`yes`, `010`, `1:30`, `2024-01-01`) are refused until they are
written so that both agree.
"""

from __future__ import annotations

import copy
import math
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from yaml.reader import ReaderError
from yaml.resolver import Resolver

from runner.errors import JobError, UsageError

KeyPath: TypeAlias = tuple[str | int, ...]

MAX_FILE_BYTES = 1024 * 1024
MAX_DEPTH = 32
MAX_PROBLEMS = 100


@dataclass
class JobFile:
    """A job file as plain values, with the place of each key and what is wrong so far."""

    name: str
    root: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)
    """Plain scalars that are not text, as they were written: `1.10`, not 1.1."""
    switches: frozenset[KeyPath] = frozenset()
    """Keys whose values `on` and `off` mean the same in both versions of YAML."""
    options: dict[KeyPath, str] = field(default_factory=dict)
    """Keys that the command line has set, with the option that did it."""
    unusable: set[KeyPath] = field(default_factory=set)
    """Values already refused, about which nothing more needs to be said."""
    _problems: list[tuple[int, str]] = field(default_factory=list)

    def refuse(self, path: KeyPath, problem: str, line: int | None = None) -> None:
        """Note that the value at `path` is wrong; `line` where it is not the key's own."""
        prefixes = [path[:length] for length in range(len(path), -1, -1)]
        option = next((self.options[p] for p in prefixes if p in self.options), None)
        line = line or next((self.lines[p] for p in prefixes if p in self.lines), 1)
        where = option or f"{self.name}:{line}"
        key = f"{dotted(path)}: " if path else ""
        self._problems.append((0 if option else line, f"{where}: {key}{problem}"))

    def is_unusable(self, path: KeyPath) -> bool:
        return any(path[:length] in self.unusable for length in range(1, len(path) + 1))

    def raise_problems(self) -> None:
        """Raise one JobError with every problem in the order of the lines, if there is any."""
        if not self._problems:
            return
        texts = [text for _, text in sorted(self._problems, key=lambda problem: problem[0])]
        texts = list(dict.fromkeys(texts))
        if len(texts) > MAX_PROBLEMS:
            texts[MAX_PROBLEMS:] = [f"{self.name}: and {len(texts) - MAX_PROBLEMS} more problems"]
        raise JobError(*texts)

    def override(self, path: KeyPath, value: Any, option: str) -> None:
        """Put a value of the command line over the file's, making the mappings it lies in."""
        self.options[path] = option
        self.texts.pop(path, None)
        place = self.root
        for depth, part in enumerate(path[:-1], start=1):
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                self.refuse(path, f"{dotted(path[:depth])} is not a mapping")
                return
        place[path[-1]] = copy.deepcopy(value)


def read_job_file(path: Path, switches: frozenset[KeyPath] = frozenset()) -> JobFile:
    """Read a file of at most 1 MiB; what is wrong with single keys is noted in what is returned.

    At the keys in `switches`, `on` and `off` are read as they stand.

    Raises UsageError when there is no such file or it cannot be read, JobError when what is in it
    cannot be read to its end.
    """
    data = _read_bytes(path)
    file = JobFile(str(path), switches=switches)
    try:
        _parse(data.decode(), file)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        file.refuse((), f"is not UTF-8 text (byte 0x{data[error.start]:02x})", line)
        file.raise_problems()
    except _Unreadable as error:
        file.refuse((), error.problem, error.line)
        file.raise_problems()
    return file


def parse_param(text: str) -> tuple[str, Any]:
    """Split `KEY=VALUE` of `-p` and read the value as a YAML scalar, quoted text or `[list]`.

    A dotted key stays dotted here (`load_job` sets it inside the nested mapping). Unlike in a
    file, an unquoted value is taken as it stands: `*.csv` and `a: b` are text. Raises UsageError.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"-p {text!r}: expected KEY=VALUE, such as epochs=5 or optimizer.lr=0.1")
    if not value:
        raise UsageError(f"-p {text!r}: has no value; write {key}=null, or {key}='\"\"' for none")
    if value[0] not in "\"'[{":
        try:
            return key, plain_scalar(value)
        except ValueError as error:
            raise UsageError(f"-p {text!r}: {error}") from None
    file = JobFile(f"-p {key}", options={(): f"-p {key}"})
    try:
        _parse(value, file)
    except _Unreadable as error:
        file.refuse((), error.problem)
    file.raise_problems()
    return key, file.root


def plain_scalar(text: str) -> bool | int | float | str | None:
    """What an unquoted scalar means: nothing, a boolean, a finite number, or text.

    Raises ValueError when YAML 1.1 and 1.2 disagree about it, and for what JSON has no word for;
    the message does not repeat the text, which may be a secret.
    """
    kind = next((kind for kind, form in _CORE_FORMS.items() if form.fullmatch(text)), "text")
    old_kind = _OLD_KINDS[_OLD_RESOLVER.resolve(yaml.ScalarNode, text, (True, False))]
    # `1e-3` is text in YAML 1.1. Whoever writes it means the number.
    agreed = kind == old_kind or (kind == "a fraction" and old_kind == "text")
    if kind == old_kind == "a number" and re.match("[-+]?0[0-9]", text):
        agreed, old_kind = False, "an octal number"
    if not agreed:
        raise ValueError(
            f"can be read as {kind} or, in YAML 1.1, as {old_kind}; put it in quotes for text, or"
            " write it as true, false or a decimal number"
        )
    if kind == "nothing":
        return None
    if kind == "true or false":
        return text.lower() == "true"
    if kind == "a number":
        return _integer(text)
    if kind == "a fraction":
        number = math.inf if text.lower().endswith(("inf", "nan")) else float(text)
        if not math.isfinite(number):
            raise ValueError("expected a finite number; put it in quotes for text")
        return number
    return text


def dotted(path: KeyPath) -> str:
    """A key as a user would name it: `params.layers[2].width`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if re.fullmatch(r"[\w-]{1,60}", part) else _shortened(repr(part))
            text += f".{shown}" if text else shown
    return text


# The core schema of YAML 1.2.2, section 10.3.2.
_CORE_FORMS = {
    "nothing": re.compile("|~|null|Null|NULL"),
    "true or false": re.compile("true|True|TRUE|false|False|FALSE"),
    "a number": re.compile("[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "a fraction": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
_OLD_RESOLVER: Any = Resolver()  # PyYAML's own, of YAML 1.1
_OLD_KINDS = {
    "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:bool": "true or false",
    "tag:yaml.org,2002:int": "a number",
    "tag:yaml.org,2002:float": "a fraction",
    "tag:yaml.org,2002:timestamp": "a date",
    "tag:yaml.org,2002:merge": "a merge key",
    "tag:yaml.org,2002:value": "a default key",
    "tag:yaml.org,2002:str": "text",
    "tag:yaml.org,2002:yaml": "text",  # a lone `!`, `&` or `*`, which only `-p` can bring here
}


def _integer(text: str) -> int:
    # The length comes first: `int` refuses very long texts with an error of its own.
    number = int(text, 16 if text.startswith("0x") else 10) if len(text) <= 24 else 2**64
    if not -(2**63) <= number < 2**64:
        raise ValueError("expected a number of at most 64 bits; put it in quotes for text")
    return number


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_bytes(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"{path} is a directory; a job is one YAML file in it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
            raise UsageError(f"{path} is not a regular file")
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"there is no job file {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"the job file {str(path)!r} cannot be read: {reason}") from None
    if len(data) > MAX_FILE_BYTES:
        raise JobError(f"{path}:1: is over 1 MiB; a job file is a page of text")
    return data


class _Unreadable(Exception):
    """Nothing after this line can be understood."""

    def __init__(self, line: int, problem: str) -> None:
        self.line, self.problem = line, problem
        super().__init__(problem)


def _parse(text: str, file: JobFile) -> None:
    """Fill `file` from the text. Raises _Unreadable where it stops being YAML."""
    try:
        loader = yaml.SafeLoader(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"is not YAML: contains the character {chr(error.character)!r}"
        raise _Unreadable(line, problem) from None
    try:
        file.root = _Reader(loader, file).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark or loader.get_mark()
        words = " ".join(filter(None, (error.context, error.problem)))
        problem = f"is not YAML: {words} (column {mark.column + 1})"
        raise _Unreadable(mark.line + 1, problem) from None
    except (ValueError, OverflowError) as error:  # PyYAML lets "\UFFFFFFFF" through to chr()
        raise _Unreadable(loader.get_mark().line + 1, f"is not YAML: {error}") from None
    finally:
        loader.dispose()


class _Reader:
    """Builds plain values from the parser's events. Each method reads one node to its end."""

    def __init__(self, loader: yaml.SafeLoader, file: JobFile) -> None:
        self._loader: Any = loader
        self._file = file

    def document(self) -> Any:
        self._next()  # the stream's start
        if self._loader.check_event(yaml.StreamEndEvent):
            return None
        self._next()
        root = self._node(())
        self._next()
        if not self._loader.check_event(yaml.StreamEndEvent):
            line = self._next().start_mark.line + 1
            raise _Unreadable(line, "a second document begins here; a job file holds one")
        return root

    def _next(self) -> Any:
        return self._loader.get_event()

    def _node(self, path: KeyPath) -> Any:
        event = self._next()
        line = event.start_mark.line + 1
        self._file.lines.setdefault(path, line)
        if isinstance(event, yaml.AliasEvent):
            self._file.refuse(path, "aliases (*name) are not read; write the value out", line)
            self._file.unusable.add(path)
            return None
        self._refuse_decoration(event, path)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        if len(path) >= MAX_DEPTH:
            raise _Unreadable(line, f"is nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path)
        return self._mapping(path)

    def _refuse_decoration(self, event: Any, path: KeyPath) -> None:
        line = event.start_mark.line + 1
        if event.anchor is not None:
            self._file.refuse(path, "anchors (&name) are not read; write the value out", line)
        if event.tag is not None:
            self._file.refuse(path, "tags (!name) are not read; quote what is text", line)

    def _scalar(self, event: Any, path: KeyPath) -> Any:
        is_switch = path in self._file.switches and event.value.lower() in ("on", "off")
        if event.style is not None:  # quoted, or a block of text
            value: Any = event.value
        elif is_switch:
            value = event.value.lower()
        else:
            try:
                value = plain_scalar(event.value)
            except ValueError as error:
                self._file.refuse(path, str(error), event.start_mark.line + 1)
                self._file.unusable.add(path)
                return event.value
            if not isinstance(value, str):
                self._file.texts.setdefault(path, event.value)
        if isinstance(value, str) and (problem := not_unicode(value)):
            self._file.refuse(path, problem, event.start_mark.line + 1)
            return value.encode(errors="replace").decode()
        return value

    def _sequence(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not self._loader.check_event(yaml.SequenceEndEvent):
            items.append(self._node((*path, len(items))))
        self._next()
        return items

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        while not self._loader.check_event(yaml.MappingEndEvent):
            line = self._loader.peek_event().start_mark.line + 1
            key = self._key(path)
            if key is None:
                self._node((*path, "?"))
                continue
            here = (*path, key)
            self._file.lines.setdefault(here, line)
            if key in first_lines:
                problem = f"is given twice, in line {first_lines[key]} and in line {line}"
                self._file.refuse(here, problem, line)
                self._node(here)
            else:
                first_lines[key] = line
                result[key] = self._node(here)
        self._next()
        return result

    def _key(self, path: KeyPath) -> str | None:
        """Read a key. None, and the problem noted, if it is not text."""
        if not self._loader.check_event(yaml.ScalarEvent):
            line = self._loader.peek_event().start_mark.line + 1
            self._file.refuse(path, "a key is text, not a list, a mapping or an alias", line)
            self._node((*path, "?"))
            return None
        event = self._next()
        line = event.start_mark.line + 1
        self._refuse_decoration(event, path)
        text: str = event.value
        if event.style is None and text == "<<":
            self._file.refuse(path, "merge keys (<<) are not read; write the keys out", line)
            return None
        if event.style is None and not _is_plain_text(text):
            self._file.refuse(path, f"a key is text: put {_shortened(text)!r} in quotes", line)
            return None
        if problem := not_unicode(text):
            self._file.refuse(path, problem, line)
            return None
        return text


def _is_plain_text(text: str) -> bool:
    try:
        return isinstance(plain_scalar(text), str)
    except ValueError:
        return False


def not_unicode(text: str) -> str | None:
    """What is wrong with a text that UTF-8 cannot hold: half a surrogate pair, from an escape."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"is not Unicode text: contains {text[error.start]!r}"
    return None
