"""Before anything is started: can this job's store hold a run? A few requests, at every start.
And can the function be called that is to validate its checkpoints?

What cannot work is a UsageError that says what to do next, because no retry would help. A server
that is busy or out of reach for a while is asked again by the store itself, for some minutes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from runner.checkpoint.frames import zstd_library
from runner.errors import (
    NobodyAnswers,
    NotFound,
    StoreDenied,
    StoreError,
    StoreUnfit,
    UsageError,
    is_outage,
)
from runner.job import Job, is_s3
from runner.launch.site import Site
from runner.store import S3Options, Store, open_store
from runner.supervisor.courteous import Courteous

log = logging.getLogger(__name__)
T = TypeVar("T")

PROBES = ".runner-probe"
_CONNECT_SECONDS = 5.0
_LOOKS_AT_SERVER = 3
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0
_MAX_PROBE_BYTES = 64
_LONGEST_LOOK = 300.0  # seconds: longer than a server is asked again by the store itself
_IMPORT_SECONDS = 120.0
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def store_of(job: Job) -> Store:
    """The job's store: a bucket and prefix, or a directory under its real path.

    By that its runs are found, whatever way led there. No request is made. UsageError if nothing
    can be written to the directory, or a file that is needed to reach the server is missing.
    """
    if is_s3(job.store):
        return open_store(job.store, s3_options(job))
    path = job.store_path.resolve()
    there = _nearest(path)
    if not there.is_dir():
        raise UsageError(f"the store cannot be written: {there} is not a directory")
    if not _is_read_only(path) and not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"the store cannot be written: no permission for {there}")
    return open_store(str(path))


def _nearest(path: Path) -> Path:
    """It, or the folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _is_read_only(path: Path) -> bool:
    """Whether its file system takes nothing from anybody: from the start, or after an error."""
    return bool(os.statvfs(_nearest(path)).f_flag & os.ST_RDONLY)


def s3_options(job: Job) -> S3Options:
    """How the job's section `s3` says that its server is reached."""
    if job.s3 is None:
        return S3Options()
    given = job.s3.model_dump()
    if job.s3.ca_bundle is not None:
        path = job.workdir / job.s3.ca_bundle
        if not path.is_file():
            raise UsageError(f"s3.ca_bundle: there is no file {path}; give the path of a PEM file")
        given["ca_bundle"] = str(path)
    return S3Options(**given)


@contextlib.contextmanager
def refusals(store: Store) -> Iterator[None]:
    """Turn what no retry of the store can help into a UsageError."""
    try:
        yield
    except StoreDenied as error:
        raise UsageError(denial(store, error)) from error
    except StoreUnfit as error:
        raise UsageError(f"the store {store.url} cannot be used: {error}") from error


def check_reachable(job: Job, store: Store) -> None:
    """UsageError if the store's server is not there, or does not let this job look. One LIST.

    Or if what this job wants to write there needs a library that is not installed.
    """
    if job.checkpoint.compression is not None:
        zstd_library()
    if is_s3(store.url):
        check_endpoint(store, s3_options(job))
        check_listing(store)


def check_writable(job: Job, store: Store) -> None:
    """Try what every run needs on a probe key, which is removed again. UsageError if it fails.

    A directory is only looked at: NobodyAnswers if its file system is read-only, which may pass.
    On S3: one HEAD, two PUTs of which only one may succeed, two GETs, one DELETE.
    """
    if not is_s3(store.url):
        if _is_read_only(Path(store.url)):
            raise NobodyAnswers(
                f"the store cannot be written: {store.url} is on a file system that is read-only; "
                "mount it writable, or name another store"
            )
        return
    options = s3_options(job)
    with refusals(store):
        check_prefix(store, options)
        won = try_probe(store, conditional=options.conditional_writes)
    if not won:
        raise UsageError(
            f"the server of {store.url} lets two writers win the same key, so two supervisors of "
            "one run could not be kept apart; use a server with conditional writes "
            "(If-None-Match), or say `conditional_writes: off` under s3 to accept that"
        )
    if not options.conditional_writes:
        log.warning(
            "conditional_writes is off: if this run is started twice at once, "
            "nothing keeps the two supervisors from writing over each other"
        )


def until_it_answers(ask: Callable[[], T], patience_seconds: float) -> T:
    """Ask the store again while it is out of reach, as long as there is patience.

    A call that does not come back, as of a network file system whose server is gone, is left alone
    then; where there is no patience at all, after five minutes. NobodyAnswers says so.
    """
    until, pause = time.monotonic() + patience_seconds, _FIRST_PAUSE_SECONDS
    while True:
        try:
            return _within(patience_seconds or _LONGEST_LOOK, ask)
        except (NobodyAnswers, StoreError) as error:
            left = until - time.monotonic()
            if left <= 0 or not is_outage(error):
                raise
            log.error("the store is out of reach, tried again in %.3g s: %s", pause, error)
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """What comes of a call, in a thread that is left behind if it stands still."""
    asking = Courteous[T]("first look", niceness=0)
    answer = asking.submit(ask)
    wait([answer], seconds)
    if not answer.done():
        raise NobodyAnswers(f"a call of the store has not come back in {seconds:.3g} s")
    asking.finish()
    return answer.result()


