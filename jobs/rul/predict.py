"""Predict the remaining cycles of the test engines from an export alone.

    runner checkpoints export RUN --best --ema --to DIR
    python -m jobs.rul.predict DIR [DATA]

DATA is what `params.data` takes: a folder, or `synthetic`. One line for each engine: its number,
the remaining cycles, and its state.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jobs.rul import data
from jobs.rul.model import STATES, load_bundle, predict


def main(folder: Path, source: str | None = None) -> None:
    net, config, statistics = load_bundle(folder)
    about = json.loads((folder / "config.json").read_bytes())
    subset = data.load(about["subset"], source, engines=about.get("engines"))
    windows = data.last_windows(subset.test, statistics, config.window)
    cycles, logits = predict(net, windows)
    for engine, left, state in zip(subset.test, cycles, logits.argmax(dim=1), strict=True):
        print(engine.unit, f"{float(left):.6f}", STATES[int(state)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
