"""A hostile week in seconds: what befalls a run is drawn, and in the end nothing may be lost.

    python -m tests.chaos [--s3] [--histories N] [--seed S]

Each history is a run with real processes on nodes that come and go. A seed that fails is printed;
with `--histories 1 --seed S` it is drawn again. When it is time for what depends on the machine, so
a history is a place to look, not a proof. With --s3 the store is on a real server, which is away
from time to time: the one that S3_ENDPOINT names, or one of our own, which takes root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nodes import Node, nodes_in
from servers.ceph import Gateway

from runner.checkpoint.attempts import AttemptRecord

from .history import EPOCHS, STEPS, History
from .stores import gateway, store_in

DISK_BYTES = 64 << 20


def check(history: History, node: Node, undisturbed: str) -> None:
    """AssertionError says what was lost, left behind, or does not add up."""
    assert node.digest() == undisturbed, "it ended with other bits than an undisturbed run"
    newest = node.newest()
    assert (newest.moment.step, newest.moment.epoch) == (STEPS, EPOCHS)
    remains = history.store.remains()
    assert not remains, f"left in the store: {remains}"
    _check_journal(node.records())


def _check_journal(records: list[AttemptRecord]) -> None:
    numbers = [record.attempt for record in records]
    assert numbers == list(range(1, len(numbers) + 1)), f"attempts {numbers}"
    assert records[-1].outcome == "succeeded", records[-1]
    for record in records:
        end = record.end_step
        assert end is None or end >= record.start_step, record
        assert record.start_step <= STEPS
    for record, following in pairwise(records):
        if record.outcome is not None:  # else its supervisor was killed, and could not write
            reached = max(record.start_step, record.end_step or 0, record.saved_step or 0)
            assert following.start_step <= reached, f"from nowhere: {following} after {record}"


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A small file system of its own, where one may be mounted: only then can it be filled."""
    with tempfile.TemporaryDirectory(prefix="runner-chaos-") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder]
        is_mounted = os.geteuid() == 0 and not subprocess.run(mount, capture_output=True).returncode
        try:
            yield Path(folder)
        finally:
            if is_mounted:
                subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def new_history(seed: int, server: Gateway | None) -> Iterator[History]:
    """With a disk, nodes and a store of its own. Nothing of it may be left in the end."""
    with (
        _folder() as folder,
        store_in(folder, server) as store,
        nodes_in(folder, store.bucket) as new_node,
    ):
        yield History(seed, new_node, store)


def undisturbed_digest(server: Gateway | None) -> str:
    """What every history has to end with."""
    with new_history(0, server) as history:
        return history.undisturbed().digest()


def play(seed: int, server: Gateway | None, undisturbed: str) -> list[str]:
    """Draw and check one history; what befell it."""
    with new_history(seed, server) as history:
        try:
            check(history, history.play(), undisturbed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {'; '.join(history.told)}: {error}") from error
        return history.told


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--histories", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1, help="of the first history")
    parser.add_argument("--s3", action="store_true", help="with the store on a real server")
    options = parser.parse_args()
    server = gateway() if options.s3 else None
    undisturbed = undisturbed_digest(server)
    kinds: Counter[str] = Counter()
    for seed in range(options.seed, options.seed + options.histories):
        told = play(seed, server, undisturbed)
        kinds.update(event.split(" at ")[0] for event in told)
        print(f"seed {seed}: {'; '.join(told) or 'nothing'}", flush=True)
    print(f"{options.histories} histories, all with the bits of an undisturbed run:")
    for kind, count in kinds.most_common():
        print(f"  {count:4}  {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
