"""The image of a container: found or pulled, pinned by its digest, and looked into once.

What a trainer would stumble over in it is named before anything is started: that there is no such
image, no Python in it, too old a one, no `runner` or another version of it. The look costs a
container of half a second, so what was found is remembered by the image's id.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runner import __version__
from runner.errors import EngineError, UsageError
from runner.job import Job
from runner.launch import shortlived
from runner.launch.docker import probe_request
from runner.launch.engine import Engine
from runner.launch.refusal import is_of_gpus, is_of_program

log = logging.getLogger(__name__)

OLDEST_PYTHON = (3, 11)  # as in pyproject.toml
_PROBE_SECONDS = 60.0
_PROGRESS_SECONDS = 5.0
_DOWNLOADED = ("Verifying Checksum", "Download complete", "Extracting", "Pull complete")
_PYTHONS = ("python3", "python")
_NOT_FOUND = 127
_PROGRAM = """
import json, os, sys
facts = {"python": sys.executable, "version": list(sys.version_info[:3]), "uid": os.getuid(),
         "gid": os.getgid(), "runner": None, "where": None, "packages": {}, "program": True}
if sys.version_info >= (3, 8):
    import importlib.metadata, shutil
    try:
        import runner
        facts["runner"] = getattr(runner, "__version__", None)
        facts["where"] = getattr(runner, "__file__", None)
    except ImportError:
        pass
    for found in importlib.metadata.distributions():
        name = found.metadata["Name"]
        if name:
            facts["packages"].setdefault(name.lower().replace("_", "-"), found.version)
    facts["program"] = shutil.which(sys.argv[1]) is not None
