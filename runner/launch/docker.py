"""From a job to a container: the body of a request to the Engine API, and nothing else. Pure.

The container gets little. Its user is not root, all capabilities are dropped, the image is
read-only, there is no network, and of the host's environment it has what `PASSED` names. What it
may write is `/tmp`, its outputs, and its side of the spool. The engine's socket is never mounted.

Source: https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from runner.job import Job
from runner.launch.base import Order, Places
from runner.launch.process import CREDENTIAL_VARIABLES, RESERVED_PREFIX
from runner.launch.trial import ALONE, PROGRAM, own_variables

INSIDE = Places(Path("/runner/spool"), Path("/runner/outputs"), Path("/runner/slots"))
WORKDIR = Path("/runner/workdir")
_FIRST_PROGRAM = Path("/runner/inside.py")
_TRIED_IN = Path("/runner/trial")

RUN_LABEL, ATTEMPT_LABEL, SPOOL_LABEL = "runner.run-id", "runner.attempt", "runner.spool"

PASSED = ("TZ", "NO_COLOR", "FORCE_COLOR")
"""What of the host's environment a container has, where it is set."""

_PASSED_WITH_CREDENTIALS = (
    *CREDENTIAL_VARIABLES,
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL*",
)
# A user without a name and a home: getpass, and the caches of torch and triton, ask for both.
_DEFAULTS = {"HOME": "/tmp", "USER": "runner", "PYTHONUNBUFFERED": "1"}
# Its own /dev/shm is for loader workers: as large as outside of containers, not Docker's 64 MB.
_SHM_SHARE = 2
_PROBE_SHM_BYTES = 1 << 20
_LEAST_SHARES = 2  # of the processor, where others want it


@dataclass(frozen=True)
class Seat:
    """What a container of this run is given on this machine.

    `user` is `UID:GID`; `python` is the interpreter in the image; `first_program` the file
    `inside.py` on this machine; `host_memory` its memory in bytes. `user_mode` is what the engine
    is told of user namespaces, empty for nothing.
    """

    image: str
    python: str
    user: str
    places: Places
    first_program: Path
    run_id: str
    host_memory: int
    user_mode: str = ""


def trainer_request(
    job: Job, seat: Seat, order: Order, parent: Mapping[str, str]
) -> dict[str, Any]:
    """The container of an attempt."""
    command = [seat.python if word in ("python", "python3") else word for word in job.command[:1]]
    places = seat.places
    request = _request(job, seat.image, seat.user, seat.user_mode)
    request |= {
        "Entrypoint": [seat.python, "-I", "-S", str(_FIRST_PROGRAM), str(INSIDE.spool)],
        "Cmd": [*command, *job.command[1:]],
        "Env": _listed(container_environment(job, order.own, parent)),
        "Labels": {
            RUN_LABEL: seat.run_id,
            ATTEMPT_LABEL: str(order.attempt),
            SPOOL_LABEL: str(places.spool),
        },
    }
    request["HostConfig"] |= {
        "Mounts": [
            *_mounts(job),
            _mount(places.spool, INSIDE.spool, writable=True),
            _mount(places.outputs, INSIDE.outputs, writable=True),
            _mount(places.slots, INSIDE.slots, writable=True),
            _mount(seat.first_program, _FIRST_PROGRAM),
        ],
        "ShmSize": _shm_bytes(job, seat),
        "DeviceRequests": device_requests(job),
    }
    return request


def probe_request(
    job: Job, image: str, program: Sequence[str], user_mode: str, parent: Mapping[str, str]
) -> dict[str, Any]:
    """A container that looks at the image with the trainer's eyes; its user is the image's own."""
    request = _request(job, image, job.user or "", user_mode)
    request |= {
        "Entrypoint": list(program),
        "Cmd": [],
        "Env": _listed(container_environment(job, {}, parent)),
        "Labels": {},
    }
    request["HostConfig"] |= {
        "NetworkMode": "none",
        "Mounts": _mounts(job),
        "ShmSize": _PROBE_SHM_BYTES,
        "DeviceRequests": device_requests(job),
    }
    return request


