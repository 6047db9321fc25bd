"""Newton's method for entropic optimal transport, on the dual with the row potentials eliminated.

Cost: four passes over the cost a step and a linear system; memory a few [n, m] arrays.
Source: Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao & Ying 2024; the shift: Tang & Qiu 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxnum.core import precision, trees
from jaxnum.core.solver import ByPrecision, Defaults, Measure, Solver
from jaxnum.core.status import Status
from jaxnum.core.transport import Transport, gain
from jaxnum.solvers.transport import marginals
from kernels_pallas import checks

Pair = tuple[jax.Array, jax.Array]

# Up to this many columns a factorisation costs less than the iterations it saves.
_DIRECT_UP_TO = 256
_CG_STEPS = 2000
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
    """

    rows: jax.Array
    cols: jax.Array
    flag: jax.Array
    best: jax.Array
    waited: jax.Array
    inner: jax.Array


class NewtonHyper(NamedTuple):
    """The factor of the shift."""

    shift: jax.Array


class System(NamedTuple):
    """(I - A^T A + shift I) w = q in variables scaled by sqrt(d), A = diag(rows) P diag(cols).

    Attributes:
      P: the plan [n, m].
      rows: sqrt(tau_a / P 1) [n].
      cols: 1 / sqrt(d) [m], d the Jacobian's diagonal in g.
      null: unit vector along which I - A^T A vanishes in the balanced case, else zero.
      shift: real scalar > 0.
      tolerance: of the conjugate gradients, relative.
    """

    P: jax.Array
    rows: jax.Array
    cols: jax.Array
    null: jax.Array
    shift: jax.Array
    tolerance: jax.Array


def newton(*, linear: str = "auto", shift: float | jax.Array = 1e-3) -> Solver:
    """Damped Newton steps for transport with small epsilon, best started by `sinkhorn`: see `sns`.

    With f eliminated by P 1 = a exp(-k_a f / epsilon) the dual is a concave function of g alone. In v = g / epsilon its
    gradient is q = b exp(-k_b v) - P^T 1 and minus its Hessian the Schur complement
    S = diag(d) - P^T diag(tau_a / P 1) P, d = P^T 1 + k_b b exp(-k_b v). A step solves
    (S + mu diag(d)) w = q, mu proportional to the marginal error, and halves w until the dual has risen enough. Rows
    are exact after each step, so that no plan overflows on the way. Where the system is of no use (a column without
    mass, a factorisation that breaks down) the step is Sinkhorn's.

    Args:
      linear: "cg": conjugate gradients in the scaled variables with the Jacobi preconditioner, to a tolerance that
        falls with the error; "direct": S is formed and factorised by Cholesky; "auto": "direct" up to 256 columns.
      shift: factor >= 0 of mu = shift * error / sum b, the Levenberg shift that bounds steps far from the solution
        and fades near it.

    Returns:
      A Solver for `Transport`, balanced and unbalanced, judged by the same residual as `sinkhorn`. `breakdown`: no step
      along the direction raises the dual while the error is large, as for a cost whose parts contradict each other.
      `stagnated`: rounding errors of the dtype allow no smaller residual. `infeasible`: as for `sinkhorn`.

    Raises:
      ValueError: linear is none of the three, shift is negative.

    Cost: a step takes four passes over the cost, of which one forms the plan [n, m], kept for the whole step. "cg":
      two products with the plan an iteration, at most 2000; "direct": n m^2 + m^3 / 3 multiplications. Few columns are
      better than few rows. Ten to thirty steps after 20 sweeps down to epsilon = 1e-3 max C; a hundred at 1e-4.

    Numerics: quadratic convergence near the solution with "direct"; "cg" stops at min(1e-2, error), not below 1e-5. The
      dual is compared up to its rounding: near the solution it changes by less. The error attainable is that of
      `sinkhorn`, about eps max |f| / epsilon: small epsilon needs float64.

    Source: Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao & Ying, "Accelerating Sinkhorn algorithm with
      sparse Newton iterations" (2024), section 3, without the sparsification; Tang & Qiu, "Safe and sparse Newton
      method for entropic-regularized optimal transport" (2024), for the shift. They take steps in (f, g) together.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> a = jnp.full(2, 0.5)
      >>> cost = jnp.array([[0.0, 1.0], [0.7, 0.0]])
      >>> solution = jaxnum.transport(cost, a, a, 0.1, solver=jaxnum.solvers.newton())
      >>> bool(solution.residual < 1e-4)
      True
    """
    checks.choice("newton", "linear", linear, ("auto", "cg", "direct"))
    if not checks.traced(shift):
        checks.value("newton", "shift", 0 <= float(shift) < jnp.inf, "be finite and >= 0", shift)
    return Solver(
        name="newton",
        init=_init,
        step={"auto": _step, "cg": _cg_step, "direct": _direct_step}[linear],
        measure=_measure,
        problem=Transport,
        hyper=NewtonHyper(jnp.asarray(shift)),
        defaults=Defaults(rtol=ByPrecision(1e-9, 1e-4), max_steps=200),
    )


def _init(hyper: NewtonHyper, x: Pair, problem: Transport) -> NewtonState:
    rows, cols = _sums(x, problem)
    best = jnp.full((), jnp.inf, problem.dtype)
    return NewtonState(rows, cols, marginals.infeasible(problem), best, jnp.int32(0), jnp.int32(0))


