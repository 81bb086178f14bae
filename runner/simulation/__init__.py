"""A simulated spot node: notices, kills, lost disks, on one machine and with real processes."""

from runner.simulation.node import simulate
from runner.simulation.plan import SpotPlan, plan_from
from runner.simulation.report import as_text

__all__ = ["SpotPlan", "as_text", "plan_from", "simulate"]
