"""Measurements: `python -m benchmarks.run`, `python -m benchmarks.tpu_schedule`, `python -m benchmarks.report`."""
