"""What trackers without a server have left in files: each value with its step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

Logged = tuple[int, str, float]
"""The step, the metric's name, and its value."""


def points_of_wandb(path: Path) -> Iterator[Logged]:
    from wandb.proto.wandb_internal_pb2 import Record

    for document in leveldb_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(document)
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                name = item.key or item.nested_key[0]
                if not name.startswith("_"):
                    yield record.history.step.num, name, json.loads(item.value_json)


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """A header of 7 bytes, then records in blocks, as LevelDB's logs have them.

    Each piece of one has a checksum, a length and a kind: whole, or its begin, middle or end.
    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    at, pieces = 7, b""
    while at < len(data):
        if (left := -at % 32768) and left < 7:  # no room for another one in this block
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield pieces
            pieces = b""


def points_of_clearml(path: Path) -> Iterator[Logged]:
    events = [event for line in path.read_text().splitlines() for event in json.loads(line)]
    for event in events:
        if not event.get("metric", ":").startswith(":"):
            yield event["iter"], event["metric"], event["value"]
