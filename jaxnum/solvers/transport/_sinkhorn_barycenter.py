"""Entropic barycentre of measures on a fixed support, by Bregman projections in the log domain.

Cost: two log-sum-exps a measure and step; memory two arrays like the measures beside the cost.
Source: Benamou, Carlier, Cuturi, Nenna & Peyre 2015.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision
from jaxnum.core.costs import as_cost
from jaxnum.core.problems import FixedPoint
from jaxnum.core.solver import Solution, Solver, drive
from jaxnum.solvers.fixed_point._picard import picard
from kernels_pallas import checks


class SinkhornBarycenter(NamedTuple):
    """What `sinkhorn_barycenter` returns.

    Attributes:
      barycenter: weights [m].
      solution: the `Solution` in the log scalings [k, m], with its status, steps and residual.
    """

    barycenter: jax.Array
    solution: Solution


def sinkhorn_barycenter(
    cost: Any,
    measures: jax.Array,
    weights: jax.Array,
    epsilon: float | jax.Array,
    *,
    solver: Solver | None = None,
    rtol: Any = None,
    max_steps: int | None = None,
    on_failure: str = "raise",
) -> SinkhornBarycenter:
    """The measure q on a fixed support that minimises sum_k weights_k OT(p_k, q), OT with entropy.

    With P_k = diag(u_k) exp(-C / epsilon) diag(v_k), u_k makes the rows of P_k sum to p_k, r_k = exp(-C / epsilon)^T
    u_k, and q = prod_k r_k^weights_k, v_k = q / r_k is the next v. It is a fixed point in log v; each log v_k is
    centred, which leaves q as it is and the fixed point unique.

    Args:
      cost: C [n, m], an array, a `DenseCost` or a `PointCloudCost`: from supports of the measures to that of q.
      measures: p [k, n] >= 0, all of one sum; zeros are allowed.
      weights: [k] >= 0, taken in proportion to their sum, which is above 0.
      epsilon: real scalar > 0, in units of C.
      solver: a solver of `FixedPoint`; None is `picard()`.
      rtol: real scalar >= 0, relative to the norm of the log scalings; None is the solver's.
      max_steps: Python int >= 0; None is the solver's.
      on_failure: "raise" or "return", as in `jaxnum.solve`.

    Returns:
      A `SinkhornBarycenter`. Measures that are negative, of no mass or of different masses, negative weights, and a
      traced epsilon that is not positive, end as `nonfinite`.

    Raises:
      ValueError, ShapeError, DtypeError: arguments that do not fit, at trace time.
      SolverError: an eager solve that did not converge.

    Cost: 2 k passes over the cost a step. Steps grow like 1 / epsilon.

    Numerics: q is blurred by about sqrt(epsilon / 2) for squared distances. Derivatives with respect to the cost, the
      measures, weights and epsilon are implicit; a zero entry of a measure has derivative zero.

    Source: Benamou, Carlier, Cuturi, Nenna & Peyre, "Iterative Bregman projections for regularized transportation
      problems" (2015), section 3.2.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> t = jnp.arange(3.0)
      >>> ends = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
      >>> found = jaxnum.solvers.sinkhorn_barycenter((t[:, None] - t) ** 2, ends, jnp.ones(2), 0.2)
      >>> int(jnp.argmax(found.barycenter))
      1
    """
    name = "sinkhorn_barycenter"
    cost = as_cost(cost)
    cost.check(name)
    n, m = cost.shape
    checks.shape(name, measures=(measures, f"k {n}"), weights=(weights, "k"), epsilon=(epsilon, ""))
    checks.dtype(name, "floating", measures=measures, weights=weights)
    checks.same_dtype(name, measures=measures, weights=weights)
    if not checks.traced(epsilon):
        checks.value(name, "epsilon", float(epsilon) > 0, "be positive", epsilon)
    args = (cost, measures, weights, jnp.asarray(epsilon, measures.dtype))
    solution = drive(
        name,
        picard() if solver is None else solver,
        jnp.zeros((measures.shape[0], m), measures.dtype),
        FixedPoint(_next, args),
        rtol=rtol,
        atol=None,
        max_steps=max_steps,
        check_every=None,
        history=False,
        adjoint="implicit",
        checkpoint_every=None,
        progress=None,
        on_failure=on_failure,
    )
    return SinkhornBarycenter(jnp.exp(_project(solution.x, *args)[0]), solution)


def _next(v: jax.Array, cost: Any, measures: jax.Array, weights: jax.Array, epsilon: jax.Array) -> jax.Array:
    q, r = _project(v, cost, measures, weights, epsilon)
    new = q - r
    return new - jnp.mean(new, axis=1, keepdims=True)


def _project(
    v: jax.Array, cost: Any, measures: jax.Array, weights: jax.Array, epsilon: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log q [m] and log r [k, m]; NaN where there is no barycentre."""
    held = measures > 0
    masses = jax.lax.stop_gradient(jnp.sum(measures, axis=1))
    slack = 4 * precision.attainable(measures) * measures.shape[1] ** 0.5
    sound = (jnp.max(masses) - jnp.min(masses) <= slack * jnp.max(masses)) & jnp.all(weights >= 0) & (epsilon > 0)
    weights = jnp.where(sound, weights, jnp.nan)
    logs = jnp.log(jnp.where(held | (measures < 0) | jnp.isnan(measures), measures, 1))
    u = logs - jax.vmap(lambda row: cost.lse_rows(row, epsilon))(v)
    u = jnp.where(measures == 0, -jnp.inf, u)
    r = jax.vmap(lambda row: cost.lse_cols(row, epsilon))(u)
    return (weights / jnp.sum(weights)) @ r, r
