"""The exception that ends a training script whose state is safe."""

from __future__ import annotations

from runner.exitcodes import PREEMPTED


class Preempted(SystemExit):
    """Raised at a boundary after the snapshot is complete. `finally` blocks run, then exit 75."""

    def __init__(self, trigger: str, code: int = PREEMPTED) -> None:
        self.trigger = trigger
        super().__init__(code)

    def __str__(self) -> str:
        return f"stopped by {self.trigger}; the state is saved"
