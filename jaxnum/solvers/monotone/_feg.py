"""Fast extragradient: monotone Lipschitz inclusions, saddle points and games, with an O(1/k) rate of the last iterate.

Cost: two F and one resolvent a step; memory 3 trees like x. Source: Lee & Kim 2021, after Yoon & Ryu 2021.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.core.problems import Inclusion
from jaxnum.core.solver import Measure, Solver
from jaxnum.core.status import Status
from jaxnum.solvers.monotone.search import (
    INCLUSION_DEFAULTS,
    above_rounding,
    first_lipschitz,
    forward_backward,
    searched,
    trusted,
)
from kernels_pallas import checks

PyTree = Any


class FEGState(NamedTuple):
    """What the next step starts from.

    Attributes:
      anchor: where the run started.
      value: F(x) + g with g in G(x), the residual; before the first step, (x - J_{aG}(x - a F(x))) / a.
      lipschitz: L, given or estimated; a = 1/L.
      count: k, as a real number.
      rejected: int32, trials in a row that raised the estimate.
    """

    anchor: PyTree
    value: PyTree
    lipschitz: jax.Array
    count: jax.Array
    rejected: jax.Array


class _FEGHyper(NamedTuple):
    lipschitz: jax.Array | None
    rho: jax.Array


def feg(lipschitz: float | jax.Array | None = None, *, rho: float | jax.Array = 0.0) -> Solver:
    """Fast extragradient for 0 in F(x) + G(x), F monotone and L-Lipschitz: anchored, O(1/k) at the last iterate.

    With v_k = F(x_k) + g_k, g_k in G(x_k), a = 1/L and beta_k = 1/(k+1), k = 0, 1, ...,
      y_k     = x_k + beta_k (x_0 - x_k) - (1 - beta_k) (a + 2 rho) v_k
      x_{k+1} = J_{aG}(x_k + beta_k (x_0 - x_k) - (1 - beta_k) 2 rho v_k - a F(y_k))
    and g_{k+1} is what the resolvent took off, divided by a. Then ||v_N|| <= 2 L ||x_0 - x*|| / ((1 + 2 rho L) N).
    The published method is the case G = 0. Its proof uses only that v is monotone between x_k and x_{k+1}, and that
    F is L-Lipschitz between y_k and x_{k+1}; with the same g_{k+1} on both sides of the second, and no g_0 in the first
    step because beta_0 = 1, it holds for every maximal monotone G at one resolvent a step.

    Args:
      lipschitz: the constant L > 0 of F, real scalar, an array leaf; or None to estimate it: from a difference
        quotient at x_0, doubled, x staying where it is, whenever ||F(x_{k+1}) - F(y_k)|| > L ||x_{k+1} - y_k||. The
        estimate ends below 2 L (or where it started), and the bound holds with the last one.
      rho: F + G is rho-comonotone: <v - w, x - z> >= rho ||v - w||^2. 0 for monotone; a negative one, above -1/(2L),
        lets nonmonotone problems in; an array leaf.

    Returns:
      A Solver for `Inclusion`. It stops at ||v|| <= atol + rtol L ||x||; ||v|| bounds the natural residual
      ||x - J_{aG}(x - a F(x))|| / a from above. `breakdown`: doubling does not help, or the estimate reached
      1/(-2 rho). A given L that is too small diverges and ends `nonfinite` with the last finite x.

    Raises:
      ValueError: lipschitz not above 0, rho at most -1/(2 lipschitz).

    Cost: two F, one resolvent a step (extragradient: two); one F more to start without `lipschitz`. A rejected trial is
      a step.

    Numerics: F is evaluated at y_k, which may lie outside the domain of G. Differences of F that rounding explains are
      not tested.

    Source: Lee & Kim, "Fast extra gradient methods for smooth structured nonconvex-nonconcave minimax problems" (2021),
      equation FEG and theorem 4.1; the resolvent form is derived as above.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> A = jnp.array([[0.0, -1.0], [1.0, 0.0]])  # rock, paper, scissors would do: gradients go round in circles
      >>> solver = jaxnum.solvers.restarted(jaxnum.solvers.feg())
      >>> solution = jaxnum.inclusion(lambda z: A @ z, jnp.ones(2), solver=solver, atol=1e-5)
      >>> bool(jnp.linalg.norm(solution.x) < 1e-4)
      True
    """
    if lipschitz is not None and not checks.traced(lipschitz):
        ok = 0 < float(lipschitz) < jnp.inf
        checks.value("feg", "lipschitz", ok, "be a finite real number > 0, or None", lipschitz)
        ok = checks.traced(rho) or 2 * float(rho) * float(lipschitz) > -1
        checks.value("feg", "rho", ok, "be above -1 / (2 lipschitz)", rho)
    return Solver(
        name="feg",
        init=_init,
        step=_step,
        measure=_measure,
        problem=Inclusion,
        hyper=_FEGHyper(None if lipschitz is None else jnp.asarray(lipschitz), jnp.asarray(rho)),
        defaults=INCLUSION_DEFAULTS,
    )


def _init(hyper: _FEGHyper, x: PyTree, problem: Inclusion) -> FEGState:
    real = precision.accumulator(precision.coarsest(x))
    value = problem.operator(x)
    guess = first_lipschitz(x, value, problem) if hyper.lipschitz is None else hyper.lipschitz
    lipschitz = guess.astype(real)
    if problem.resolvent is not None:
        value = trees.scaled(lipschitz, trees.sub(x, forward_backward(x, value, 1 / lipschitz, problem)))
    return FEGState(x, value, lipschitz, jnp.zeros((), real), jnp.int32(0))


def _step(hyper: _FEGHyper, x: PyTree, state: FEGState, problem: Inclusion) -> tuple[PyTree, FEGState]:
    lipschitz, beta = state.lipschitz, 1 / (state.count + 1)
    step, rho = 1 / lipschitz, hyper.rho.astype(lipschitz.dtype)
    base = trees.add_scaled(x, beta, trees.sub(state.anchor, x))
    base = trees.add_scaled(base, -(1 - beta) * 2 * rho, state.value)
    middle = trees.add_scaled(base, -(1 - beta) * step, state.value)
    pushed = problem.operator(middle)
    target = trees.add_scaled(base, -step, pushed)
    new = problem.backward(target, step)
    force = value = problem.operator(new)
    if problem.resolvent is not None:
        value = trees.add_scaled(force, lipschitz, trees.sub(target, new))
    accepted = FEGState(state.anchor, value, lipschitz, state.count + 1, jnp.int32(0))
    if hyper.lipschitz is not None:
        return new, accepted
    # NaN fails no comparison: the driver sees it in the residual.
    rise = trees.norm(trees.sub(force, pushed))
    failed = (rise > lipschitz * trees.norm(trees.sub(new, middle))) & above_rounding(
        rise, x, trees.norm(force), lipschitz, state.rejected
    )
    again = state._replace(lipschitz=2 * lipschitz, rejected=state.rejected + 1)
    return trees.where(failed, (x, again), (new, accepted))


def _measure(hyper: _FEGHyper, x: PyTree, state: FEGState, problem: Inclusion) -> Measure:
    flag = searched(state.rejected, x)
    outside = 2 * hyper.rho.astype(state.lipschitz.dtype) * state.lipschitz <= -1
    flag = jnp.where(outside, jnp.int32(Status.breakdown), flag)
    return Measure(trees.norm(state.value), trusted(state.lipschitz, state.rejected) * trees.norm(x), flag)
