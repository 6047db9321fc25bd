"""The Sinkhorn divergence: entropic transport without its bias, zero between equal clouds.

Cost: three solves by `sinkhorn`; memory linear in the points.
Source: Feydy, Sejourne, Vialard, Amari, Trouve & Peyre 2019; Sejourne, Feydy, Vialard, Trouve & Peyre 2019.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.costs import PointCloudCost
from jaxnum.core.solver import Phases, Solver, drive
from jaxnum.core.transport import Transport
from jaxnum.solvers.transport._sinkhorn import sinkhorn
from kernels_pallas import checks


class SinkhornDivergence(NamedTuple):
    """What `sinkhorn_divergence` returns.

    Attributes:
      value: real scalar.
      status: int32 [3], a `jaxnum.Status` for each of the transports x to y, x to x, y to y.
      steps: int32 [3], their steps.
    """

    value: jax.Array
    status: jax.Array
    steps: jax.Array


def sinkhorn_divergence(
    x: jax.Array,
    y: jax.Array,
    epsilon: float | jax.Array,
    *,
    a: jax.Array | None = None,
    b: jax.Array | None = None,
    tau: float | jax.Array = 1.0,
    kind: str = "sqeuclidean",
    solver: Solver | Phases | None = None,
    rtol: Any = None,
    max_steps: int | None = None,
    on_failure: str = "raise",
) -> SinkhornDivergence:
    """Entropic transport between two weighted clouds, less half the transport of each to itself.

    S = OT(a, b) - (OT(a, a) + OT(b, b)) / 2, with OT the minimum of <C, P> + epsilon KL(P | a b^T) over plans with
    marginals a and b. The entropy of `Transport`, without the reference measure, gives the same S: what the two differ
    by, epsilon times the entropies of a and b, cancels. Libraries that sum <C, P> alone compute another number.

    With tau < 1 marginals may be missed at the price rho KL, rho = epsilon tau / (1 - tau), and masses may differ:
      OT(a, b) = min_P <C, P> + epsilon KL(P | a b^T) + rho KL(P 1 | a) + rho KL(P^T 1 | b),
      S = OT(a, b) - (OT(a, a) + OT(b, b)) / 2 + epsilon (sum a - sum b)^2 / 2.
    `Transport` solves this with the weights a^(1/tau) and b^(1/tau), which put the reference measure back.

    Args:
      x: points [n, d], floating-point.
      y: points [m, d], of the same dtype.
      epsilon: real scalar > 0, in units of the cost.
      a: weights [n] >= 0; None weighs all points alike with sum 1.
      b: weights [m] >= 0, sum b = sum a unless tau < 1; None likewise.
      tau: real scalar in (0, 1], for both sides; 1 is balanced.
      kind: of the `PointCloudCost`. S >= 0 is proven for exp(-C / epsilon) positive definite, as of "sqeuclidean" and
        "euclidean".
      solver: a solver of `Transport`; None is `sinkhorn()`.
      rtol: real scalar >= 0, on the marginals; None is the solver's.
      max_steps: Python int >= 0, for each solve; None is the solver's.
      on_failure: "raise" or "return", as in `jaxnum.solve`.

    Returns:
      A `SinkhornDivergence`.

    Raises:
      ValueError, ShapeError, DtypeError: arguments that do not fit, at trace time.
      SolverError: an eager solve that did not converge.

    Cost: the steps of three solves, and one more pass over each cost.

    Numerics: the value is stationary in the potentials, so its error is of second order in the marginal error; rounding
      may leave it below zero by a few units of OT. Its gradient takes the potentials for constants: it is exact at
      the solution, of first order in the marginal error, and of first derivatives only. With respect to weights it is
      defined up to a constant, as sums of weights must stay equal; it is zero where a weight is zero. Where a
      weight to the power 1/tau underflows (1e-4 at tau = 0.1 in float32) the value is NaN.

    Source: Feydy, Sejourne, Vialard, Amari, Trouve & Peyre, "Interpolating between optimal transport and MMD using
      Sinkhorn divergences" (2019), equation 3 and theorem 1; Sejourne, Feydy, Vialard, Trouve & Peyre, "Sinkhorn
      divergences for unbalanced optimal transport" (2019), definition 5.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> x = jnp.array([[0.0], [1.0]])
      >>> print(f"{float(jaxnum.solvers.sinkhorn_divergence(x, x + 2.0, 0.5).value):.4f}")
      4.0000
    """
    name = "sinkhorn_divergence"
    checks.shape(name, x=(x, "n d"), y=(y, "m d"))
    checks.dtype(name, "floating", x=x, y=y)
    for argument, cloud in (("x", x), ("y", y)):
        checks.value(name, argument, cloud.shape[0] > 0, "have a point", cloud.shape)
    a, b = (jnp.full(p.shape[0], 1 / p.shape[0], p.dtype) if w is None else w for p, w in ((x, a), (y, b)))
    checks.arrays(name, a=a, b=b)
    # A power of whole numbers would take tau for one.
    a, b = (w.astype(x.dtype) if jnp.issubdtype(w.dtype, jnp.integer) else w for w in (a, b))
    checks.value(name, "tau", jnp.ndim(tau) == 0, "be a scalar", f"shape {jnp.shape(tau)}", error=checks.ShapeError)
    if not checks.traced(tau):
        checks.value(name, "tau", 0 < float(tau) <= 1, "be in (0, 1]", tau)
    solver = sinkhorn() if solver is None else solver
    (a, lost_a), (b, lost_b) = _with_reference(a, tau), _with_reference(b, tau)
    pairs = ((x, y, a, b), (x, x, a, a), (y, y, b, b))
    problems = [Transport(PointCloudCost(p, q, kind=kind), v, w, epsilon, tau, tau) for p, q, v, w in pairs]
    solutions = [
        drive(
            name,
            solver,
            (jnp.zeros_like(problem.a), jnp.zeros_like(problem.b)),
            problem,
            rtol=rtol,
            atol=None,
            max_steps=max_steps,
            check_every=None,
            history=False,
            adjoint="none",
            checkpoint_every=None,
            progress=None,
            on_failure=on_failure,
        )
        for problem in problems
    ]
    across, first, second = (p.dual_cost(s.x) for p, s in zip(problems, solutions, strict=True))
    value = across - (first + second) / 2
    return SinkhornDivergence(
        jnp.where(lost_a | lost_b, jnp.nan, value),
        jnp.stack([s.status for s in solutions]),
        jnp.stack([s.steps for s in solutions]),
    )


def _with_reference(weights: jax.Array, tau: Any) -> tuple[jax.Array, jax.Array]:
    """The weights whose `Transport` has the reference measure in its entropy, and whether some vanished.

    With u = f / epsilon + log a for potentials f of the problem with reference, a exp(-f / rho) = a^(1/tau) exp(-k u),
    k = epsilon / rho = 1/tau - 1. A power of 1 is exact.
    """
    power = 1 / jnp.asarray(tau, weights.dtype)
    held = weights > 0
    raised = jnp.where(held, jnp.where(held, weights, 1) ** power, weights)
    return raised, jnp.any(held & (raised == 0))
