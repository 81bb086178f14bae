"""What an engine means by a refusal. It has words for that and no codes; they are all here. Pure.

Sources: what Docker 20.10 to 29, runc, crun, Podman and NVIDIA's container toolkit say.
"""

from __future__ import annotations

import re

from runner.errors import EngineError

_OF_GPUS = (
    "could not select device driver",
    "gpu vendor",  # "failed to discover GPU vendor from CDI"
    "nvidia-container-cli",
    "unknown device",
    "unresolvable cdi devices",
)
_NO_PROGRAM = re.compile(r"executable file (`.*` )?not found|no such file or directory")


def is_of_gpus(refusal: EngineError) -> bool:
    """Whether the machine's GPUs are what the engine cannot give."""
    said = refusal.reason.lower()
    return any(words in said for words in _OF_GPUS)


def is_of_program(refusal: EngineError, program: str) -> bool:
    """Whether the image has no such program, and the engine found no other fault."""
    named = re.search(rf"[\"'`]{re.escape(program)}[\"'`]", refusal.reason)
    return named is not None and _NO_PROGRAM.search(refusal.reason.lower()) is not None
