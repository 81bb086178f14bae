"""How a test's node has its trainers run in containers of the base image.

torch is the one of this environment, mounted with everything beside it, and so are this checkout's
package and the tests' programs: nothing is built or copied, and both launchers run the same bits.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from servers.engine import IMAGE

import runner

PROGRAMS = Path(__file__).parent / "child_programs"
WORKDIR, PROGRAMS_INSIDE, PACKAGES, OURS = "/runner/workdir", "/programs", "/packages", "/ours"


def in_container(document: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """A job file's content, changed so that the same happens in a container."""
    inside = {str(PROGRAMS): PROGRAMS_INSIDE, str(workdir): WORKDIR}
    job = {
        **document,
        "launcher": "docker",
        "image": IMAGE,
        "mounts": [
            {"source": sysconfig.get_path("purelib"), "target": PACKAGES},
            {"source": str(Path(runner.__file__).parent), "target": f"{OURS}/runner"},
            {"source": str(PROGRAMS), "target": PROGRAMS_INSIDE},
            *document.get("mounts", []),
        ],
        "env": {"PYTHONPATH": f"{OURS}:{PACKAGES}", **document.get("env", {})},
    }
    for key in ("command", "params"):
        if key in job:
            job[key] = _translated(job[key], inside)
    return job


def _translated(value: Any, inside: Mapping[str, str]) -> Any:
    """The same with the paths that a container has."""
    if isinstance(value, dict):
        return {name: _translated(each, inside) for name, each in value.items()}
    if isinstance(value, list):
        return [_translated(each, inside) for each in value]
    if isinstance(value, str):
        for outer, inner in inside.items():
            value = value.replace(outer, inner)
    return value
