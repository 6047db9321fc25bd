"""Hutchinson's estimate of the trace of an operator, with its standard error."""

from __future__ import annotations

from typing import Any

import jax

from jaxnum.curvature import monte_carlo

PyTree = Any


def hutchinson_trace(op: Any, like: PyTree, key: jax.Array, *, num_probes: int = 30) -> tuple[jax.Array, jax.Array]:
    """Estimate tr A from products with random signs.

    The mean of zᵀ A z over probes z of independent signs is unbiased, with variance 2 (|A|_F² - sum_i A_ii²) for a
    symmetric A: exact for a diagonal one. The estimator is matfree's, which has more (XTrace, for fast decaying
    spectra).

    Args:
      op: linear function v -> A v on trees like `like`, as of `gauss_newton_product`, or an array [n, n].
      like: pytree of floating-point arrays, of the shapes and dtypes of v.
      key: [] typed random key.
      num_probes: Python int >= 2.

    Returns:
      (mean, standard error of the mean), [] each, in float32 at least.

    Raises:
      ImportError: matfree is missing; the extra `interop` has it.
      ValueError: num_probes below 2.
      TypeError, ShapeError, TreeError, DtypeError: op, like or key do not fit.

    Cost: num_probes products, all at once: memory num_probes trees like `like`.

    Numerics: sums in float32 at least; op sees the dtypes of `like`.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1989).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mean, error = hutchinson_trace(jnp.diag(jnp.arange(4.0)), jnp.zeros(4), jax.random.key(0))
      >>> print(f"{mean:.4f} {error:.4f}")
      6.0000 0.0000
    """
    return monte_carlo.mean_and_error("hutchinson_trace", "monte_carlo_trace", op, like, key, num_probes)
