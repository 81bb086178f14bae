"""Which data a run has seen: one digest for a file, a folder, or values in memory.

Of files and folders by content, whatever their names outside and times are. What has been read once
is remembered by size and modification time, in the user's cache folder, so that the next attempt
only looks. Where there is a file of DVC beside it (`data.dvc` for `data`), its digest is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from runner.errors import CaptureError
from runner.training.tensors import as_bytes
from runner.training.tree import Encoder

_CHUNK_BYTES = 8 << 20
_SETTLED_NS = 2_000_000_000  # what was changed just now may be changed again unseen


def fingerprint(source: Any, alive: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """`digest` and `kind` of a path (text or a Path), or of plain values, arrays and tensors.

    For paths also `path`, `files` and `bytes`. An object that has a method `fingerprint()` is asked
    for it. `alive` is called while much is read. Raises OSError for a path that cannot be read, and
    TypeError for anything else.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        return _of_dvc(path) or _of_path(path, alive)
    own = getattr(source, "fingerprint", None)
    if callable(own):
        return {"digest": str(own()), "kind": type(source).__name__}
    return {"digest": _of_value(source), "kind": "value"}


# ---------------------------------------------------------------------------- files


def _of_path(path: Path, alive: Callable[[], None]) -> dict[str, Any]:
    known = _Known(path)
    if path.is_file():
        status = path.stat()
        digest, count, nbytes = known.digest("", path, alive), 1, status.st_size
        kind = "file"
    else:
        total, count, nbytes, kind = hashlib.sha256(), 0, 0, "folder"
        for name, file in _files(path):
            size = file.stat().st_size
            line = json.dumps([name, size, known.digest(name, file, alive)])
            total.update(line.encode() + b"\n")
            count, nbytes = count + 1, nbytes + size
        digest = total.hexdigest()
    known.remember()
    facts = {"path": str(path), "files": count, "bytes": nbytes}
    return {"digest": f"sha256:{digest}", "kind": kind, **facts}


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Regular files below a folder, with their names there, in the order of these."""
    found = []
    for place, _, names in os.walk(folder, onerror=_raise):
        paths = (Path(place, name) for name in names)
        found += [(p.relative_to(folder).as_posix(), p) for p in paths if p.is_file()]
    return iter(sorted(found))


def _raise(error: OSError) -> None:
    raise error


class _Known:
    """Digests of the files below a path that have been read before."""

    def __init__(self, path: Path) -> None:
        where = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._file = Path(cache, "runner", "fingerprints", f"{where}.json")
        self._now: dict[str, list[Any]] = {}
        try:
            before = json.loads(self._file.read_bytes())
            self._before: Mapping[str, Any] = before if isinstance(before, dict) else {}
        except (OSError, ValueError):
            self._before = {}

    def digest(self, name: str, file: Path, alive: Callable[[], None]) -> str:
        """SHA-256 of a file; it is read only if it may have changed."""
        status = file.stat()
        mark = [status.st_size, status.st_mtime_ns, status.st_ino]
        before = self._before.get(name)
        if isinstance(before, list) and before[:3] == mark and len(before) == 4:
            digest = str(before[3])
        else:
            digest = _sha256(file, alive)
        if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
            self._now[name] = [*mark, digest]
        return digest

    def remember(self) -> None:
        """For the next time; does nothing where nothing can be written."""
        if self._now == self._before:
            return
        temporary = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._now))
            temporary.replace(self._file)


def _sha256(file: Path, alive: Callable[[], None]) -> str:
    total = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            total.update(chunk)
            alive()
    return total.hexdigest()


def _of_dvc(path: Path) -> dict[str, Any] | None:
    """What DVC has noted of this path; None if it has not.

    Source: https://dvc.org/doc/user-guide/project-structure/dvc-files
    """
    try:
        text = path.with_name(f"{path.name}.dvc").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    for out in _outs(text):
        kind = out.get("hash", "md5")
        if out.get("path") == path.name and kind in out:
            numbers = {
                key: int(out[key]) for key in ("nfiles", "size") if out.get(key, "").isdigit()
            }
            facts = {"files": numbers.get("nfiles", 1), "bytes": numbers.get("size")}
            return {"digest": f"{kind}:{out[kind]}", "kind": "dvc", "path": str(path), **facts}
    return None


def _outs(text: str) -> list[dict[str, str]]:
    """The list `outs`, as DVC writes it: one plain value on a line. No YAML library is needed."""
    outs: list[dict[str, str]] = []
    is_inside = False
    for line in text.splitlines():
        if line[:1] not in (" ", "-"):
            is_inside = line.rstrip() == "outs:"
            continue
        if line.startswith("- "):
            outs += [{}] if is_inside else []
        key, _, value = line.lstrip("- ").partition(":")
        if is_inside and outs:
            outs[-1][key.strip()] = value.strip().strip("'\"")
    return outs


# ---------------------------------------------------------------------------- values


def _of_value(value: Any) -> str:
    def reference(tensor: torch.Tensor, path: str) -> dict[str, Any]:
        raw = as_bytes(tensor.detach().cpu().resolve_conj().resolve_neg()).numpy()
        digest = hashlib.sha256(raw.data).hexdigest()
        return {"$": "tensor", "dtype": str(tensor.dtype), "shape": list(tensor.shape), "v": digest}

    try:
        tree = Encoder(reference).encode(value, "data")
    except CaptureError as error:
        raise TypeError(
            f"run.fingerprint takes a path, or plain values, arrays and tensors; {error.path} is "
            f"a {type(value).__qualname__}: give the files it reads, or the values it holds"
        ) from error
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
