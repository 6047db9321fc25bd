"""Learning-rate schedules that optax lacks: functions from a step's number to a rate, wherever optax takes a schedule.

What optax has is optax's: `optax.linear_schedule(peak, 0.0, steps)` is the linear decay that `refine_schedule` starts
from.
"""

from jaxnum.schedules._refine_schedule import refine_schedule, refine_schedule_values
from jaxnum.schedules._wsd import wsd, wsd_branch, wsd_s

__all__ = ["refine_schedule", "refine_schedule_values", "wsd", "wsd_branch", "wsd_s"]
