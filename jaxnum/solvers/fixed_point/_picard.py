"""Picard iteration x <- T(x), damped if asked: for contractions, and for averaged maps when damped.

Cost: one T a step, one reduction; memory 2 trees like x. Source: Banach 1922; damped: Krasnosel'skii 1955, Mann 1953.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import trees
from jaxnum.core.problems import FixedPoint
from jaxnum.core.solver import ByPrecision, Defaults, Measure, Solver
from kernels_pallas import checks

PyTree = Any


class PicardState(NamedTuple):
    """T(x), from which both the residual and the next step come."""

    image: PyTree


def picard(*, damping: float | jax.Array = 1.0) -> Solver:
    """Picard iteration x_{k+1} = x_k + damping (T(x_k) - x_k).

    Converges linearly, with factor gamma, for a gamma-contraction; with damping in (0, 1) (Krasnosel'skii-Mann) also
    for a nonexpansive T with a fixed point, where ||x_k - T(x_k)|| = O(1/sqrt(k)). There `halpern` is faster: O(1/k).

    Args:
      damping: real scalar in (0, 1]; an array leaf, so another value costs no recompilation.

    Returns:
      A Solver for `FixedPoint`. It stops at ||x - T(x)|| <= atol + rtol ||T(x)||, norm over all leaves; x is the last
      iterate.

    Raises:
      ValueError: damping outside (0, 1].

    Cost: one evaluation of T a step.

    Source: Banach (1922); Krasnosel'skii (1955), Mann (1953).

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> solution = jaxnum.fixed_point(jnp.cos, jnp.float32(1.0), solver=jaxnum.solvers.picard(damping=0.6))
      >>> print(f"{float(solution.x):.4f}")
      0.7391
    """
    if not checks.traced(damping):
        checks.value("picard", "damping", 0 < float(damping) <= 1, "be in (0, 1]", damping)
    return Solver(
        name="picard",
        init=_init,
        step=_step,
        measure=measure_fixed_point,
        problem=FixedPoint,
        hyper=jnp.asarray(damping),
        defaults=FIXED_POINT_DEFAULTS,
    )


# Where the fixed point may be zero, a tolerance relative to ||T(x)|| alone could never be met.
FIXED_POINT_DEFAULTS = Defaults(atol=ByPrecision(float64=1e-12, shorter=1e-7))


def _init(hyper: jax.Array, x: PyTree, problem: FixedPoint) -> PicardState:
    return PicardState(problem.map(x))


def _step(hyper: jax.Array, x: PyTree, state: PicardState, problem: FixedPoint) -> tuple[PyTree, PicardState]:
    x = trees.add_scaled(x, hyper, trees.sub(state.image, x))
    return x, PicardState(problem.map(x))


def measure_fixed_point(hyper: PyTree, x: PyTree, state: Any, problem: FixedPoint) -> Measure:
    """||x - T(x)|| beside ||T(x)||, for every state that caches `image` = T(x)."""
    return Measure(trees.norm(trees.sub(x, state.image)), trees.norm(state.image), jnp.int32(0))
