"""A supervisor started with SIGCHLD ignored: prints its trainer's exit code as it sees it."""

import sys
from pathlib import Path

from runner.launch.process import TrainerProcess
from runner.supervisor.reaper import become_subreaper

become_subreaper()
trainer = TrainerProcess.start([sys.executable, *sys.argv[1:]], cwd=Path.cwd(), env={})
while (code := trainer.poll()) is None:
    pass
print("code", code, flush=True)
trainer.kill_tree()
trainer.close()
