"""A supervisor that prints its trainer's process id; killed, it leaves the trainer running."""

import signal
import sys
from pathlib import Path

from runner.launch.process import TrainerProcess

trainer = TrainerProcess.start([sys.executable, *sys.argv[1:]], cwd=Path.cwd(), env={})
print("trainer", trainer.pid, flush=True)
while True:
    signal.pause()
