"""Where the checkpoints of an MLflow run are: `python -m runner.tracking.locate`, for `--from`.

A process of its own, because the one that asks is a supervisor, and stays light. It reads one JSON
object (`uri`, `workdir`, `id`) and prints one: `place`, or `problem`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from runner.errors import UsageError
from runner.job_tracking import Tracking, missing_tracker

SCHEME = "mlflow:"
_PATIENCE_SECONDS = 120.0


def place_of(which: str, tracking: Tracking | None, workdir: Path) -> str:
    """The place of the run that `mlflow:<run id>` names. UsageError if there is none."""
    chosen = Tracking.model_validate({"mlflow": {}})
    if problem := missing_tracker(chosen):
        raise UsageError(f"--from {which}: {problem}")
    uri = None if tracking is None or tracking.mlflow is None else tracking.mlflow.uri
    asked = {"uri": uri, "workdir": str(workdir), "id": which.removeprefix(SCHEME)}
    try:
        answer = subprocess.run(
            [sys.executable, "-m", "runner.tracking.locate"],
            input=json.dumps(asked).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE_SECONDS,
            check=True,
        )
        reply = json.loads(answer.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise UsageError(f"--from {which}: MLflow cannot be asked: {error}") from error
    if "place" not in reply:
        raise UsageError(f"--from {which}: {reply.get('problem')}")
    return str(reply["place"])


def main() -> None:
    asked = json.loads(sys.stdin.read())
    from runner.errors import TrackerError
    from runner.tracking.mlflow import place_of_run

    try:
        reply = {"place": place_of_run(asked["uri"], Path(asked["workdir"]), asked["id"])}
    except TrackerError as error:
        reply = {"problem": " ".join(str(error).split())}
    sys.stdout.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
