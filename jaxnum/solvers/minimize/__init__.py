"""Solvers of `Minimize`."""
