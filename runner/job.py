"""The job file: what to run, where its checkpoints live, and how it may fail.

`load_job` turns a YAML file into a frozen `Job`, or raises one `JobError` that names every problem
with its line, its key, what was expected and, for an unknown key, the nearest valid one. What is
read is obeyed: a key that this version does not act on is an unknown key.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from pydantic import ValidationError

from runner.errors import UsageError
from runner.job_container import Mount
from runner.job_export import Export
from runner.job_launch import check_launchable, resolved_command, shadowing_file, workdir_problem
from runner.job_model import (
    Backoff,
    Best,
    Checkpoint,
    Every,
    EveryEpochs,
    EverySteps,
    Health,
    Job,
    Keep,
    Outputs,
    Preemption,
    Restart,
)
from runner.job_resources import Resources
from runner.job_store import S3, WHERE_CREDENTIALS_BELONG, is_credential, is_s3, s3_url
from runner.job_tracking import Tracking, missing_tracker
from runner.job_types import Part
from runner.job_yaml import JobFile, KeyPath, dotted, parse_param, read_job_file
from runner.units import format_duration, format_size

__all__ = [
    "S3",
    "Backoff",
    "Best",
    "Checkpoint",
    "Every",
    "EveryEpochs",
    "EverySteps",
    "Export",
    "Health",
    "Job",
    "Keep",
    "Mount",
    "Outputs",
    "Preemption",
    "Resources",
    "Restart",
    "Tracking",
    "check_launchable",
    "check_run_id",
    "differences",
    "is_s3",
    "job_as_submitted",
    "job_schema",
    "load_job",
    "missing_tracker",
    "parse_param",
    "resolved_command",
    "s3_url",
    "shadowing_file",
]

_SWITCHES: frozenset[KeyPath] = frozenset(
    {
        ("s3", "conditional_writes"),
        ("checkpoint", "compression"),
        ("resources", "memory_guard"),
        ("metrics", "port"),
        ("provenance", "diff"),
    }
)
_RUN_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"


def load_job(
    path: Path,
    *,
    workdir: Path | None = None,
    params: Mapping[str, Any] = MappingProxyType({}),
    store: str | None = None,
    launcher: str | None = None,
    overrides: Mapping[KeyPath, str | None] = MappingProxyType({}),
) -> Job:
    """Read a job file and put the command line's values over it.

    `workdir` is the folder against which the job's own `workdir` is resolved, by default the
    current one. The keys of `params` may be dotted: `optimizer.lr` is `lr` inside `optimizer`.
    `overrides` has other keys of the file; the option that sets one is called like its last part.

    Raises UsageError if there is no file that can be read, JobError with one line per problem
    (all problems of the file at once) if it cannot be obeyed. Nothing is written.
    """
    file = read_job_file(path, _SWITCHES)
    if not isinstance(file.root, dict):
        file.raise_problems()
        found = "the file is empty" if file.root is None else "expected a mapping"
        file.refuse((), f"{found}; a job has at least a name and a command", line=1)
        file.raise_problems()
    for key, value in params.items():
        file.override(_place_of(key, file.root.get("params")), value, f"-p {key}")
    if store is not None and not is_s3(store) and is_s3(str(file.root.get("store"))):
        file.root.pop("s3", None)  # it says how to reach the store that is not used
    for path_of_key, given in {("store",): store, ("launcher",): launcher, **overrides}.items():
        if given is not None:
            file.override(path_of_key, given, f"--{path_of_key[-1]}")
    job = _validated(file, workdir)
    file.raise_problems()
    assert job is not None, "a job that is not valid has problems"
    return job


def _place_of(key: str, own: object) -> KeyPath:
    """Where `-p KEY=…` belongs: in the params, but for `tracking.…`, which is about the job.

    A key that the file itself spells with a dot is replaced as it stands.
    """
    names = own if isinstance(own, dict) else {}
    if key in names:
        return ("params", key)
    parts = tuple(key.split("."))
    is_of_job = parts[0] == "tracking" and len(parts) > 1 and "tracking" not in names
    return parts if is_of_job else ("params", *parts)


def submitted(path: Path) -> dict[str, Any]:
    """What a job file itself says, without defaults; it was loaded before, so it can be read."""
    root = read_job_file(path, _SWITCHES).root
    return root if isinstance(root, dict) else {}


def _validated(file: JobFile, workdir: Path | None) -> Job | None:
    for path in _missing_values((), file.root):
        known = _keys(path[:-1])
        if not file.is_unusable(path) and (not known or path[-1] in known):
            file.refuse(path, "has no value; give one, or leave the key out")
            file.unusable.add(path)
    values = dict(file.root)
    if isinstance(own := values.get("workdir", "."), str) and own.strip():
        try:
            values["workdir"] = str((workdir or Path.cwd()) / Path(own).expanduser())
        except (OSError, RuntimeError) as error:  # the current folder is gone; no such user
            file.refuse(("workdir",), f"expected a directory: {error}")
            file.unusable.add(("workdir",))
    try:
        job = Job.model_validate(values)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            if not file.is_unusable(details["loc"]):
                file.refuse(details["loc"], _problem(details, file))
        return None
    if problem := workdir_problem(job.workdir):
        file.refuse(("workdir",), problem)
    return job


def _missing_values(path: KeyPath, value: Any) -> Iterator[KeyPath]:
    """Keys whose value was left out. In `params` that is a value, null."""
    if value is None and not (path[0] == "params" and len(path) > 1):
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _missing_values((*path, key), item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _missing_values((*path, index), item)


_EXPECTED = {  # pydantic's types of error → what is said instead
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected text",
    "tuple_type": "expected a list, such as [a, b]",
    "dict_type": "expected a mapping of names to values",
    "greater_than": "expected more than {gt:g}",
    "greater_than_equal": "expected {ge} or more",
    "less_than_equal": "expected {le} or less",
    "literal_error": "expected {expected}",
    "value_error": "{error}",
}


def _problem(details: Any, file: JobFile) -> str:
    """Say what was expected and what was found, from one of pydantic's errors."""
    path, kind, value = details["loc"], details["type"], details["input"]
    if kind == "missing":
        return "is missing"
    if kind == "needed":
        return str(details["msg"])
    if kind == "extra_forbidden":
        hint = WHERE_CREDENTIALS_BELONG if is_credential(path) else _hint(path)
        return f"is not a key of a job{hint}"
    if kind == "model_type":
        auto = (
            "auto, or "
            if path in (("checkpoint", "every"), ("checkpoint", "snapshot_every"))
            else ""
        )
        return f"expected {auto}a mapping with keys among {', '.join(_keys(path))}"
    is_scalar = value is None or isinstance(value, bool | int | float | str)
    hint = "; put it in quotes" if kind == "string_type" and is_scalar else ""
    template = _EXPECTED.get(kind)
    expected = template.format(**details.get("ctx", {})) if template else details["msg"]
    # Values of the environment may be secrets, and so may be what stands in a URL before an @.
    if path[0] in ("env", "params") or not is_scalar or "@" in str(value):
        return expected + hint
    got = file.texts.get(path) or (repr(value) if isinstance(value, str) else json.dumps(value))
    return f"{expected}, got {got if len(got) <= 60 else f'{got[:57]}...'}{hint}"


