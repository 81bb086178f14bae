"""A trainer with a loader worker: each prints the signals that it gets, behind its name."""

import os
import signal

name = "trainer" if os.fork() else "worker"
told = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

# Not a handler and `pause`: a signal between two of those would not wake it up.
signal.pthread_sigmask(signal.SIG_BLOCK, told)
os.write(1, f"{name} ready\n".encode())
while True:
    os.write(1, f"{name} {signal.Signals(signal.sigwait(told)).name}\n".encode())
