"""What an engine means by a refusal. It has words for that and no codes; they are all here. Pure.

Sources: what Docker 20.10 to 29, runc, crun, Podman and NVIDIA's container toolkit say.
"""

from __future__ import annotations

from runner.errors import EngineError

_OF_GPUS = (
    "could not select device driver",
    "gpu vendor",  # "failed to discover GPU vendor from CDI"
    "nvidia-container-cli",
    "unknown device",
    "unresolvable cdi devices",
)


def is_of_gpus(refusal: EngineError) -> bool:
    """Whether the machine's GPUs are what the engine cannot give."""
    said = refusal.reason.lower()
    return any(words in said for words in _OF_GPUS)
