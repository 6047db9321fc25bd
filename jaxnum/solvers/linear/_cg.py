"""Conjugate gradients for symmetric positive definite A, preconditioned, and flexible when the preconditioner varies.

Cost: one A and one preconditioner a step, two reductions; memory 4 vectors (flexible: 2 m more).
Source: Hestenes & Stiefel 1952; flexible: Notay 2000; residual replacement: van der Vorst & Ye 2000.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import trees
from jaxnum.core.operators import Operator, check_symmetric
from jaxnum.core.problems import Linear
from jaxnum.core.solver import Defaults, Measure, Solver
from jaxnum.core.status import Status
from jaxnum.solvers.linear import lengths
from kernels_pallas import checks

PyTree = Any


class CGState(NamedTuple):
    """What the next step starts from.

    Attributes:
      r: residual.
      p: next direction.
      rz: r.z, z the preconditioned residual.
      residual: ||r||.
      scale: ||b||.
      mark: a Status found on the way; else -1 less the looks in a row that found r meaningless, 0 before any look.
      look: whether the next step recomputes r from x and leaves x alone.
    """

    r: PyTree
    p: PyTree
    rz: jax.Array
    residual: jax.Array
    scale: jax.Array
    mark: jax.Array
    look: jax.Array


class FlexibleCGState(NamedTuple):
    """A CGState whose p is the preconditioned residual z, and rings of the last m directions p, A p and p.A p."""

    base: CGState
    directions: PyTree
    images: PyTree
    curvatures: jax.Array
    count: jax.Array


def cg(*, flexible: int | None = None, verify_symmetry: bool = False) -> Solver:
    """Preconditioned conjugate gradients for A x = b, A and the preconditioner M symmetric positive definite.

    With z = M r: alpha = r.z / p.Ap, x += alpha p, r -= alpha Ap, beta = r'.z' / r.z, p = z' + beta p. The error in the
    A-norm falls as 2 ((sqrt kappa - 1)/(sqrt kappa + 1))^k; A with d distinct eigenvalues takes at most d steps.

    Args:
      flexible: None, or the number m >= 1 of earlier directions to keep orthogonal to, for an M that changes from step
        to step (an inner solve, a network): Notay's FCG(m), p = z - sum_i (z.Ap_i / p_i.Ap_i) p_i over the last
        max(1, k mod (m+1)) directions. m = 1 is the Polak-Ribiere form in exact arithmetic.
      verify_symmetry: Python bool; a debug check: before the first step compare <u, A v> with <A u, v> for two pairs of
        random vectors, and break down where they differ by more than rounding. Two products with A each, and about
        as much to compile. See `jaxnum.check_symmetric`.

    Returns:
      A Solver for `Linear`. It stops at ||b - A x|| <= atol + rtol ||b||, where the residual is recomputed from x every
      50 steps and before convergence is declared. `breakdown`: p.Ap <= 0, r.z <= 0, or a dense or sparse A that
      is not symmetric; x is then the last good iterate, and without `flexible` the direction of p.Ap <= 0 is
      `solution.state.p`. `stagnated`: rounding errors dominate the residual. `infeasible`: b has a part in the declared
      null space, or A does not map it to zero.

    Raises:
      ValueError: flexible below 1, or verify_symmetry no Python bool.

    Cost: one A, one M a step.

    Numerics: the residual attainable is about eps kappa ||b||. Reductions in float32 at least. A null space declared by
      the problem is projected out of every residual and direction. Residuals below 1e-19 in float32 (1e-154 in float64)
      have no square: asked for less, as for a b below 1e-14 at rtol 1e-5, it ends `stagnated`; scale b.

    Source: Hestenes & Stiefel, "Methods of conjugate gradients for solving linear systems" (1952), section 3; Notay,
      "Flexible conjugate gradients" (2000), algorithm FCG(m).

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> A = jnp.array([[4.0, 1.0], [1.0, 3.0]])
      >>> solution = jaxnum.linear_solve(A, jnp.array([1.0, 2.0]), solver=jaxnum.solvers.cg(flexible=2))
      >>> int(solution.steps)
      2
    """
    verify = checks.flag("cg", "verify_symmetry", verify_symmetry)
    if flexible is None:
        return Solver(
            name="cg",
            init=_verified_init if verify else _init,
            step=_step,
            measure=_measure,
            refresh=_refresh,
            problem=Linear,
            defaults=_DEFAULTS,
        )
    ok = isinstance(flexible, int) and not isinstance(flexible, bool) and flexible >= 1
    checks.value("cg", "flexible", ok, "be None or a Python int >= 1", flexible)
    # The ring's length is a shape, so it travels as the shape of a leaf.
    return Solver(
        name="cg",
        init=_verified_flexible_init if verify else flexible_init,
        step=_flexible_step,
        measure=flexible_measure,
        refresh=flexible_refresh,
        problem=Linear,
        hyper=jnp.zeros((flexible,), jnp.int8),
        defaults=_DEFAULTS,
    )


# The default atol is 0: an absolute tolerance would accept x = 0 for every small b.
_DEFAULTS = Defaults(refresh_every=50)


def _init(hyper: None, x: PyTree, problem: Linear) -> CGState:
    scale = lengths.scale(problem.b)
    mark = jnp.where(asymmetric(problem.A), jnp.int32(Status.breakdown), jnp.int32(0))
    zero, still = jnp.zeros_like(scale), jax.tree.map(jnp.zeros_like, problem.b)
    # The first look finds that r = 0 is meaningless, which is no sign of drift.
    return CGState(still, still, zero, zero, scale, mark, jnp.bool_(True))


def _verified_init(hyper: None, x: PyTree, problem: Linear) -> CGState:
    state = _init(hyper, x, problem)
    return state._replace(mark=verified(state.mark, problem))


def verified(mark: jax.Array, problem: Linear) -> jax.Array:
    """A mark, or breakdown where random vectors show that A is not symmetric."""
    defect = check_symmetric(problem.matvec, jax.random.key(0), problem.b)
    # Not `>`: NaN is wrong too.
    return jnp.where(defect <= jnp.finfo(defect.dtype).eps ** 0.5, mark, jnp.int32(Status.breakdown))


def _precondition(r: PyTree, problem: Linear) -> tuple[PyTree, jax.Array, jax.Array]:
    """z = M r, r.z and r.r."""
    rr = trees.vdot(r, r)
    if problem.preconditioner is None:
        return r, rr, rr
    z = problem.project(problem.preconditioned(r))
    return z, trees.vdot(r, z), rr


def asymmetric(A: Any) -> jax.Array:
    """Whether a stored A differs from its conjugate transpose by more than rounding; functions cannot be asked."""
    if isinstance(A, Operator):
        return jnp.bool_(getattr(A, "asymmetric", False))
    if not isinstance(A, jax.Array) or A.ndim != 2:
        return jnp.bool_(False)
    eps = jnp.finfo(A.dtype).eps
    return jnp.max(jnp.abs(A - A.conj().T)) > eps**0.5 * jnp.max(jnp.abs(A))


def advance(
    x: PyTree, p: PyTree, state: CGState, rp: jax.Array, problem: Linear
) -> tuple[PyTree, PyTree, PyTree, jax.Array, jax.Array]:
    """One exact line search along p: the new x and r, q = A p, p.q, a mark. On a look: x as it is, r = b - A x."""
    look = state.look
    q = problem.matvec(trees.where(look, x, p))
    pq = trees.vdot(p, q)
    alpha = _ratio(look, rp, pq)
    raw = trees.add_scaled(trees.where(look, problem.b, state.r), -jnp.where(look, 1, alpha), q)
    r = problem.project(raw)
    mark = state.mark
    if problem.null_space is not None:
        # What the projection removes must be rounding: else b or the image of A leaves the complement.
        removed = trees.norm(trees.sub(raw, r)) > jnp.finfo(pq.dtype).eps ** 0.5 * state.scale
        mark = jnp.where(look & removed, jnp.int32(Status.infeasible), mark)
    return trees.add_scaled(x, alpha, p), r, q, pq, mark


def _ratio(look: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The quotient a / b, 0 on a look and where b <= 0. NaN passes: it ends in the residual, and the driver sees it."""
    flat = b <= 0
    return jnp.where(look | flat, 0, a / jnp.where(flat, 1, b))


