"""The solver protocol: problems, solvers, the driver that runs them, their derivatives and their status."""
