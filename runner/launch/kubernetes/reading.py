"""The log of a run in a cluster: what its store has of it, and the log of its newest pod.

A pod's log goes with its node, so all before the newest pod is read from the store. Where the
store cannot be asked, the pods that the cluster still knows are. The lines are those of
`runner.logs.lines`; of what a pod printed the stream is known, and which attempt it was is not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from runner.errors import ClusterError, StoreError
from runner.launch.kubernetes import state
from runner.launch.kubernetes.client import Cluster
from runner.logs import lines
from runner.logs.reading import LogReader, Source

log = logging.getLogger(__name__)

_OWN = b"runner: "  # how the supervisor's own lines begin, on its stderr
_POLL_SECONDS = 1.0
_STAMP = len("2026-01-01T00:00:00.000")


def read_log(
    cluster: Cluster,
    name: str,
    stored: Source | None,
    *,
    follow: bool,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[bytes]:
    """Blocks of whole lines; an empty one says that there is no more for now.

    With `follow` it goes on from pod to pod until the run is over.
    """
    pods = cluster.pods(name)
    newest = pods[-1:]
    try:
        if stored is None:
            raise StoreError("nobody has said where it is")
        yield from _from_store(stored, before=newest[0] if newest else None)
    except StoreError as error:
        log.warning("the store has older lines, but cannot be read: %s", error)
        newest = pods
    in_store = {pod["metadata"]["name"] for pod in pods if pod not in newest}
    told: dict[str, bytes] = {}  # up to when, for each pod
    ended: set[str] = set()
    while True:
        # What is over now is told whole by what is read from now on.
        is_over = not follow or state.phase_of(cluster.job(name)).is_over
        for pod in newest:
            pod_name = pod["metadata"]["name"]
            if pod_name in ended or not _has_begun(pod):
                continue
            if state.exit_code_of_pod(pod) is not None:
                ended.add(pod_name)
            yield from _from_pod(cluster, pod_name, told, follow=follow)
        yield b""
        if is_over:
            return
        sleep(_POLL_SECONDS)
        newest = [pod for pod in cluster.pods(name) if pod["metadata"]["name"] not in in_store]


def _from_store(stored: Source, before: dict[str, Any] | None) -> Iterator[bytes]:
    limit = None if before is None else before["metadata"]["creationTimestamp"].rstrip("Z")
    for block in LogReader().advance([stored]):
        if limit is None:
            yield block
            continue
        kept = [line for line in block.splitlines(keepends=True) if line[:_STAMP].decode() < limit]
        if kept:
            yield b"".join(kept)


def _from_pod(
    cluster: Cluster, pod: str, told: dict[str, bytes], *, follow: bool
) -> Iterator[bytes]:
    """What has not been told of it. A connection may break long before the pod ends."""
    try:
        for line in cluster.log_lines(pod, follow=follow):
            moment, _, text = line.partition(b" ")
            if moment <= told.get(pod, b""):  # of one length, so in the order of time
                continue
            told[pod] = moment
            stream = lines.RUN if text.startswith(_OWN) else lines.OUT
            yield lines.records(_stamp(moment), 0, stream, text.removeprefix(_OWN))
    except ClusterError as error:
        log.warning("the log of pod %s cannot be had any more: %s", pod, error)


def _stamp(moment: bytes) -> bytes:
    """A time of the API, of any precision, in milliseconds."""
    seconds, _, fraction = moment.rstrip(b"Z").partition(b".")
    return seconds + b"." + fraction[:3].ljust(3, b"0") + b"Z"


def _has_begun(pod: dict[str, Any]) -> bool:
    statuses = pod.get("status", {}).get("containerStatuses", ())
    return any({"running", "terminated"} & each.get("state", {}).keys() for each in statuses)
