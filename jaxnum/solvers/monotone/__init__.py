"""Solvers for inclusions 0 in F(x) + G(x) with monotone F and G."""