def trial_request(job: Job, seat: Seat, folder: Path, parent: Mapping[str, str]) -> dict[str, Any]:
    """A container that tries the job's own function in a folder of this machine."""
    passed = {name: value for name, value in parent.items() if name in PASSED}  # no credentials
    environment = container_environment(job, own_variables(job, seat.run_id), passed)
    request = _request(job, seat.image, seat.user, seat.user_mode)
    request |= {
        "Entrypoint": [seat.python, *PROGRAM, str(_TRIED_IN)],
        "Cmd": [],
        "Env": _listed({**environment, **ALONE}),
        "Labels": {RUN_LABEL: seat.run_id, SPOOL_LABEL: str(seat.places.spool)},
    }
    request["HostConfig"] |= {
        "NetworkMode": "none",
        "Mounts": [*_mounts(job), _mount(folder, _TRIED_IN, writable=True)],
        "ShmSize": _shm_bytes(job, seat),
        "DeviceRequests": [],
        "CpuShares": _LEAST_SHARES,
    }
    return request


def _shm_bytes(job: Job, seat: Seat) -> int:
    return job.resources.shm or (job.resources.memory or seat.host_memory) // _SHM_SHARE


def container_environment(
    job: Job, own: Mapping[str, str], parent: Mapping[str, str]
) -> dict[str, str]:
    """The trainer's environment, beside what the image brings.

    Of `parent`, which is the supervisor's, only what is named here; `job.env` goes over it, and
    `own`, the `RUNNER_*` variables, over all.
    """
    allowed = (*PASSED, *(_PASSED_WITH_CREDENTIALS if job.credentials == "pass" else ()))
    passed = {
        name: value
        for name, value in parent.items()
        if any(fnmatchcase(name, pattern) for pattern in allowed)
    }
    given = {**_DEFAULTS, **passed, **job.env}
    return {n: v for n, v in given.items() if not n.startswith(RESERVED_PREFIX)} | dict(own)


def device_requests(job: Job) -> list[dict[str, Any]]:
    """GPUs by number, or by name. Source: Docker's documentation of `docker run --gpus`."""
    gpus = job.resources.gpus
    if not gpus:
        return []
    chosen = {"Count": gpus} if isinstance(gpus, int) else {"DeviceIDs": list(gpus)}
    return [{"Driver": "", **chosen, "Capabilities": [["gpu"]], "Options": {}}]


def _request(job: Job, image: str, user: str, user_mode: str) -> dict[str, Any]:
    """What all containers of a job have in common."""
    memory, cpus = job.resources.memory or 0, job.resources.cpus or 0
    return {
        "Image": image,
        "User": user,
        "WorkingDir": str(WORKDIR),
        "Tty": False,
        "OpenStdin": False,
        # The image's own would start `runner` beside the trainer again and again.
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": {
            "NetworkMode": job.network,
            "Init": True,
            "ReadonlyRootfs": True,
            "Tmpfs": {"/tmp": "rw,exec,nosuid,nodev,mode=1777"},
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "Privileged": False,
            "RestartPolicy": {"Name": "no"},
            "AutoRemove": False,
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "1"}},
            "Memory": memory,
            "MemorySwap": memory,  # with this, no swap beside it
            "NanoCpus": int(cpus * 1e9),
            "UsernsMode": user_mode,
        },
    }


def _mounts(job: Job) -> list[dict[str, Any]]:
    """The workdir, read-only, and what the job names."""
    return [
        _mount(job.workdir, WORKDIR),
        *(
            _mount(source, Path(mount.target or source), writable=mount.writable)
            for mount in job.mounts
            for source in [job.workdir / mount.source]
        ),
    ]


def _mount(source: Path, target: Path, *, writable: bool = False) -> dict[str, Any]:
    """A bind mount. Unlike `Binds`, it is refused if there is no such source."""
    return {
        "Type": "bind",
        "Source": str(source),
        "Target": str(target),
        "ReadOnly": not writable,
    }


def _listed(environment: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in sorted(environment.items())]
