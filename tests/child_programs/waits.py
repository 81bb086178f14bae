"""Says that it is there, and stays until it is killed."""

import signal

print("ready", flush=True)
while True:
    signal.pause()
