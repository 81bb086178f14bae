"""The exception that ends a training script whose state is safe."""

from __future__ import annotations

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Preempted(SystemExit):
    """Raised at a boundary after the snapshot is complete. `finally` blocks run, then exit 75."""

    def __init__(self, trigger: str) -> None:
        self.trigger = trigger
        super().__init__(PREEMPTED_EXIT_CODE)

    def __str__(self) -> str:
        return f"stopped by {self.trigger}; the state is saved"