print(json.dumps(facts))
"""


@dataclass(frozen=True)
class Image:
    """An image that can run the trainer. `digest` is the registry's, None for one only here."""

    name: str
    id: str
    digest: str | None
    python: str = ""
    version: tuple[int, ...] = ()
    uid: int = 0
    gid: int = 0
    packages: Mapping[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> dict[str, Any]:
        """What says which image it is, for the run's record."""
        return {"name": self.name, "id": self.id, "digest": self.digest}


def find_image(
    engine: Engine, name: str, pinned: Mapping[str, Any] | None = None, *, newest: bool = False
) -> Image:
    """The image of this name: the one that is here, or else pulled.

    With `pinned`, the record of a run that was begun with it, it is the very same image, whatever
    its name stands for by now. With `newest`, the registry that it came from is asked for what it
    has under the name now; if that cannot be told, it is the one that is here. UsageError if it
    cannot be had.
    """
    if pinned is not None and pinned.get("name") == name:
        return _find_pinned(engine, name, pinned)
    found = engine.image(name)
    if found is None:
        found = _pull(engine, name)
    elif newest and "@" not in name and _digest_from(name, found):
        found = _newest(engine, name, found)
    return _described(name, found)


def _find_pinned(engine: Engine, name: str, pinned: Mapping[str, Any]) -> Image:
    found = engine.image(str(pinned["id"]))
    if found is None and pinned.get("digest"):
        digest = str(pinned["digest"])
        found = engine.image(digest) or _pull(engine, digest, known_as=name)
    if found is None:
        raise UsageError(
            f"image: the run began with {name} as {pinned['id']}, which is not here and from no "
            "registry; bring it here (docker save, docker load), or say --update to go on with "
            "what has that name now"
        )
    return _described(name, found)


def _newest(engine: Engine, name: str, here: dict[str, Any]) -> dict[str, Any]:
    found, problem = _fetch(engine, name)
    if found is None:
        log.warning(
            "no newer %s can be looked for: %s; going on with the one that is here", name, problem
        )
    return found or here


def _described(name: str, found: Mapping[str, Any]) -> Image:
    digests = found.get("RepoDigests") or []
    digest = _digest_from(name, found) or (digests[0] if digests else None)
    return Image(name, str(found["Id"]), digest)


def _digest_from(name: str, found: Mapping[str, Any]) -> str | None:
    """By which digest the repository of this name has an image; None if it came from elsewhere."""
    digests = found.get("RepoDigests") or []
    return next((str(d) for d in digests if repository_of(d) == repository_of(name)), None)


def repository_of(reference: str) -> str:
    """Where an image is kept, without tag and digest, and in one way for Docker's own registry."""
    path, slash, last = reference.partition("@")[0].rpartition("/")
    whole = f"{path}{slash}{last.partition(':')[0]}"
    for said in ("index.docker.io/", "docker.io/"):
        whole = whole.removeprefix(said)
    return whole.removeprefix("library/")


def _pull(engine: Engine, name: str, known_as: str | None = None) -> dict[str, Any]:
    """Fetch what is not here. `known_as` is the name by which a run began with this digest."""
    found, problem = _fetch(engine, name)
    if found is not None:
        return found
    next_step = "check the name, and `docker login` if its registry asks for that"
    if known_as is not None:
        next_step = (
            f"the run began with it as {known_as}: `docker login` if its registry asks for that, "
            "or say --update to go on with what has that name now"
        )
    raise UsageError(f"image: {name} is not here and cannot be pulled: {problem}; {next_step}")


def _fetch(engine: Engine, name: str) -> tuple[dict[str, Any] | None, str]:
    """Pull an image: what the engine has of it then, or None and why it cannot be."""
    log.info("pulling the image %s", name)
    begun = time.monotonic()
    if problem := _follow(engine.pull(name), begun):
        return None, problem
    found = engine.image(name)
    if found is not None:
        size, seconds = found.get("Size", 0) / 1e6, time.monotonic() - begun
        log.info("pulled %s: %.0f MB in %.0f s", name, size, seconds)
    return found, "it is not there"


def _follow(messages: Iterable[Mapping[str, Any]], begun: float) -> str | None:
    """Say how far it is, from time to time; why it failed, if it did."""
    progress, said = Progress(), begun
    for message in messages:
        if "error" in message:
            return str(message["error"])
        progress.take(message)
        if progress and time.monotonic() - said >= _PROGRESS_SECONDS:
            said = time.monotonic()
            log.info("pulling: %s", progress)
    return None


class Progress:
    """How far a pull is, by what the engine tells of it: bytes of the layers begun so far."""

    def __init__(self) -> None:
        self._layers: dict[str, tuple[int, int]] = {}

    def take(self, message: Mapping[str, Any]) -> None:
        layer, status = str(message.get("id")), message.get("status")
        detail = message.get("progressDetail") or {}
        if status == "Downloading" and detail.get("total"):
            self._layers[layer] = int(detail["current"]), int(detail["total"])
        elif status in _DOWNLOADED and layer in self._layers:
            self._layers[layer] = (self._layers[layer][1],) * 2

    def __bool__(self) -> bool:
        return bool(self._layers)

    def __str__(self) -> str:
        done, total = (sum(numbers) / 1e6 for numbers in zip(*self._layers.values(), strict=True))
        return f"{done:.0f} of {total:.0f} MB" if done < total else f"unpacking {total:.0f} MB"


# ---------------------------------------------------------------------------- what is in it


def look_into(engine: Engine, job: Job, image: Image, user_mode: str, cache: Path) -> Image:
    """What the trainer will find in the image. UsageError if it cannot run there.

    `cache` is a folder where the answers are kept.
    """
    program = job.command[0] if job.command[0] not in _PYTHONS else ""
    request = probe_request(job, image.id, ["PYTHON", "-c", _PROGRAM, program], user_mode, {})
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]
    known = _read(cache / f"{key}.json")
    facts = known or _ask(engine, job, image, request)
    if facts is None:
        raise UsageError(
            f"image: {image.name} has no Python: build it from one that has, such as "
            "docker/Dockerfile does"
        )
    if problem := problem_of(facts, job, image.name):
        raise UsageError(f"image: {problem}")
    if known is None:
        _write(cache / f"{key}.json", facts)
    return Image(
        **{
            **asdict(image),
            "python": str(facts["python"]),
            "version": tuple(facts["version"]),
            "uid": int(facts["uid"]),
            "gid": int(facts["gid"]),
            "packages": dict(facts["packages"]),
        }
    )