def endpoint_of(options: S3Options) -> tuple[str, str | None]:
    """Who has named the server, and its URL; None is AWS, or what a profile of boto3 says."""
    if options.endpoint is not None:
        return "s3.endpoint", options.endpoint
    for variable in _ENDPOINT_VARIABLES:
        if os.environ.get(variable):
            return variable, os.environ[variable]
    return "s3.endpoint", None


def denial(store: Store, error: StoreDenied) -> str:
    """Which permission is missing, on all that runs need it for, and where to add it."""
    bucket = store.url.removeprefix("s3://").partition("/")[0]
    everything = f"{store.url.removeprefix('s3://')}/*"
    resource = bucket if "Bucket" in error.action else everything
    return (
        f"the store {store.url} cannot be used: the permission {error.action} is missing; allow it "
        f"on arn:aws:s3:::{resource}, in the policy of the user or role, or of the bucket"
    )


def check_listing(store: Store) -> None:
    """UsageError if the store cannot be listed, or is spoken for by what is no S3 server."""
    try:
        with refusals(store):
            store.children(PROBES)  # at the root there may be many pages of runs
    except NotFound as error:
        raise UsageError(
            f"the store {store.url} cannot be used: what answers there is no S3 server; "
            "correct the endpoint"
        ) from error


def check_endpoint(store: Store, options: S3Options) -> None:
    """UsageError if the endpoint that was named cannot be one; NobodyAnswers if nobody is there."""
    source, named = endpoint_of(options)
    if named is None:
        return
    url = urlsplit(named)
    host = url.hostname or ""
    if url.scheme == "http" and (f".{host}".endswith((".amazonaws.com", ".amazonaws.com.cn"))):
        raise UsageError(f"{source}: AWS is not spoken to without encryption; say https://{host}")
    if not host or (url.scheme in urllib.request.getproxies() and not _bypasses_proxy(host)):
        return
    problem = None
    for _ in range(_LOOKS_AT_SERVER):
        problem = _connection_problem(host, url.port or (443 if url.scheme == "https" else 80))
        if problem is None:
            return
        time.sleep(0.5)
    raise NobodyAnswers(
        f"the store {store.url} cannot be used: {source} is {named}, and {problem}; "
        "correct the address, or start the server"
    )


def check_prefix(store: Store, options: S3Options) -> None:
    """UsageError if there is an object where the store's prefix is."""
    above, _, name = store.url.rpartition("/")
    if not is_s3(store.url) or above == "s3:/":
        return  # a directory, or the whole bucket
    try:
        open_store(above, options).stored(name)
    except (NotFound, StoreDenied):  # whose permissions end at the prefix need not see above it
        return
    raise UsageError(
        f"the store {store.url} is an object, where a prefix is expected; "
        "choose another prefix, or move the object away"
    )


def try_probe(store: Store, *, conditional: bool) -> bool:
    """Write, read and delete a probe key; False if a second writer was let in as well."""
    key = f"{PROBES}/{secrets.token_hex(8)}"
    contents = [secrets.token_hex(16).encode() for _ in range(2 if conditional else 1)]
    try:
        won = [store.create(key, content) for content in contents]
        store.read(key, _MAX_PROBE_BYTES)
    except StoreError:
        with contextlib.suppress(StoreError):
            store.delete([key])
        raise
    store.delete([key])
    return won == [True, False][: len(won)]


def _bypasses_proxy(host: str) -> bool:
    return bool(urllib.request.proxy_bypass(host))


def _connection_problem(host: str, port: int) -> str | None:
    """Why nobody can be there. Slowness, or a resolver that is out of order, proves nothing."""
    try:
        socket.create_connection((host, port), _CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return f"nothing listens on port {port} there"
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            return f"there is no host {host}"
    except OSError:
        pass
    return None


def check_entrypoint(job: Job, site: Site) -> None:
    """UsageError if the function that is to validate is not there, or cannot be called.

    It is imported where the trainer will run, in a process of its own, and not called. Does nothing
    where none is named.
    """
    validation = job.checkpoint.validation
    if validation is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        trial = site.trial(Path(folder), {"entrypoint": validation.entrypoint})
        trial.begin()
        answer = trial.wait(_IMPORT_SECONDS, threading.Event())
    problem = answer and (answer.problem or answer.unusable)
    if problem:
        raise UsageError(f"checkpoint.validate.entrypoint: {problem}")
