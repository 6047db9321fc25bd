"""Solvers for entropic optimal transport."""
