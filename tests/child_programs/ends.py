"""Leaves an orphan and ends: `ends.py 3` with an exit code, `ends.py SIGSEGV` by a signal."""

import os
import resource
import signal
import sys

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

if os.fork() == 0:  # a child whose end is noticed by whoever adopts it
    if os.fork() == 0:
        os.setsid()
        os._exit(9)
    os._exit(0)

how = sys.argv[1]
if how.startswith("SIG"):
    os.kill(os.getpid(), signal.Signals[how])
os._exit(int(how))
