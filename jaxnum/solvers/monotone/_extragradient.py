"""Extragradient: the classical method for monotone Lipschitz inclusions, O(1/sqrt k) at the last iterate.

Cost: two F and two resolvents a step; memory 2 trees like x. Source: Korpelevich 1976.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.core.problems import Inclusion
from jaxnum.core.solver import Measure, Solver
from jaxnum.solvers.monotone.search import INCLUSION_DEFAULTS, forward_backward
from kernels_pallas import checks

PyTree = Any


class ExtragradientState(NamedTuple):
    """y = J_{aG}(x - a F(x)), from which both the residual and the next step come."""

    middle: PyTree


def extragradient(lipschitz: float | jax.Array) -> Solver:
    """Extragradient y_k = J_{aG}(x_k - a F(x_k)), x_{k+1} = J_{aG}(x_k - a F(y_k)) for 0 in F(x) + G(x), F monotone.

    a = 1/(sqrt 2 L). Linear where F + G is strongly monotone or metrically subregular, O(1/sqrt k) at the last iterate
    otherwise, where `feg` has O(1/k).

    Args:
      lipschitz: the Lipschitz constant L > 0 of F, real scalar, an array leaf.

    Returns:
      A Solver for `Inclusion`. It stops at ||x - y|| / a <= atol + rtol ||y|| / a, the natural residual at step a; for
      G = 0 that is ||F(x)||. An L that is too small diverges and ends `nonfinite` with the last finite x.

    Raises:
      ValueError: lipschitz not above 0.

    Cost: two F and two resolvents a step.

    Source: Korpelevich, "The extragradient method for finding saddle points and other problems" (1976); last iterate:
      Gorbunov, Loizou & Gidel, "Extragradient method: O(1/K) last-iterate convergence for monotone variational
      inequalities and connections with cocoercivity" (2022), which asks for a <= 1/(sqrt 2 L).

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> F = lambda z: jnp.stack([z[1], -z[0]]) + 0.1 * z
      >>> solution = jaxnum.inclusion(F, jnp.ones(2), solver=jaxnum.solvers.extragradient(1.1), atol=1e-5)
      >>> bool(jnp.linalg.norm(solution.x) < 1e-4)
      True
    """
    if not checks.traced(lipschitz):
        ok = 0 < float(lipschitz) < jnp.inf
        checks.value("extragradient", "lipschitz", ok, "be a finite real number > 0", lipschitz)
    return Solver(
        name="extragradient",
        init=_init,
        step=_step,
        measure=_measure,
        problem=Inclusion,
        hyper=jnp.asarray(lipschitz),
        defaults=INCLUSION_DEFAULTS,
    )


def _length(hyper: jax.Array, x: PyTree) -> jax.Array:
    return 0.5**0.5 / hyper.astype(precision.accumulator(precision.coarsest(x)))


def _init(hyper: jax.Array, x: PyTree, problem: Inclusion) -> ExtragradientState:
    return ExtragradientState(forward_backward(x, problem.operator(x), _length(hyper, x), problem))


def _step(
    hyper: jax.Array, x: PyTree, state: ExtragradientState, problem: Inclusion
) -> tuple[PyTree, ExtragradientState]:
    x = forward_backward(x, problem.operator(state.middle), _length(hyper, x), problem)
    return x, _init(hyper, x, problem)


def _measure(hyper: jax.Array, x: PyTree, state: ExtragradientState, problem: Inclusion) -> Measure:
    inverse = 1 / _length(hyper, x)
    residual, scale = trees.norm(trees.sub(x, state.middle)), trees.norm(state.middle)
    return Measure(inverse * residual, inverse * scale, jnp.int32(0))