def _keys(path: KeyPath) -> list[str]:
    """The valid keys of the mapping at `path`; none where any key is valid."""
    model: Any = Job
    for part in path:
        if isinstance(part, int):
            continue  # an item of a list has the keys of its kind
        field = next(
            (f for name, f in model.model_fields.items() if part == (f.alias or name)), None
        )
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, Part)), None)
        if model is None:
            return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _hint(path: KeyPath) -> str:
    """The nearest valid key beside an unknown one, or where its namesake belongs, or all keys."""
    *parents, unknown = path
    known = _keys(tuple(parents))
    if near := difflib.get_close_matches(str(unknown).lower(), known, n=1):
        return f"; did you mean {dotted((*parents, near[0]))}?"
    if home := next((place for place in _all_keys(()) if place[-1] == unknown), None):
        return f"; did you mean {dotted(home)}?"
    return f"; valid here: {', '.join(known)}"


def _all_keys(path: KeyPath) -> Iterator[KeyPath]:
    for key in _keys(path):
        yield (*path, key)
        yield from _all_keys((*path, key))


def job_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a job file, with the names and units that the file has."""
    schema = _as_in_files(Job.model_json_schema(by_alias=True))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "examples": [
            {
                "name": "rul-fd001",
                "command": ["python", "-m", "jobs.rul.train"],
                "params": {"subset": "FD001", "epochs": 30},
                "checkpoint": {
                    "every": {"steps": 500},
                    "keep": {"last": 3, "best": {"metric": "val_rmse", "mode": "min"}},
                },
                "preemption": {"grace": "30s"},
            }
        ],
    }


def _as_in_files(schema: Any) -> Any:
    """Correct pydantic's schema: optional keys are left out, never null; units are in the text."""
    if isinstance(schema, list):
        return [_as_in_files(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _as_in_files(value) for key, value in schema.items() if value is not None}
    if schema.get("type") == "string" and isinstance(schema.get("default"), float):
        schema["default"] = format_duration(schema["default"])
    if schema.get("type") == "string" and isinstance(schema.get("default"), int):
        schema["default"] = format_size(schema["default"])
    if {"type": "null"} in schema.get("anyOf", []):
        (only,) = (kind for kind in schema.pop("anyOf") if kind != {"type": "null"})
        if schema.pop("auto", False):
            return {"anyOf": [{"const": "auto"}, only], **schema}
        schema = {**only, **schema}
    return schema


def job_as_submitted(job: Job) -> dict[str, Any]:
    """The job as plain JSON under its public names; `Job.model_validate` gives it back, equal."""
    # Keys that were not given are left out; a null inside params is a value, and stays.
    return job.model_dump(mode="json", by_alias=True, exclude_none=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two submitted jobs in what makes them the same run.

    That is the command and the params: the rest says how to run, and may change between attempts.
    One line each, such as `params.epochs: 5 -> 9`; none if the two are the same run.
    """
    return [
        *_changes(("command",), old.get("command", ...), new.get("command", ...)),
        *_changes(("params",), old.get("params") or {}, new.get("params") or {}),
    ]


def _changes(path: KeyPath, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _changes((*path, key), old.get(key, ...), new.get(key, ...))
    # As JSON, because 1, 1.0 and true are equal in Python and are not the same params.
    elif (before := _value(path, old)) != (after := _value(path, new)):
        yield f"{dotted(path)}: {before} -> {after}"


def _value(path: KeyPath, value: Any) -> str:
    if value is ...:
        return "(not set)"
    if path == ("command",) and isinstance(value, list | tuple):
        return shlex.join(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def check_run_id(text: str) -> str:
    """Return the id unchanged, or raise UsageError: it becomes the name of a folder."""
    if not re.fullmatch(_RUN_ID, text):
        raise UsageError(
            f"{text!r} cannot be a run id: expected 1 to 63 letters, digits, '.', '_' and '-',"
            " the first of them a letter or a digit"
        )
    return text
