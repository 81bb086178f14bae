"""What the trainer prints: passed through as it comes, and kept in one file per attempt."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 16


class Output:
    """Two pipes for one attempt. `stdout` and `stderr` are the ends that the trainer writes to."""

    def __init__(self, log_file: Path, stdout: int, stderr: int) -> None:
        self._file: BinaryIO | None = None
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            self._file = log_file.open("ab", buffering=0)
        except OSError as error:
            log.warning("what the trainer prints is not kept: %s", error)
        self._lock = threading.Lock()
        self.stdout, self._out_thread = self._pipe(stdout)
        self.stderr, self._err_thread = self._pipe(stderr)

    def launched(self) -> None:
        """The trainer has its ends: close ours, so that the pipes end with it."""
        os.close(self.stdout)
        os.close(self.stderr)

    def drain(self, timeout_seconds: float = 5.0) -> None:
        """Wait until all that was printed has been passed on, and close the file."""
        self._out_thread.join(timeout_seconds)
        self._err_thread.join(timeout_seconds)
        if self._file is not None:
            self._file.close()

    def _pipe(self, target: int) -> tuple[int, threading.Thread]:
        reading, writing = os.pipe()
        thread = threading.Thread(
            target=self._pump, args=(reading, target), name="output", daemon=True
        )
        thread.start()
        return writing, thread

    def _pump(self, source: int, target: int) -> None:
        open_targets = [target]
        while chunk := os.read(source, _CHUNK_BYTES):
            self._keep(chunk)
            for descriptor in list(open_targets):
                if not _write_all(descriptor, chunk):
                    open_targets.remove(descriptor)
        os.close(source)

    def _keep(self, chunk: bytes) -> None:
        if self._file is None:
            return
        with self._lock:
            try:
                self._file.write(chunk)
            except (OSError, ValueError) as error:
                log.debug("the log file cannot be written: %s", error)


def _write_all(descriptor: int, chunk: bytes) -> bool:
    """False if nobody reads there any more."""
    view = memoryview(chunk)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        return False
    return True
