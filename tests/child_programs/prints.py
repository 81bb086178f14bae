"""Prints `lines` lines as fast as it can, and leaves in `told` how long that took.

Also how long the slowest single line was held up.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

lines, told = int(sys.argv[1]), Path(sys.argv[2])
print(f"supervisor process {os.getppid()}", flush=True)
line = b"step %07d loss 0.123456789 grad_norm 1.23456789 lr 0.00010000 seconds 0.0123\n"
began, slowest = time.perf_counter(), 0.0
for number in range(lines):
    before = time.perf_counter()
    os.write(1, line % number)
    slowest = max(slowest, time.perf_counter() - before)
seconds = time.perf_counter() - began
told.write_text(json.dumps({"seconds": seconds, "slowest": slowest}))
