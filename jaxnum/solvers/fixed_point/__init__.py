"""Solvers for fixed points of maps."""
