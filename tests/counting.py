"""How many requests a process sends to S3, whoever makes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def counted_requests() -> Iterator[list[int]]:
    """The number of requests sent since; it goes on counting until the block ends."""
    from botocore.httpsession import URLLib3Session

    count, send = [0], URLLib3Session.send

    def counting(session: Any, request: Any) -> Any:
        count[0] += 1
        return send(session, request)

    URLLib3Session.send = counting
    try:
        yield count
    finally:
        URLLib3Session.send = send
