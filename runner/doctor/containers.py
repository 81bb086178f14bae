"""What a container of the job would need: the engine, the image, and what is in it."""

from __future__ import annotations

import os
from collections.abc import Iterator

from runner.doctor.finding import Finding, fail, ok
from runner.doctor.machine import validation
from runner.errors import EngineError, UsageError
from runner.job import Job
from runner.launch.engine import Engine
from runner.launch.site import ContainerSite, site_for
from runner.supervisor import index


def container(job: Job) -> Iterator[Finding]:
    """An image that is not here is pulled."""
    try:
        engine = Engine.connect()
        name = "Podman" if engine.is_podman else "Docker"
        yield ok("engine", f"{name} {engine.facts.get('ServerVersion')} at {engine.address}")
        site = site_for(job, None, None, index.home() / "images")
    except (UsageError, EngineError) as error:
        yield fail("container", str(error))
        return
    assert isinstance(site, ContainerSite)
    version = ".".join(map(str, site.found.version))
    which = site.found.digest or site.found.id
    user = site.user
    if user == "0:0" and engine.is_rootless:
        user = f"0:0, who is {os.geteuid()}:{os.getegid()} here: the engine runs without root"
    yield ok("image", f"{which}, with Python {version} and this runner; the user is {user}")
    yield from validation(job, site)
