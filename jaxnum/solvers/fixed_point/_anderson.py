"""Anderson acceleration (type II): fixed points of contractions in a Krylov space of the last few residuals.

Cost: one T and 2 m + 1 inner products a step; memory 2 m + 2 trees like x. Source: Anderson 1965; Walker & Ni 2011.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.core.problems import FixedPoint
from jaxnum.core.solver import ByPrecision, Solver
from jaxnum.solvers.fixed_point._picard import FIXED_POINT_DEFAULTS, measure_fixed_point
from kernels_pallas import checks

PyTree = Any

# What keeps the normal equations regular: the square of their unit of rounding would not.
_REGULARISATION = ByPrecision(float64=1e-12, shorter=1e-5)


class AndersonState(NamedTuple):
    """T(x), and rings of the last m differences.

    Attributes:
      image: T(x).
      moves: differences of x.
      changes: differences of the residual f = T(x) - x.
      gram: inner products of the changes, real [m, m].
      count: int32, steps taken.
    """

    image: PyTree
    moves: PyTree
    changes: PyTree
    gram: jax.Array
    count: jax.Array


class _AndersonHyper(NamedTuple):
    slots: jax.Array
    damping: jax.Array
    regularisation: jax.Array | None


def anderson(
    memory: int = 5, *, damping: float | jax.Array = 1.0, regularisation: float | jax.Array | None = None
) -> Solver:
    """Anderson acceleration of x <- T(x), type II, over the last m residuals.

    With f_k = T(x_k) - x_k, dx_i = x_{i+1} - x_i, df_i = f_{i+1} - f_i over the last m steps,
      gamma = argmin ||f_k - sum_i gamma_i df_i||^2 + regularisation sum_i gamma_i^2 ||df_i||^2,
      x_{k+1} = x_k + damping f_k - sum_i gamma_i (dx_i + damping df_i).
    For affine T, k <= m and no regularisation, x_{k+1} is T of the k-th GMRES iterate. Near a fixed point of a smooth
    contraction it converges at Picard's rate at least while the gamma stay bounded; far from one it may diverge, as a
    quasi-Newton method without line search may. `halpern` is the choice for maps that are only nonexpansive.

    Args:
      memory: m, Python int >= 1.
      damping: real scalar in (0, 1], an array leaf.
      regularisation: real scalar >= 0, relative to the squared length of each difference, an array leaf; default 1e-12
        in float64, else 1e-5.

    Returns:
      A Solver for `FixedPoint`. It stops at ||x - T(x)|| <= atol + rtol ||T(x)||, norm over all leaves.

    Raises:
      ValueError: memory below 1, damping outside (0, 1], regularisation below 0.

    Cost: one evaluation of T, m + 1 inner products and one m x m solve a step.

    Numerics: the least squares problem is solved by its normal equations, scaled to unit diagonal. Slots of the ring
      that are not filled yet, and differences that are zero, are masked.

    Source: Anderson, "Iterative procedures for nonlinear integral equations" (1965); Walker & Ni, "Anderson
      acceleration for fixed-point iterations" (2011), theorem 2.2 for the equivalence with GMRES.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> slow = lambda x: 0.99 * x + jnp.array([0.01, 0.02])  # Picard takes hundreds of steps
      >>> solution = jaxnum.fixed_point(slow, jnp.zeros(2), solver=jaxnum.solvers.anderson())
      >>> int(solution.steps) < 10
      True
    """
    ok = isinstance(memory, int) and not isinstance(memory, bool) and memory >= 1
    checks.value("anderson", "memory", ok, "be a Python int >= 1", memory)
    if not checks.traced(damping):
        checks.value("anderson", "damping", 0 < float(damping) <= 1, "be in (0, 1]", damping)
    if regularisation is not None and not checks.traced(regularisation):
        good = 0 <= float(regularisation) < jnp.inf
        checks.value("anderson", "regularisation", good, "be a finite real number >= 0, or None", regularisation)
    hyper = _AndersonHyper(
        # The ring's length is a shape, so it travels as the shape of a leaf.
        jnp.zeros((memory,), jnp.int8),
        jnp.asarray(damping),
        None if regularisation is None else jnp.asarray(regularisation),
    )
    return Solver(
        name="anderson",
        init=_init,
        step=_step,
        measure=measure_fixed_point,
        problem=FixedPoint,
        hyper=hyper,
        defaults=FIXED_POINT_DEFAULTS,
    )


def _init(hyper: _AndersonHyper, x: PyTree, problem: FixedPoint) -> AndersonState:
    m = hyper.slots.shape[0]
    # Stacked from copies of x's leaves, so that the rings inherit their sharding.
    ring = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf)] * m), x)
    gram = jnp.zeros((m, m), precision.accumulator(precision.coarsest(x)))
    return AndersonState(problem.map(x), ring, ring, gram, jnp.int32(0))


def _step(hyper: _AndersonHyper, x: PyTree, state: AndersonState, problem: FixedPoint) -> tuple[PyTree, AndersonState]:
    residual = trees.sub(state.image, x)
    gamma = _weights(hyper, residual, state)
    damping = hyper.damping.astype(gamma.dtype)

    def mix(leaf: jax.Array, f: jax.Array, moves: jax.Array, changes: jax.Array) -> jax.Array:
        beta = damping.astype(leaf.dtype)
        back = jnp.tensordot(gamma.astype(leaf.dtype), moves + beta * changes, 1, precision="highest")
        return leaf + beta * f - back

    new = jax.tree.map(mix, x, residual, state.moves, state.changes)
    image = problem.map(new)
    change = trees.sub(trees.sub(image, new), residual)
    m = hyper.slots.shape[0]
    here = jnp.arange(m, dtype=jnp.int32) == state.count % m

    def put(ring: jax.Array, entry: jax.Array) -> jax.Array:
        # A choice, not a scatter: scatters refuse explicitly sharded operands.
        return jnp.where(here.reshape((m,) + (1,) * (ring.ndim - 1)), entry, ring)

    changes = jax.tree.map(put, state.changes, change)
    row = _products(changes, change).astype(state.gram.dtype)
    gram = jnp.where(here[:, None], row[None, :], jnp.where(here[None, :], row[:, None], state.gram))
    moves = jax.tree.map(put, state.moves, trees.sub(new, x))
    return new, AndersonState(image, moves, changes, gram, state.count + 1)


def _products(ring: PyTree, v: PyTree) -> jax.Array:
    return jax.vmap(lambda member: trees.vdot(member, v))(ring)


def _weights(hyper: _AndersonHyper, residual: PyTree, state: AndersonState) -> jax.Array:
    """gamma, from normal equations scaled to unit diagonal; 0 where the ring holds nothing."""
    given = hyper.regularisation
    ridge = jnp.asarray(_REGULARISATION.pick(residual) if given is None else given, state.gram.dtype)
    squares = jnp.diagonal(state.gram)
    filled = squares > 0
    inverse = jnp.where(filled, jax.lax.rsqrt(jnp.where(filled, squares, 1)), 0)
    matrix = inverse[:, None] * state.gram * inverse[None, :]
    matrix = matrix + jnp.diag(jnp.where(filled, ridge, 1))
    right = inverse * _products(state.changes, residual).astype(matrix.dtype)
    return inverse * jnp.linalg.solve(matrix, right)
