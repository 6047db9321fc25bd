"""Hutchinson's estimate of the diagonal of any operator, with its standard error; `hutchinson` is for optimisers."""

from __future__ import annotations

from typing import Any

import jax

from jaxnum.curvature import monte_carlo

PyTree = Any


def hutchinson_diagonal(op: Any, like: PyTree, key: jax.Array, *, num_probes: int = 30) -> tuple[PyTree, PyTree]:
    """Estimate the diagonal of A from products with random signs.

    The mean of z * (A z) over probes z of independent signs is unbiased; entry i has variance sum over j != i of
    A_ij²: exact for a diagonal A. The estimator is matfree's, which has more (XDiag).

    Args:
      op: linear function v -> A v on trees like `like`, as of `gauss_newton_product`, or an array [n, n].
      like: pytree of floating-point arrays, of the shapes and dtypes of v.
      key: [] typed random key.
      num_probes: Python int >= 2.

    Returns:
      (mean, standard error of the mean), trees like `like`, in float32 at least.

    Raises:
      ImportError: matfree is missing; the extra `interop` has it.
      ValueError: num_probes below 2.
      TypeError, ShapeError, TreeError, DtypeError: op, like or key do not fit.

    Cost: num_probes products, all at once: memory num_probes trees like `like`.

    Numerics: sums in float32 at least; op sees the dtypes of `like`.

    Source: Bekas, Kokiopoulou & Saad, "An estimator for the diagonal of a matrix" (2007), equation 3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mean, error = hutchinson_diagonal(jnp.diag(jnp.arange(4.0)), jnp.zeros(4), jax.random.key(0))
      >>> mean.round(4).tolist()
      [0.0, 1.0, 2.0, 3.0]
    """
    return monte_carlo.mean_and_error("hutchinson_diagonal", "monte_carlo_diagonal", op, like, key, num_probes)
