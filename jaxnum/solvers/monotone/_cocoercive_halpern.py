"""Halpern iteration on the forward-backward map: cocoercive inclusions with the O(1/k) rate of the last iterate.

Cost: one F and one resolvent a step; memory 4 trees like x. Source: Halpern 1967; sharp rate: Lieder 2021; without
parameters: Diakonikolas 2020.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.core.problems import Inclusion
from jaxnum.core.solver import Measure, Solver
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


class CocoerciveHalpernState(NamedTuple):
    """What the next step starts from.

    Attributes:
      anchor: where the run started.
      force: F(x).
      image: J_{sG}(x - s F(x)), s = 2 / lipschitz.
      lipschitz: L, given or estimated.
      phi: the inverse of the last anchor weight, k + 1.
      rejected: int32, trials in a row that raised the estimate.
    """

    anchor: PyTree
    force: PyTree
    image: PyTree
    lipschitz: jax.Array
    phi: jax.Array
    rejected: jax.Array


def cocoercive_halpern(lipschitz: float | jax.Array | None = None) -> Solver:
    """Anchored forward-backward iteration for 0 in F(x) + G(x), F cocoercive: gradients of convex functions above all.

    F is 1/L-cocoercive: <F(u) - F(v), u - v> >= ||F(u) - F(v)||^2 / L. With s = 2/L the map
    T(x) = J_{sG}(x - s F(x)) is nonexpansive and x_{k+1} = lambda_k x_0 + (1 - lambda_k) T(x_k), lambda_k = 1/(k+2), is
    Halpern's iteration, so that ||x_N - T(x_N)|| / s <= L ||x_0 - x*|| / (N+1); for G = 0 the left side is ||F(x_N)||.
    The iterates stay in the domain of G when x_0 lies in it.

    Args:
      lipschitz: the constant L > 0, real scalar, an array leaf; or None to estimate it. The estimate starts at a
        difference quotient of F at x_0 and is doubled, x staying where it is, whenever the inequality above fails
        between x_k and x_{k+1}. It ends below 2 L (or where it started), and for G = 0 the bound holds with the
        last estimate in place of L and N in place of N + 1. For G != 0 the map changes with s, so each doubling moves
        the anchor to x_k.

    Returns:
      A Solver for `Inclusion`. It stops at ||x - T(x)|| / s <= atol + rtol ||T(x)|| / s: the natural residual at the
      step s = 2/L. `breakdown`: doubling does not help, so F is not cocoercive (use `feg`). A given L that is too small
      diverges, or circles until max_steps; what diverges ends `nonfinite` with the last finite x.

    Raises:
      ValueError: lipschitz not above 0.

    Cost: one F and one resolvent a step, one F more to start without `lipschitz`. A rejected trial is a step.

    Numerics: differences of F that rounding explains are not tested.

    Source: Lieder, "On the convergence rate of the Halpern-iteration" (2021), theorem 2.1; Diakonikolas, "Halpern
      iteration for near-optimal and parameter-free monotone inclusion and strong solutions to variational inequalities"
      (2020), section 2 (which works on step 1/L in the constrained case; the longest step that is nonexpansive, taken
      here, keeps the sharp constant for every G).

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> gradient = lambda x: 3 * x - jnp.array([3.0, -3.0])
      >>> solver = jaxnum.solvers.restarted(jaxnum.solvers.cocoercive_halpern())
      >>> resolvent = jaxnum.solvers.resolvents.nonnegative()
      >>> jaxnum.inclusion(gradient, jnp.zeros(2), resolvent=resolvent, solver=solver).x.round(3).tolist()
      [1.0, 0.0]
    """
    if lipschitz is not None and not checks.traced(lipschitz):
        ok = 0 < float(lipschitz) < jnp.inf
        checks.value("cocoercive_halpern", "lipschitz", ok, "be a finite real number > 0, or None", lipschitz)
    return Solver(
        name="cocoercive_halpern",
        init=_init,
        step=_step,
        measure=_measure,
        problem=Inclusion,
        hyper=None if lipschitz is None else jnp.asarray(lipschitz),
        defaults=INCLUSION_DEFAULTS,
    )


def _init(hyper: jax.Array | None, x: PyTree, problem: Inclusion) -> CocoerciveHalpernState:
    real = precision.accumulator(precision.coarsest(x))
    force = problem.operator(x)
    guess = first_lipschitz(x, force, problem) if hyper is None else hyper
    lipschitz = guess.astype(real)
    image = forward_backward(x, force, 2 / lipschitz, problem)
    return CocoerciveHalpernState(x, force, image, lipschitz, jnp.ones((), real), jnp.int32(0))


def _step(
    hyper: jax.Array | None, x: PyTree, state: CocoerciveHalpernState, problem: Inclusion
) -> tuple[PyTree, CocoerciveHalpernState]:
    anchor, lipschitz, phi = state.anchor, state.lipschitz, state.phi + 1
    new = trees.add_scaled(state.image, 1 / phi, trees.sub(anchor, state.image))
    force, rejected = problem.operator(new), state.rejected
    if hyper is None:
        failed = _fails(x, new, force, state)
        rejected = jnp.where(failed, rejected + 1, 0)
        lipschitz = jnp.where(failed, 2 * lipschitz, lipschitz)
        new, force = trees.where(failed, (x, state.force), (new, force))
        phi = jnp.where(failed, state.phi if problem.resolvent is None else jnp.ones_like(phi), phi)
        if problem.resolvent is not None:
            anchor = trees.where(failed, x, anchor)
    image = forward_backward(new, force, 2 / lipschitz, problem)
    return new, CocoerciveHalpernState(anchor, force, image, lipschitz, phi, rejected)


def _fails(x: PyTree, new: PyTree, force: PyTree, state: CocoerciveHalpernState) -> jax.Array:
    """Whether x and the new point show that L is too small. NaN shows nothing: the driver sees it in the residual."""
    risen = trees.sub(force, state.force)
    rise = trees.norm(risen)
    wrong = rise * rise > state.lipschitz * trees.vdot(risen, trees.sub(new, x))
    return wrong & above_rounding(rise, x, trees.norm(state.force), state.lipschitz, state.rejected)


def _measure(hyper: Any, x: PyTree, state: CocoerciveHalpernState, problem: Inclusion) -> Measure:
    residual = state.lipschitz / 2 * trees.norm(trees.sub(x, state.image))
    scale = trusted(state.lipschitz, state.rejected) / 2 * trees.norm(state.image)
    return Measure(residual, scale, searched(state.rejected, x))
