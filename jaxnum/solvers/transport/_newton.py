"""Newton's method for entropic optimal transport, on the dual with the row potentials eliminated.

Cost: four passes over the cost a step and a linear system; memory a few [n, m] arrays.
Source: Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao & Ying 2024; the shift: Tang & Qiu 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxnum.core import precision, trees
from jaxnum.core.costs import DenseCost
from jaxnum.core.solver import ByPrecision, Defaults, Measure, Solver
from jaxnum.core.status import Status
from jaxnum.core.transport import Transport, gain
from jaxnum.solvers.transport import marginals, plans, schur
from kernels_pallas import checks

Pair = tuple[jax.Array, jax.Array]

# Up to this many columns a factorisation costs less than the iterations it saves.
_DIRECT_UP_TO = 256
# From so many entries on a plan leaves the caches, and its largest entries are multiplied faster: 3000 x 3000.
_SPARSE_FROM = 9 * 10**6
# So many times fewer of them, or it does not pay.
_SPARSER = 8
# Above this many entries, 1 GiB in float64, a plan is not stored for the steps that need the whole of it.
_STORED_UP_TO = 2**27
# Of the steps in a row that bring no smaller error each third takes the whole plan.
_WHOLE_EVERY = 3
# Steps with the whole plan after which no new selection is tried: the plan is not sparse.
_SELECTIONS = 3
_HALVINGS = 40
# Steps without a better residual, at a gain below rounding, after which there will be none.
_PATIENCE = 10


class NewtonState(NamedTuple):
    """What the next step starts from.

    Attributes:
      rows: row log-sum-exps at g.
      cols: column log-sum-exps at f.
      flag: a Status found on the way, else 0.
      best: the smallest residual so far.
      waited: steps since then.
      inner: conjugate gradient steps so far, 0 where systems are factorised.
      columns: where the entries of the plan stand that "sparse" keeps, int32 [n, k]; else None.
      whole: steps so far that "sparse" took with the whole plan.
    """

    rows: jax.Array
    cols: jax.Array
    flag: jax.Array
    best: jax.Array
    waited: jax.Array
    inner: jax.Array
    columns: Any
    whole: jax.Array


class Point(NamedTuple):
    """Where a step starts.

    Attributes:
      u: log scalings of the rows, the best for v [n].
      v: log scalings of the columns [m].
      sums: the row sums P 1 that they give [n].
      before: log scalings of the rows that came with v [n].
    """

    u: jax.Array
    v: jax.Array
    sums: jax.Array
    before: jax.Array


class NewtonHyper(NamedTuple):
    """The factor of the shift, the mass to keep, and an array as long as rows are to have entries."""

    shift: jax.Array
    kept: jax.Array
    slots: jax.Array


def newton(
    *,
    linear: str = "auto",
    shift: float | jax.Array = 1e-3,
    entries: int = 128,
    kept: float | jax.Array = 0.999,
) -> Solver:
    """Damped Newton steps for transport with small epsilon, best started by `sinkhorn`: see `sns`.

    With f eliminated by P 1 = a exp(-k_a f / epsilon) the dual is a concave function of g alone. In v = g / epsilon its
    gradient is q = b exp(-k_b v) - P^T 1 and minus its Hessian the Schur complement
    S = diag(d) - P^T diag(tau_a / P 1) P, d = P^T 1 + k_b b exp(-k_b v). A step solves
    (S + mu diag(d)) w = q, mu proportional to the marginal error, and halves w until the dual has risen enough. Rows
    are exact after each step, so that no plan overflows on the way. Where the system is of no use (a column without
    mass, a factorisation that breaks down) the step is Sinkhorn's.

    "sparse" multiplies with the largest entries of each row alone, where they hold nearly all mass, scaled so that both
    marginals are those of P. Their S is that of another plan: never indefinite, and off by a small factor in every
    direction. (With the diagonal of P kept beside unscaled entries, as in the papers, it is off by the missing mass
    in the directions where S is nearly singular: measured, 1000 points of the unit square, epsilon 1e-3, 15 entries a
    row with 0.984 of the mass: 11 steps scaled, 5e-4 after 24 steps unscaled, 5 steps whole.)

    Args:
      linear: "cg": conjugate gradients in the scaled variables with the Jacobi preconditioner, to a tolerance that
        falls with the error; "direct": S is formed and factorised by Cholesky; "sparse": as "cg" with the largest
        entries, and a plan from a `PointCloudCost` is never stored; "auto": "direct" up to 256 columns, "sparse" from
        3000 x 3000 on, where it was faster, and "cg" between them and where arrays are explicitly sharded.
      shift: factor >= 0 of mu = shift * error / sum b, the Levenberg shift that bounds steps far from the solution
        and fades near it.
      entries: how many entries a row keeps in "sparse", Python int >= 1, times ceil(m / n) where there are more
        columns than rows. Points spread evenly over the unit square need about 30 n epsilon of them.
      kept: part of the mass in (0, 1] that they must hold. A step for which they hold less, and the third in a row that
        brought no smaller error, uses the whole plan; `solution.state.whole` counts these steps.

    Returns:
      A Solver for `Transport`, balanced and unbalanced, judged by the same residual as `sinkhorn`. `breakdown`: no step
      along the direction raises the dual while the error is large, as for a cost whose parts contradict each other.
      `stagnated`: rounding errors of the dtype allow no smaller residual. `infeasible`: as for `sinkhorn`.

    Raises:
      ValueError: linear is none of the four, shift is negative, entries below 1, kept outside (0, 1].

    Cost: a step takes four passes over the cost, of which one forms the plan [n, m], kept for the whole step. "cg":
      two products with the plan an iteration, at most 2000; "direct": n m^2 + m^3 / 3 multiplications. Few columns are
      better than few rows. Ten to thirty steps after 20 sweeps down to epsilon = 1e-3 max C; a hundred at 1e-4.
      "sparse": as a rule one selection in a solve, which costs about two passes, then three passes a step and no
      plan; products with 128 entries a row take a tenth of the time of those with the plan at n = m = 4000 on a CPU.
      All of Newton's stage took half the time at n = 3000 and 4000 in the plane, a third with a `PointCloudCost`, and
      as long as "cg" for colours of photographs, which need 512 entries. Not measured on accelerators.
      With linear="sparse", and in "auto" above 2^27 entries, steps that need the whole of a point cloud's plan compute
      it anew for each product: they are slow, and store nothing.

    Numerics: quadratic convergence near the solution with "direct"; "cg" stops at min(1e-2, error), not below 1e-5. The
      dual is compared up to its rounding: near the solution it changes by less. The error attainable is that of
      `sinkhorn`, about eps max |f| / epsilon: small epsilon needs float64.

    Source: Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao & Ying, "Accelerating Sinkhorn algorithm with
      sparse Newton iterations" (2024), section 3; Tang & Qiu, "Safe and sparse Newton method for entropic-regularized
      optimal transport" (2024), for the shift. They take steps in (f, g) together, and keep the largest entries of the
      whole plan unscaled.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> a = jnp.full(2, 0.5)
      >>> cost = jnp.array([[0.0, 1.0], [0.7, 0.0]])
      >>> solution = jaxnum.transport(cost, a, a, 0.1, solver=jaxnum.solvers.newton())
      >>> bool(solution.residual < 1e-4)
      True
    """
    checks.choice("newton", "linear", linear, ("auto", "cg", "direct", "sparse"))
    if not checks.traced(shift):
        checks.value("newton", "shift", 0 <= float(shift) < jnp.inf, "be finite and >= 0", shift)
    ok = isinstance(entries, int) and not isinstance(entries, bool) and entries >= 1
    checks.value("newton", "entries", ok, "be a Python int >= 1", entries)
    if not checks.traced(kept):
        checks.value("newton", "kept", 0 < float(kept) <= 1, "be in (0, 1]", kept)
    return Solver(
        name="newton",
        init={"auto": _auto_init, "sparse": _sparse_init}.get(linear, _init),
        step={"auto": _step, "cg": _cg_step, "direct": _direct_step, "sparse": _sparse_step}[linear],
        measure=_measure,
        problem=Transport,
        # How many entries a row keeps is a shape, so it travels as the shape of a leaf.
        hyper=NewtonHyper(jnp.asarray(shift), jnp.asarray(kept), jnp.zeros((entries,), jnp.int8)),
        defaults=Defaults(rtol=ByPrecision(1e-9, 1e-4), max_steps=200),
    )


def _init(hyper: NewtonHyper, x: Pair, problem: Transport) -> NewtonState:
    return _start(None, x, problem)


def _sparse_init(hyper: NewtonHyper, x: Pair, problem: Transport) -> NewtonState:
    count = _count(hyper, problem)
    # Any distinct columns: they hold too little, so that the first step selects.
    return _start(jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (x[0].size, count)), x, problem)


def _auto_init(hyper: NewtonHyper, x: Pair, problem: Transport) -> NewtonState:
    n, m = problem.cost.shape
    sparse = n * m >= _SPARSE_FROM and m >= _SPARSER * _count(hyper, problem)
    sparse &= not trees.explicitly_sharded(problem)
    return (_sparse_init if sparse else _init)(hyper, x, problem)


def _start(columns: jax.Array | None, x: Pair, problem: Transport) -> NewtonState:
    rows, cols = _sums(x, problem)
    best = jnp.full((), jnp.inf, problem.dtype)
    zero = jnp.int32(0)
    return NewtonState(rows, cols, marginals.infeasible(problem), best, zero, zero, columns, zero)


def _count(hyper: NewtonHyper, problem: Transport) -> int:
    n, m = problem.cost.shape
    return min(m, hyper.slots.size * max(1, -(-m // n)))


def _sums(x: Pair, problem: Transport) -> Pair:
    """Log-sum-exps of the rows at g and of the columns at f."""
    u, v = problem.log_scalings(x)
    epsilon = problem.scalars[0]
    rows, cols = problem.cost.lse_rows(v, epsilon), problem.cost.lse_cols(u, epsilon)
    return marginals.laid(rows, problem.a), marginals.laid(cols, problem.b)


def _cg_step(hyper: NewtonHyper, x: Pair, state: NewtonState, problem: Transport) -> tuple[Pair, NewtonState]:
    return _advance(partial(_dense, schur.conjugate_gradients), hyper, x, state, problem)


def _direct_step(hyper: NewtonHyper, x: Pair, state: NewtonState, problem: Transport) -> tuple[Pair, NewtonState]:
    return _advance(partial(_dense, schur.cholesky), hyper, x, state, problem)


def _sparse_step(hyper: NewtonHyper, x: Pair, state: NewtonState, problem: Transport) -> tuple[Pair, NewtonState]:
    # A cost that is an array has room for the plan beside it.
    fallback = _stored if isinstance(problem.cost, DenseCost) else _recomputed
    return _advance(partial(_sparse, fallback), hyper, x, state, problem)


def _step(hyper: NewtonHyper, x: Pair, state: NewtonState, problem: Transport) -> tuple[Pair, NewtonState]:
    n, m = problem.cost.shape
    if m <= _DIRECT_UP_TO:
        return _direct_step(hyper, x, state, problem)
    if state.columns is None:
        return _cg_step(hyper, x, state, problem)
    if n * m > _STORED_UP_TO:
        return _sparse_step(hyper, x, state, problem)
    return _advance(partial(_sparse, _stored), hyper, x, state, problem)


def _advance(
    direction: Callable, hyper: NewtonHyper, x: Pair, state: NewtonState, problem: Transport
) -> tuple[Pair, NewtonState]:
    given, (like_f, like_g) = problem, x
    problem, x, state = _gathered(problem, x, state)
    epsilon = problem.scalars[0]
    before, v = problem.log_scalings(x)
    u, sums = _row_scalings(state.rows, problem)
    (w, slope, inner), columns, whole = direction(hyper, Point(u, v, sums, before), state, problem)
    alpha, good, noise = _line_search(u, v, w, slope, problem)
    g = _potential(v + alpha * w, epsilon, problem.b, like_g.dtype)
    # Of the rounded g, so that its rounding does not count as an error of the rows.
    v = problem.log_scalings((x[0], g))[1]
    f = _potential(_row_scalings(problem.cost.lse_rows(v, epsilon), problem)[0], epsilon, problem.a, like_f.dtype)
    x = marginals.laid(f, like_f), marginals.laid(g, like_g)
    rows, cols = _sums(x, given)
    residual = jax.lax.stop_gradient(marginals.error(x, rows, cols, given))
    best, waited = jnp.minimum(state.best, residual), jnp.where(residual < state.best, 0, state.waited + 1)
    rough = precision.attainable(residual) ** 0.5 * (1 + jnp.sum(problem.b))
    failed = jnp.where(residual > rough, jnp.int32(Status.breakdown), jnp.int32(Status.stagnated))
    flag = jnp.where(good, 0, failed)
    flag = jnp.where((waited >= _PATIENCE) & (slope <= noise), jnp.int32(Status.stagnated), flag)
    flag = jnp.where(state.flag == 0, flag, state.flag)
    return x, NewtonState(rows, cols, flag, best, waited, state.inner + inner, columns, whole)


def _gathered(problem: Transport, x: Pair, state: NewtonState) -> tuple[Transport, Pair, NewtonState]:
    """All vectors on every device where shardings are explicit: rows and columns meet in the plan."""

    def gather(leaf: jax.Array) -> jax.Array:
        if not trees.explicitly_sharded(leaf):
            return leaf
        return jax.sharding.reshard(leaf, PartitionSpec(*[None] * leaf.ndim))

    a, b, x, state = jax.tree.map(gather, (problem.a, problem.b, x, state))
    return marginals.tied(replace(problem, a=a, b=b), x), x, state


def _row_scalings(rows: jax.Array, problem: Transport) -> Pair:
    """The best u = f / epsilon for a given g, and the sums P 1 it gives."""
    held, tau = problem.a > 0, problem.scalars[1]
    a = jnp.where(held, problem.a, 1).astype(rows.dtype)
    u = tau * (jnp.log(a) - rows)
    return jnp.where(held, u, -jnp.inf), jnp.where(held, a * jnp.exp(-u * (1 - tau) / tau), 0)


def _potential(scaling: jax.Array, epsilon: jax.Array, weights: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.where(weights > 0, jnp.where(weights > 0, scaling, 0) * epsilon, -jnp.inf).astype(dtype)


def _stored(point: Point, problem: Transport) -> plans.Whole:
    C = problem.cost.matrix().astype(point.v.dtype)
    return plans.Whole(jnp.exp(point.u[:, None] + point.v - C / problem.scalars[0]))


def _recomputed(point: Point, problem: Transport) -> plans.Recomputed:
    return plans.Recomputed(problem.cost, point.u, point.v, problem.scalars[0])


def _dense(
    solve: Callable, hyper: NewtonHyper, point: Point, state: NewtonState, problem: Transport
) -> tuple[tuple, Any, jax.Array]:
    """The direction from the stored plan."""
    plan = _stored(point, problem)
    found = _direction(solve, plan, jnp.sum(plan.P, axis=0), point.sums, hyper, point.v, problem)
    return found, state.columns, state.whole


def _sparse(
    form: Callable, hyper: NewtonHyper, point: Point, state: NewtonState, problem: Transport
) -> tuple[tuple, Any, jax.Array]:
    """The direction from the entries that hold nearly all mass, and from the whole plan where none do."""
    u, v, sums, before = point
    # After the first step f is the best for its g but for rounding, and its column sums are known.
    known = jnp.all((u == before) | (jnp.abs(u - before) <= precision.attainable(u) * (1 + jnp.abs(u))))
    logs = jax.lax.cond(known, lambda: state.cols, lambda: problem.cost.lse_cols(u, problem.scalars[0]))
    c = jnp.where(problem.b > 0, jnp.exp(jnp.where(problem.b > 0, v, 0) + logs), 0)

    def enough(plan: plans.Kept) -> jax.Array:
        return jnp.sum(plan.values) >= hyper.kept.astype(c.dtype) * jnp.sum(c)

    def selected() -> plans.Kept:
        return plans.kept(u, v, plans.heaviest(v, state.columns.shape[1], problem), problem)

    plan = plans.kept(u, v, state.columns, problem)
    plan = jax.lax.cond(~enough(plan) & (state.whole < _SELECTIONS), selected, lambda: plan)
    # Steps that bring no smaller error may have met parts of the plan that only small entries connect.
    useful = enough(plan) & (state.waited % _WHOLE_EVERY != _WHOLE_EVERY - 1)

    def few() -> tuple:
        balanced, row_sums = plan.balanced(sums, c)
        return _direction(schur.conjugate_gradients, balanced, c, row_sums, hyper, v, problem)

    def every() -> tuple:
        return _direction(schur.conjugate_gradients, form(point, problem), c, sums, hyper, v, problem)

    return jax.lax.cond(useful, few, every), plan.columns, state.whole + ~useful


def _direction(
    solve: Callable,
    plan: Any,
    c: jax.Array,
    sums: jax.Array,
    hyper: NewtonHyper,
    v: jax.Array,
    problem: Transport,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where v goes, the slope of the dual along it, and the iterations it took; c is P^T 1 and sums P 1."""
    _, tau_a, tau_b = problem.scalars
    held, k = problem.b > 0, (1 - tau_b) / tau_b
    b = jnp.where(held, problem.b, 1).astype(v.dtype)
    v = jnp.where(held, v, 0)
    wanted = b * jnp.exp(-k * v)
    q = jnp.where(held, wanted - c, 0)
    d = c + k * wanted
    # A column that the plan does not reach yet says nothing about the curvature.
    reached = jnp.all(~held | (d > jnp.finfo(v.dtype).eps ** 0.5 * wanted))
    d = jnp.where(held & (d > 0), d, 1)
    error = jax.lax.stop_gradient(jnp.sum(jnp.abs(q)) / jnp.sum(jnp.where(held, wanted, 0)))
    null = jnp.where(held & problem.balanced, jnp.sqrt(d), 0)
    system = schur.System(
        plan=plan,
        rows=jnp.where(sums > 0, jnp.sqrt(tau_a / jnp.where(sums > 0, sums, 1)), 0),
        cols=1 / jnp.sqrt(d),
        null=null / jnp.sqrt(jnp.maximum(jnp.sum(null * null), jnp.finfo(v.dtype).tiny)),
        shift=hyper.shift.astype(v.dtype) * error + precision.attainable(v),
        tolerance=jnp.clip(error, 1e-5, 1e-2),
    )
    scaled, inner = jax.lax.custom_linear_solve(
        partial(schur.apply, system),
        q * system.cols,
        lambda _, rhs: solve(jax.lax.stop_gradient(system), rhs),
        symmetric=True,
        has_aux=True,
    )
    w = scaled * system.cols
    sinkhorn = tau_b * (jnp.log(b) - jnp.log(jnp.maximum(c, jnp.finfo(v.dtype).tiny)) + v) - v
    useful = reached & jnp.all(jnp.isfinite(w)) & (jnp.sum(q * w) >= 0)
    w = jnp.where(held, jnp.where(useful, w, sinkhorn), 0)
    return w, jnp.sum(q * w), inner


