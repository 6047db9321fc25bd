"""Solvers for linear systems."""
