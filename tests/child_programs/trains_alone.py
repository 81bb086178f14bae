"""Trains without a supervisor. At step `wait_at` it says `ready` and waits for a line."""

import random
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import runner


class Noisy(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([index / 10, random.random()]) + torch.rand(2)


def main():
    p = runner.params(epochs=4, workers=0, wait_at=None, fail_at=None)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    random.seed(1)
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    loader = DataLoader(Noisy(), batch_size=2, shuffle=True, num_workers=p["workers"])
    run = runner.attach(model=model, optimizer=optimizer)
    print("from step", run.step, flush=True)
    for _epoch in run.epochs(p["epochs"]):
        for batch in run.batches(loader):
            if run.step == p["wait_at"]:
                print("ready", flush=True)
                sys.stdin.readline()
            if run.step == p["fail_at"]:
                raise RuntimeError("the script itself fails")
            optimizer.zero_grad()
            loss = model(batch).pow(2).mean()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
    assert run.load("latest", components=[]).step <= run.step
    print("to step", run.step, run.output_dir.name, run.params["epochs"], flush=True)


if __name__ == "__main__":
    main()
