"""The base of all problems, in a file of its own so that a problem class may live outside `problems`."""

from __future__ import annotations

from typing import Any

__all__ = ["Problem"]

PyTree = Any


class Problem:
    """What the driver and the derivatives ask of a problem; a registered dataclass inherits it.

    Subclasses give `root(x)`; the rest has defaults that fit an isolated solution.
    """

    # True: symmetric positive definite; "indefinite": symmetric.
    symmetric: bool | str = False

    def root(self, x: PyTree) -> PyTree:
        """The optimality function: a tree like x that is zero at a solution."""
        raise NotImplementedError

    def project(self, v: PyTree) -> PyTree:
        """Projection of a tangent onto the complement of the null space of the Jacobian of `root`."""
        return v

    def canonical(self, x: PyTree) -> PyTree:
        """One differentiable choice among equivalent solutions."""
        return x

    def preconditioned(self, v: PyTree) -> PyTree:
        """Approximate inverse of the Jacobian of `root` (positive definite unless `symmetric` is False), or v."""
        return v

    def traced(self, x: PyTree) -> Problem:
        """The same problem with user functions traced at x and their captured arrays hoisted to leaves."""
        return self

    def check(self, function: str, x: PyTree) -> None:
        """Raise the house errors if x and the data do not fit together."""
