"""Trains one step without a supervisor, and ends while the device copies that state.

The copy ends when somebody waits for it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from test_overlap import LateDevice
from waiting import wait_until

import runner
from runner.training import session as sessions

device = LateDevice()
sessions.engine_for_this_machine = lambda: device
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
run = runner.attach(model=model, optimizer=optimizer)
session = run._course.session
wait_until(session.slots.is_ready, what="the slots")
overlap = session._overlap
wait = overlap.has_landed


def wait_and_release(seconds):
    device.released.set()
    return wait(seconds)


overlap.has_landed = wait_and_release
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
run.boundary()
assert overlap.in_flight