def judge(
    x: PyTree, r: PyTree, pq: jax.Array, rz: jax.Array, rr: jax.Array, mark: jax.Array, state: CGState
) -> tuple[PyTree, jax.Array, CGState]:
    """The x and the state of the next step, p still to be set, and whether the directions are stale."""
    look = state.look
    # Where r has little to do with the residual of x, the directions made from it are stale too.
    lost = look & (rr > 0) & (state.residual * state.residual <= 0.25 * rr)
    mark = jnp.where(look & (mark <= 0), jnp.where(lost, mark - 1, -1), mark)
    mark = jnp.where(mark < -2, jnp.int32(Status.stagnated), mark)
    # For b = 0 no residual above zero is small relative to ||b||, but the answer is known.
    null = (state.scale == 0) & ~look
    bad = ~null & ((~look & (pq <= 0)) | ((rz <= 0) & (rr > 0)))
    mark = jnp.where(bad, jnp.maximum(mark, jnp.int32(Status.breakdown)), mark)
    x = jax.tree.map(lambda leaf: jnp.where(null, 0, leaf), x)
    residual, mark = lengths.residual(rr, state.scale, mark)
    return x, lost, CGState(r, state.p, rz, jnp.where(null, 0, residual), state.scale, mark, jnp.zeros_like(look))


