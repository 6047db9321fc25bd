"""Inexact Halpern iteration: monotone inclusions whose operator is a mean of many, at few evaluations of its terms.

Cost: a resolvent by a variance-reduced inner loop each step; memory 8 trees like x. Source: Cai, Alacaoglu &
Diakonikolas 2024.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.core.problems import FiniteSum
from jaxnum.core.solver import Measure, Solver
from jaxnum.core.status import Status
from jaxnum.solvers.monotone.search import INCLUSION_DEFAULTS
from kernels_pallas import checks

PyTree = Any

# An inner residual this many roundings of its own terms is as good as zero.
_ROUNDINGS = 64.0


class InexactHalpernState(NamedTuple):
    """What the next step starts from.

    Attributes:
      anchor: where the run started.
      point: J_k, the approximate resolvent of eta (F + G) at x; what a solve returns.
      residual: ||F(J_k) + g||, g in G(J_k).
      count: k, as a real number.
      key: typed key of the next draw.
      calls: evaluations of terms so far; int64 where x64 is on, else int32.
      failed: whether the inner loop reached its limit.
      look: whether the next step takes the resolvent at x as it stands.
    """

    anchor: PyTree
    point: PyTree
    residual: jax.Array
    count: jax.Array
    key: jax.Array
    calls: jax.Array
    failed: jax.Array
    look: jax.Array


class _InexactHalpernHyper(NamedTuple):
    key: jax.Array
    lipschitz: jax.Array
    step: jax.Array
    accuracy: jax.Array
    inner_limit: jax.Array


class _Inner(NamedTuple):
    """The inner loop between two refreshes of w: v = w there, `force` = F(w), `before` the w of the last round."""

    w: PyTree
    before: PyTree
    force: PyTree
    value: jax.Array
    residual: jax.Array
    bound: jax.Array
    rounds: jax.Array
    key: jax.Array
    calls: jax.Array


def inexact_halpern(
    key: jax.Array,
    lipschitz: float | jax.Array,
    *,
    step: float | jax.Array = 1.0,
    accuracy: float | jax.Array = 0.1,
    inner_limit: int | jax.Array = 300,
) -> Solver:
    """Halpern iteration on a resolvent found by variance reduction: 0 in (1/n) sum_i F_i(x) + G(x), monotone.

    The mean F is monotone, and (1/n) sum_i ||F_i(u) - F_i(v)||^2 <= L^2 ||u - v||^2; no term need be cocoercive, which
    `vr_halpern` asks for. With eta = step sqrt(n) / L and lambda_k = 1/(k+2),
      u_{k+1} = lambda_k u_0 + (1 - lambda_k) J_k,   J_k ~ (I + eta (F + G))^{-1} u_k.
    The inner loop (VR-FoRB) starts from v = w = u_k and, with p = 1/n and tau = sqrt(p (1-p)) / (2 eta L), repeats
      v <- J_{s G}(((1-p) v + p w - tau eta (F(w) + F_i(v) - F_i(w')) + tau u_k) / (1 + tau)),  s = tau eta / (1 + tau),
    i drawn at random (2 terms), w' the w of one step ago, and with probability p sets w = v (a refresh: n terms). At
    a refresh F(v) is known exactly, and with g in G(v), what the resolvent took off, the loop ends at
      ||eta (F(v) + g) + v - u_k|| <= accuracy ||u_k - v|| / (k+2)^2.
    The left side bounds ||v - (I + eta (F + G))^{-1} u_k||, because the equation is strongly monotone with constant 1.

    Args:
      key: typed PRNG key of the draws.
      lipschitz: the constant L > 0 of the average, real scalar, an array leaf. For F_i(u) = B_i u + c_i that is the
        root of the largest eigenvalue of the mean of B_i^T B_i.
      step: eta L / sqrt n, real scalar > 0.
      accuracy: of the resolvents, real scalar > 0.
      inner_limit: refreshes that one resolvent may take, an integer >= 1, an array leaf.

    Returns:
      A Solver for `FiniteSum`. It stops at ||F(J_k) + g|| <= atol + rtol L ||J_k||, both exact, and returns J_k: this
      is ||u_k - J_k|| / eta up to the accuracy of the resolvent. With max_steps=0 it returns J_0. `breakdown`: the
      inner loop reached its limit before its test held, as it does where F + G is not monotone. A far too small L ends
      `nonfinite` with the last finite J_k. `Solution.state.calls` counts the terms evaluated, exactly.

    Raises:
      ValueError: lipschitz, step or accuracy not above 0, inner_limit below 1.
      TypeError: key is not a typed key.

    Cost: about 3n terms from one refresh to the next, and O((1 + step) log k) refreshes a step: 17 to 29 on the games
      of the benchmark. So it pays where n is large and L near the constant of the mean: beside `feg`, 0.3x the terms at
      n = 10^4, 1.5x at n = 10^3, and 40x there where L is 20 times the constant of the mean. A vmap takes as many inner
      steps and refreshes as its slowest lane.

    Numerics: an inner residual explained by rounding passes. The inner loop has no reverse mode: adjoint="unrolled"
      fails; the implicit derivative does not look at the path. Without x64 the counter is int32 and wraps at 2e9.

    Source: Cai, Alacaoglu & Diakonikolas, "Variance reduced Halpern iteration for finite-sum monotone inclusions"
      (ICLR 2024), algorithm 2, with a test one can compute in place of its expectation; inner solver: Alacaoglu &
      Malitsky, "Stochastic variance reduction for variational inequality methods" (2022), algorithm 2.

    Example:
      >>> import jax, jax.numpy as jnp, jaxnum
      >>> a = jax.random.normal(jax.random.key(0), (50, 2))
      >>> turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
      >>> terms = lambda u, i: turn @ (u - jnp.mean(a[i], axis=0))  # round and round the mean of a
      >>> solver = jaxnum.solvers.inexact_halpern(jax.random.key(1), 1.0)
      >>> solution = jaxnum.solve(solver, jnp.ones(2), jaxnum.FiniteSum(terms, 50), atol=1e-2, rtol=0.0)
      >>> bool(jnp.linalg.norm(solution.x - a.mean(0)) <= 1e-2)
      True
    """
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    remedy = "Make one with jax.random.key(seed)."
    checks.value("inexact_halpern", "key", typed, "be a typed key", key, remedy, TypeError)
    for name, value in (("lipschitz", lipschitz), ("step", step), ("accuracy", accuracy)):
        if not checks.traced(value):
            checks.value("inexact_halpern", name, 0 < float(value) < jnp.inf, "be a finite real number > 0", value)
    if not checks.traced(inner_limit):
        ok = bool(inner_limit == int(inner_limit)) and int(inner_limit) >= 1
        checks.value("inexact_halpern", "inner_limit", ok, "be an integer >= 1", inner_limit)
    hyper = _InexactHalpernHyper(
        key,
        jnp.asarray(lipschitz),
        jnp.asarray(step),
        jnp.asarray(accuracy),
        jnp.asarray(inner_limit, jnp.int32),
    )
    return Solver(
        name="inexact_halpern",
        init=_init,
        step=_step,
        measure=_measure,
        finish=_finish,
        refresh=_refresh,
        problem=FiniteSum,
        hyper=hyper,
        defaults=INCLUSION_DEFAULTS,
    )


def _init(hyper: _InexactHalpernHyper, x: PyTree, problem: FiniteSum) -> InexactHalpernState:
    zero = jnp.zeros((), precision.accumulator(precision.coarsest(x)))
    no = jnp.bool_(False)
    return InexactHalpernState(x, x, zero, zero, hyper.key, jnp.zeros((), int), no, no)


def _refresh(hyper: _InexactHalpernHyper, state: InexactHalpernState, due: jax.Array) -> InexactHalpernState:
    return state._replace(look=due)


def _step(
    hyper: _InexactHalpernHyper, x: PyTree, state: InexactHalpernState, problem: FiniteSum
) -> tuple[PyTree, InexactHalpernState]:
    pulled = trees.add_scaled(state.point, 1 / (state.count + 2), trees.sub(state.anchor, state.point))
    new = trees.where(state.look, x, pulled)
    count = jnp.where(state.look, state.count, state.count + 1)
    key, draw = jax.random.split(state.key)
    found = _resolvent(hyper, new, count, draw, problem)
    return new, InexactHalpernState(
        anchor=state.anchor,
        point=found.w,
        residual=found.value,
        count=count,
        key=key,
        calls=state.calls + found.calls,
        failed=~(found.residual <= found.bound),
        look=jnp.bool_(False),
    )


def _resolvent(hyper: _InexactHalpernHyper, u: PyTree, count: jax.Array, key: jax.Array, problem: FiniteSum) -> _Inner:
    """(I + eta (F + G))^{-1} u by VR-FoRB, to the accuracy that step `count` asks for."""
    real = count.dtype
    eta = hyper.step.astype(real) * problem.n**0.5 / hyper.lipschitz.astype(real)
    share = hyper.accuracy.astype(real) / (count + 2) ** 2
    unknown = jnp.full((), jnp.inf, real)
    first = _Inner(
        w=u,
        before=u,
        force=problem.operator(u),
        value=unknown,
        residual=unknown,
        bound=jnp.zeros((), real),
        rounds=jnp.int32(0),
        key=key,
        calls=jnp.asarray(problem.n, int),
    )

    def unfinished(c: _Inner) -> jax.Array:
        searching = (c.rounds == 0) | (jnp.isfinite(c.residual) & (c.residual > c.bound))
        return searching & (c.rounds < hyper.inner_limit)

    return jax.lax.while_loop(unfinished, lambda c: _round(hyper, c, u, eta, share, problem), first)


def _round(
    hyper: _InexactHalpernHyper, c: _Inner, u: PyTree, eta: jax.Array, share: jax.Array, problem: FiniteSum
) -> _Inner:
    """Steps of v up to and with the next refresh of w, and the test there.

    How many there are is drawn beforehand: a coin for each step would have a vmap evaluate all n terms in every step.
    """
    p = 1 / max(problem.n, 2)  # a mean of one term is refreshed at every other step
    tau = (p * (1 - p)) ** 0.5 / (2 * eta * hyper.lipschitz.astype(eta.dtype))
    key, length, draws = jax.random.split(c.key, 3)
    steps = jax.random.geometric(length, p, dtype=jnp.int32)

    def advance(i: jax.Array, pair: tuple) -> tuple:
        v, _ = pair
        index = jax.random.randint(jax.random.fold_in(draws, i), (1,), 0, problem.n, jnp.int32)
        last = trees.where(i == 0, c.before, c.w)
        change = trees.sub(problem.mean(v, index), problem.mean(last, index))
        target = trees.add_scaled(v, jnp.asarray(p, eta.dtype), trees.sub(c.w, v))
        target = trees.add_scaled(target, -tau * eta, trees.add(c.force, change))
        target = trees.scaled(1 / (1 + tau), trees.add_scaled(target, tau, u))
        new = problem.backward(target, tau * eta / (1 + tau))
        return new, trees.sub(target, new)

    start = (c.w, jax.tree.map(jnp.zeros_like, c.w))
    w, taken = jax.lax.fori_loop(0, steps, advance, start)
    force = problem.operator(w)
    value = force
    if problem.resolvent is not None:
        value = trees.add_scaled(force, (1 + tau) / (tau * eta), taken)
    moved, size = trees.sub(w, u), trees.norm(value)
    rounding = _ROUNDINGS * jnp.finfo(precision.coarsest(u)).eps * (trees.norm(u) + eta * trees.norm(force))
    return _Inner(
        w=w,
        before=c.w,
        force=force,
        value=size,
        residual=trees.norm(trees.add_scaled(moved, eta, value)),
        bound=jnp.maximum(share * trees.norm(moved), rounding),
        rounds=c.rounds + 1,
        key=key,
        calls=c.calls + 2 * steps + problem.n,
    )


def _measure(hyper: _InexactHalpernHyper, x: PyTree, state: InexactHalpernState, problem: FiniteSum) -> Measure:
    flag = jnp.where(state.failed, jnp.int32(Status.breakdown), jnp.int32(0))
    scale = hyper.lipschitz.astype(state.residual.dtype) * trees.norm(state.point)
    return Measure(state.residual, scale, flag)


def _finish(hyper: _InexactHalpernHyper, x: PyTree, state: InexactHalpernState, problem: FiniteSum) -> PyTree:
    return state.point
