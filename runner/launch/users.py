"""Who the trainer is in its container, and to whom that makes its files belong on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from runner.errors import UsageError
from runner.job import Job
from runner.launch.engine import Engine
from runner.launch.image import Image
from runner.spool import Owner

NOBODY = 65532
"""Who it is in an image without a user of its own, as in distroless and Chainguard's: "nonroot"."""


def container_user(engine: Engine, job: Job, image: Image, uid: int, gid: int) -> str:
    """Who the trainer is, as `UID:GID`, where `runner` is `uid`. Never root unless that is asked.

    Whoever it is must own its side of the spool, which only root can give away. UsageError if the
    job names another one.
    """
    if engine.is_rootless and not engine.is_podman:
        return job.user or "0:0"  # which is `uid` here
    if uid:
        if job.user and job.user.partition(":")[0] != str(uid):
            raise UsageError(
                f"user: the trainer can only be {uid}, who runs `runner`, because it shares memory "
                "with it; leave `user` out, or run as root"
            )
        return job.user or f"{uid}:{gid}"
    if job.user:
        return job.user
    return f"{image.uid}:{image.gid}" if image.uid else f"{NOBODY}:{NOBODY}"


def check_readable(folder: Path, user: str) -> None:
    """UsageError if the trainer may not look into its workdir, by its mode: the owner is known."""
    owner = owner_of(user)
    if owner is None:
        return
    status = folder.stat()
    bits = 6 if status.st_uid == owner[0] else 3 if status.st_gid == owner[1] else 0
    if (status.st_mode >> bits) & 0o5 != 0o5:
        raise UsageError(
            f"workdir: the trainer is user {owner[0]}, who may not read {folder}; allow it "
            "(chmod o+rx), or name another `user`"
        )


def user_mode(engine: Engine, job: Job) -> str:
    """What the engine is told of user namespaces: users in there shall be those of this machine."""
    if engine.is_rootless and engine.is_podman and os.geteuid() and not job.user:
        return "keep-id"
    return "host" if engine.remaps_users and not engine.is_podman else ""


def owner_of(user: str) -> Owner | None:
    """Whom files are to be given to for this `UID:GID`; None where they are the trainer's so."""
    uid, gid = (int(number) for number in user.split(":"))
    return (uid, gid) if os.geteuid() == 0 and uid != 0 else None