def problem_of(facts: Mapping[str, Any], job: Job, name: str) -> str | None:
    """Why the trainer cannot run in an image of which this is known. Pure."""
    if tuple(facts["version"]) < OLDEST_PYTHON:
        has, needs = (".".join(map(str, v)) for v in (facts["version"], OLDEST_PYTHON))
        return f"{name} has Python {has}, and runner needs {needs} or later"
    if facts["runner"] is None or facts["where"] is None:
        return (
            f"{name} has no runner; add to its Dockerfile: RUN pip install runner=={__version__} "
            "(the package alone, without its extras)"
        )
    if facts["runner"] != __version__:
        return (
            f"{name} has runner {facts['runner']}, and this is {__version__}; both sides of the "
            f"spool must be the same: RUN pip install runner=={__version__}"
        )
    if not facts["program"] and job.command[0] not in _PYTHONS:
        return f"{name} has no program {job.command[0]!r}, with which the command begins"
    return None


def _ask(
    engine: Engine, job: Job, image: Image, request: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What the probe finds; None if there is no Python to run it."""
    for python in _PYTHONS:
        entry = [python, *request["Entrypoint"][1:]]
        try:
            answer = _run(engine, image.name, {**request, "Entrypoint": entry})
        except EngineError as error:
            if job.resources.gpus and is_of_gpus(error):
                raise UsageError(f"resources.gpus: {gpu_problem()}: {error.reason}") from error
            if not 400 <= error.status < 500:  # a full disk, say: it may work another time
                raise
            raise UsageError(f"image: {image.name}: {error}") from error
        if answer is not None:
            return answer
    return None


def _run(engine: Engine, name: str, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Run a probe to its end; what it printed, None if there is no such program."""
    container = shortlived.make(engine, "probe", request)
    try:
        engine.start(container)
        code = engine.wait(container, _PROBE_SECONDS)
        said = engine.output(container, stdout=True, stderr=False)
        error = engine.output(container, stdout=False, stderr=True)
    except EngineError as refusal:
        # Without an init, the engine looks for the program itself.
        if is_of_program(refusal, request["Entrypoint"][0]):
            return None
        raise
    finally:
        with contextlib.suppress(EngineError):  # another look removes it then
            engine.remove(container)
    if code == _NOT_FOUND:
        return None
    try:
        return dict(json.loads(said.splitlines()[-1]))
    except (ValueError, IndexError):
        words = error.decode(errors="replace").strip().splitlines()[-1:] or ["it says nothing"]
        raise UsageError(
            f"image: a Python in {name} ended with {code} and did not tell its version: {words[0]}"
        ) from None


def gpu_problem(root: Path = Path("/")) -> str:
    """What is missing for GPUs on this machine."""
    if not (root / "proc/driver/nvidia/version").exists():
        return "no NVIDIA driver is loaded on this machine; install it, and check nvidia-smi"
    tools = ("usr/bin/nvidia-container-runtime-hook", "usr/bin/nvidia-container-cli")
    if not any((root / tool).exists() for tool in tools):
        return (
            "the NVIDIA Container Toolkit is not installed; install nvidia-container-toolkit and "
            "start the engine again"
        )
    return (
        "the engine does not know the NVIDIA runtime; call `nvidia-ctk runtime configure`, and "
        "start the engine again"
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _write(path: Path, facts: Mapping[str, Any]) -> None:
    """Keep an answer; where that cannot be, it is asked again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(facts))
        temporary.replace(path)
    except OSError as error:
        log.debug("what is in the image is not remembered: %s", error)
