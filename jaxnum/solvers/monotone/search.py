"""What the solvers of inclusions share: the forward-backward point, and the search for an unknown Lipschitz constant.

The search never loops inside a step: a trial that fails its inequality leaves x where it is and doubles the estimate,
and the next step tries again. So a step costs the same whether it is accepted or not, under vmap too, and reverse mode
can go through it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.core.solver import ByPrecision, Defaults
from jaxnum.core.status import Status

PyTree = Any

# G = 0 has its solution where F(x) = 0, and x = 0 may be that solution: no scale serves alone.
INCLUSION_DEFAULTS = Defaults(atol=ByPrecision(float64=1e-12, shorter=1e-7))

# Differences of F below this many roundings of F say nothing about its Lipschitz constant.
_ROUNDINGS = 64.0


def forward_backward(x: PyTree, force: PyTree, step: jax.Array, problem: Any) -> PyTree:
    """J_{step G}(x - step F(x)), given `force` = F(x)."""
    return problem.backward(trees.add_scaled(x, -step, force), step)


def first_lipschitz(x: PyTree, force: PyTree, problem: Any) -> jax.Array:
    """||F(y) - F(x)|| / ||y - x|| at a y near x: a guess of L from below, which the search raises."""
    eps = jnp.finfo(precision.coarsest(x)).eps
    size, around = trees.norm(force), 1 + trees.norm(x)
    known = size > 0
    direction = trees.where(known, force, jax.tree.map(jnp.ones_like, x))
    y = trees.add_scaled(x, -(eps ** (1 / 3)) * around / trees.norm(direction), direction)
    slope = trees.norm(trees.sub(problem.operator(y), force)) / trees.norm(trees.sub(y, x))
    # A constant F has L = 0, and no step is too long for it; the floor keeps the step finite.
    floor = 1e-3 * jnp.where(known, size, 1) / around
    return jax.lax.stop_gradient(jnp.maximum(slope, floor))


def above_rounding(rise: jax.Array, x: PyTree, size: jax.Array, lipschitz: jax.Array, rejected: jax.Array) -> jax.Array:
    """Whether a difference of F of norm `rise` is more than rounding of values of norm `size` at x."""
    eps = jnp.finfo(precision.coarsest(x)).eps
    return rise > _ROUNDINGS * eps * (trusted(lipschitz, rejected) * trees.norm(x) + size)


def trusted(lipschitz: jax.Array, rejected: jax.Array) -> jax.Array:
    """The estimate before the rejections in a row: doubling must silence no test that scales with it."""
    return lipschitz * jnp.exp2(-rejected.astype(lipschitz.dtype))


def searched(rejected: jax.Array, x: PyTree) -> jax.Array:
    """The flag of a search: breakdown when the estimate was doubled in vain until rounding decides."""
    limit = jnp.finfo(precision.coarsest(x)).nmant // 2
    return jnp.where(rejected >= limit, jnp.int32(Status.breakdown), jnp.int32(0))
