"""What the trainer may use: GPUs, CPUs and memory, for the launchers that can see to it.

A process of this machine uses what the machine has; only `memory_guard` concerns it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema

from runner.job_types import DEFAULT_GUARD, LARGEST_COUNT, Guard, Part, Size

_LEAST_MEMORY_BYTES = 6 * 2**20  # what Docker's engine takes for a limit


def _gpus(value: object) -> object:
    """A number of GPUs, or which ones: by their index or by the UUID that nvidia-smi shows."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT:
        return value
    if not isinstance(value, list | tuple) or not value or not all(map(_is_gpu, value)):
        raise ValueError("expected how many, such as 2, or which ones, such as [0, 2]")
    ids = [str(one) for one in value]
    if len(set(ids)) < len(ids):
        raise ValueError("expected each GPU once")
    return tuple(ids)


def _is_gpu(one: object) -> bool:
    if isinstance(one, int) and not isinstance(one, bool):
        return one >= 0
    return isinstance(one, str) and one.replace("-", "").replace(":", "").isalnum()


def _memory(nbytes: int) -> int:
    if nbytes < _LEAST_MEMORY_BYTES:
        raise ValueError("expected 6Mi or more")
    return nbytes


Gpus = Annotated[
    Any,
    BeforeValidator(_gpus),
    PlainSerializer(lambda gpus: gpus if isinstance(gpus, int) else list(gpus)),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "array", "items": {"type": ["integer", "string"]}, "minItems": 1},
            ]
        }
    ),
]


class Resources(Part):
    """What the trainer may use. All but the guard is for docker and kubernetes."""

    gpus: Gpus = Field(
        default=0,
        description="How many NVIDIA GPUs; with docker also which ones, by index or UUID.",
        examples=[1, [0, 2]],
    )
    cpus: Annotated[float, Field(gt=0, le=LARGEST_COUNT)] | None = Field(
        default=None, description="CPUs' worth of time; default: all.", examples=[8, 0.5]
    )
    memory: Annotated[Size, AfterValidator(_memory)] | None = Field(
        default=None,
        description="The limit, the slots included; default: none.",
        examples=["32Gi"],
    )
    shm: Size | None = Field(
        default=None,
        description="The size of /dev/shm, for loader workers; default: half of the memory.",
        examples=["8Gi"],
    )
    memory_guard: Guard = Field(
        default=DEFAULT_GUARD,
        description="At this share of the cgroup's memory limit the trainer is saved and started"
        " again, before the kernel kills it and the supervisor.",
        json_schema_extra={"default": f"{DEFAULT_GUARD:.0%}"},
    )

    @property
    def gpu_count(self) -> int:
        return self.gpus if isinstance(self.gpus, int) else len(self.gpus)
