"""Ends, by an exception if told to, while a device copies: until somebody waits for the copy."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_overlap import Bench

bench = Bench()
bench.snapshot(publish=lambda: os.write(1, b"published") and None)
wait = bench.overlap.has_landed


def wait_and_release(seconds: float) -> bool:
    bench.device.released.set()
    return wait(seconds)


mock.patch.object(bench.overlap, "has_landed", wait_and_release).start()
if "raise" in sys.argv:
    raise RuntimeError("as it was told")
