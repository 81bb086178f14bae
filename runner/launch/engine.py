"""A container engine as it is spoken to: Docker's, or Podman's compatible socket.

Thin over the `docker` SDK's client for the Engine API, whose errors become ours. The engine must be
this machine's, since the spool is shared by mounting it.
"""

from __future__ import annotations

import contextlib
import grp
import importlib
import os
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from runner.errors import EngineError, EngineGone, UsageError
from runner.launch.process import UNKNOWN_EXIT

DEFAULT_SOCKET = "unix:///var/run/docker.sock"
_ANSWER_SECONDS = 10.0
_REMOVE_SECONDS = 60.0
_CONFLICT = 409
_LOOK_SECONDS = 0.1
_SHELLS_ADD = 128  # to a signal's number; also what the init of a container makes of it
_LAST_SIGNAL = 64
_START_SECONDS = 120.0  # GPUs and large images take their time


class Engine:
    """One connection, used from one thread at a time. All methods raise EngineError."""

    def __init__(self, client: Any, sdk: ModuleType, address: str) -> None:
        self._client, self._sdk, self.address = client, sdk, address

    @classmethod
    def connect(cls, environment: Mapping[str, str] = os.environ) -> Engine:
        """Reach the engine that `DOCKER_HOST` names, or Docker's own socket.

        UsageError if there is none, it is another machine's, or this user may not use it; also if
        Docker's own configuration cannot be understood.
        """
        sdk = _sdk()
        address = environment.get("DOCKER_HOST") or DEFAULT_SOCKET
        socket = _socket_of(address)
        _check_credentials(sdk)
        try:
            client = sdk.APIClient(
                base_url=f"unix://{socket}", version="auto", timeout=_ANSWER_SECONDS
            )
        except sdk.errors.DockerException as error:
            raise UsageError(
                f"no container engine answers at {address}: {_first_line(error)}; start it, or "
                "name another in DOCKER_HOST"
            ) from error
        return cls(client, sdk, address)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the engine says of itself and of its machine."""
        with self._translated("be asked about itself"):
            return dict(self._client.info())

    @cached_property
    def is_podman(self) -> bool:
        with self._translated("be asked for its version"):
            components = self._client.version(api_version=False).get("Components") or []
        return any("podman" in str(part.get("Name", "")).lower() for part in components)

    @property
    def is_rootless(self) -> bool:
        """Whether root in its containers is an ordinary user here."""
        podman_says = bool(self.facts.get("Rootless"))  # 4.3 has no such option
        return podman_says or self._has_option("rootless")

    @property
    def has_no_limits(self) -> bool:
        """Whether it passes over limits of processors and memory, and does not say so.

        Without root it may not set them where cgroups are of version 1, nor where no systemd
        hands it some: Docker has no driver for them then. Source:
        https://docs.docker.com/engine/security/rootless/tips/#limiting-resources
        """
        is_first = str(self.facts.get("CgroupVersion")) == "1"
        return self.is_rootless and (is_first or self.facts.get("CgroupDriver") == "none")

    @property
    def remaps_users(self) -> bool:
        """Whether users in its containers are other users here, unless it is told otherwise."""
        return self._has_option("userns")

    def _has_option(self, name: str) -> bool:
        options = self.facts.get("SecurityOptions") or []
        return any(f"name={name}" in str(option).split(",") for option in options)

    # ------------------------------------------------------------------ images

    def image(self, name: str) -> dict[str, Any] | None:
        """What the engine has of an image; None if it has none of that name."""
        with self._translated(f"look for the image {name}"):
            try:
                return dict(self._client.inspect_image(name))
            except self._sdk.errors.NotFound:
                return None

    def pull(self, name: str) -> Iterator[dict[str, Any]]:
        """Fetch an image, with the credentials of Docker's own configuration: what it tells.

        A message with `error` is the last one.
        """
        whole, _, digest = name.partition("@")
        repository, tag = self._sdk.utils.parse_repository_tag(whole)
        wanted = {"tag": digest or tag or "latest"}
        with self._translated(f"pull {name}"):
            try:
                yield from self._client.pull(repository, **wanted, stream=True, decode=True)
            except self._sdk.errors.DockerException as error:  # of a helper for credentials, too
                yield {"error": _explanation(error)}

    # ------------------------------------------------------------------ containers

    def create(self, name: str, request: Mapping[str, Any]) -> str:
        """Make a container of a request to `POST /containers/create`; its id."""
        with self._translated("make the container", _START_SECONDS):
            made = self._client.create_container_from_config(dict(request), name)
        return str(made["Id"])

    def start(self, container: str) -> None:
        with self._translated("start the container", _START_SECONDS):
            self._client.start(container)

    def state(self, container: str) -> dict[str, Any]:
        """The state of a container; empty if it is gone."""
        with self._translated("look at the container"):
            try:
                return dict(self._client.inspect_container(container)["State"])
            except self._sdk.errors.NotFound:
                return {}

    def wait(self, container: str, timeout_seconds: float) -> int:
        """Wait for its end; the exit code."""
        with self._translated("wait for the container"):
            return int(self._client.wait(container, timeout=timeout_seconds)["StatusCode"])

    def kill(self, container: str, signum: int) -> None:
        """Signal the first process; nothing happens if it has ended."""
        with self._translated("signal the container"):
            try:
                self._client.kill(container, str(int(signum)))
            except self._sdk.errors.APIError as error:
                if error.status_code not in (404, 409):
                    raise

    def output(self, container: str, *, stdout: bool, stderr: bool) -> bytes:
        """What a container has printed past the pipes it was given."""
        with self._translated("read the container's log"):
            # All of it, 1 MB at most: of the last lines, Podman 4.3 loses parts of a long one.
            return bytes(self._client.logs(container, stdout=stdout, stderr=stderr))

    def remove(self, container: str) -> None:
        """Remove a container, whether it runs or not; it is gone then. Nothing happens if it was.

        One that dies slowly has its time: the engine itself waits for ten seconds and more.
        """
        until = time.monotonic() + _REMOVE_SECONDS
        missing = contextlib.suppress(self._sdk.errors.NotFound)
        with self._translated("remove the container", _REMOVE_SECONDS), missing:
            try:
                self._client.remove_container(container, force=True, v=True)
            except self._sdk.errors.APIError as error:
                if error.status_code != _CONFLICT:
                    raise
                while self._client.inspect_container(container):  # somebody's is on its way
                    if time.monotonic() >= until:
                        raise
                    time.sleep(_LOOK_SECONDS)

    def labelled(self, label: str, value: str) -> list[str]:
        """The ids of all containers with this label, those that have ended too."""
        with self._translated("list containers"):
            filters = {"label": [f"{label}={value}"]}
            found = self._client.containers(all=True, filters=filters)
        return [str(one["Id"]) for one in found]

    def labels(self, label: str) -> dict[str, str]:
        """What this label says of each container that has it, by their ids."""
        with self._translated("list containers"):
            found = self._client.containers(all=True, filters={"label": [label]})
        return {str(one["Id"]): str((one.get("Labels") or {}).get(label, "")) for one in found}

    def close(self) -> None:
        self._client.close()

    @contextlib.contextmanager
    def _translated(self, action: str, timeout_seconds: float = _ANSWER_SECONDS) -> Iterator[None]:
        from requests.exceptions import RequestException
        from urllib3.exceptions import HTTPError  # of a stream, which the SDK reads past requests

        gone = (RequestException, HTTPError, OSError)
        self._client.timeout = timeout_seconds
        try:
            yield
        except self._sdk.errors.APIError as error:
            raise EngineError(action, _whole(error), error.status_code) from error
        except (*gone, self._sdk.errors.DockerException) as error:
            raise EngineGone(action, f"it does not answer at {self.address}") from error


def exit_code_of(state: Mapping[str, Any]) -> int | None:
    """How a container has ended, negative for a signal; None before that."""
    if state.get("Running") or state.get("Status") in ("created", "stopping"):
        return None
    code = int(state.get("ExitCode", UNKNOWN_EXIT))
    is_signal = _SHELLS_ADD < code <= _SHELLS_ADD + _LAST_SIGNAL
    return _SHELLS_ADD - code if is_signal else code


def _sdk() -> ModuleType:
    """The `docker` SDK. A folder of that name in the workdir passes for a package, so look inside.

    UsageError if it is not installed.
    """
    with contextlib.suppress(ModuleNotFoundError):
        sdk = importlib.import_module("docker")
        if hasattr(sdk, "APIClient"):
            return sdk
    raise UsageError("launcher: docker needs the docker SDK: pip install 'runner[docker]'")


def _check_credentials(sdk: ModuleType) -> None:
    """UsageError for credentials that are none, over which the SDK stumbles. None are shown."""
    try:
        sdk.auth.load_config()
    except (sdk.errors.DockerException, ValueError, TypeError, AttributeError):
        file = sdk.utils.config.find_config_file()
        raise UsageError(
            f"Docker's configuration {file} has credentials that are none: mend its `auths`, or "
            "call `docker logout` and `docker login` for the registry"
        ) from None


def _socket_of(address: str) -> Path:
    """The file of the socket. UsageError if there is none that can be used."""
    scheme, _, path = address.partition("://")
    if scheme not in ("unix", "http+unix"):
        raise UsageError(
            f"DOCKER_HOST is {address}: the trainer shares memory with its supervisor, so the "
            "engine must be this machine's (unix://...)"
        )
    socket = Path("/", path)
    try:
        group = socket.stat().st_gid
    except PermissionError:
        group = None  # in a folder of somebody else's, as rootless engines have theirs
    except OSError as error:
        raise UsageError(
            f"no container engine: there is no socket {socket}; install and start Docker or "
            "Podman, or name its socket in DOCKER_HOST"
        ) from error
    if group is None or not os.access(socket, os.R_OK | os.W_OK):
        raise UsageError(
            f"no permission for the container engine's socket {socket}: {_way_in(group)}, or use a "
            "rootless engine of your own (DOCKER_HOST)"
        )
    return socket


def _way_in(group: int | None) -> str:
    """How one comes to be allowed to use a socket of this group; None if its folder is closed."""
    if not group:  # root's group is nobody's to join
        return "run as the user whose it is"
    try:
        name = grp.getgrgid(group).gr_name
    except KeyError:
        name = str(group)
    return f"become a member of the group {name} (usermod -aG {name} USER, then log in again)"


def _whole(error: Any) -> str:
    """All that the engine says, in one line: the runtime's own words come last."""
    return " ".join(str(error.explanation or error).split())[:1000]


def _explanation(error: Any) -> str:
    return _first_line(getattr(error, "explanation", None) or error)


def _first_line(error: object) -> str:
    text = error.decode(errors="replace") if isinstance(error, bytes) else str(error)
    return (text.strip().splitlines() or ["no reason given"])[0][:500]
