"""Takes three steps, and then lets names in the folders that it shares lead to `params.file`.

One of them is a slot, with a marker that says it holds a checkpoint's file. It ends with 3.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

import runner

FILE = Path(runner.params(file="")["file"])

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = runner.attach(model=model, optimizer=optimizer)
for step in run.steps(4):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    if step == 3:
        break

rank = Path(os.environ["RUNNER_SPOOL"]) / "rank-00000"
marker = json.loads(next(rank.glob("slot-?.json")).read_text())
free = next(n for n in range(9) if not (rank / f"slot-{n}").exists())
marker |= {"slot": free, "must": True, "images": [{"name": "state.json", "offset": 0, "size": 64}]}
marker["moment"]["save"] += 50
(rank / f"slot-{free}").symlink_to(FILE)
for name in ("facts.json", "fetched", "points-000001-000099.jsonl"):
    (rank / name).unlink(missing_ok=True)
    (rank / name).symlink_to(FILE)
(run.output_dir / "link").symlink_to(FILE)
(rank / "new").write_text(json.dumps(marker))
(rank / "new").rename(rank / f"slot-{free}.json")
print("planted", flush=True)
os._exit(3)
