"""Sinkhorn's algorithm in the log domain: balanced, unbalanced, with epsilon scaling and over-relaxation.

Cost: one row and one column log-sum-exp a step; memory 2 (n + m) beside the cost.
Source: Cuturi 2013; unbalanced: Chizat et al. 2018; epsilon scaling: Schmitzer 2019; Peyre & Cuturi 2019, chapter 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision
from jaxnum.core.solver import ByPrecision, Defaults, Measure, Solver
from jaxnum.core.status import Status
from jaxnum.core.transport import Transport
from kernels_pallas import checks

Pair = tuple[jax.Array, jax.Array]


class SinkhornState(NamedTuple):
    """Row and column log-sum-exps at x, the current epsilon and where it began, steps, whether x is judged, a flag."""

    rows: jax.Array
    cols: jax.Array
    epsilon: jax.Array
    first: jax.Array
    count: jax.Array
    judged: jax.Array
    flag: jax.Array


class SinkhornHyper(NamedTuple):
    """Over-relaxation (None without), and the decay of epsilon (None without scaling) with the sweeps of a stage."""

    momentum: jax.Array | None
    decay: jax.Array | None
    sweeps: jax.Array | None


def sinkhorn(
    *,
    epsilon_scaling: float | jax.Array | None = None,
    stage_sweeps: int | jax.Array = 10,
    momentum: float | jax.Array = 1.0,
) -> Solver:
    """Sinkhorn's alternating maximisation of the dual, in the log domain.

    One step is f_i <- tau_a epsilon (log a_i - LSE_j (g_j - C_ij) / epsilon), then the same for g with the new f. The
    log-sum-exp that judges the row marginals is the first half of the next step, so judging costs nothing.

    Args:
      epsilon_scaling: None, or the factor q in (0, 1), say 0.5 to 0.75, by which epsilon falls from the largest cost to
        its target, keeping the potentials. Worth it for epsilon below about 1e-2 max C. A start whose marginals are
        already within a tenth of the mass is not scaled away.
      stage_sweeps: steps at each epsilon above the target, >= 1.
      momentum: over-relaxation w in (0, 2): f <- (1 - w) f + w f_new. 1 is Sinkhorn, and always converges; 1.5 may
        halve the steps near the solution or diverge far from it.

    Returns:
      A Solver for `Transport`. Balanced, it stops at ||P 1 - a||_1 + ||P^T 1 - b||_1 <= atol + rtol, the second term
      being rounding when momentum is 1; unbalanced, at the sup-norm of (next potential - potential) / epsilon.
      While epsilon is above its target the residual is reported as the largest number of the dtype, so that no
      tolerance accepts it. `infeasible`: weights negative, not finite, all zero or, balanced, of different sums.

    Raises:
      ValueError: epsilon_scaling outside (0, 1), stage_sweeps below 1, momentum outside (0, 2).

    Cost: two passes over the cost a step. Steps grow like 1 / epsilon; rtol is 1e-6 (float64) or 1e-4, looked at every
      10 steps; 10,000 steps are enough for epsilon = 1e-3 max C on typical clouds and end a hopeless run in seconds.

    Numerics: the marginal error attainable is about eps max |f| / epsilon: float32 reaches 1e-6 at best, 1e-4 at
      epsilon = 1e-3 max C.

    Source: Cuturi, "Sinkhorn distances" (2013); Chizat, Peyre, Schmitzer & Vialard, "Scaling algorithms for unbalanced
      optimal transport problems" (2018), section 4; Schmitzer, "Stabilized sparse scaling algorithms for entropy
      regularized transport problems" (2019), section 3.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> a = jnp.full(2, 0.5)
      >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
      >>> solution = jaxnum.transport(cost, a, a, 0.1, solver=jaxnum.solvers.sinkhorn(epsilon_scaling=0.5))
      >>> print(f"{float(jaxnum.Transport(cost, a, a, 0.1).primal_cost(solution.x)):.6f}")
      0.000045
    """
    for name, given, top in (("epsilon_scaling", epsilon_scaling, 1), ("momentum", momentum, 2)):
        if given is not None and not checks.traced(given):
            checks.value("sinkhorn", name, 0 < float(given) < top, f"be in (0, {top})", given)
    if not checks.traced(stage_sweeps):
        checks.value("sinkhorn", "stage_sweeps", int(stage_sweeps) >= 1, "be at least 1", stage_sweeps)
    scaled = epsilon_scaling is not None
    hyper = SinkhornHyper(
        # Python's 1.0 leaves the blend out of the graph, which is compiled with every shape.
        None if isinstance(momentum, (int, float)) and momentum == 1 else jnp.asarray(momentum),
        jnp.asarray(epsilon_scaling) if scaled else None,
        jnp.asarray(stage_sweeps, jnp.int32) if scaled else None,
    )
    return Solver(
        name="sinkhorn",
        init=_init,
        step=_step,
        measure=_measure,
        finish=_finish,
        problem=Transport,
        hyper=hyper,
        defaults=Defaults(rtol=ByPrecision(1e-6, 1e-4), max_steps=10_000, check_every=10),
    )


def _init(hyper: SinkhornHyper, x: Pair, problem: Transport) -> SinkhornState:
    target = problem.scalars[0]
    u, v = problem.log_scalings(x)
    cols = problem.cost.lse_cols(u, target)
    rows = problem.cost.lse_rows(v, target)
    judged = jnp.bool_(True)
    state = SinkhornState(rows, cols, target, target, jnp.int32(0), judged, _infeasible(problem))
    if hyper.decay is None:
        return state
    error = _measure(hyper, x, state, problem).residual
    warm = error <= 0.1 * jnp.where(problem.balanced, jnp.sum(problem.a) + jnp.sum(problem.b), 1)
    first = jnp.where(warm, target, jnp.maximum(problem.cost.largest().astype(target.dtype), target))
    # A start is judged at the target epsilon; the first step needs the rows at its own.
    _, v = problem.log_scalings(x, first)
    rows = jnp.where(warm, rows, problem.cost.lse_rows(v, first))
    return state._replace(rows=rows, epsilon=first, first=first, judged=warm)


def _infeasible(problem: Transport) -> jax.Array:
    a, b = problem.a.astype(problem.dtype), problem.b.astype(problem.dtype)
    epsilon, tau_a, tau_b = problem.scalars
    mass_a, mass_b = jnp.sum(a), jnp.sum(b)
    # Normalised weights sum to 1 up to the rounding of each of them, so the slack is that of their own dtype.
    rounding = precision.attainable(problem.a) * 4 * (a.size + b.size) ** 0.5
    good = jnp.all(a >= 0) & jnp.all(b >= 0) & jnp.isfinite(mass_a) & jnp.isfinite(mass_b)
    good &= (mass_a > 0) & (mass_b > 0) & (~problem.balanced | (jnp.abs(mass_a - mass_b) <= rounding * mass_a))
    good &= (epsilon > 0) & (tau_a > 0) & (tau_a <= 1) & (tau_b > 0) & (tau_b <= 1)
    return jnp.where(good, jnp.int32(0), jnp.int32(Status.infeasible))


def _step(hyper: SinkhornHyper, x: Pair, state: SinkhornState, problem: Transport) -> tuple[Pair, SinkhornState]:
    target, tau_a, tau_b = problem.scalars
    now, count, after = state.epsilon, state.count + 1, target
    if hyper.decay is not None and hyper.sweeps is not None:
        stage = (count // hyper.sweeps).astype(target.dtype)
        after = jnp.maximum(state.first * hyper.decay.astype(target.dtype) ** stage, target)
    f, g = x
    f = _update(f, state.rows, problem.a, tau_a, now, hyper.momentum)
    cols = problem.cost.lse_cols(problem.log_scalings((f, g), now)[0], now)
    g = _update(g, cols, problem.b, tau_b, now, hyper.momentum)
    rows = problem.cost.lse_rows(problem.log_scalings((f, g), after)[1], after)
    judged = (now <= target) & (after <= target)
    return (f, g), SinkhornState(rows, cols, after, state.first, count, judged, state.flag)


def _update(
    old: jax.Array, lse: jax.Array, weights: jax.Array, tau: jax.Array, epsilon: jax.Array, momentum: jax.Array | None
) -> jax.Array:
    held = weights > 0
    new = tau * epsilon * (jnp.log(jnp.where(held, weights, 1)).astype(lse.dtype) - lse)
    if momentum is not None:
        w = momentum.astype(lse.dtype)
        new = (1 - w) * jnp.where(held, old, 0).astype(lse.dtype) + w * new
    return jnp.where(held, new, -jnp.inf).astype(old.dtype)


def _measure(hyper: Any, x: Pair, state: SinkhornState, problem: Transport) -> Measure:
    _, tau_a, tau_b = problem.scalars
    u, v = problem.log_scalings(x)
    wrong_a, next_a = _errors(u, state.rows, problem.a, tau_a)
    wrong_b, next_b = _errors(v, state.cols, problem.b, tau_b)
    residual = jnp.where(problem.balanced, wrong_a + wrong_b, jnp.maximum(next_a, next_b))
    waiting = jnp.where(jnp.isfinite(residual), jnp.finfo(residual.dtype).max, residual)
    return Measure(jnp.where(state.judged, residual, waiting), jnp.ones((), residual.dtype), state.flag)


def _finish(hyper: Any, x: Pair, state: SinkhornState, problem: Transport) -> Pair:
    # Every adjoint then returns the same potentials, not only the implicit one.
    return problem.canonical(x)


def _errors(u: jax.Array, lse: jax.Array, weights: jax.Array, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
    """L1 error of a marginal, and the sup-norm of the next change of its log scaling."""
    held = weights > 0
    weights = jnp.where(held, weights, 1).astype(lse.dtype)
    u = jnp.where(held, u, 0)
    wrong = jnp.where(held, jnp.abs(jnp.exp(u + lse) - weights), 0)
    change = jnp.where(held, jnp.abs(tau * (jnp.log(weights) - lse) - u), 0)
    return jnp.sum(wrong), jnp.max(change)
