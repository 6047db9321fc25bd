"""Leverage scores: how much each row of a matrix matters to least squares on it.

Cost: one QR and an SVD of its small factor. Source: Drineas, Magdon-Ismail, Mahoney & Woodruff 2012.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import checks


def leverage_scores(A: jax.Array, *, rtol: Any = None) -> jax.Array:
    """tau_i = a_i^T (A^T A)^+ a_i: the diagonal of the projector onto the columns of A.

    0 <= tau_i <= 1, and they sum to the rank. tau_i is the largest share of ||A x||^2 that row i can have.

    Args:
      A: [n, d] with n >= d, floating point.
      rtol: singular values at most rtol sigma_1 count as zero; real scalar. Default n eps.

    Returns:
      [n] scores; NaN where A holds one, but for rows of zeros.

    Raises:
      ShapeError, DtypeError: A is not a real matrix. ValueError: n < d, or no column.

    Cost: 4 n d^2.

    Numerics: A^T A is never formed. A row of zeros has the score 0 exactly.

    Source: Drineas, Magdon-Ismail, Mahoney & Woodruff, "Fast approximation of matrix coherence and statistical
      leverage" (2012), definition 1.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> jaxnum.solvers.leverage_scores(jnp.array([[1.0], [1.0], [0.0]])).round(3).tolist()
      [0.5, 0.5, 0.0]
    """
    checks.arrays("leverage_scores", A=A)
    A = jnp.asarray(A)
    checks.shape("leverage_scores", A=(A, "N D"))
    checks.dtype("leverage_scores", "floating", A=A)
    n, d = A.shape
    checks.value("leverage_scores", "A", n >= d, "have as many rows as columns", A.shape, "Every score is 1 below.")
    checks.value("leverage_scores", "A", d >= 1, "have a column", A.shape)
    Q, R = jnp.linalg.qr(A)
    U, singular, _ = jnp.linalg.svd(R)
    cut = n * jnp.finfo(A.dtype).eps if rtol is None else rtol
    # Not `>`: NaN is to be seen.
    basis = jnp.where(singular <= cut * singular[0], 0, jnp.matmul(Q, U, precision="highest"))
    return jnp.where(jnp.any(A != 0, axis=1), jnp.sum(basis * basis, axis=1), 0)
