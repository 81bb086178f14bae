"""The process that shows a run to one tracker: `python -m runner.tracking.sender`.

stdin:  one line of JSON that says what to do, then a line whenever something has happened; a number
        on a line is how many seconds are left when the supervisor leaves, and the end of the file
        that it has left
stdout: lines of JSON: the tracker's id of the run, messages for the log, and `done` if all is sent

It gives way to everything else. A tracker that fails is asked again, after a minute at most, and
whatever it raises is no reason to end. Of two senders of a run on one node, the second one waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from runner.store import S3Options, open_store
from runner.tracking.base import Tracker
from runner.tracking.mirror import Mirror, Record, Settings

_TRACKERS = {
    "mlflow": ("runner.tracking.mlflow", "MLflowTracker"),
    "wandb": ("runner.tracking.wandb", "WandBTracker"),
    "clearml": ("runner.tracking.clearml", "ClearMLTracker"),
}
_NICENESS = 19
_ROUND_SECONDS = 2.0
_GATHER_SECONDS = 0.3
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
_LAST_SECONDS = 5.0


@dataclass(frozen=True)
class Errand:
    """What a sender is to do; its first line.

    `settings` is the tracker's section of the job, `points` the folder with the run's newest ones,
    `folder` a place for files of the tracker. `options` say how an S3 store is reached.
    """

    tracker: str
    store: str
    run_id: str
    points: str
    folder: str
    workdir: str
    settings: Mapping[str, Any]
    options: Mapping[str, Any] | None = None

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Errand:
        return cls(**json.loads(line))

    def mirror(self) -> Mirror:
        options = None if self.options is None else S3Options(**self.options)
        record = Record(open_store(self.store, options), self.run_id, Path(self.points))
        settings = Settings(self.settings, Path(self.folder), Path(self.workdir))
        return Mirror(record, self.tracker, partial(tracker_named, self.tracker), settings)


def tracker_named(name: str) -> Tracker:
    """Loads its library, which takes seconds."""
    module, attribute = _TRACKERS[name]
    made: Tracker = getattr(importlib.import_module(module), attribute)()
    return made


class Sender:
    """Rounds of `Mirror.advance`, until there is nobody left to send for."""

    def __init__(self, mirror: Mirror, say: Callable[[dict[str, Any]], None]) -> None:
        self._mirror, self._say = mirror, say
        self._pause_seconds = 0.0
        self._failing_since: float | None = None
        self._said_id: str | None = None
        self._said_refused = False

    def recall(self) -> None:
        """Say under which id the tracker knows the run, if it does: for the next checkpoint."""
        self._round(self._mirror.recall)

    def run(self, news: queue.SimpleQueue[float | None]) -> None:
        """`news` has None when something has happened, and the seconds left in the end."""
        seconds, everything = None, True
        while seconds is None:
            if self._round(partial(self._mirror.advance, everything=everything)):
                everything = False
            try:
                seconds = news.get(timeout=self._pause_seconds or _ROUND_SECONDS)
                everything = True
                if seconds is None and not self._pause_seconds:
                    seconds = _gathered(news)
            except queue.Empty:
                pass
        until = time.monotonic() + seconds
        while not self._round(self._mirror.end):
            if time.monotonic() + self._pause_seconds >= until:
                return
            time.sleep(self._pause_seconds)
        self._say({"done": True})

    def _round(self, go: Callable[[], None]) -> bool:
        try:
            go()
        except Exception as error:  # noqa: BLE001 - libraries of trackers raise whatever they like
            self._failed(error)
            self._say_id()
            return False
        if self._failing_since is not None:
            seconds = time.monotonic() - self._failing_since
            self._say({"info": f"takes what it is sent again, after {seconds:.0f} s"})
        self._failing_since, self._pause_seconds = None, 0.0
        self._say_id()
        if self._mirror.refused and not self._said_refused:
            self._said_refused = True
            self._say({"warn": f"refuses {self._mirror.refused[0]}"})
        return True

    def _failed(self, error: Exception) -> None:
        longer = max(_FIRST_PAUSE_SECONDS, 2 * self._pause_seconds)
        self._pause_seconds = min(longer, _LONGEST_PAUSE_SECONDS)
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            text = " ".join(str(error).split()) or type(error).__name__
            self._say({"warn": f"cannot be told anything for now, it is tried again: {text[:300]}"})

    def _say_id(self) -> None:
        if self._mirror.id != self._said_id:
            self._said_id = self._mirror.id
            self._say({"id": self._said_id})


def _gathered(news: queue.SimpleQueue[float | None]) -> float | None:
    """What else happens at about the same time is one round's work."""
    until = time.monotonic() + _GATHER_SECONDS
    while (left := until - time.monotonic()) > 0:
        with contextlib.suppress(queue.Empty):
            seconds = news.get(timeout=left)
            if seconds is not None:
                return seconds
    return None


def main() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # it ends with its supervisor
    line = sys.stdin.buffer.readline()
    if not line:
        return
    out = _own_stdout()
    news: queue.SimpleQueue[float | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, news), daemon=True).start()
    errand = Errand.from_line(line)
    folder = Path(errand.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{errand.tracker}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sender = Sender(errand.mirror(), lambda message: _write(out, message))
        sender.recall()
        os.nice(_NICENESS)  # what comes now, the tracker's library first of all, can wait
        sender.run(news)
    os._exit(0)  # what the libraries have left running would hold it up


def _listen(lines: IO[bytes], news: queue.SimpleQueue[float | None]) -> None:
    for line in lines:
        with contextlib.suppress(ValueError):
            news.put(float(line) if line.strip() else None)
    news.put(_LAST_SECONDS)


def _own_stdout() -> IO[bytes]:
    """The pipe to the supervisor, which no library can print into."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    return out


def _write(out: IO[bytes], message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the supervisor is gone
        out.write(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
