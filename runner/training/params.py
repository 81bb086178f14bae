"""The job's hyperparameters, before anything is built."""

from __future__ import annotations

import json
import os
from typing import Any

from runner.errors import UsageError

PARAMS_VARIABLE = "RUNNER_PARAMS"


def params(**defaults: Any) -> dict[str, Any]:
    """The job's `params` over these defaults; without a supervisor, `RUNNER_PARAMS` over them.

    Raises UsageError if `RUNNER_PARAMS` is no JSON object.
    """
    text = os.environ.get(PARAMS_VARIABLE, "")
    try:
        given = json.loads(text) if text else {}
    except ValueError as error:
        raise UsageError(f"{PARAMS_VARIABLE} is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise UsageError(f"{PARAMS_VARIABLE} must be a JSON object, not {text[:40]!r}")
    return {**defaults, **given}
