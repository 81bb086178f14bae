"""A trainer with a loader worker: each prints the signals that it gets, behind its name."""

import os
import signal

name = "trainer" if os.fork() else "worker"


def tell(number: int, _frame: object) -> None:
    os.write(1, f"{name} {signal.Signals(number).name}\n".encode())


for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    signal.signal(number, tell)
os.write(1, f"{name} ready\n".encode())
while True:
    signal.pause()
