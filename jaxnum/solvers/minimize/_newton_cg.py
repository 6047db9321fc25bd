"""Truncated Newton: conjugate gradients on the Newton equation, as far as the gradient deserves, and backtracking.

Cost: one gradient a step, a Hessian product for each inner step; memory 6 vectors.
Source: Dembo & Steihaug 1983.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.problems import Minimize
from jaxnum.core.solver import Measure, Solver
from jaxnum.core.status import Status
from jaxnum.curvature import hessian_product
from jaxnum.solvers.minimize import flat
from kernels_pallas import checks

PyTree = Any


class NewtonCGState(NamedTuple):
    """What the next step starts from.

    Attributes:
      gradient: [d] at x.
      residual: its norm.
      mark: [] int32, a Status found on the way, else 0.
    """

    gradient: jax.Array
    residual: jax.Array
    mark: jax.Array


def newton_cg(*, inner_steps: int = 50) -> Solver:
    """Minimise a smooth f by inexact Newton steps x <- x + t d.

    d solves H d = -g by conjugate gradients until |H d + g| <= min(1/2, sqrt |g|) |g|: loosely far from the minimum,
    ever better near it, so that convergence is faster than linear. A direction of curvature p.Hp <= 0 ends the inner
    loop with what it has (with -g where it is the first), so that every d descends; t is 1, 1/2, 1/4, ... by Armijo's
    rule. No dense Hessian is formed.

    Args:
      inner_steps: Python int >= 1, Hessian products a step at most.

    Returns:
      A Solver for `Minimize`. It stops at |gradient| <= atol + rtol (scale 1, as the gtol of scipy.optimize).
      `stagnated`: no step along d decreases f, up to rounding. A saddle or a maximum that it starts from meets the
      tolerance too: the Hessian is not asked.

    Raises:
      ValueError: inner_steps below 1; at the solve, the problem has a resolvent.

    Cost: one gradient and at most inner_steps Hessian products a step.

    Numerics: f is compared up to 8 roundings. The leaves of x are laid end to end in their widest dtype; explicitly
      sharded ones are gathered. With `adjoint="unrolled"` each d is differentiated as the solution of H d = -g.

    Source: Dembo & Steihaug, "Truncated-Newton algorithms for large-scale unconstrained optimization" (1983); Nocedal &
      Wright, "Numerical optimization" (2006), algorithm 7.1.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> f = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
      >>> solution = jaxnum.minimize(f, jnp.array([-1.2, 1.0]), solver=jaxnum.solvers.newton_cg())
      >>> bool(jnp.allclose(solution.x, 1.0, atol=1e-3))
      True
    """
    ok = isinstance(inner_steps, int) and not isinstance(inner_steps, bool) and inner_steps >= 1
    checks.value("newton_cg", "inner_steps", ok, "be a Python int >= 1", inner_steps)
    return Solver(
        name="newton_cg",
        init=_init,
        step=_step,
        measure=_measure,
        problem=Minimize,
        hyper=jnp.asarray(inner_steps, jnp.int32),
    )


def _init(hyper: jax.Array, x: PyTree, problem: Minimize) -> NewtonCGState:
    remedy = "Take jaxnum.solvers.bcd, or jaxnum.inclusion with the gradient."
    checks.value("newton_cg", "problem", problem.resolvent is None, "have no resolvent", "one", remedy)
    z, tree = flat.flatten(x)
    return _state(flat.gradient(problem, z, tree), jnp.int32(0))


def _state(g: jax.Array, mark: jax.Array) -> NewtonCGState:
    return NewtonCGState(g, jnp.sqrt(jnp.sum(g**2)), mark)


def _step(hyper: jax.Array, x: PyTree, state: NewtonCGState, problem: Minimize) -> tuple[PyTree, NewtonCGState]:
    z, tree = flat.flatten(x)
    g = state.gradient
    product = hessian_product(flat.value(problem, tree), z)
    share = jax.lax.stop_gradient(jnp.minimum(0.5, jnp.sqrt(state.residual)))

    def solve(matvec: Any, rhs: jax.Array) -> jax.Array:
        return flat.truncated(matvec, rhs, share, hyper)

    d = jax.lax.custom_linear_solve(product, -g, solve, symmetric=True)
    slope = jnp.sum(g * d)
    still, start, direction = jax.lax.stop_gradient((problem, z, d))
    fn = flat.value(still, tree)
    t = flat.armijo(lambda t: fn(start + t * direction), slope)
    mark = jnp.where((t == 0) & (state.residual > 0), jnp.int32(Status.stagnated), state.mark)
    z = z + t * d
    return tree(z), _state(flat.gradient(problem, z, tree), mark)


def _measure(hyper: jax.Array, x: PyTree, state: NewtonCGState, problem: Minimize) -> Measure:
    return Measure(state.residual, jnp.ones_like(state.residual), state.mark)