def _line_search(
    u: jax.Array, v: jax.Array, w: jax.Array, slope: jax.Array, problem: Transport
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The step length, whether it is any good, and the rounding error of the dual.

    NaN at the shortest step is passed on: the driver sees it in the residual and keeps the last finite x.
    """
    u, v, w, slope, problem = jax.lax.stop_gradient((u, v, w, slope, problem))
    epsilon = problem.scalars[0]
    size = jnp.sum(_weighted(u, problem.a)) + jnp.sum(_weighted(v, problem.b)) + jnp.sum(problem.a)
    noise = precision.attainable(v) * size
    value = _dual(u, v, problem)

    def rises(alpha: jax.Array) -> jax.Array:
        moved = v + alpha * w
        new = _dual(_row_scalings(problem.cost.lse_rows(moved, epsilon), problem)[0], moved, problem)
        return new >= value + 1e-4 * alpha * slope - noise

    def halve(carry: tuple) -> tuple:
        alpha, _, k = carry
        return alpha / 2, rises(alpha / 2), k + 1

    one = jnp.ones((), v.dtype)
    first = (2 * one, jnp.bool_(False), jnp.int32(0))
    alpha, good, _ = jax.lax.while_loop(lambda c: ~c[1] & (c[2] < _HALVINGS), halve, first)
    return alpha, good, noise


def _weighted(scaling: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.where(weights > 0, weights * jnp.abs(jnp.where(weights > 0, scaling, 0)), 0)


def _dual(u: jax.Array, v: jax.Array, problem: Transport) -> jax.Array:
    """The dual over epsilon, for the best u at v: the mass follows from u alone."""
    _, tau_a, tau_b = problem.scalars
    held = problem.a > 0
    mass = jnp.where(held, problem.a * jnp.exp(-jnp.where(held, u, 0) * (1 - tau_a) / tau_a), 0)
    return gain(u, problem.a, tau_a) + gain(v, problem.b, tau_b) - jnp.sum(mass)


def _measure(hyper: NewtonHyper, x: Pair, state: NewtonState, problem: Transport) -> Measure:
    residual = marginals.error(x, state.rows, state.cols, problem)
    return Measure(residual, marginals.scale(problem).astype(residual.dtype), state.flag)
