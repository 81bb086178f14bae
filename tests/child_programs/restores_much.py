"""Trains a large model for one epoch per life; says `ready`, restores, says `restored`.

Waits for a line after each, so that its memory can be looked at from outside.
"""

import torch

import runner

LAYERS, WIDTH = 12, 1024  # 12.6 million parameters: 151 MB with the two moments of AdamW

torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
# What an optimizer step needs besides: had here, so that it is not taken for the restore's.
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
state_bytes = 3 * sum(4 * parameter.numel() for parameter in model.parameters())

print("ready", state_bytes, flush=True)
input()
run = runner.attach(model=model, optimizer=optimizer)
for epoch in run.epochs(2):
    print("restored" if run.resumed_from else "began", flush=True)
    input()
    for _ in run.batches([0]):
        optimizer.step()
    if epoch == 0:
        run.stop("one epoch is enough")
        break
