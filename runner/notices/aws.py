"""AWS: a spot instance's interruption, two minutes ahead, and advice to leave, if it is early.

Sources: Amazon EC2 User Guide, "Spot Instance interruption notices", "EC2 instance rebalance
recommendations" and "Use the Instance Metadata Service to access instance metadata".
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from runner.errors import MetadataError
from runner.notices.metadata import Answer, MetadataServer
from runner.notices.news import Found, deadline_of, time_of_day

_LONGEST_SECONDS = 120.0
_TOKEN_SECONDS = 21600
_RENEWED_BEFORE_SECONDS = 600.0
_TOKEN = re.compile(r"[!-~]{1,1024}")  # it is sent back in a header
_ACTIONS = ("terminate", "stop", "hibernate")
_HOPS = (
    "in a container the hop limit of the instance's metadata options has to be 2 or more, and "
    "outside of AWS aws does not belong into preemption.notices"
)


class Aws:
    """Asks by IMDSv2 alone: with a token, which is renewed before it ends, or when refused."""

    name = "aws"
    pause_seconds = 5.0

    def __init__(self, server: MetadataServer) -> None:
        self._server = server
        self._token, self._token_until = "", 0.0

    def look(self) -> Iterator[Found]:
        action = self._get("spot/instance-action")
        if action is not None:
            yield _interruption(action)
        advice = self._get("events/recommendations/rebalance")
        if advice is not None:
            said = str(advice.json_object().get("noticeTime"))
            yield Found("rebalance", said, advice.at, is_advice=True)

    def acknowledge(self) -> None:
        """AWS does not want to hear of it."""

    def _get(self, path: str) -> Answer | None:
        """What stands there; None for nothing, which is the rule."""
        answer = self._with_token(path)
        if answer.status == 401:  # it has ended before its time, or was another server's
            self._token_until = 0.0
            answer = self._with_token(path)
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise MetadataError(f"{path} is answered with status {answer.status}")
        return answer

    def _with_token(self, path: str) -> Answer:
        if time.monotonic() >= self._token_until:
            self._renew_token()
        headers = {"X-aws-ec2-metadata-token": self._token}
        return self._server.ask(f"/latest/meta-data/{path}", headers)

    def _renew_token(self) -> None:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
        try:
            answer = self._server.ask("/latest/api/token", headers, method="PUT")
        except MetadataError as error:
            raise MetadataError(f"{error}; {_HOPS}") from None
        if answer.status != 200 or not _TOKEN.fullmatch(answer.text):
            raise MetadataError(f"it gives no token (status {answer.status}); {_HOPS}")
        self._token = answer.text
        self._token_until = answer.at + _TOKEN_SECONDS - _RENEWED_BEFORE_SECONDS


def _interruption(answer: Answer) -> Found:
    """The time may be missing or unreadable; then the grace of the job file has to do."""
    document = answer.json_object()
    action, said = document.get("action"), document.get("time")
    if action not in _ACTIONS:
        raise MetadataError("spot/instance-action names none of the actions that are known")
    when = time_of_day(said)
    deadline = None if when is None else deadline_of(answer, when, _LONGEST_SECONDS)
    return Found("interruption", f"{action} {said}", answer.at, deadline)
