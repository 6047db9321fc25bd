"""Minimal residuals for symmetric A that need not be definite, with a positive definite preconditioner.

Cost: one A and one preconditioner a step, three reductions; memory 6 vectors.
Source: Paige & Saunders 1975; preconditioned: Elman, Silvester & Wathen 2014, algorithm 4.1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import lanczos, trees
from jaxnum.core.lanczos import Lanczos
from jaxnum.core.problems import Linear
from jaxnum.core.solver import Defaults, Measure, Solver
from jaxnum.core.status import Status
from jaxnum.solvers.linear import lengths
from jaxnum.solvers.linear._cg import asymmetric, verified
from kernels_pallas import checks

PyTree = Any


class MinresState(NamedTuple):
    """What the next step starts from.

    Attributes:
      r: residual.
      lanczos: the recurrence.
      residual: ||r||.
      scale: ||b||.
      mark: a Status found on the way; else -1 less the looks in a row that found r meaningless, 0 before any look.
      look: whether the next step recomputes r from x and leaves x alone.
    """

    r: PyTree
    lanczos: Lanczos
    residual: jax.Array
    scale: jax.Array
    mark: jax.Array
    look: jax.Array


def minres(*, verify_symmetry: bool = False) -> Solver:
    """Minimal residuals for A x = b, A symmetric (Hermitian), the preconditioner M symmetric positive definite.

    x_k minimises ||b - A x||, in the metric of M, over x_0 plus the Krylov space; A may be indefinite, or singular when
    b lies in its range. The residual never grows in that metric. For an A with eigenvalues on both sides the steps grow
    as kappa, for a definite one as sqrt(kappa), where `cg` does the same for less.

    Args:
      verify_symmetry: Python bool; a debug check: before the first step compare <u, A v> with <A u, v> for two pairs of
        random vectors, and break down where they differ by more than rounding. Two products with A each, and about
        as much to compile. See `jaxnum.check_symmetric`.

    Returns:
      A Solver for `Linear`; give the problem (or `linear_solve`) `symmetric="indefinite"`, which its derivative needs.
      It stops at ||b - A x|| <= atol + rtol ||b||, the 2-norm whatever M, where the residual is recomputed from x every
      50 steps and before convergence is declared. `breakdown`: r.M r <= 0, or a dense or sparse A that is not
      symmetric, or a function that `verify_symmetry` finds so. `stagnated`: rounding errors dominate the residual.
      `infeasible`: A r vanishes and r does not, so x is a least-squares solution of a system that has none (rounding
      may hide it: then `stagnated`); or b has a part in the declared null space, or A does not map it to zero.

    Raises:
      ValueError: verify_symmetry is no Python bool. SolverError: through `solve`, for any status but `converged`.

    Cost: one A, one M a step.

    Numerics: the residual is kept by a recurrence of its own, r' = s^2 r + c eta' v', v' the next Lanczos vector; where
      a look finds it meaningless, the recurrence starts again at x. A null space declared by the problem is projected
      out of every vector; without one, a singular consistent system from x0 = 0 gives the solution of least norm when
      M is the identity.

    Source: Paige & Saunders, "Solution of sparse indefinite systems of linear equations" (1975), section 6; Elman,
      Silvester & Wathen, "Finite Elements and Fast Iterative Solvers", 2nd ed. (2014), algorithm 4.1.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> A = jnp.array([[1.0, 2.0], [2.0, 1.0]])
      >>> solution = jaxnum.linear_solve(A, jnp.ones(2), solver=jaxnum.solvers.minres(), symmetric="indefinite")
      >>> [f"{float(entry):.4f}" for entry in solution.x]
      ['0.3333', '0.3333']
    """
    return Solver(
        name="minres",
        init=_verified_init if checks.flag("minres", "verify_symmetry", verify_symmetry) else _init,
        step=_step,
        measure=_measure,
        refresh=_refresh,
        problem=Linear,
        defaults=Defaults(refresh_every=50),
    )


def _init(hyper: None, x: PyTree, problem: Linear) -> MinresState:
    scale = lengths.scale(problem.b)
    still, zero = jax.tree.map(jnp.zeros_like, problem.b), jnp.zeros_like(scale)
    mark = jnp.where(asymmetric(problem.A), jnp.int32(Status.breakdown), jnp.int32(0))
    # The first look finds that r = 0 is meaningless, which is no sign of drift.
    return MinresState(still, lanczos.started(still, still, zero), zero, scale, mark, jnp.bool_(True))


def _verified_init(hyper: None, x: PyTree, problem: Linear) -> MinresState:
    state = _init(hyper, x, problem)
    return state._replace(mark=verified(state.mark, problem))


def _step(hyper: None, x: PyTree, state: MinresState, problem: Linear) -> tuple[PyTree, MinresState]:
    look, old = state.look, state.lanczos
    p = lanczos.normal(old)
    q = problem.matvec(trees.where(look, x, p))
    raw = trees.sub(problem.b, q)
    seen = problem.project(raw)
    v, delta = lanczos.orthogonalised(old, p, q)
    u = trees.where(look, seen, problem.project(v))
    z = u if problem.preconditioner is None else problem.project(problem.preconditioned(u))
    uz = trees.vdot(u, z)
    gamma = jnp.sqrt(jnp.maximum(uz, 0)) + 0 * uz
    moved, r, new = lanczos.advanced(x, state.r, old, p, delta, u, z, gamma)
    # Such a step would go along a null vector, without bound.
    eps = jnp.finfo(uz.dtype).eps
    unsolvable = ~look & (new.flat <= 10 * eps) & (state.residual > 100 * eps * state.scale)
    r = trees.where(look, seen, trees.where(unsolvable, state.r, r))
    x = trees.where(look | unsolvable, x, moved)
    rr = trees.vdot(r, r)
    # Where r has little to do with the residual of x, the Lanczos vectors made from it are stale too.
    lost = look & (rr > 0) & (state.residual * state.residual <= 0.25 * rr)
    new = trees.where(look, trees.where(lost, lanczos.started(u, z, gamma), old), new)
    mark = _mark(state, lost, uz, trees.vdot(u, u), unsolvable)
    if problem.null_space is not None:
        # What the projection removes must be rounding: else b or the image of A leaves the complement.
        removed = trees.norm(trees.sub(raw, seen)) > jnp.finfo(rr.dtype).eps ** 0.5 * state.scale
        mark = jnp.where(look & removed, jnp.int32(Status.infeasible), mark)
    # For b = 0 no residual above zero is small relative to ||b||, but the answer is known.
    null = (state.scale == 0) & ~look
    x = jax.tree.map(lambda leaf: jnp.where(null, 0, leaf), x)
    residual, mark = lengths.residual(rr, state.scale, mark)
    return x, MinresState(r, new, jnp.where(null, 0, residual), state.scale, mark, jnp.zeros_like(look))


def _mark(state: MinresState, lost: jax.Array, uz: jax.Array, uu: jax.Array, unsolvable: jax.Array) -> jax.Array:
    """What the step found: lost residuals, a preconditioner that is not positive, a system without solution."""
    look, mark = state.look, state.mark
    mark = jnp.where(look & (mark <= 0), jnp.where(lost, mark - 1, -1), mark)
    mark = jnp.where(mark < -2, jnp.int32(Status.stagnated), mark)
    mark = jnp.where(unsolvable & (mark <= 0), jnp.int32(Status.infeasible), mark)
    bad = (uz < 0) | ((uz == 0) & (uu > 0))
    return jnp.where(bad, jnp.maximum(mark, jnp.int32(Status.breakdown)), mark)


def _measure(hyper: None, x: PyTree, state: MinresState, problem: Linear) -> Measure:
    return Measure(state.residual, state.scale, jnp.maximum(state.mark, 0))


def _refresh(hyper: None, state: MinresState, due: jax.Array) -> MinresState:
    return state._replace(look=due)
