"""A small training script that says what it does: `importing`, `ready`, and `step N` in each body.

Params: `epochs`, `workers`, `ballast` (megabytes of state that each step changes), `helpers` (start
processes that never end), `gate` (a file), and what befalls an attempt: `{"2": {"5": "raise"}}` is
for the second, in the body of step 5. `wait` is to wait for the gate there, `validate` to wait for
it in the validation after that step, and `import`, at step 0, before anything is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import runner

PARAMS = runner.params(epochs=2, workers=0, helpers=False, gate="", befalls={}, pace=0.0, ballast=0)
SAMPLES, BATCH = 48, 4


def say(text: str) -> None:
    print(text, flush=True)


def wait_at_gate(alive: Any = None) -> None:
    while not Path(PARAMS["gate"]).exists():
        time.sleep(0.001)
        if alive is not None:
            alive()


def wait_until_saved(run: Any) -> None:
    latest = run.output_dir.parent / "latest.json"
    while not latest.exists() or json.loads(latest.read_text())["attempt"] != run.attempt:
        time.sleep(0.001)


def hang_for_ever() -> None:
    threading.Event().wait()


def befall(what: str, run: Any) -> None:
    """Something happens in the middle of a step."""
    if what == "save":
        run.save()
    elif what == "be saved":
        wait_until_saved(run)
    elif what == "wait":
        wait_at_gate()
    elif what == "raise":
        raise RuntimeError("raised on purpose")
    elif what == "hang":
        hang_for_ever()
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "freeze supervisor":
        os.kill(os.getppid(), signal.SIGSTOP)


def start_helpers() -> None:
    """One child as it comes, and one that goes into a session of its own."""
    program = str(Path(__file__).with_name("waits.py"))
    for session in (False, True):
        helper = subprocess.Popen(
            [sys.executable, program], stdout=subprocess.DEVNULL, start_new_session=session
        )
        say(f"process {helper.pid}")


def leave_out_the_compiler() -> None:
    """Optimizers import it to be left alone by it: half of the time of such a short run."""

    def leave_alone(function: Any = None, *_: Any, **__: Any) -> Any:
        return function

    compiler = types.ModuleType("torch._dynamo")
    compiler.__getattr__ = lambda name: leave_alone  # type: ignore[method-assign]
    sys.modules["torch._dynamo"] = compiler


def digest(model: Any) -> str:
    """Of the parameters, as they are now."""
    values = (parameter.detach().numpy().tobytes() for parameter in model.parameters())
    return hashlib.sha256(b"".join(values)).hexdigest()


def main() -> None:
    attempt = os.environ.get("RUNNER_ATTEMPT", "1")
    befalls = {int(step): what for step, what in PARAMS["befalls"].get(attempt, {}).items()}
    say(f"importing in process {os.getpid()}")
    if befalls.get(0) == "import":
        wait_at_gate()

    import torch
    from torch.utils.data import DataLoader, TensorDataset

    leave_out_the_compiler()
    torch.manual_seed(7)
    torch.set_num_threads(1)
    features = torch.randn(SAMPLES, 6)
    data = TensorDataset(features, features.sum(1, keepdim=True))
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=PARAMS["workers"])
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)
    )
    if PARAMS["ballast"]:
        model.register_buffer("ballast", torch.zeros(PARAMS["ballast"] * 250_000))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)

    run = runner.attach(model=model, optimizer=optimizer, scheduler=scheduler)
    if PARAMS["helpers"]:
        start_helpers()
    say(f"ready at {run.step} in attempt {run.attempt}")
    say(f"weights {digest(model)}")
    for _ in run.epochs(PARAMS["epochs"]):
        model.train()
        for inputs, targets in run.batches(loader):
            while not run._course.session.slots.is_ready():  # else no snapshot of quick steps
                time.sleep(0.001)
            say(f"step {run.step + 1}")
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            befall(befalls.get(run.step + 1, ""), run)
            time.sleep(PARAMS["pace"])
            optimizer.step()
            for buffer in model.buffers():
                buffer.add_(1)
            scheduler.step()
            run.log(train_loss=loss)
        with run.phase("validation"), torch.no_grad():
            model.eval()
            if befalls.get(run.step) == "validate":
                say("validating")
                wait_at_gate(run.alive)
            run.log(val_loss=torch.nn.functional.mse_loss(model(features), data.tensors[1]))
    results = {"val_loss": run.history[-1]["val_loss"], "steps": run.step}
    (run.output_dir / "metrics.json").write_text(json.dumps(results))
    say(f"weights {digest(model)}")
    say(f"finished at {run.step}")


if __name__ == "__main__":
    main()
