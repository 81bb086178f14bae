"""Starts daemons by the book (two forks and a session of their own), and prints their process ids.

`starts_daemons.py COUNT` stays then, `starts_daemons.py COUNT EXIT_CODE` leaves them alone.
With FORGET=1 in the environment they drop what they inherited: environment, directory, files.
"""

import os
import signal
import sys


def daemonize() -> None:
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        os.wait()
        os.read(reader, 1)  # empty when the daemon has closed its end, too
        os.close(reader)
        return
    if os.fork():
        os._exit(0)
    os.setsid()
    os.write(1, f"daemon {os.getpid()}\n".encode())
    os.close(writer)
    if os.environ.get("FORGET"):
        os.chdir("/")
        os.closerange(0, 100)
        os.execve(sys.executable, [sys.executable, "-ISc", "import signal; signal.pause()"], {})
    while True:
        signal.pause()


for _ in range(int(sys.argv[1])):
    daemonize()
print("ready", flush=True)
if len(sys.argv) > 2:
    os._exit(int(sys.argv[2]))
while True:
    signal.pause()
