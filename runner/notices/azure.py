"""Azure: scheduled events, of which only the eviction of this very machine is of interest.

An event that is acknowledged begins at once. So that is done when nothing is left to save, and
never for one that takes other machines along.

Source: Azure Virtual Machines, "Azure Metadata Service: Scheduled Events for Linux VMs".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from runner.errors import MetadataError
from runner.notices.metadata import Answer, MetadataServer
from runner.notices.news import SHORTEST_SECONDS, Found, deadline_of, time_of_day

_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
_HEADERS = {"Metadata": "true"}
_LONGEST_SECONDS = 900.0  # the longest that any kind of event is announced ahead
_FIRST_SECONDS = 120.0  # the first call switches the service on, which takes up to two minutes
_MOST_NAME_CHARACTERS = 256


class Azure:
    """Knows its own name, and which events may be acknowledged."""

    name = "azure"
    pause_seconds = 1.0

    def __init__(self, server: MetadataServer, first_seconds: float = _FIRST_SECONDS) -> None:
        self._server = server
        self._own_name = ""
        self._extra_seconds = first_seconds
        self._own_events: tuple[str, ...] = ()

    def look(self) -> Iterator[Found]:
        answer = self._ask(_EVENTS)
        self._extra_seconds = 0.0
        preemptions = [event for event in _events(answer) if event.get("EventType") == "Preempt"]
        if preemptions and not self._own_name:
            self._own_name = self._ask_name()
        own = [event for event in preemptions if self._own_name in _machines(event)]
        self._own_events = tuple(_id(event) for event in own if len(_machines(event)) == 1)
        for event in own:
            yield _preemption(event, answer)

    def acknowledge(self) -> None:
        for event_id in self._own_events:
            body = json.dumps({"StartRequests": [{"EventId": event_id}]}).encode()
            headers = {**_HEADERS, "Content-Type": "application/json"}
            answer = self._server.ask(_EVENTS, headers, method="POST", body=body)
            if answer.status // 100 != 2:
                raise MetadataError(f"the acknowledgement is answered with {answer.status}")

    def _ask_name(self) -> str:
        answer = self._ask(_NAME)
        if not 0 < len(answer.text) <= _MOST_NAME_CHARACTERS:
            raise MetadataError("it does not say how this machine is called")
        return answer.text.casefold()

    def _ask(self, path: str) -> Answer:
        answer = self._server.ask(path, _HEADERS, extra_seconds=self._extra_seconds)
        if answer.status != 200:
            what = path.partition("?")[0]
            raise MetadataError(f"{what} is answered with status {answer.status}")
        return answer


def _events(answer: Answer) -> list[dict[str, Any]]:
    events = answer.json_object().get("Events")
    if not isinstance(events, list):
        raise MetadataError("its answer has no list of events")
    return [event for event in events if isinstance(event, dict) and _id(event)]


def _id(event: dict[str, Any]) -> str:
    """What names it; nothing where that cannot be a name."""
    event_id = event.get("EventId")
    return event_id if isinstance(event_id, str) else ""


def _machines(event: dict[str, Any]) -> list[str]:
    """Azure does not tell names apart by their case."""
    resources = event.get("Resources")
    names = resources if isinstance(resources, list) else []
    return [name.casefold() for name in names if isinstance(name, str)]


def _preemption(event: dict[str, Any], answer: Answer) -> Found:
    """It may begin at `NotBefore`; when it has begun, that is empty, and the end is near."""
    status, not_before = str(event.get("EventStatus")), str(event.get("NotBefore"))
    when = time_of_day(not_before)
    deadline = None if when is None else deadline_of(answer, when, _LONGEST_SECONDS)
    if status == "Started":
        deadline = answer.at + SHORTEST_SECONDS
    return Found(_id(event), f"{status} {not_before}", answer.at, deadline)
