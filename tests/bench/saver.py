"""The training script that saves in turn by every way there is, and writes down what each cost.

Supervised, so that ours is the real thing: the snapshot in the loop, the rest in the other
process. Between two saves there are steps, the same for all. Peers are called where a script would
call them, at the end of the body.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

import runner
from tests.bench.workload import build, train_step

_BEFORE, _AFTER = 3, 5
_MODES = ("ours", "torch.save", "safetensors", "dcp.save", "dcp.async_save", "copy", "write")


class Peers:
    """The other ways to save. Each gives the seconds that the loop waited, and a way to wait for
    the bytes to be on the disk."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self._touched: list[torch.Tensor] = []
        self._bytes = b""

    def call(self, mode: str) -> tuple[float, Callable[[], None]]:
        begun = time.perf_counter()
        finish = getattr(self, mode.replace(".", "_"))()
        return time.perf_counter() - begun, finish or (lambda: None)

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> dict[str, torch.Tensor]:
        moments = {
            f"optimizer.{i}.{key}": value
            for i, entry in self.optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        return {**self.model.state_dict(), **moments}

    def torch_save(self) -> Callable[[], None]:
        torch.save(self.state(), self.folder / "peer.pt")
        return self._sync

    def safetensors(self) -> Callable[[], None]:
        from safetensors.torch import save_file

        save_file(self.tensors(), self.folder / "peer.safetensors")
        return self._sync

    def dcp_save(self) -> Callable[[], None]:
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state(), checkpoint_id=str(self.folder / "dcp"), no_dist=True)
        return self._sync

    def dcp_async_save(self) -> Callable[[], None]:
        import torch.distributed.checkpoint as dcp

        future = dcp.async_save(self.state(), checkpoint_id=str(self.folder / "dcp-async"))

        def finish() -> None:
            future.result()
            self._sync()

        return finish

    def copy(self) -> None:
        """The floor: one copy of the same tensors into memory that was touched before."""
        tensors = list(self.tensors().values())
        if not self._touched:
            self._touched = [torch.empty_like(tensor).fill_(0) for tensor in tensors]
        for place, tensor in zip(self._touched, tensors, strict=True):
            place.copy_(tensor)

    def write(self) -> Callable[[], None]:
        """The floor of durability: so many bytes, written and fsynced."""
        if not self._bytes:
            self._bytes = os.urandom(1 << 20) * (
                sum(t.nbytes for t in self.tensors().values()) >> 20
            )
        (self.folder / "plain").write_bytes(self._bytes)
        return self._sync

    def clear(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _sync(self) -> None:
        for path in self.folder.rglob("*"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


class Memory:
    """The least memory that the machine had left while something happened."""

    def __init__(self) -> None:
        self.before = self.least = psutil.virtual_memory().available
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self.least = min(self.least, psutil.virtual_memory().available)

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return max(0, self.before - self.least)


def main() -> None:
    p = runner.params(megabytes=50.0, rounds=3, out="", folder="", every_step=0, batch=8)
    model, optimizer = build(p["megabytes"])
    run = runner.attach(model=model, optimizer=optimizer)
    if p["every_step"]:
        times = loop(run, model, optimizer, p["every_step"], p["batch"])
        Path(p["out"]).write_text(json.dumps({"steps": times}))
        return
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{p['folder']}.rendezvous", rank=0, world_size=1
    )
    folder = Path(p["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    rounds = measure(run, model, optimizer, Peers(folder, model, optimizer), p["rounds"])
    document = {"rounds": rounds, "restore": restore(run, p["megabytes"], folder)}
    Path(p["out"]).write_text(json.dumps(document))


def loop(
    run: Any, model: nn.Sequential, optimizer: torch.optim.AdamW, steps: int, batch: int
) -> list[float]:
    """Seconds from the begin of a step to the begin of the next."""
    begins = []
    for _ in run.batches([0] * steps):
        begins.append(time.perf_counter())
        train_step(model, optimizer, run.step, batch)
    return [after - before for before, after in pairwise(begins)]


def measure(
    run: Any, model: nn.Sequential, optimizer: torch.optim.AdamW, peers: Peers, rounds: int
) -> list[dict[str, Any]]:
    """One entry for each save: stall, seconds until durable, slow-down of the steps beside it."""
    results: list[dict[str, Any]] = []
    body = iter(run.batches([0] * 10_000_000))
    next(body)
    board = run._course.session.board

    def step() -> float:
        begun = time.perf_counter()
        train_step(model, optimizer, run.step)
        return time.perf_counter() - begun

    def turn() -> float:
        """From the end of one body to the begin of the next: where ours stalls."""
        begun = time.perf_counter()
        next(body)
        return time.perf_counter() - begun

    for number in range(rounds + 1):  # the first round warms everything up
        for mode in _MODES:
            alone = []
            for _ in range(_BEFORE):
                alone.append(step())
                turn()
            step()
            memory, begun = Memory(), time.perf_counter()
            if mode == "ours":
                run.save()
                wanted = run.step + 2
                stall = turn()
                finish = lambda wanted=wanted: _wait_for(board, wanted)  # noqa: E731
            else:
                stall, finish = peers.call(mode)
                turn()
            durable: list[float] = []
            waiter = threading.Thread(target=_note_end, args=(finish, begun, durable))
            waiter.start()
            beside = []
            while waiter.is_alive() or len(beside) < _AFTER:
                busy = waiter.is_alive()
                seconds = step()
                turn()
                if busy:
                    beside.append(seconds)
                elif len(beside) < _AFTER:
                    break
            waiter.join()
            if number:
                results.append(
                    {
                        "mode": mode,
                        "stall": stall,
                        "durable": durable[0],
                        "slow_down": statistics.median(beside) / statistics.median(alone)
                        if beside
                        else 1.0,
                        "memory": memory.end(),
                        "bytes": sum(f.stat().st_size for f in peers.folder.rglob("*")),
                    }
                )
            else:
                memory.end()
            peers.clear()
    return results


def _wait_for(board: Any, step: int) -> None:
    while board.persisted_step < step:
        time.sleep(0.001)


def _note_end(finish: Callable[[], None], begun: float, durable: list[float]) -> None:
    finish()
    durable.append(time.perf_counter() - begun)


def restore(run: Any, megabytes: float, folder: Path) -> list[dict[str, float]]:
    """Ours from the newest slot against torch.load(mmap=True), each into a fresh model."""
    from runner.training.capture import TrainingState
    from runner.training.saved import open_saved

    session = run._course.session
    results = []
    path = folder / "restore.pt"
    state = run._course.state
    torch.save(
        {n: c.module.state_dict() if n == "model" else c._optimizer.state_dict()
         for n, c in state.components.items()},
        path,
    )  # fmt: skip
    for _ in range(4):
        marker = session.rank.complete()[-1]
        model, optimizer = build(megabytes)
        fresh = TrainingState({"model": model, "optimizer": optimizer}, {})
        begun = time.perf_counter()
        saved = open_saved(session.rank.slot_path(marker.slot), marker)
        fresh.restore(saved.document, saved.source, final=True)
        ours = time.perf_counter() - begun
        del fresh, saved
        model, optimizer = build(megabytes)
        begun = time.perf_counter()
        loaded = torch.load(path, mmap=True)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        train_step(model, optimizer, 0)  # what was only mapped is read now
        theirs = time.perf_counter() - begun
        begun = time.perf_counter()
        train_step(model, optimizer, 0)
        results.append({"ours": ours, "torch.load": theirs - (time.perf_counter() - begun)})
    path.unlink()
    return results[1:]


if __name__ == "__main__":
    main()