def _sums(x: Pair, problem: Transport) -> Pair:
    """Log-sum-exps of the rows at g and of the columns at f."""
    u, v = problem.log_scalings(x)
    epsilon = problem.scalars[0]
    rows, cols = problem.cost.lse_rows(v, epsilon), problem.cost.lse_cols(u, epsilon)
    return marginals.laid(rows, problem.a), marginals.laid(cols, problem.b)


def _cg_step(hyper: NewtonHyper, x: Pair, state: NewtonState, problem: Transport) -> tuple[Pair, NewtonState]:
    return _advance(_conjugate_gradients, hyper, x, state, problem)


def _direct_step(hyper: NewtonHyper, x: Pair, state: NewtonState, problem: Transport) -> tuple[Pair, NewtonState]:
    return _advance(_cholesky, hyper, x, state, problem)


def _step(hyper: NewtonHyper, x: Pair, state: NewtonState, problem: Transport) -> tuple[Pair, NewtonState]:
    step = _direct_step if x[1].size <= _DIRECT_UP_TO else _cg_step
    return step(hyper, x, state, problem)


def _advance(
    solve: Callable, hyper: NewtonHyper, x: Pair, state: NewtonState, problem: Transport
) -> tuple[Pair, NewtonState]:
    given, (like_f, like_g) = problem, x
    problem, x, state = _gathered(problem, x, state)
    epsilon = problem.scalars[0]
    v = problem.log_scalings(x)[1]
    u, sums = _row_scalings(state.rows, problem)
    w, slope, inner = _direction(solve, hyper, u, v, sums, problem)
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
    return x, NewtonState(rows, cols, flag, best, waited, state.inner + inner)


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


def _direction(
    solve: Callable, hyper: NewtonHyper, u: jax.Array, v: jax.Array, sums: jax.Array, problem: Transport
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where v goes, the slope of the dual along it, and the iterations it took."""
    epsilon, tau_a, tau_b = problem.scalars
    held, k = problem.b > 0, (1 - tau_b) / tau_b
    b = jnp.where(held, problem.b, 1).astype(v.dtype)
    v = jnp.where(held, v, 0)
    P = jnp.exp(u[:, None] + jnp.where(held, v, -jnp.inf) - problem.cost.matrix().astype(v.dtype) / epsilon)
    c = jnp.sum(P, axis=0)
    wanted = b * jnp.exp(-k * v)
    q = jnp.where(held, wanted - c, 0)
    d = c + k * wanted
    # A column that the plan does not reach yet says nothing about the curvature.
    reached = jnp.all(~held | (d > jnp.finfo(v.dtype).eps ** 0.5 * wanted))
    d = jnp.where(held & (d > 0), d, 1)
    error = jax.lax.stop_gradient(jnp.sum(jnp.abs(q)) / jnp.sum(jnp.where(held, wanted, 0)))
    null = jnp.where(held & problem.balanced, jnp.sqrt(d), 0)
    system = System(
        P=P,
        rows=jnp.where(sums > 0, jnp.sqrt(tau_a / jnp.where(sums > 0, sums, 1)), 0),
        cols=1 / jnp.sqrt(d),
        null=null / jnp.sqrt(jnp.maximum(jnp.sum(null * null), jnp.finfo(v.dtype).tiny)),
        shift=hyper.shift.astype(v.dtype) * error + precision.attainable(v),
        tolerance=jnp.clip(error, 1e-5, 1e-2),
    )
    scaled, inner = jax.lax.custom_linear_solve(
        partial(_apply, system),
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


def _apply(system: System, w: jax.Array) -> jax.Array:
    """(I - A^T A + shift I) w."""
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    image = system.rows**2 * product(system.P, system.cols * w)
    return (1 + system.shift) * w - system.cols * product(image, system.P)


def _cholesky(system: System, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    A = system.rows[:, None] * system.P * system.cols
    S = (1 + system.shift) * jnp.eye(q.size, dtype=q.dtype) - jnp.matmul(A.T, A, precision=jax.lax.Precision.HIGHEST)
    # What is added has no part in q, so it changes nothing but the factorisation.
    S = S + system.null[:, None] * system.null
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(S), q), jnp.int32(0)


def _conjugate_gradients(system: System, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    squares = jnp.matmul(system.rows**2, system.P * system.P, precision=jax.lax.Precision.HIGHEST)
    diagonal = jnp.maximum(1 - squares * system.cols**2, 0) + system.shift

    def unfinished(carry: tuple) -> jax.Array:
        _, _, _, rz, k = carry
        return (rz > goal) & (k < _CG_STEPS)

    def step(carry: tuple) -> tuple:
        w, r, p, rz, k = carry
        image = _apply(system, p)
        alpha = rz / jnp.sum(p * image)
        w, r = w + alpha * p, r - alpha * image
        z = r / diagonal
        new = jnp.sum(r * z)
        return w, r, z + new / rz * p, new, k + 1

    z = q / diagonal
    rz = jnp.sum(q * z)
    goal = system.tolerance**2 * rz
    w, *_, k = jax.lax.while_loop(unfinished, step, (jnp.zeros_like(q), q, z, rz, jnp.int32(0)))
    return w, k


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
