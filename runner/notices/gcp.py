"""Google Cloud: whether this machine has been preempted, some 30 seconds before it is gone.

The first request asks how it is, the next ones wait for a change of what was seen last, so that no
change between two of them is missed. No deadline is told.

Sources: Compute Engine, "Spot VMs" and "View and query VM metadata".
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from runner.errors import MetadataError
from runner.notices.metadata import Answer, MetadataServer
from runner.notices.news import Found

_PATH = "/computeMetadata/v1/instance/preempted"
_WAIT_SECONDS = 15  # short: a connection that a live migration cut off silently is noticed by then
_FASTEST_SECONDS = 1.0
_ETAG = re.compile(r"[0-9A-Za-z_-]{1,128}")  # it is sent back in a URL


class Gcp:
    """Waits at the server. One that answers at once is asked no more than once a second."""

    name = "gcp"
    pause_seconds = 0.0

    def __init__(self, server: MetadataServer) -> None:
        self._server = server
        self._etag: str | None = None

    def look(self) -> Iterator[Found]:
        began = time.monotonic()
        self.pause_seconds = 0.0
        etag, self._etag = self._etag, None  # after an error, it is asked anew
        answer = self._ask(etag)
        if answer.text.upper() == "TRUE":
            yield Found("preempted", "TRUE", answer.at)
        elif answer.text.upper() != "FALSE":
            raise MetadataError("instance/preempted is neither TRUE nor FALSE")
        now = answer.headers.get("etag", "")
        self._etag = now if _ETAG.fullmatch(now) else None
        if etag is not None or self._etag is None:
            self.pause_seconds = max(0.0, began + _FASTEST_SECONDS - time.monotonic())

    def acknowledge(self) -> None:
        """Google does not want to hear of it."""

    def _ask(self, etag: str | None) -> Answer:
        path, wait_seconds = _PATH, 0
        if etag is not None:
            path += f"?wait_for_change=true&timeout_sec={_WAIT_SECONDS}&last_etag={etag}"
            wait_seconds = _WAIT_SECONDS
        answer = self._server.ask(path, {"Metadata-Flavor": "Google"}, extra_seconds=wait_seconds)
        if answer.status != 200:
            raise MetadataError(f"instance/preempted is answered with status {answer.status}")
        if answer.headers.get("metadata-flavor") != "Google":
            raise MetadataError("what answers there is not Google's metadata server")
        return answer
