"""What the code is beyond its commit: a digest of all changes, and the changes themselves.

Two runs of one commit that is dirty are the same code only if their changes are. Nothing here
fails: what git does not tell is not known.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIT_TIMEOUT_SECONDS = 5.0
MAX_PATCH_BYTES = 16 << 20
_MAX_UNTRACKED_BYTES = 64 << 20  # of a file that git does not know; larger ones count by size
_NAMED = 20

# Set where a hook or an alias of git has started us: they would name another repository.
GIT_LOCATIONS = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_COMMON_DIR",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
)


@dataclass(frozen=True)
class Changes:
    """What a working tree has that its commit has not: the patch, and files git does not know."""

    patch: bytes
    untracked: tuple[str, ...]
    digest: str

    def to_json(self) -> dict[str, Any]:
        """`diff`: one SHA-256 over all of it; the first names of the unknown files."""
        return {
            "diff": self.digest,
            "diff_bytes": len(self.patch),
            "untracked": list(self.untracked[:_NAMED]),
            "untracked_files": len(self.untracked),
        }


def git(folder: Path, *arguments: str) -> bytes | None:
    """What a git command prints; None if it fails, is missing, or is slow. It takes no lock."""
    environment = {name: v for name, v in os.environ.items() if name not in GIT_LOCATIONS}
    try:
        return subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *arguments],
            cwd=folder,
            env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=GIT_TIMEOUT_SECONDS,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def changes(workdir: Path) -> Changes | None:
    """The changes of the repository around `workdir`; None if git does not tell.

    The digest is over the patch against the commit, and names and contents of untracked files.
    """
    top = git(workdir, "rev-parse", "--show-toplevel")
    if top is None:
        return None
    root = Path(os.fsdecode(top.rstrip(b"\n")))
    patch = git(root, "diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD")
    names = git(root, "ls-files", "--others", "--exclude-standard", "-z")
    if patch is None or names is None:
        return None
    untracked = tuple(sorted(os.fsdecode(name) for name in names.split(b"\0") if name))
    total = hashlib.sha256(hashlib.sha256(patch).digest())
    for line in _contents(root, untracked):
        total.update(line)
    return Changes(patch, untracked, total.hexdigest())


def _contents(root: Path, names: tuple[str, ...]) -> Iterator[bytes]:
    for name in names:
        path = root / name
        try:
            size = path.lstat().st_size
            small = path.is_file() and size <= _MAX_UNTRACKED_BYTES
            content = hashlib.sha256(path.read_bytes()).hexdigest() if small else ""
        except OSError:  # it has just gone, or may not be read
            size, content = 0, ""
        yield os.fsencode(name) + f"\0{size} {content}\n".encode()
