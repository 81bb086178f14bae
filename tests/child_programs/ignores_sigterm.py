"""A chain of three processes, each in its own process group, that ignore what can be ignored."""

import os
import signal

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)

for _ in range(2):
    if os.fork():
        break
    os.setpgid(0, 0)
else:
    print("ready", flush=True)

while True:
    signal.pause()
