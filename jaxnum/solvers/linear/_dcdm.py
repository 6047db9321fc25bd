"""The deep conjugate direction method: conjugate gradients along directions that a network proposes.

Cost: one A, one network and one reduction for each kept direction a step; memory 2 m + 3 vectors.
Source: Kaneda, Akar, Chen, Kala, Hyde & Teran 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import trees
from jaxnum.core.functions import Function, as_function
from jaxnum.core.problems import Linear
from jaxnum.core.solver import Defaults, Solver
from jaxnum.solvers.linear import _cg
from kernels_pallas import checks

PyTree = Any


class DCDMState(NamedTuple):
    """A `FlexibleCGState` whose base.p is r, and how many directions were orthogonal to r and replaced by it."""

    base: _cg.CGState
    directions: PyTree
    images: PyTree
    curvatures: jax.Array
    count: jax.Array
    replaced: jax.Array


class _Hyper(NamedTuple):
    direction: Function
    params: PyTree
    ring: jax.Array


def dcdm(direction: Callable, params: PyTree = (), *, keep: int = 2) -> Solver:
    """Conjugate directions d = f(params, r / ||r||) proposed by any function f, for symmetric positive definite A.

    d is made A-orthogonal to the last `keep` directions p_i, p = d - sum_i (d.Ap_i / p_i.Ap_i) p_i, and followed to the
    minimum of the A-norm of the error: alpha = p.r / p.Ap, x += alpha p, r -= alpha Ap. The error falls whatever f
    proposes; how fast is all that f decides. f(r) = r gives conjugate gradients, f = A^-1 one step.

    Args:
      direction: f(params, r), r of norm 1 and shaped like b, to a tree like r; a module-level function, since a fresh
        lambda compiles anew. Such as `dcdm_network`. It need not be linear, and its length does not matter. Where rows
        of A are zero (cells outside the domain) it must return zero.
      params: pytree of arrays, the network's weights; other weights cost no compilation.
      keep: number m >= 1 of earlier directions to stay A-orthogonal to.

    Returns:
      A Solver for `Linear`; a preconditioner of the problem serves its derivatives alone. It stops at
      ||b - A x|| <= atol + rtol ||b||, where the residual is recomputed from x every 50 steps and before convergence is
      declared. A direction (nearly) orthogonal to r cannot help; r takes its place, and `state.replaced` counts it.
      `breakdown`: p.Ap <= 0.

    Raises:
      TypeError: direction is not a function. ValueError: keep below 1.

    Cost: one A and one f a step. On a CPU a convolutional f costs tens of products with a five-point A, so the steps it
      saves do not pay there; see the benchmark's row.

    Source: Kaneda, Akar, Chen, Kala, Hyde & Teran, "A deep conjugate direction method for iteratively solving linear
      systems" (ICML 2023), algorithm 1; the replacement of directions orthogonal to r is ours.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> A = jnp.array([[4.0, 1.0], [1.0, 3.0]])
      >>> exact = lambda inverse, r: inverse @ r
      >>> solver = jaxnum.solvers.dcdm(exact, jnp.linalg.inv(A))
      >>> int(jaxnum.linear_solve(A, jnp.array([1.0, 2.0]), solver=solver).steps)
      1
    """
    checks.value("dcdm", "direction", callable(direction), "be a function", type(direction).__name__, error=TypeError)
    ok = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    checks.value("dcdm", "keep", ok, "be a Python int >= 1", keep)
    params = jax.tree.map(jnp.asarray, params)
    return Solver(
        name="dcdm",
        init=_init,
        step=_step,
        measure=_cg.flexible_measure,
        refresh=_cg.flexible_refresh,
        problem=Linear,
        # The ring's length is a shape, so it travels as the shape of a leaf.
        hyper=_Hyper(as_function(direction), params, jnp.zeros((keep,), jnp.int8)),
        defaults=Defaults(refresh_every=50),
    )


def dcdm_loss(direction: Callable, params: PyTree, A: Callable, b: PyTree) -> jax.Array:
    """What one exact line search along f(params, b / ||b||) from zero leaves of b: ||b - alpha A d||^2 / ||b||^2.

    alpha = d.b / d.Ad. No solution enters: the loss is 0 iff d is parallel to A^-1 b, and it does not change with the
    length of d. It may exceed 1, since the search minimises the A-norm of the error and not the residual.

    Args:
      direction: as for `dcdm`.
      params: the network's weights.
      A: linear function v -> A v, symmetric positive definite.
      b: right-hand side, a tree of floating-point arrays; average over a batch with `jax.vmap`.

    Returns:
      Real scalar >= 0, differentiable in params; 0 for b = 0, 1 for a direction of zero.

    Raises:
      TreeError, ShapeError, DtypeError: direction does not return a tree like b.

    Source: Kaneda et al. (ICML 2023), section 4.1.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> A = lambda v: 2 * v
      >>> float(jaxnum.solvers.dcdm_loss(lambda params, r: -3 * r, (), A, jnp.arange(3.0)))
      0.0
    """
    unit, _ = normalised(b)
    d = direction(params, unit)
    checks.same_tree("dcdm_loss", ("b", b), dtypes=True, **{"direction(params, b)": d})
    q = A(d)
    curvature = trees.vdot(d, q)
    alpha = jnp.where(curvature == 0, 0, trees.vdot(d, unit) / jnp.where(curvature == 0, 1, curvature))
    rest = trees.add_scaled(unit, -alpha, q)
    return trees.vdot(rest, rest)


def normalised(r: PyTree) -> tuple[PyTree, jax.Array]:
    """R / ||r|| and ||r||; zero stays zero."""
    norm = trees.norm(r)
    return trees.scaled(1 / jnp.where(norm > 0, norm, 1), r), norm


def _init(hyper: _Hyper, x: PyTree, problem: Linear) -> DCDMState:
    return DCDMState(*_cg.flexible_init(hyper.ring, x, problem), jnp.int32(0))


def _step(hyper: _Hyper, x: PyTree, state: DCDMState, problem: Linear) -> tuple[PyTree, DCDMState]:
    base = state.base
    ring = _cg.FlexibleCGState(*state[:-1])
    unit, size = normalised(base.r)
    d = hyper.direction(hyper.params, unit)
    checks.same_tree("dcdm", ("b", problem.b), dtypes=True, **{"direction(params, r)": d})
    p = problem.project(_cg.conjugate(d, ring, hyper.ring.size))
    slope, length = trees.vdot(p, base.r), trees.norm(p)
    # r is orthogonal to every direction already followed, so that it keeps its slope when made conjugate to them.
    useless = jnp.abs(slope) <= jnp.finfo(slope.dtype).eps ** 0.5 * length * size
    p = trees.where(useless, _cg.conjugate(unit, ring, hyper.ring.size), p)
    slope = jnp.where(useless, trees.vdot(p, base.r), slope)
    moved, r, q, pq, mark = _cg.advance(x, p, base, slope, problem)
    # On a look the length is zero, and zero times a direction of NaN is not.
    x = trees.where(base.look, x, moved)
    rr = trees.vdot(r, r)
    x, _, new = _cg.judge(x, r, pq, rr, rr, mark, base)
    ring = _cg.remember(ring, new._replace(p=r), p, problem.project(q), pq)
    return x, DCDMState(*ring, state.replaced + (useless & ~base.look))
