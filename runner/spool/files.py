"""Small files that appear all at once, whose they are, and locks that end with their process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from runner.errors import SpoolError, SpoolFull
from runner.regular import open_regular

Owner = tuple[int, int]
"""A user and a group, by their numbers."""
_MAX_JSON_BYTES = 64 << 20
LOCK_TRIES = 5
_LOCK_SECONDS = 0.01


def read_json(path: Path) -> dict[str, Any] | None:
    """A small JSON object, or None if there is none."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            content = json.loads(file.read(_MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def dump(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode()


def put(path: Path, content: bytes, owner: Owner | None = None) -> None:
    """Put a whole file in place at once. It lives no longer than the node: no fsync."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # of a dead process with our number, or put in our way
        descriptor = open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if owner is not None:
                os.fchown(descriptor, *owner)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpoolFull(f"{path.parent} is full") from error
        raise SpoolError(f"{path} cannot be written: {error.strerror}") from error


def give_to(folder: Path, owner: Owner | None) -> None:
    """Let a folder with all that is in it belong to somebody else. Links are not followed.

    Not even those that come to be while we walk: each folder is held open.
    """
    if owner is None or not folder.exists():
        return
    os.chown(folder, *owner, follow_symlinks=False)
    for _, folders, files, held in os.fwalk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                os.chown(name, *owner, dir_fd=held, follow_symlinks=False)


def locked(path: Path) -> IO[bytes] | None:
    """The file, locked for as long as it is open; None if another process has the lock."""
    try:
        file = os.fdopen(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), "ab")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SpoolError(f"{path} cannot be opened: {error.strerror}") from error
    for attempt in range(LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if attempt < LOCK_TRIES - 1:
                time.sleep(_LOCK_SECONDS)  # `is_locked` may be looking just now
        else:
            return file
    file.close()
    return None


def is_locked(path: Path) -> bool:
    """Whether a living process has this lock. Takes nothing for longer than it looks."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one that its path names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
