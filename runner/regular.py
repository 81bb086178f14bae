"""Files that somebody else may have put in our way: nothing that a name leads to is followed.

A trainer in a container writes into folders of its supervisor, who is root often. A link there can
name any file of this machine, which the trainer could not reach itself; a pipe would never end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path, PurePath


def open_regular(
    path: str | Path, flags: int = os.O_RDONLY, mode: int = 0o600, *, folder: int | None = None
) -> int:
    """Open a regular file, and nothing else of its name; its descriptor.

    `folder` is the descriptor of what a relative path begins at. Raises OSError: ELOOP for a link,
    EINVAL for what else is no file.
    """
    # A pipe that nobody writes to, or a device, would keep us waiting.
    safely = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags | safely, mode, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return descriptor


def open_folder_below(folder: Path, relative: PurePath, *, make: bool = False) -> int:
    """Open a folder below another one without passing through links; its descriptor.

    `make` makes what is missing of it. Raises OSError: ENOTDIR or ELOOP for a link on the way.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    at = os.open(folder, flags)
    try:
        for part in relative.parts:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=at)
            below = os.open(part, flags | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
    except BaseException:
        os.close(at)
        raise
    return at
