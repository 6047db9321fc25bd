"""Halpern iteration: fixed points of nonexpansive maps with the optimal O(1/k) rate of the last iterate.

Cost: one T a step, one reduction; memory 3 trees like x. Source: Halpern 1967; sharp rate: Lieder 2021; contractive:
Park & Ryu 2022.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.core.problems import FixedPoint
from jaxnum.core.solver import Solver
from jaxnum.solvers.fixed_point._picard import FIXED_POINT_DEFAULTS, measure_fixed_point
from kernels_pallas import checks

PyTree = Any


class HalpernState(NamedTuple):
    """Anchor, T(x), and the inverse of the last anchor weight, phi_k (k + 1 when T is not a contraction)."""

    anchor: PyTree
    image: PyTree
    phi: jax.Array


def halpern(*, contraction: float | jax.Array = 1.0) -> Solver:
    """Halpern iteration x_{k+1} = lambda_k x_0 + (1 - lambda_k) T(x_k).

    For a nonexpansive T (`contraction` = 1) the weights are lambda_k = 1/(k+2) and the last iterate obeys the sharp
    bound ||x_N - T(x_N)|| <= 2 ||x_0 - x*|| / (N+1). For a gamma-contraction (`contraction` = gamma < 1) they are
    lambda_k = 1/phi_{k+1}, phi_k = sum_{i=0}^k gamma^{-2i}, and
    ||x_N - T(x_N)|| <= (1+gamma) ||x_0 - x*|| / sum_{i=0}^N gamma^{-i}: the optimal method, never slower than Picard in
    the worst case. gamma = 1 gives the first case back. The anchor x_0 is where the run started: `restarted(halpern())`
    moves it.

    Args:
      contraction: Lipschitz constant gamma of T, real scalar in (0, 1]. An array leaf: another value costs no
        recompilation.

    Returns:
      A Solver for `FixedPoint`. It stops at ||x - T(x)|| <= atol + rtol ||T(x)||, norm over all leaves; x is the last
      iterate, never an average.

    Raises:
      ValueError: contraction outside (0, 1].

    Cost: one evaluation of T a step.

    Numerics: the update is written T(x) + lambda (x_0 - T(x)), so that a tiny lambda loses no bits of T(x). phi grows
      like gamma^{-2k}; where it overflows, lambda is exactly 0 and the iteration is Picard's, its limit.

    Source: Halpern (1967); Lieder, "On the convergence rate of the Halpern-iteration" (2021), theorem 2.1; Park & Ryu,
      "Exact optimal accelerated complexity for fixed-point iterations" (2022), OC-Halpern.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> rotate = lambda z: jnp.stack([-z[1], z[0]])  # Picard circles for ever
      >>> solution = jaxnum.fixed_point(rotate, jnp.ones(2), solver=jaxnum.solvers.halpern(), atol=1e-2)
      >>> bool(jnp.linalg.norm(solution.x) < 1e-2)
      True
    """
    if not checks.traced(contraction):
        checks.value("halpern", "contraction", 0 < float(contraction) <= 1, "be in (0, 1]", contraction)
    return Solver(
        name="halpern",
        init=_init,
        step=_step,
        measure=measure_fixed_point,
        problem=FixedPoint,
        hyper=jnp.asarray(contraction),
        defaults=FIXED_POINT_DEFAULTS,
    )


def _init(hyper: jax.Array, x: PyTree, problem: FixedPoint) -> HalpernState:
    return HalpernState(x, problem.map(x), jnp.ones((), precision.accumulator(precision.coarsest(x))))


def _step(hyper: jax.Array, x: PyTree, state: HalpernState, problem: FixedPoint) -> tuple[PyTree, HalpernState]:
    # phi_{k+1} = 1 + phi_k / gamma^2 sums the powers without forming them.
    phi = 1 + state.phi / hyper.astype(state.phi.dtype) ** 2
    x = trees.add_scaled(state.image, 1 / phi, trees.sub(state.anchor, state.image))
    return x, HalpernState(state.anchor, problem.map(x), phi)
