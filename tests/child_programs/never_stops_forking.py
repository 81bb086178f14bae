"""Forks and exits, again and again: whoever looks it up finds a process that has just ended."""

import os

print("ready", flush=True)
while True:
    if os.fork():
        os._exit(0)
