"""`runner logs`: a run's log for people and for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from runner.cli import cluster
from runner.cli.common import (
    BundleOption,
    ContextOption,
    EndpointOption,
    NamespaceOption,
    OutputOption,
    RegionOption,
    RunName,
    StoreOption,
    found_run,
)
from runner.errors import UsageError
from runner.logs import lines
from runner.logs.lines import Record
from runner.units import parse_duration


def logs(
    name: RunName,
    store: StoreOption = None,
    s3_endpoint: EndpointOption = None,
    s3_region: RegionOption = None,
    s3_ca_bundle: BundleOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on as it comes, until the run ends.")
    ] = False,
    attempt: Annotated[int | None, typer.Option("--attempt", help="Of this one only.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="10m|TIME", help="What is newer than that.")
    ] = None,
    stream: Annotated[
        list[str] | None,
        typer.Option("--stream", metavar="out|err|run", help="Of this only; may be repeated."),
    ] = None,
    times: Annotated[
        bool, typer.Option("-t", "--times", help="Before each line: when, attempt, stream.")
    ] = False,
    output: OutputOption = "text",
) -> None:
    """What the trainer printed and the supervisor said, over all attempts."""
    from runner.supervisor.following import read_log

    for wanted in stream or ():
        if wanted not in lines.STREAMS:
            raise UsageError(f"--stream {wanted}: expected one of {', '.join(lines.STREAMS)}")
    oldest = None if since is None else _oldest(since)
    run = cluster.find(name, namespace, context, store, (s3_endpoint, s3_region, s3_ca_bundle))
    if run is not None:
        blocks = cluster.read_log(run, attempt, follow=follow)
    else:
        found = found_run(name, store, s3_endpoint, s3_region, s3_ca_bundle)
        blocks = read_log(found, attempt, follow=follow)
    show: Callable[[Record], bytes]
    show = _as_json if output == "json" else _with_times if times else _AsPrinted()
    try:
        for block in blocks:
            chosen = _chosen(block, stream or lines.STREAMS, oldest)
            sys.stdout.buffer.write(b"".join(map(show, chosen)))
            if not block:
                sys.stdout.flush()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _oldest(since: str) -> str:
    """The time of the oldest record that is wanted, as records have it."""
    try:
        moment = datetime.fromisoformat(since)
    except ValueError:
        try:
            moment = datetime.now(UTC) - timedelta(seconds=parse_duration(since))
        except ValueError as error:
            raise UsageError(f"--since {since}: {error}, or a time in ISO 8601") from error
    return lines.stamp(moment.timestamp()).decode()


def _chosen(block: bytes, streams: Iterable[str], oldest: str | None) -> Iterator[Record]:
    """The records that are wanted. A line that is none was cut by a crash: it is passed over."""
    for line in block.split(b"\n")[:-1]:
        record = lines.parse(line)
        if record is not None and record.stream in streams:
            if oldest is not None and record.time < oldest:
                continue
            yield record


class _AsPrinted:
    """The text as it was printed; what was not a whole line is ended before others go on."""

    def __init__(self) -> None:
        self._open: tuple[int, str] | None = None

    def __call__(self, record: Record) -> bytes:
        source = record.attempt, record.stream
        before = b"\n" if self._open not in (None, source) else b""
        self._open = None if record.end == b"\n" else source
        who = b"runner: " if record.stream == lines.RUN else b""
        return before + who + record.text + record.end


def _with_times(record: Record) -> bytes:
    mark = {b"\n": b"", b"": lines.GOES_ON, b"\r": lines.WRITTEN_OVER}[record.end]
    return lines.records(record.time.encode(), record.attempt, record.stream, record.text, mark)


def _as_json(record: Record) -> bytes:
    """One object in one line, so that it can be followed, too."""
    document: dict[str, Any] = {
        "time": record.time,
        "attempt": record.attempt,
        "stream": record.stream,
        "text": record.text.decode(errors="backslashreplace"),
        "end": record.end.decode(),
    }
    return json.dumps(document).encode() + b"\n"
