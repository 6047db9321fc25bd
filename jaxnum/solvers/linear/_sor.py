"""Successive over-relaxation: Gauss-Seidel sweeps in the natural or a multicolour order, stretched by omega.

Cost: one A and one triangular solve a step; memory 2 vectors. Source: Young 1954; Frankel 1950.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import operators, trees
from jaxnum.core.operators import DiaOperator, EllOperator
from jaxnum.core.problems import Linear
from jaxnum.core.solver import Measure, Solver
from jaxnum.core.status import Status
from jaxnum.solvers.linear import lengths, sweeps
from jaxnum.solvers.linear.sweeps import Colours, Schedule
from kernels_pallas import checks

PyTree = Any


class SorState(NamedTuple):
    """What the next step starts from.

    Attributes:
      r: residual b - A x.
      scale: ||b||.
      mark: `Status.breakdown` or 0.
    """

    r: jax.Array
    scale: jax.Array
    mark: jax.Array


class SorHyper(NamedTuple):
    """The relaxation, and None or the order of a sparse A."""

    omega: jax.Array
    schedule: Schedule | Colours | None


def sor(omega: float | jax.Array = 1.0, *, schedule: Schedule | Colours | None = None) -> Solver:
    """Successive over-relaxation x += (D / omega + L)^-1 (b - A x), A = D + L + U, in the order of the schedule.

    Converges for every omega in (0, 2) when A is symmetric (Hermitian) positive definite. For a consistently ordered A,
    whose Jacobi matrix I - D^-1 A has the real eigenvalues +-mu_i and spectral radius beta < 1, the best is omega = 1 +
    (beta / (1 + sqrt(1 - beta^2)))^2, and the error then falls by omega - 1 a step. omega = 1 is Gauss-Seidel.

    Args:
      omega: real scalar in (0, 2); an array leaf, so that a scan or vmap over systems may choose it: see
        `jaxnum.solvers.learned_relaxation`.
      schedule: `sor_schedule(A)` for a sparse A; None for an array.

    Returns:
      A Solver for `Linear` whose A is an array [n, n] or sparse. It stops at ||b - A x|| <= atol + rtol ||b||, the
      residual recomputed from x at every step. `breakdown`: a zero on the diagonal, or entries that the schedule does
      not know; `nonfinite`: it diverged.

    Raises:
      ValueError: omega outside (0, 2); a schedule missing, not wanted or another format's; a problem with a
        preconditioner.
      TypeError: A is a function.

    Cost: one A and one triangular solve a step. A dense solve is LAPACK's; a sparse one is a scan of as many turns as
      the pattern has levels (2 n - 1 for an n x n grid, 5-point), so it suits many unknowns to a level. Colour by
      colour it is a scan of as many turns as there are colours (2), and for a matrix of diagonals one A less than
      colours: a twelfth of the time on a 256 x 256 grid on two CPU cores.

    Numerics: the iterates are those of the sequential sweep, in the natural order (without a schedule too) or, with
      `sor_schedule(A, ordering="multicolour")`, through the unknowns colour by colour: other iterates of the same
      limit. Where two colours suffice A is consistently ordered by them, and the best omega and its rate are the same.

    Source: Young, "Iterative methods for solving partial difference equations of elliptic type" (1954); Saad,
      "Iterative Methods for Sparse Linear Systems", 2nd ed. (2003), sections 4.1, 4.2.5 and 11.6.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> A = jnp.array([[4.0, 1.0], [1.0, 3.0]])
      >>> x = jaxnum.linear_solve(A, jnp.array([1.0, 2.0]), solver=jaxnum.solvers.sor(1.02)).x
      >>> [f"{float(entry):.4f}" for entry in x]
      ['0.0909', '0.6364']
    """
    sweeps.check_relaxation("sor", omega)
    return Solver(
        name="sor", init=_init, step=_step, measure=measure_sweep, problem=Linear, hyper=hyper(omega, schedule)
    )


def sor_schedule(A: Any, *, ordering: str = "natural") -> Schedule | Colours:
    """Which unknowns of a sparse A a sweep may treat at once, in which order; made once, on the host.

    In the natural order row i waits for the rows j < i with an entry A_ij or A_ji; its level is the longest chain of
    waits, and rows of one level are treated together. In a multicolour order each row has the least colour that no such
    j has, and rows of one colour, which do not read each other, are treated together: red and black on a 5-point grid.
    The schedule holds places, not values: it serves every A of the same format and pattern.

    Args:
      A: concrete square sparse matrix or operator, as `jaxnum.sparse_operator` takes or returns it.
      ordering: "natural", or "multicolour" for few and long turns, which suit accelerators and stencils. It changes the
        iterates: they are those of the natural order on P A P^T, P sorting the unknowns by colour. `sor` takes a few
        per cent more steps; `cg` with `ssor_preconditioner` keeps little of its gain, and omega = 1 is its best then
        (on a 256 x 256 grid 236 steps, in the natural order 71, unpreconditioned 470).

    Returns:
      A pytree of int32 arrays for `sor`, `ssor` and `ssor_preconditioner`.

    Raises:
      TypeError: A is not sparse, or is being traced.
      ValueError: A is not square, or no such ordering.

    Cost: O(entries log(entries) + levels) of NumPy on the host; at most one colour more than the most entries beside
      the diagonal in a row.

    Source: Saad, "Iterative Methods for Sparse Linear Systems", 2nd ed. (2003), sections 11.6.3 (level scheduling) and
      12.4 (multicolouring).

    Example:
      >>> import numpy as np, scipy.sparse as sp, jaxnum
      >>> arrow = sp.csr_array(np.eye(4, dtype=np.float32) + np.eye(4)[:, -1:] + np.eye(4)[-1:, :])
      >>> jaxnum.solvers.sor_schedule(arrow).rows.tolist()
      [[0, 1, 2], [3, 4, 4]]
    """
    checks.choice("sor_schedule", "ordering", ordering, ("natural", "multicolour"))
    A = operators.sparse_operator(A) if operators.is_sparse(A) else A
    known = isinstance(A, (DiaOperator, EllOperator))
    checks.value("sor_schedule", "A", known, "be a sparse matrix", type(A).__name__, error=TypeError)
    concrete = not any(checks.traced(leaf) for leaf in jax.tree.leaves(A))
    remedy = "Make the schedule before tracing, from any matrix of the same pattern."
    checks.value("sor_schedule", "A", concrete, "be concrete", "a traced matrix", remedy, TypeError)
    checks.value("sor_schedule", "A", A.shape[0] == A.shape[1], "be square", A.shape)
    return sweeps.build(A, ordering)


def hyper(omega: float | jax.Array, schedule: Schedule | Colours | None) -> SorHyper:
    """Omega as a leaf, beside the schedule."""
    return SorHyper(jnp.asarray(omega), schedule)


def begin_sweeps(function: str, hyper: SorHyper, x: jax.Array, problem: Linear) -> SorState:
    """The state at x of a solver by sweeps, after the checks that need the problem."""
    sweeps.check_matrix(function, problem.A, hyper.schedule)
    remedy = "Give it to jaxnum.solvers.cg()."
    absent = problem.preconditioner is None
    checks.value(function, "preconditioner", absent, "be None: the sweep is one", "one", remedy)
    broken = sweeps.split(problem.A, hyper.omega, hyper.schedule).broken
    mark = jnp.where(broken, jnp.int32(Status.breakdown), jnp.int32(0))
    return SorState(trees.sub(problem.b, problem.matvec(x)), lengths.scale(problem.b), mark)


def _init(hyper: SorHyper, x: jax.Array, problem: Linear) -> SorState:
    return begin_sweeps("sor", hyper, x, problem)


def _step(hyper: SorHyper, x: jax.Array, state: SorState, problem: Linear) -> tuple[jax.Array, SorState]:
    # Made at every step, not kept in the state: XLA moves it out of the loop, and a state is copied for every lane.
    parts = sweeps.split(problem.A, hyper.omega, hyper.schedule)
    x = x + sweeps.forward(parts, state.r)
    return x, state._replace(r=problem.b - problem.matvec(x))


def measure_sweep(hyper: SorHyper, x: jax.Array, state: SorState, problem: Linear) -> Measure:
    """||b - A x|| beside ||b||."""
    residual, mark = lengths.residual(trees.vdot(state.r, state.r), state.scale, state.mark)
    return Measure(residual, state.scale, mark)
