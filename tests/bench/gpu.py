"""Snapshots out of a GPU: stall, slow-down, speed, exactness, and that none is ever torn.

    python tests/bench/gpu.py [--gigabytes 10] [--json FILE]

Needs this repository, torch, safetensors and numpy, and nothing else. The state is a bf16 model
with fp32 master weights and AdamW: 14 bytes for each weight. `--device cpu` tries the script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

_BYTES_PER_WEIGHT = 14
_LAYERS = 16


class Training:
    """bf16 layers, and fp32 masters in the optimizer."""

    def __init__(self, gigabytes: float, device: torch.device, rows: int) -> None:
        torch.manual_seed(0)
        width = int((gigabytes * 1e9 / _BYTES_PER_WEIGHT / _LAYERS) ** 0.5) // 8 * 8
        self.model = nn.Sequential(
            *(nn.Linear(width, width, bias=False) for _ in range(_LAYERS))
        ).to(device, torch.bfloat16)
        self.masters = nn.ParameterList(
            nn.Parameter(p.detach().float()) for p in self.model.parameters()
        )
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=device.type == "cuda")
        self.rows = torch.randn(rows, width, device=device, dtype=torch.bfloat16)

    def step(self) -> None:
        loss = self.model(self.rows).float().square().mean()
        loss.backward()
        for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                parameter.copy_(master)

    def digest(self) -> list[bytes]:
        """The bytes of some elements of every tensor."""
        tensors = [*self.model.parameters(), *self.masters]
        tensors += [v for s in self.optimizer.state.values() for v in s.values()]
        samples = (t.detach().reshape(-1)[:: max(1, t.numel() // 4096)].float() for t in tensors)
        return [sample.cpu().numpy().tobytes() for sample in samples]

    def nbytes(self) -> int:
        moments = [v for s in self.optimizer.state.values() for v in s.values()]
        return sum(t.nbytes for t in (*self.model.parameters(), *self.masters, *moments))


def attach(training: Training) -> Any:
    import runner

    return runner.attach(
        model=training.model, masters=training.masters, optimizer=training.optimizer
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pinned_copy_seconds(training: Training, device: torch.device) -> float:
    """The floor: the same tensors into page-locked memory."""
    tensors = [*training.masters]
    pin = device.type == "cuda"
    places = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pin) for t in tensors]
    times = []
    for _ in range(4):
        synchronize(device)
        begun = time.perf_counter()
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor.detach(), non_blocking=True)
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:]) * training.nbytes() / sum(t.nbytes for t in tensors)


def measure(
    training: Training, run: Any, device: torch.device, every: int | None
) -> dict[str, Any]:
    """Steps with a snapshot at every n-th; what the host waits at a boundary."""
    from runner.training.rhythm import SnapshotRhythm

    course = run._course
    course._rhythm = SnapshotRhythm(every or 1 << 40)
    steps, stalls = [], []
    count = max(20, 4 * (every or 5))
    ended = time.perf_counter()
    before = course.session._saves
    for index, _ in enumerate(run.batches([0] * (count + 1))):
        begun = time.perf_counter()
        stalls.append(begun - ended)
        training.step()
        if index % 5 == 4:
            synchronize(device)
        ended = time.perf_counter()
        steps.append(ended - begun)
    synchronize(device)
    whole = sum(steps[5:]) + sum(stalls[5:])
    return {
        "snapshot every": every,
        "seconds a step": whole / (count - 4),
        "stall median ms": 1e3 * statistics.median(stalls[5:]),
        "stall max ms": 1e3 * max(stalls[5:]),
        "snapshots": course.session._saves - before,
    }


def torn_snapshots(training: Training, run: Any, device: torch.device) -> int:
    """Copies are slowed down by work on their stream; each snapshot must be of one step.

    The masters and the bf16 weights of one step agree: one is the other, rounded.
    """
    from runner.training.overlap import CudaEngine
    from runner.training.rhythm import SnapshotRhythm
    from runner.training.saved import open_saved

    course = run._course
    course._rhythm = SnapshotRhythm(1)
    engine = course.session._overlap.engine
    if isinstance(engine, CudaEngine):
        plain = engine.copy_beside

        def slowly(pairs: Any) -> Any:
            tickets = []
            for pair in pairs:
                torch.cuda._sleep(20_000_000)  # about 10 ms on the compute stream's turn
                tickets += plain([pair])
            return tickets

        engine.copy_beside = slowly  # type: ignore[method-assign]
    torn = 0
    for _ in run.batches([0] * 12):
        training.step()
        course.session._overlap.land()
        complete = course.session.rank.complete()
        if complete:
            marker = complete[-1]
            saved = open_saved(course.session.rank.slot_path(marker.slot), marker)
            parts = saved.document["components"]
            model = [saved.source.view(r) for r in parts["model"]["state"].values()]
            masters = [saved.source.view(r) for r in parts["masters"]["state"].values()]
            torn += any(
                not torch.equal(m.to(torch.bfloat16), p)
                for m, p in zip(masters, model, strict=True)
            )
    return torn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here: nothing was measured")
        return
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory(prefix="runner-gpu-") as folder:
        os.environ |= {"RUNNER_STORE": folder, "RUNNER_RUN_ID": f"gpu-{os.getpid()}"}
        training = Training(options.gigabytes, device, options.rows)
        training.step()
        run = attach(training)
        run._course.session.slots._finish_preparing()
        floor = pinned_copy_seconds(training, device)
        rows = [measure(training, run, device, every) for every in (None, 20, 5, 1)]
        torn = torn_snapshots(training, run, device)
        document = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "state GB": training.nbytes() / 1e9,
            "pinned copy GB/s": training.nbytes() / 1e9 / floor,
            "pinned copy seconds": floor,
            "loops": rows,
            "torn snapshots": torn,
            "exact": restored_exactly(training, run, options, device),
        }
        run.stop("measured")
    text = json.dumps(document, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text)
    if torn or not document["exact"]:
        sys.exit(1)


def restored_exactly(
    training: Training, run: Any, options: argparse.Namespace, device: torch.device
) -> bool:
    """Whether the newest snapshot, put into new objects, has the very bytes of the old ones."""
    from runner.training.capture import TrainingState
    from runner.training.saved import open_saved

    course = run._course
    course._snapshot(set(), beside=False)
    wanted = training.digest()
    marker = course.session.rank.complete()[-1]
    saved = open_saved(course.session.rank.slot_path(marker.slot), marker)
    fresh = Training(options.gigabytes, device, options.rows)
    parts = {"model": fresh.model, "masters": fresh.masters, "optimizer": fresh.optimizer}
    TrainingState(parts, {}).restore(saved.document, saved.source, final=True)
    return fresh.digest() == wanted


if __name__ == "__main__":
    main()
