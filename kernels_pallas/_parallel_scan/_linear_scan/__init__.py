"""The elementwise linear recurrence; its public name is in `kernels_pallas`."""
