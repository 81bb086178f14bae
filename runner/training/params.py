"""The job's hyperparameters, before anything is built."""

from __future__ import annotations

import json
import os
from typing import Any

from runner.errors import UsageError

PARAMS_VARIABLE = "RUNNER_PARAMS"

_defaults: dict[str, Any] = {}  # of all calls in this process


def params(**defaults: Any) -> dict[str, Any]:
    """The job's `params` over these defaults; without a supervisor, `RUNNER_PARAMS` over them.

    `run.params` has all of them later. Raises UsageError if `RUNNER_PARAMS` is no JSON object.
    """
    _defaults.update(defaults)
    return {**defaults, **_given()}


def all_params() -> dict[str, Any]:
    """The job's `params` over the defaults of every call of `params` before."""
    return {**_defaults, **_given()}


def _given() -> dict[str, Any]:
    text = os.environ.get(PARAMS_VARIABLE, "")
    try:
        given = json.loads(text) if text else {}
    except ValueError as error:
        raise UsageError(f"{PARAMS_VARIABLE} is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise UsageError(f"{PARAMS_VARIABLE} must be a JSON object, not {text[:40]!r}")
    return given
