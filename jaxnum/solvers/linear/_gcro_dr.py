"""GCRO-DR: restarted GMRES that keeps the directions it found hardest, within a system and for the next one.

Cost: one A and one preconditioner a step, 4 m inner products; memory 2 m vectors.
Source: Parks, de Sturler, Mackey, Johnson & Maiti 2006; directions from residuals: Jiranek & Rozloznik 2010.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.core.problems import Linear
from jaxnum.core.solver import Defaults, Measure, Solver
from jaxnum.core.status import Status
from jaxnum.solvers.linear import lengths
from kernels_pallas import checks

PyTree = Any

# A step that leaves more than this of the residual is followed by the last image instead of the residual.
_SLOW = 0.9
# An image within so many roundings of the span of the others is in it.
_ROUNDINGS = 64.0


class GCRODRState(NamedTuple):
    """What the next step starts from.

    Attributes:
      r: residual.
      directions: ring [m, ...] of u_i; after the first `count`, recycled vectors not yet multiplied by A.
      images: ring [m, ...] of c_i = A u_i, orthonormal; zero from `count` on.
      gram: [m, m] inner products of the first `count` directions.
      kept: int8 [k], whose shape is the number of directions that survive a restart.
      last: the last image.
      count: directions held.
      pending: recycled vectors among the slots.
      slow: whether the next direction comes from the last image rather than from r.
      residual: ||r||.
      scale: ||b||.
      matvecs: products with A so far, looks included.
      mark: a Status found on the way; else -1 less the looks in a row that found r meaningless, 0 before any look.
      look: whether the next step recomputes r from x and takes no direction.
    """

    r: PyTree
    directions: PyTree
    images: PyTree
    gram: jax.Array
    kept: jax.Array
    last: PyTree
    count: jax.Array
    pending: jax.Array
    slow: jax.Array
    residual: jax.Array
    scale: jax.Array
    matvecs: jax.Array
    mark: jax.Array
    look: jax.Array

    @property
    def recycle(self) -> PyTree:
        """The directions [k, ...] for `gcro_dr(recycle=...)` of the next system."""
        k = self.kept.shape[0]
        given = jax.tree.map(lambda ring: ring[:k], self.directions)
        # A solve that ends before it has tried all it was given learns nothing better.
        return trees.where(self.count < self.pending, given, _rotated(self.directions, _hardest(self)))


class _Hyper(NamedTuple):
    """Sizes as shapes of leaves, and the recycled directions or None."""

    held: jax.Array
    kept: jax.Array
    recycle: PyTree


def gcro_dr(m: int = 40, k: int = 10, *, recycle: PyTree = None) -> Solver:
    """GCRO-DR(m, k) for A x = b with any regular A: minimal residuals, deflated restarts, recycling between systems.

    It holds up to m pairs c_i = A u_i with orthonormal c_i, and keeps r = b - A x orthogonal to all of them: x has the
    least residual over x_0 + span(u). A step takes z = r / ||r||, or the last image where r hardly fell, and adds
    u = M z, c = A u, both less their parts along earlier pairs. When m pairs are held, the k combinations of unit image
    with the longest u (the least singular values of A on the span) are kept and the rest dropped. With k = 0 this is
    GMRES(m). The next system starts from these k directions: `gcro_dr(m, k, recycle=solution.state.recycle)`. They are
    multiplied by its own A and orthogonalised anew, one a step, so any A of the same shape may follow.

    Args:
      m: Python int >= 1, pairs held.
      k: Python int in [0, m), pairs kept at a restart and handed on.
      recycle: tree [k, ...] over a tree like x, or None. Zero vectors mean none and come last, so that zeros start a
        `lax.scan` over systems whose carry is `solution.state.recycle`; NaN means none at all. Array leaves: new ones
        compile nothing.

    Returns:
      A Solver for `Linear` (give it symmetric=False: the tangents are then solved by LU or GMRES). It stops at
      ||b - A x|| <= atol + rtol ||b||, recomputed from x every 100 steps and before convergence is declared. One step
      is one direction; `solution.state.matvecs` counts every product with A. `breakdown`: A maps the new direction into
      the span of the others while r is orthogonal to it, so A is singular. `stagnated`: rounding rules the residual.

    Raises:
      ValueError: m below 1, or k outside [0, m).
      TreeError: recycle is not a tree like x; ShapeError: a leaf of it is not [k, ...].

    Cost: one A, one M and 5 m vectors read a step; a restart 2 m k more. The first and the last look cost one A each.
      The problem's preconditioner applies from the right, may change from step to step and from system to system. A
      `vmap` pays for a restart at every step: use `solve_batched` on a CPU.

    Numerics: every image is orthogonalised twice. The restart takes an eigenproblem of the symmetric Gram matrix of u,
      which every backend has; harmonic Ritz vectors need `jnp.linalg.eig`, which runs on CPUs alone, and saved 1 % of
      the products on the Darcy systems of the benchmark. The choice of the kept directions has no derivative under
      adjoint="unrolled". A null space of the problem only fixes the gauge of the solution.

    Source: Parks, de Sturler, Mackey, Johnson & Maiti, "Recycling Krylov subspaces for sequences of linear systems"
      (2006), algorithm 2, with pairs built as in GCR; the choice between residual and image: Jiranek & Rozloznik,
      "Adaptive version of simpler GMRES" (2010).

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> A = jnp.array([[4.0, 1.0], [-1.0, 3.0]])
      >>> problem = jaxnum.Linear(A, jnp.array([1.0, 2.0]), symmetric=False)
      >>> first = jaxnum.solve(jaxnum.solvers.gcro_dr(m=4, k=2), jnp.zeros(2), problem)
      >>> int(first.steps), first.state.recycle.shape
      (2, (2, 2))
    """
    whole = lambda n, least: isinstance(n, int) and not isinstance(n, bool) and n >= least  # noqa: E731
    checks.value("gcro_dr", "m", whole(m, 1), "be a Python int >= 1", m)
    checks.value("gcro_dr", "k", whole(k, 0) and k < m, f"be a Python int in [0, m = {m})", k)
    for path, leaf in jax.tree_util.tree_flatten_with_path(recycle)[0]:
        at = "recycle" + jax.tree_util.keystr(path)
        fits = jnp.ndim(leaf) >= 1 and jnp.shape(leaf)[0] == k
        wanted, remedy = f"have shape [{k}, ...]", "Pass the `state.recycle` of a solve with the same k."
        checks.value("gcro_dr", at, fits, wanted, jnp.shape(leaf), remedy, checks.ShapeError)
    # The lengths of the rings are shapes, so they travel as the shapes of leaves.
    return Solver(
        name="gcro_dr",
        init=_init,
        step=_step,
        measure=_measure,
        refresh=_refresh,
        problem=Linear,
        hyper=_Hyper(jnp.zeros((m,), jnp.int8), jnp.zeros((k,), jnp.int8), recycle),
        defaults=Defaults(refresh_every=100),
    )


def _init(hyper: _Hyper, x: PyTree, problem: Linear) -> GCRODRState:
    m = hyper.held.shape[0]
    still = jax.tree.map(jnp.zeros_like, x)
    # Stacked from copies of x's leaves, so that the rings inherit their sharding.
    empty = jax.tree.map(lambda leaf: jnp.stack([leaf] * m), still)
    directions, pending = empty, jnp.int32(0)
    if hyper.recycle is not None:
        member = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], leaf.dtype), hyper.recycle)
        checks.same_tree("gcro_dr", ("x0", x), dtypes=True, **{"recycle[i]": member})
        # Of a solve that ended in NaN nothing is of use.
        good = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(hyper.recycle)]))
        directions = trees.where(good, _padded(hyper.recycle, empty), empty)
        pending = jnp.sum(jax.vmap(trees.norm)(directions) > 0, dtype=jnp.int32)
    scale = lengths.scale(problem.b)
    gram = jnp.zeros((m, m), jax.eval_shape(trees.inner, x, x).dtype)
    no, none = jnp.bool_(False), jnp.int32(0)
    zero = jnp.zeros_like(scale)
    return GCRODRState(
        r=still,
        directions=directions,
        images=empty,
        gram=gram,
        kept=hyper.kept,
        last=still,
        count=none,
        pending=pending,
        slow=no,
        residual=zero,
        scale=scale,
        matvecs=none,
        mark=none,
        look=jnp.bool_(True),
    )


def _step(hyper: _Hyper, x: PyTree, state: GCRODRState, problem: Linear) -> tuple[PyTree, GCRODRState]:
    m, look = hyper.held.shape[0], state.look
    state = jax.lax.cond((state.count == m) & ~look, _restarted, lambda s: s, state)
    slot, recycled = jnp.minimum(state.count, m - 1), state.count < state.pending
    u = trees.where(recycled, _member(state.directions, slot), problem.preconditioned(_seed(state)))
    q = problem.matvec(trees.where(look, x, u))
    # A look takes the residual through the same projection as a step its image, and x moves with it.
    raw = trees.where(look, trees.sub(problem.b, q), q)
    t, weights = _orthogonalised(raw, state.images)
    along = _combined(weights, state.directions)
    c, u, dependent = _normalised(t, trees.sub(u, along), trees.norm(raw))
    alpha = jnp.where(look, 0, trees.inner(c, state.r))
    x = trees.where(look, trees.add(x, along), trees.add_scaled(x, alpha, u))
    r = trees.where(look, t, trees.add_scaled(state.r, -alpha, c))
    x, r, residual, mark = _judge(x, r, dependent & ~recycled, state)
    # Choices, not scatters, which take longer to compile.
    at = jnp.arange(m, dtype=jnp.int32)
    products = jnp.where(at < state.count, _coefficients(state.directions, u), 0)
    row = jnp.where(at == slot, trees.inner(u, u), products)
    fresh = jnp.where((at == slot)[:, None], row.conj(), jnp.where(at == slot, row[:, None], state.gram))
    return x, state._replace(
        r=r,
        directions=_put(state.directions, slot, u, look),
        images=_put(state.images, slot, c, look),
        gram=jnp.where(look, state.gram, fresh),
        last=trees.where(look, state.last, c),
        count=state.count + jnp.where(look, 0, 1),
        slow=jnp.where(look, state.slow, ~recycled & (residual > _SLOW * state.residual)),
        residual=residual,
        matvecs=state.matvecs + 1,
        mark=mark,
        look=jnp.bool_(False),
    )


def _restarted(state: GCRODRState) -> GCRODRState:
    """The k hardest pairs alone; a rotation keeps the images orthonormal."""
    m, k = state.gram.shape[0], state.kept.shape[0]
    P = _hardest(state)
    gram = P.conj().T @ state.gram @ P
    empty = jax.tree.map(jnp.zeros_like, state.directions)
    return state._replace(
        directions=_padded(_rotated(state.directions, P), empty),
        images=_padded(_rotated(state.images, P), empty),
        gram=jnp.pad(gram, (0, m - k)),
        count=jnp.full_like(state.count, k),
        pending=jnp.zeros_like(state.pending),
        slow=jnp.zeros_like(state.slow),
    )


def _hardest(state: GCRODRState) -> jax.Array:
    """Orthonormal P [m, k]: the combinations of the pairs with the longest u for a unit image, longest first."""
    vectors = jnp.linalg.eigh(jax.lax.stop_gradient(state.gram))[1]
    return vectors[:, ::-1][:, : state.kept.shape[0]]


def _seed(state: GCRODRState) -> PyTree:
    """The vector whose image is tried next: r of unit length, or the last image."""
    inverse = 1 / jnp.where(state.residual > 0, state.residual, 1)
    return trees.where(state.slow, state.last, trees.scaled(inverse, state.r))


def _orthogonalised(t: PyTree, images: PyTree) -> tuple[PyTree, jax.Array]:
    """The part of t orthogonal to the images, and the weights of the rest. Twice is enough."""
    once = _coefficients(images, t)
    t = trees.sub(t, _combined(once, images))
    again = _coefficients(images, t)
    return trees.sub(t, _combined(again, images)), once + again


def _normalised(t: PyTree, u: PyTree, size: jax.Array) -> tuple[PyTree, PyTree, jax.Array]:
    """c of unit length and u to match, or zeros where rounding is all that is left of an image of that size."""
    square = trees.vdot(t, t)
    floor = _ROUNDINGS * jnp.finfo(precision.coarsest(t)).eps * size
    dependent = square <= floor * floor
    inverse = jnp.where(dependent, 0, 1 / jnp.sqrt(jnp.where(dependent, 1, square)))
    return trees.scaled(inverse, t), trees.scaled(inverse, u), dependent


def _judge(
    x: PyTree, r: PyTree, dependent: jax.Array, state: GCRODRState
) -> tuple[PyTree, PyTree, jax.Array, jax.Array]:
    """x, r, ||r|| and the mark after a step or a look."""
    look = state.look
    rr = trees.vdot(r, r)
    lost = look & (rr > 0) & (state.residual * state.residual <= 0.25 * rr)
    mark = jnp.where(look & (state.mark <= 0), jnp.where(lost, state.mark - 1, -1), state.mark)
    small = jnp.sqrt(rr) <= 256 * precision.attainable(r) * state.scale
    found = jnp.where(small, jnp.int32(Status.stagnated), jnp.int32(Status.breakdown))
    mark = jnp.where(mark < -2, jnp.int32(Status.stagnated), mark)
    mark = jnp.where(~look & dependent & (rr > 0), found, mark)
    # For b = 0 no residual above zero is small relative to ||b||, but the answer is known.
    null = (state.scale == 0) & ~look
    x, r = (jax.tree.map(lambda leaf: jnp.where(null, 0, leaf), tree) for tree in (x, r))
    residual, mark = lengths.residual(rr, state.scale, mark)
    return x, r, jnp.where(null, 0, residual), mark


def _coefficients(ring: PyTree, v: PyTree) -> jax.Array:
    return jax.vmap(lambda member: trees.inner(member, v))(ring)


def _combined(weights: jax.Array, ring: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.tensordot(weights.astype(leaf.dtype), leaf, 1, precision="highest"), ring)


def _rotated(ring: PyTree, P: jax.Array) -> PyTree:
    return _combined(P.T, ring)


def _padded(some: PyTree, empty: PyTree) -> PyTree:
    """A ring that starts with `some` and ends with zeros."""
    return jax.tree.map(lambda a, zeros: jnp.concatenate([a, zeros[a.shape[0] :]]), some, empty)


def _member(ring: PyTree, slot: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False), ring)


def _put(ring: PyTree, slot: jax.Array, new: PyTree, look: jax.Array) -> PyTree:
    """The ring with `new` in a slot, or as it was on a look."""
    here = trees.where(look, _member(ring, slot), new)
    return jax.tree.map(lambda leaf, v: jax.lax.dynamic_update_index_in_dim(leaf, v, slot, 0), ring, here)


def _measure(hyper: _Hyper, x: PyTree, state: GCRODRState, problem: Linear) -> Measure:
    return Measure(state.residual, state.scale, jnp.maximum(state.mark, 0))


def _refresh(hyper: _Hyper, state: GCRODRState, due: jax.Array) -> GCRODRState:
    return state._replace(look=due)
