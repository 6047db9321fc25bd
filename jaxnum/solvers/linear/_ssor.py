"""Symmetric successive over-relaxation: a sweep forth and a sweep back, as a solver and as a preconditioner.

Cost: two triangular solves, and one A when it solves alone. Source: Sheldon 1955; preconditioner: Axelsson 1972.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core import operators
from jaxnum.core.operators import Operator
from jaxnum.core.problems import Linear
from jaxnum.core.solver import Solver
from jaxnum.solvers.linear import _sor, sweeps
from jaxnum.solvers.linear._sor import SorHyper, SorState
from jaxnum.solvers.linear.sweeps import Colours, Schedule, Split


@partial(jax.tree_util.register_dataclass, data_fields=["parts", "omega"], meta_fields=[])
@dataclass(frozen=True)
class SsorOperator(Operator):
    """The inverse of the SSOR splitting matrix, as a linear map."""

    parts: Split
    omega: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        n = self.parts.diagonal.shape[-1]
        return (n, n)

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.parts.diagonal.dtype

    def matvec(self, v: jax.Array) -> jax.Array:
        """M v for v [n]."""
        omega = self.omega.astype(jnp.finfo(self.dtype).dtype)
        half = self.parts.diagonal * sweeps.forward(self.parts, v)
        return (2 - omega) / omega * sweeps.backward(self.parts, half)


def ssor(omega: float | jax.Array = 1.0, *, schedule: Schedule | Colours | None = None) -> Solver:
    """Symmetric successive over-relaxation: x += M (b - A x), M the map of `ssor_preconditioner`.

    Each step is one `sor` sweep forth and one back. Converges for omega in (0, 2) when A is symmetric (Hermitian)
    positive definite, and I - M A has real eigenvalues in [0, 1) then, which is why `cg` with M is so much faster.

    Args:
      omega: real scalar in (0, 2), an array leaf.
      schedule: `sor_schedule(A)` for a sparse A; None for an array.

    Returns:
      A Solver for `Linear` whose A is an array [n, n] or sparse; it stops, and breaks down, as `sor` does.

    Raises:
      ValueError: omega outside (0, 2); a schedule missing or not wanted; a problem with a preconditioner.
      TypeError: A is a function.

    Cost: one A and two triangular solves a step.

    Source: Young, "Iterative Solution of Large Linear Systems" (1971), chapter 15; Saad, "Iterative Methods for Sparse
      Linear Systems", 2nd ed. (2003), section 4.1.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> A = jnp.array([[4.0, 1.0], [1.0, 3.0]])
      >>> x = jaxnum.linear_solve(A, jnp.array([1.0, 2.0]), solver=jaxnum.solvers.ssor()).x
      >>> [f"{float(entry):.4f}" for entry in x]
      ['0.0909', '0.6364']
    """
    sweeps.check_relaxation("ssor", omega)
    return Solver(
        name="ssor",
        init=_init,
        step=_step,
        measure=_sor.measure_sweep,
        problem=Linear,
        hyper=_sor.hyper(omega, schedule),
    )


def ssor_preconditioner(
    A: Any, omega: float | jax.Array = 1.0, *, schedule: Schedule | Colours | None = None
) -> SsorOperator:
    """The SSOR approximation of the inverse of A, for `preconditioner=` of `linear_solve`.

    M = (2 - omega) / omega (D / omega + U)^-1 D (D / omega + L)^-1, A = D + L + U: symmetric positive definite when A
    is. On a Poisson problem of mesh width h, omega = 2 / (1 + sin(pi h)) leaves A M a condition number O(1/h), the
    square root of A's own, so that `cg` needs O(h^-1/2) steps.

    Args:
      A: array [n, n], sparse matrix, or the operator that `jaxnum.sparse_operator` made of one.
      omega: real scalar in (0, 2), an array leaf.
      schedule: `sor_schedule(A)`; None makes one where A is sparse and concrete, so give it where A is traced, or to
        serve many A of one pattern.

    Returns:
      An operator, a pytree with `matvec(r)` = M r, linear, transposable and usable under jit and vmap.

    Raises:
      ValueError: omega outside (0, 2), or a schedule for a dense A.
      TypeError: A is a function, or sparse and traced without a schedule.

    Cost: two triangular solves a product, see `sor`.

    Numerics: where A has a zero on the diagonal, or entries the schedule does not know, M is NaN.

    Source: Axelsson, "A generalized SSOR method" (1972); Saad, "Iterative Methods for Sparse Linear Systems", 2nd ed.
      (2003), section 10.2.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> A = jnp.array([[4.0, 1.0], [1.0, 3.0]])
      >>> M = jaxnum.solvers.ssor_preconditioner(A)
      >>> [f"{float(entry):.4f}" for entry in jaxnum.linear_solve(A, jnp.ones(2), preconditioner=M).x]
      ['0.1818', '0.2727']
    """
    sweeps.check_relaxation("ssor_preconditioner", omega)
    A = operators.sparse_operator(A) if operators.is_sparse(A) else A
    if isinstance(A, Operator) and schedule is None:
        schedule = _sor.sor_schedule(A)
    sweeps.check_matrix("ssor_preconditioner", A, schedule)
    omega = jnp.asarray(omega)
    parts = sweeps.split(A, omega, schedule)
    # A preconditioner has no status of its own.
    return SsorOperator(parts._replace(diagonal=jnp.where(parts.broken, jnp.nan, parts.diagonal)), omega)


def _init(hyper: SorHyper, x: jax.Array, problem: Linear) -> SorState:
    return _sor.begin_sweeps("ssor", hyper, x, problem)


def _step(hyper: SorHyper, x: jax.Array, state: SorState, problem: Linear) -> tuple[jax.Array, SorState]:
    M = SsorOperator(sweeps.split(problem.A, hyper.omega, hyper.schedule), hyper.omega)
    x = x + M.matvec(state.r)
    return x, state._replace(r=problem.b - problem.matvec(x))
