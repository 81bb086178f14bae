"""Whether what was measured is right: a disturbed run must end in the state of an undisturbed one.

Each restore on the way must have been exact, or the ends would differ. The digests are taken from
live tensors and from the checkpoint's files as the safetensors library reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from tests.bench.figures import Check

if TYPE_CHECKING:
    from collections.abc import Buffer

    from tests.bench.place import Place
    from tests.bench.supervised import SupervisedRun


def digest_of(tensors: Iterable[Buffer]) -> str:
    """SHA-256 over the sorted digests of the tensors' bytes, in hex digits."""
    digests = sorted(sha256(tensor).digest() for tensor in tensors)
    return sha256(b"".join(digests)).hexdigest()


def digest_of_files(checkpoint: Path) -> str:
    """The same of all tensors in a checkpoint's directory."""

    def tensors() -> Iterable[Buffer]:
        for path in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    yield file.get_tensor(name).data

    return digest_of(tensors())


def compare_with_undisturbed(place: Place, run: SupervisedRun) -> list[Check]:
    """Let a run come to its end, and train as many steps again without `runner`."""
    ended_with, steps = run.finish()
    newest = run.newest()
    words = ["plain", str(run.megabytes), str(steps)]
    _, undisturbed = place.python("-m", "tests.bench.trainer", *words)
    in_files = digest_of_files(run.checkpoint_path(newest))
    what = f"{run.run_id}: after {steps} steps"
    last = f"{run.run_id}: the last checkpoint is of step {steps}"
    return [
        Check(f"{what} the trainer has the state of an undisturbed run", ended_with, undisturbed),
        Check(f"{what} the files of the last checkpoint have it", in_files, undisturbed),
        Check(last, str(newest.moment.step), str(steps)),
    ]
