"""What a run begins from: a checkpoint of its own, another run's, or nothing.

`--from` takes a step, `best` or a name of this run, or the place of another run or of one of its
checkpoints: a path, or an `s3://` URL, which is reached as the job's section `s3` says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.format import STATE_FILE, CheckpointName
from runner.checkpoint.keeper import Origin
from runner.checkpoint.manifest import Manifest
from runner.errors import CheckpointCorrupt, NotFound, UnknownName, UsageError
from runner.job import is_s3, s3_url
from runner.store import S3Options, Store, open_store
from runner.supervisor.preflight import refusals
from runner.supervisor.verification import verify

_MAX_STATE_BYTES = 1 << 30


def beginning_of(
    archive: Archive,
    known: dict[str, Any] | None,
    which: str | None,
    components: Sequence[str],
    best: tuple[str | None, str],
    options: S3Options,
) -> tuple[str | None, Origin | None]:
    """What the first attempt begins from: a checkpoint of this run, or another run's.

    `known` is the `run.json` of the run if it exists. UsageError if that is not possible.
    """
    run_id = archive.run_id
    if which is None and components:
        raise UsageError("--components says what to take over; --from must say from where")
    if which is not None and _is_place(which):
        if known is None:
            return None, origin_at(which, components, options)
        if (known.get("from"), known.get("components")) != (real_place(which), list(components)):
            raise UsageError(f"run {run_id} exists; --from another run needs --new")
        which = None  # started again as it was at first: it goes on
    if which is None:
        return None, None if known is None else _recorded(archive, known, options)
    if known is None:
        raise UsageError(f"--from {which}: run {run_id} does not exist, so it has no checkpoints")
    if components:
        raise UsageError(
            "--components begins a new run: give --from a checkpoint's path, and --new"
        )
    _refuse_weights(which, archive.find(which, *best))
    return which, None


def origin_at(which: str, components: Sequence[str], options: S3Options) -> Origin:
    """The checkpoint at a place: its own prefix, or a run's, of which the newest is taken.

    UsageError if there is none or it is not sound.
    """
    store, run_id, name = _split(which, options)
    archive = Archive(store, run_id)
    with refusals(store):
        manifest = _found(which, archive, name, components)
        if not components:
            _refuse_weights(which, manifest)
        for file in verify(archive, manifest):
            if not file.sound:
                raise UsageError(f"--from {which}: {file.name} of {manifest.name} {file.problem}")
        key = f"{run_id}/checkpoints/{manifest.name}/{STATE_FILE}"
        saved = json.loads(store.read(key, _MAX_STATE_BYTES))["components"] if components else ()
    for component in components:
        if component not in saved:
            raise UnknownName("component", component, list(saved), f"in {which}")
    return Origin(archive, manifest.name, tuple(components))


def real_place(which: str) -> str:
    """The one spelling of a place: that of an URL, or the real path."""
    if not is_s3(which):
        return str(Path(which).expanduser().resolve())
    try:
        return s3_url(which)
    except ValueError as error:
        raise UsageError(f"--from {which}: {error}") from error


def _is_place(which: str) -> bool:
    return "/" in which or which.startswith(".")


def _split(which: str, options: S3Options) -> tuple[Store, str, str | None]:
    """The store, the run in it, and the checkpoint's name if the place is that of one."""
    if "://" in which and not is_s3(which):
        raise UsageError(f"--from {which}: expected a path, or s3://bucket/prefix/run")
    place = real_place(which)
    head, _, last = place.rpartition("/")
    name = None
    if head.endswith("/checkpoints") and CheckpointName.parse(last) is not None:
        place, name = head.removesuffix("/checkpoints"), last
    root, _, run_id = place.rpartition("/")
    if is_s3(which):
        if root == "s3:/":
            raise UsageError(f"--from {which}: expected s3://bucket/prefix/run, not a bucket")
        return open_store(root, options), run_id, name
    if not run_id:
        raise UsageError(f"--from {which}: there is neither a checkpoint nor a run to begin from")
    return open_store(root or "/"), run_id, name


def _found(which: str, archive: Archive, name: str | None, components: Sequence[str]) -> Manifest:
    """The checkpoint of that name, or the newest that serves: for components, of any scope."""
    try:
        if name is not None:
            return archive.manifest(name)
        for manifest in archive.manifests():
            if components or manifest.moment.scope == "full":
                return manifest
    except NotFound:
        pass
    except CheckpointCorrupt as error:
        raise UsageError(f"--from {which}: {error}; choose another one") from error
    raise UsageError(f"--from {which}: there is neither a checkpoint nor a run to begin from")


def _refuse_weights(which: str, manifest: Manifest) -> None:
    if manifest.moment.scope != "full":
        raise UsageError(
            f"--from {which}: {manifest.name} holds the weights alone, so nothing can be resumed "
            "from it; begin a new run with --new and --components model"
        )


def _recorded(archive: Archive, known: dict[str, Any], options: S3Options) -> Origin | None:
    """What the run began from, if it has saved nothing of its own yet."""
    which, components = known.get("from"), known.get("components")
    records = Ledger(archive.store, archive.run_id, "").records() if which is not None else []
    if which is None or any(record.committed for record in records):
        return None
    return origin_at(which, components or (), options)
