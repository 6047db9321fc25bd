"""How a solve ended: a small integer inside compiled code, one sentence for a reader, an exception when eager."""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class Status(IntEnum):
    """How a solve ended. Traced code compares `Solution.status` with these; `sentence` explains one."""

    converged = 0
    max_steps = 1
    nonfinite = 2
    breakdown = 3
    stagnated = 4
    infeasible = 5


# What the driver's loop carries while none of the above holds.
RUNNING = -1

_SENTENCES = {
    Status.converged: "The residual met the tolerance.",
    Status.max_steps: "The step limit was reached before the residual met the tolerance. "
    "Raise max_steps, loosen rtol or atol, or choose a faster solver.",
    Status.nonfinite: "The residual or its scale became NaN or infinite; x is the last finite iterate. "
    "Look for NaN in the input, a map that expands, or too long a step.",
    Status.breakdown: "The method broke down: the problem lacks a property that the method needs "
    "(for cg: a symmetric positive definite A and preconditioner).",
    Status.stagnated: "The residual stopped falling above the tolerance: rounding errors of this dtype allow no "
    "less. Loosen rtol or atol, precondition, or use float64.",
    Status.infeasible: "The problem has no solution as posed "
    "(for transport: weights must be non-negative, finite and of equal total mass unless unbalanced; "
    "for a linear system: A must map the null space to zero, and b must be orthogonal to it).",
}


def sentence(status: Any) -> str:
    """One sentence that says how the solve ended and what helps.

    Args:
      status: an int or a concrete integer scalar, as in `Solution.status`.

    Returns:
      The sentence.

    Example:
      >>> sentence(0)
      'The residual met the tolerance.'
    """
    return _SENTENCES[Status(int(status))]


class SolverError(RuntimeError):
    """An eager solve did not converge. `solution` holds what it reached, `status` says how it ended."""

    def __init__(self, message: str, solution: Any, status: Status):
        super().__init__(message)
        self.solution = solution
        self.status = status
