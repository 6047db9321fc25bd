"""Variance-reduced Halpern iteration: inclusions whose operator is a mean of many, at few evaluations of its terms.

Cost: n terms at a refresh, 2 sqrt n else; memory 6 trees like x. Source: Cai, Alacaoglu & Diakonikolas 2024.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.core.problems import FiniteSum
from jaxnum.core.solver import Measure, Solver
from jaxnum.solvers.monotone.search import INCLUSION_DEFAULTS, forward_backward
from kernels_pallas import checks

PyTree = Any


class VRHalpernState(NamedTuple):
    """What the next step starts from, and what was exact last.

    Attributes:
      anchor: where the run started.
      estimate: the PAGE estimate of F(x).
      exact: x at the last refresh, where F(x) is known exactly.
      residual: ||F(x) + g|| there, g in G(x).
      count: k, as a real number.
      key: typed key of the next draw.
      calls: evaluations of terms so far; int64 where x64 is on, else int32.
    """

    anchor: PyTree
    estimate: PyTree
    exact: PyTree
    residual: jax.Array
    count: jax.Array
    key: jax.Array
    calls: jax.Array


class _VRHalpernHyper(NamedTuple):
    key: jax.Array
    step: jax.Array
    refresh: jax.Array | None
    batch: jax.Array | None


def vr_halpern(
    key: jax.Array,
    lipschitz: float | jax.Array,
    *,
    step: float | jax.Array = 0.5,
    batch: int | None = None,
    refresh: float | jax.Array | None = None,
) -> Solver:
    """Halpern iteration with the PAGE estimator for 0 in (1/n) sum_i F_i(x) + G(x), cocoercive on average.

    The terms satisfy <F(u) - F(v), u - v> >= (1/(n L)) sum_i ||F_i(u) - F_i(v)||^2. With lambda_k = 2/(k+4) and
    eta_k = (step / L) (1 - lambda_k),
      u_{k+1} = J_{eta_k G}(lambda_k u_0 + (1 - lambda_k) u_k - eta_k E_k),
      E_{k+1} = F(u_{k+1}) with probability p_{k+1} (a refresh: n terms), else
      E_{k+1} = E_k + (1/b) sum_{i in S} (F_i(u_{k+1}) - F_i(u_k)), S of b indices drawn with replacement (2b terms),
    p_k = 4/(k+5) while k <= sqrt n, then 4/(sqrt n + 5). The expected terms to (E ||F(u) + g||^2)^{1/2} <= eps are
    O~(n + sqrt(n) L/eps), against O(n L/eps) of `cocoercive_halpern`. It pays from n of some thousands on: at n = 400
    it takes more terms than the deterministic method.

    Args:
      key: typed PRNG key of the draws.
      lipschitz: the constant L > 0 of the average, real scalar, an array leaf. For F_i(u) = a_i (a_i.u - b_i) that is
        max ||a_i||^2, not the largest eigenvalue of the mean.
      step: eta L, real scalar > 0. The analysis asks for 1/4; 1/2 took about half the terms in every run we made.
      batch: b, a Python int >= 1; default ceil(sqrt n), which F_batch takes in one call (any other is mapped term by
        term).
      refresh: p, a real scalar in (0, 1] for every step; default p_k above. With 1 the method is deterministic.

    Returns:
      A Solver for `FiniteSum`. It stops at ||F(u) + g|| <= atol + rtol (L/step) ||u||, judged at refreshes alone, where
      F(u) is exact and g is what the resolvent took off: no estimate ever ends the run. x is the point at which the
      residual was last exact. `Solution.state.calls` counts the terms evaluated, exactly.

    Raises:
      ValueError: lipschitz or step not above 0, batch below 1, refresh outside (0, 1].
      TypeError: key is not a typed key.

    Cost: p n + (1 - p) 2b terms a step. Under vmap both kinds of step are computed in every lane, and nothing is saved.

    Numerics: without x64 the counter is int32 and wraps at 2e9. `restarted(vr_halpern(...))` draws from the same key
      after each restart, and counts anew.

    Source: Cai, Alacaoglu & Diakonikolas, "Variance reduced Halpern iteration for finite-sum monotone inclusions"
      (ICLR 2024), algorithm 1; the constants of lambda, p and step are those we measured with.

    Example:
      >>> import jax, jax.numpy as jnp, jaxnum
      >>> a = jax.random.normal(jax.random.key(0), (400,))
      >>> terms = lambda u, i: u - jnp.mean(a[i])  # its zero is the mean of a
      >>> solver = jaxnum.solvers.vr_halpern(jax.random.key(1), 1.0)
      >>> problem = jaxnum.FiniteSum(terms, 400)
      >>> solution = jaxnum.solve(solver, jnp.ones(()), problem, atol=1e-2, rtol=0.0)
      >>> bool(abs(solution.x - a.mean()) <= 1e-2)
      True
    """
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    checks.value("vr_halpern", "key", typed, "be a typed key", key, "Make one with jax.random.key(seed).", TypeError)
    for name, value in (("lipschitz", lipschitz), ("step", step)):
        if not checks.traced(value):
            checks.value("vr_halpern", name, 0 < float(value) < jnp.inf, "be a finite real number > 0", value)
    ok = batch is None or (isinstance(batch, int) and not isinstance(batch, bool) and batch >= 1)
    checks.value("vr_halpern", "batch", ok, "be None or a Python int >= 1", batch)
    if refresh is not None and not checks.traced(refresh):
        checks.value("vr_halpern", "refresh", 0 < float(refresh) <= 1, "be in (0, 1]", refresh)
    hyper = _VRHalpernHyper(
        key,
        jnp.asarray(step) / jnp.asarray(lipschitz),
        None if refresh is None else jnp.asarray(refresh),
        # The batch is a shape, so it travels as the shape of a leaf.
        None if batch is None else jnp.zeros((batch,), jnp.int8),
    )
    return Solver(
        name="vr_halpern",
        init=_init,
        step=_step,
        measure=_measure,
        finish=_finish,
        problem=FiniteSum,
        hyper=hyper,
        defaults=INCLUSION_DEFAULTS,
    )


def _init(hyper: _VRHalpernHyper, x: PyTree, problem: FiniteSum) -> VRHalpernState:
    real = precision.accumulator(precision.coarsest(x))
    step, force = hyper.step.astype(real), problem.operator(x)
    value = force
    if problem.resolvent is not None:
        value = trees.scaled(1 / step, trees.sub(x, forward_backward(x, force, step, problem)))
    zero, calls = jnp.zeros((), real), jnp.asarray(problem.n, int)
    return VRHalpernState(x, force, x, trees.norm(value), zero, hyper.key, calls)


def _step(
    hyper: _VRHalpernHyper, x: PyTree, state: VRHalpernState, problem: FiniteSum
) -> tuple[PyTree, VRHalpernState]:
    weight = 2 / (state.count + 4)
    step = hyper.step.astype(weight.dtype) * (1 - weight)
    target = trees.add_scaled(x, weight, trees.sub(state.anchor, x))
    target = trees.add_scaled(target, -step, state.estimate)
    new = problem.backward(target, step)
    batch = problem.batch if hyper.batch is None else hyper.batch.shape[0]
    key, coin, draw = jax.random.split(state.key, 3)
    due = jax.random.bernoulli(coin, _refresh_probability(hyper, state.count + 1, problem.n))

    def full() -> PyTree:
        return problem.operator(new)

    def recursive() -> PyTree:
        indices = jax.random.randint(draw, (batch,), 0, problem.n, jnp.int32)
        change = trees.sub(problem.mean(new, indices), problem.mean(x, indices))
        return trees.add(state.estimate, change)

    estimate = jax.lax.cond(due, full, recursive)
    value = estimate
    if problem.resolvent is not None:
        value = trees.add_scaled(estimate, 1 / step, trees.sub(target, new))
    return new, VRHalpernState(
        anchor=state.anchor,
        estimate=estimate,
        exact=trees.where(due, new, state.exact),
        residual=jnp.where(due, trees.norm(value), state.residual),
        count=state.count + 1,
        key=key,
        calls=state.calls + jnp.where(due, problem.n, 2 * batch),
    )


def _refresh_probability(hyper: _VRHalpernHyper, count: jax.Array, n: int) -> jax.Array:
    if hyper.refresh is not None:
        return hyper.refresh
    return 4 / (jnp.minimum(count, n**0.5) + 5)


def _measure(hyper: _VRHalpernHyper, x: PyTree, state: VRHalpernState, problem: FiniteSum) -> Measure:
    inverse = 1 / hyper.step.astype(state.residual.dtype)
    return Measure(state.residual, inverse * trees.norm(state.exact), jnp.int32(0))


def _finish(hyper: _VRHalpernHyper, x: PyTree, state: VRHalpernState, problem: FiniteSum) -> PyTree:
    return state.exact
