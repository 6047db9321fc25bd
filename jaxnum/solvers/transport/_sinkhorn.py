"""Sinkhorn's algorithm in the log domain: balanced, unbalanced, with epsilon scaling and over-relaxation.

Cost: one row and one column log-sum-exp a step; memory 2 (n + m) beside the cost.
Source: Cuturi 2013; unbalanced: Chizat et al. 2018; epsilon scaling: Schmitzer 2019; Peyre & Cuturi 2019, chapter 4.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.solver import ByPrecision, Defaults, Measure, Solver
from jaxnum.core.transport import Transport
from jaxnum.solvers.transport import marginals
from kernels_pallas import checks

Pair = tuple[jax.Array, jax.Array]


class SinkhornState(NamedTuple):
    """What the next step starts from.

    Attributes:
      rows: row log-sum-exps at g.
      cols: column log-sum-exps at f.
      flag: a Status found by a look, else 0.
      look: whether the next step evaluates the log-sum-exps at x and leaves x alone.
      stage: where epsilon stands; None without epsilon scaling.
    """

    rows: jax.Array
    cols: jax.Array
    flag: jax.Array
    look: jax.Array
    stage: SinkhornStage | None


class SinkhornStage(NamedTuple):
    """Epsilon scaling: the current epsilon, where it began, steps, whether x is judged, whether `rows` are of use."""

    epsilon: jax.Array
    first: jax.Array
    count: jax.Array
    judged: jax.Array
    fresh: jax.Array


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
      A Solver for `Transport`. Balanced, it stops at ||P 1 - a||_1 + ||P^T 1 - b||_1 <= atol + rtol sum a, the
      second term being rounding when momentum is 1; unbalanced, at the sup-norm of (next potential - potential) /
      epsilon.
      While epsilon is above its target the residual is reported as the largest number of the dtype, so that no
      tolerance accepts it. `infeasible`: weights negative, not finite, all zero or, balanced, of different sums.

    Raises:
      ValueError: epsilon_scaling outside (0, 1), stage_sweeps below 1, momentum outside (0, 2).

    Cost: two passes over the cost a step. Steps grow like 1 / epsilon; rtol is 1e-6 (float64) or 1e-4;
      10,000 steps are enough for epsilon = 1e-3 max C on typical clouds and end a hopeless run in seconds.

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
        refresh=_refresh,
        problem=Transport,
        hyper=hyper,
        defaults=Defaults(rtol=ByPrecision(1e-6, 1e-4), max_steps=10_000),
    )


def _init(hyper: SinkhornHyper, x: Pair, problem: Transport) -> SinkhornState:
    target, yes = problem.scalars[0], jnp.bool_(True)
    rows, cols = (jnp.zeros_like(w, problem.dtype) for w in (problem.a, problem.b))
    stage = None if hyper.decay is None else SinkhornStage(target, target, jnp.int32(0), yes, yes)
    return SinkhornState(rows, cols, jnp.int32(0), yes, stage)


def _step(hyper: SinkhornHyper, x: Pair, state: SinkhornState, problem: Transport) -> tuple[Pair, SinkhornState]:
    target, tau_a, tau_b = problem.scalars
    look, stage = state.look, state.stage
    now, after = (target, target) if stage is None else (stage.epsilon, _next_epsilon(hyper, stage, look, target))
    still = look if stage is None else look | ~stage.fresh
    flag = jnp.where(look, marginals.infeasible(problem), 0)
    f, g = x
    problem = marginals.tied(problem, x)
    f = jnp.where(still, f, _update(f, state.rows, problem.a, tau_a, now, hyper.momentum))
    cols = problem.cost.lse_cols(problem.log_scalings((f, g), now)[0], _variable(now, x))
    cols = marginals.laid(cols, problem.b)
    g = jnp.where(look, g, _update(g, cols, problem.b, tau_b, now, hyper.momentum))
    rows = problem.cost.lse_rows(problem.log_scalings((f, g), after)[1], _variable(after, x))
    rows = marginals.laid(rows, problem.a)
    new = SinkhornState(rows, cols, flag, jnp.zeros_like(look), stage)
    return (f, g), new if stage is None else new._replace(stage=_next_stage(hyper, (f, g), new, look, after, problem))


def _variable(epsilon: jax.Array, x: Pair) -> jax.Array:
    # Otherwise XLA keeps C / epsilon, another matrix, through the loop.
    return jax.lax.optimization_barrier((epsilon, x))[0]


def _next_epsilon(hyper: SinkhornHyper, stage: SinkhornStage, look: jax.Array, target: jax.Array) -> jax.Array:
    decay: jax.Array = hyper.decay  # pyright: ignore[reportAssignmentType]  # both are there where stages are
    sweeps: jax.Array = hyper.sweeps  # pyright: ignore[reportAssignmentType]
    number = ((stage.count + 1) // sweeps).astype(target.dtype)
    return jnp.where(look, target, jnp.maximum(stage.first * decay.astype(target.dtype) ** number, target))


def _next_stage(
    hyper: SinkhornHyper, x: Pair, state: SinkhornState, look: jax.Array, after: jax.Array, problem: Transport
) -> SinkhornStage:
    target = problem.scalars[0]
    stage: SinkhornStage = state.stage  # pyright: ignore[reportAssignmentType]  # called only where there is one
    # A start is judged at the target epsilon. Rows at the target are of no use at the epsilon a cold start gets.
    error = marginals.error(x, state.rows, state.cols, problem)
    warm = error <= 0.1 * jnp.where(problem.balanced, jnp.sum(problem.a) + jnp.sum(problem.b), 1)
    begin = jnp.where(warm, target, jnp.maximum(problem.cost.largest().astype(target.dtype), target))
    return SinkhornStage(
        epsilon=jnp.where(look, begin, after),
        first=jnp.where(look, begin, stage.first),
        count=stage.count + jnp.where(look, 0, 1),
        judged=jnp.where(look, warm, (stage.epsilon <= target) & (after <= target)),
        fresh=~look | warm,
    )


def _refresh(hyper: SinkhornHyper, state: SinkhornState, due: jax.Array) -> SinkhornState:
    return state._replace(look=due)


def _update(
    old: jax.Array, lse: jax.Array, weights: jax.Array, tau: jax.Array, epsilon: jax.Array, momentum: jax.Array | None
) -> jax.Array:
    held = weights > 0
    new = tau * epsilon * (jnp.log(jnp.where(held, weights, 1)).astype(lse.dtype) - lse)
    if momentum is not None:
        w = momentum.astype(lse.dtype)
        new = (1 - w) * jnp.where(held, old, 0).astype(lse.dtype) + w * new
    return jnp.where(held, new, -jnp.inf).astype(old.dtype)


def _measure(hyper: SinkhornHyper, x: Pair, state: SinkhornState, problem: Transport) -> Measure:
    residual = marginals.error(x, state.rows, state.cols, problem)
    scale = marginals.scale(problem).astype(residual.dtype)
    if state.stage is None:
        return Measure(residual, scale, state.flag)
    # Potentials of another epsilon may well overflow at the target; NaN means what it says.
    waiting = jnp.where(jnp.isnan(residual), residual, jnp.finfo(residual.dtype).max)
    return Measure(jnp.where(state.stage.judged, residual, waiting), scale, state.flag)
