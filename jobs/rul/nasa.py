"""NASA's C-MAPSS files: downloaded once, checked against known SHA-256 sums, kept in a cache.

They come as a zip within a zip. Whatever fails its check gets into no folder.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import struct
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

SUBSETS = ("FD001", "FD002", "FD003", "FD004")
NASA_ZIP = (
    "https://phm-datasets.s3.amazonaws.com/NASA/"
    "6.+Turbofan+Engine+Degradation+Simulation+Data+Set.zip"
)
# Of NASA's files as published. For FD003 and FD004 (and for the zip itself) no sums are known to
# us: those files are taken as they come, and `load` says so.
KNOWN_SHA256 = {
    "train_FD001.txt": "963b5e22825b34d8b21c69e1aeb4af3e647050eb672ee8834ba4b5d91d2de0f8",
    "train_FD002.txt": "dac6c4dbc4e7c1bdeb5747da3d313d05c395bb99801b44a002b26a2ba13d788f",
    "test_FD001.txt": "3cda7109ce17bafb5443f2ac926cfcf88154b941b8c4cf95eb55d1ddd6f52851",
    "test_FD002.txt": "de7b5bf7e998a985c378488480528b7c02cff1406a46740def362dda8d9b4e02",
    "RUL_FD001.txt": "a19c8ec94931949d0485bdc35118206e9c81c4547b422efb9cf86f4ceddbceca",
    "RUL_FD002.txt": "c851dd96a6ea6998d3c4a8f834d3c8013aa90e93a6ed950dc826ad0655b2906b",
}
INNER_ZIP = "CMAPSSData.zip"
MOST_ZIP_BYTES = 64 * 2**20  # of the zip, and of the zip in it: NASA's have 12 MB
MOST_FILE_BYTES = 16 * 2**20  # of each file in it: NASA's largest has 10 MB
CONNECT_SECONDS, DOWNLOAD_SECONDS = 5.0, 120.0


class DataError(ValueError):
    """The data is not as it must be; the message is one line: where, what, and what to do."""


def cached_folder(name: str, url: str, announce: Callable[[str], None]) -> Path:
    """The folder of the cache with NASA's files of the subset, downloaded where they are missing.

    Raises DataError or OSError; nothing that fails its check gets into the cache.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "runner" / "cmapss"
    if not all(_is_sound(folder / file) for file in file_names(name)):
        announce(f"downloading {url} into {folder}")
        contents = unpack(download(url))
        for file in file_names(name):
            if file not in contents:
                raise DataError(f"{file} is not in {url}")
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            write_atomically(folder / file, content)
    unverified = [file for file in file_names(name) if file not in KNOWN_SHA256]
    if unverified:
        announce(f"no SHA-256 is known for {', '.join(unverified)}: taken as downloaded")
    return folder


def file_names(name: str) -> tuple[str, str, str]:
    """The three files of a subset."""
    return f"train_{name}.txt", f"test_{name}.txt", f"RUL_{name}.txt"


def _is_sound(path: Path) -> bool:
    if not path.is_file():
        return False
    known = KNOWN_SHA256.get(path.name)
    return known is None or hashlib.sha256(path.read_bytes()).hexdigest() == known


def download(url: str) -> bytes:
    """The bytes at `url`. Raises DataError where they are too many or too slow, and OSError."""
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    content = bytearray()
    with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response:
        while chunk := response.read(1 << 20):
            content += chunk
            if len(content) > MOST_ZIP_BYTES:
                raise DataError(f"{url} is larger than {MOST_ZIP_BYTES} bytes")
            if time.monotonic() > deadline:
                raise DataError(f"{url} took longer than {DOWNLOAD_SECONDS:.0f} s")
    return bytes(content)


def unpack(archive: bytes) -> dict[str, bytes]:
    """The text files of all subsets in NASA's zip within a zip, by their plain names.

    Members are picked by the names that are wanted, so that a name in the archive never becomes a
    path. Raises DataError for what is no such zip, and for a file whose SHA-256 is not the known.
    """
    wanted = {file for name in SUBSETS for file in file_names(name)}
    inner = _members(archive, {INNER_ZIP}, MOST_ZIP_BYTES).get(INNER_ZIP)
    if inner is None:
        raise DataError(f"the download has no {INNER_ZIP} in it")
    contents = _members(inner, wanted, MOST_FILE_BYTES)
    for file, content in contents.items():
        digest = hashlib.sha256(content).hexdigest()
        if digest != KNOWN_SHA256.get(file, digest):
            raise DataError(f"{file} in the download is not NASA's: its SHA-256 is {digest}")
    return contents


# What zipfile raises for archives that are cut off or damaged; found by damaging some.
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
)


def _members(archive: bytes, wanted: set[str], most_bytes: int) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            for info in file.infolist():
                name = info.filename.rpartition("/")[2]
                if name in wanted and name not in found:
                    with file.open(info) as member:  # the size in the header may be a lie
                        found[name] = member.read(most_bytes + 1)
    except DAMAGED as error:
        raise DataError(f"the download is not a sound zip: {error}") from error
    for name, content in found.items():
        if len(content) > most_bytes:
            raise DataError(f"{name} in the download is over {most_bytes} bytes")
    return found


def write_atomically(path: Path, content: bytes) -> None:
    """Put a file in place whole, and durably: a reader sees the old one or the new one."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as new:
        try:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
            os.fchmod(new.fileno(), 0o644)
            Path(new.name).replace(path)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
