"""A process of its own that loads a saved checkpoint and calls the job's function with it.

    python -m runner.training.validate FOLDER

It is started by the supervisor, which has read and verified the bytes: it needs no store and is
given no credentials. It takes only what processor, disk and memory are left over. It begins when
its input is closed. What is wanted is in the folder's `request.json`, the state in its `slot`:

    {"path": […], "entrypoint": "module:function"}                        look only
    {…, "marker": {…}, "params": {…}, "gives_way": BOOL}                  call it

What came of it goes into `result.json`; what it prints is for people. That is
`{"metrics": {…}}`, or `{"metrics": null}` where the function had nothing to say;
`{"problem": TEXT}` if it failed, and `{"unusable": TEXT}` if none can be called. Without that file,
the process died.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import importlib
import inspect
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runner.trial_files import REQUEST, RESULT, SLOT

EXPECTED = "check(components, *, params, state)"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h; see PR_SET_PDEATHSIG(2const)
_NICENESS = 19


class EntrypointError(Exception):
    """The function that the job names is not there, or cannot be called as it will be."""


def find(entrypoint: str) -> Callable[..., Any]:
    """The function that `module:function` names. EntrypointError says why it cannot be used."""
    module, _, name = entrypoint.partition(":")
    try:
        content = vars(importlib.import_module(module))
    except ModuleNotFoundError as error:
        own = error.name is not None and f"{module}.".startswith(f"{error.name}.")
        why = "" if own else f", which {module} imports"
        raise EntrypointError(f"there is no module {error.name!r}{why}") from error
    except Exception as error:  # importing runs code, which may raise anything
        raise EntrypointError(f"{module} cannot be imported: {_in_a_line(error)}") from error
    if name not in content:
        known = [key for key, value in content.items() if callable(value)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise EntrypointError(f"module {module} has no {name!r}{hint}")
    function: Callable[..., Any] = content[name]
    if not callable(function):
        raise EntrypointError(f"{entrypoint} is no function, but a {type(function).__name__}")
    try:
        inspect.signature(function).bind({}, params={}, state={})
    except TypeError as error:
        raise EntrypointError(
            f"{entrypoint}{inspect.signature(function)} cannot be called as {EXPECTED}: {error}"
        ) from error
    except ValueError:
        pass  # written in C, without a signature: it will be seen
    return function


def call(
    function: Callable[..., Any], request: Mapping[str, Any], slot: Path
) -> dict[str, float] | None:
    """Call the function with what was saved; its metrics, None if it says nothing."""
    from runner.spool import Marker
    from runner.training.saved import open_saved, state_dicts

    saved = open_saved(slot, Marker(**request["marker"]))
    components, state = state_dicts(saved)
    returned = function(components, params=request["params"], state=state)
    if returned is None:
        return None
    if not isinstance(returned, Mapping):
        raise TypeError(f"it returned a {type(returned).__name__} instead of metrics by name")
    return {str(name): float(value) for name, value in returned.items()}


def main() -> int:
    folder = Path(sys.argv[1])
    sys.stdin.read()
    request = json.loads((folder / REQUEST).read_bytes())
    _be_alone()
    if request.get("gives_way"):
        _give_way()
    sys.path[1:1] = request["path"]  # after the workdir, which `-m` has put first
    result: dict[str, Any]
    try:
        function = find(request["entrypoint"])
        is_called = "marker" in request
        result = {"metrics": _plain(call(function, request, folder / SLOT)) if is_called else {}}
    except EntrypointError as error:
        result = {"unusable": str(error)}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - what it raises is the result
        traceback.print_exc()
        result = {"problem": _in_a_line(error)}
    temporary = folder / "result.part"
    temporary.write_text(json.dumps(result))
    temporary.replace(folder / RESULT)
    return 0


def _in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _plain(metrics: dict[str, float] | None) -> dict[str, float | str] | None:
    if metrics is None:
        return None
    return {name: v if math.isfinite(v) else str(v) for name, v in metrics.items()}


def _be_alone() -> None:
    """Have a session of its own, to be killed whole, and end with whoever has started this."""
    parent = os.getppid()
    with contextlib.suppress(OSError):
        os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def _give_way() -> None:
    """Be the last in every queue, and the first to be killed for memory, as far as it is allowed.

    With autogroups a session has its share of the processor whatever the niceness in it, so that
    of the group is lowered, too: see sched(7).
    """
    for file, text in (("autogroup", str(_NICENESS)), ("oom_score_adj", "1000")):
        with contextlib.suppress(OSError):
            Path("/proc/self", file).write_text(text)
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import psutil

        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


if __name__ == "__main__":
    sys.exit(main())