def _step(hyper: None, x: PyTree, state: CGState, problem: Linear) -> tuple[PyTree, CGState]:
    x, r, _, pq, mark = advance(x, state.p, state, state.rz, problem)
    z, rz, rr = _precondition(r, problem)
    x, lost, new = judge(x, r, pq, rz, rr, mark, state)
    # A look gives r a jump along p, after which r.z is no longer p.r: the next line search would miss its minimum, and
    # so would all after it, by the same factor.
    slope = jax.lax.cond(state.look, lambda: trees.vdot(state.p, r), lambda: rz)
    kept = state.look & ~lost & (slope > 0)
    new = new._replace(rz=jnp.where(kept, slope, rz))
    beta = _ratio(state.look, rz, state.rz)
    p = trees.combine(jnp.where(kept, 0, jnp.ones_like(beta)), z, jnp.where(kept, 1, beta), state.p)
    # A direction of no curvature is worth keeping: who minimises wants to go along it.
    return x, new._replace(p=trees.where(new.mark == Status.breakdown, state.p, p))


def _measure(hyper: Any, x: PyTree, state: CGState, problem: Linear) -> Measure:
    return Measure(state.residual, state.scale, jnp.maximum(state.mark, 0))


def _refresh(hyper: None, state: CGState, due: jax.Array) -> CGState:
    return state._replace(look=due)


def flexible_init(hyper: jax.Array, x: PyTree, problem: Linear) -> FlexibleCGState:
    """A CGState with empty rings of directions, hyper.shape[0] long."""
    # Stacked from copies of x's leaves, so that the rings inherit their sharding.
    ring = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf)] * hyper.shape[0]), x)
    base = _init(None, x, problem)
    return FlexibleCGState(base, ring, ring, jnp.ones(hyper.shape, base.rz.dtype), jnp.int32(0))


def _verified_flexible_init(hyper: jax.Array, x: PyTree, problem: Linear) -> FlexibleCGState:
    state = flexible_init(hyper, x, problem)
    return state._replace(base=state.base._replace(mark=verified(state.base.mark, problem)))


def _flexible_step(
    hyper: jax.Array, x: PyTree, state: FlexibleCGState, problem: Linear
) -> tuple[PyTree, FlexibleCGState]:
    base, m = state.base, hyper.shape[0]
    # Truncation with restart: the first m steps of each cycle keep all.
    p = conjugate(base.p, state, jnp.maximum(1, state.count % (m + 1)))
    x, r, q, pq, mark = advance(x, p, base, trees.vdot(p, base.r), problem)
    z, rz, rr = _precondition(r, problem)
    x, _, new = judge(x, r, pq, rz, rr, mark, base)
    return x, remember(state, new._replace(p=z), p, problem.project(q), pq)


def conjugate(z: PyTree, state: FlexibleCGState, keep: jax.Array | int) -> PyTree:
    """z less its A-components along the last `keep` directions, all from the unmodified z."""
    m = state.curvatures.size
    # Age 1 is the direction of the last step.
    age = (state.count % m - jnp.arange(m, dtype=jnp.int32) - 1) % m + 1
    zq = jax.vmap(lambda image: trees.vdot(z, image))(state.images)
    weights = jnp.where(age <= jnp.minimum(state.count, keep), zq / state.curvatures, 0)
    return jax.tree.map(
        lambda leaf, ring: leaf - jnp.tensordot(weights.astype(ring.dtype), ring, 1, precision="highest"),
        z,
        state.directions,
    )


def remember(state: FlexibleCGState, base: CGState, p: PyTree, q: PyTree, pq: jax.Array) -> FlexibleCGState:
    """The state of the next step, with p and q = A p in the ring unless this step was a look."""
    m = state.curvatures.size
    look = state.base.look
    here = (jnp.arange(m, dtype=jnp.int32) == state.count % m) & ~look

    def put(ring: jax.Array, new: jax.Array) -> jax.Array:
        # A choice, not a scatter: scatters refuse explicitly sharded operands.
        return jnp.where(here.reshape((m,) + (1,) * (ring.ndim - 1)), new, ring)

    return FlexibleCGState(
        base=base,
        directions=jax.tree.map(put, state.directions, p),
        images=jax.tree.map(put, state.images, q),
        curvatures=put(state.curvatures, jnp.where(pq > 0, pq, 1)),
        count=state.count + jnp.where(look, 0, 1),
    )


def flexible_measure(hyper: Any, x: PyTree, state: FlexibleCGState, problem: Linear) -> Measure:
    """The residual of the CGState inside."""
    return _measure(None, x, state.base, problem)


def flexible_refresh(hyper: Any, state: FlexibleCGState, due: jax.Array) -> FlexibleCGState:
    """Have the CGState inside look where it is due."""
    return state._replace(base=_refresh(None, state.base, due))
