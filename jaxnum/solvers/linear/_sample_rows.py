"""Rows of a matrix drawn by importance, with the weights that keep norms unbiased.

Cost: one table of n sums and m draws. Source: Cohen & Peng 2015; Woodruff & Yasuda 2023.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import checks


def sample_rows(key: jax.Array, scores: jax.Array, m: int, *, p: Any = 2.0) -> tuple[jax.Array, jax.Array]:
    """Draw m rows with replacement, row i with probability q_i = scores_i / sum of the scores.

    With weights (m q_i)^(-1/p), E ||W A[rows] x||_p^p = ||A x||_p^p for every A and x: a row is worth the number of
    times it is expected. Leverage scores keep all ||A x||_2 within 1 +- eps from m of about d log(d) / eps^2 rows.

    Args:
      key: a PRNG key.
      scores: [n] >= 0, not all zero, floating point: `leverage_scores(A)` for p = 2, ones for uniform draws.
      m: Python int >= 1, rows to draw.
      p: real scalar >= 1, the norm to keep.

    Returns:
      Row numbers int32 [m], and weights [m] to multiply the rows (and right-hand sides) by.

    Raises:
      ShapeError, DtypeError: scores is not a real vector. ValueError: m or p below 1.

    Numerics: a row of score 0 is never drawn. Scores that are negative, NaN or all zero give NaN weights.

    Source: Cohen & Peng, "Lp row sampling by Lewis weights" (2015), section 2; Woodruff & Yasuda, "Sharper bounds for
      l_p sensitivity sampling" (2023), definition 1.2.

    Example:
      >>> import jax, jax.numpy as jnp, jaxnum
      >>> rows, weights = jaxnum.solvers.sample_rows(jax.random.key(0), jnp.array([0.0, 1.0]), 4)
      >>> rows.tolist(), weights.tolist()
      ([1, 1, 1, 1], [0.5, 0.5, 0.5, 0.5])
    """
    checks.arrays("sample_rows", scores=scores)
    scores = jnp.asarray(scores)
    checks.shape("sample_rows", scores=(scores, "N"))
    checks.dtype("sample_rows", "floating", scores=scores)
    ok = isinstance(m, int) and not isinstance(m, bool) and m >= 1
    checks.value("sample_rows", "m", ok, "be a Python int >= 1", m)
    if not checks.traced(p):
        checks.value("sample_rows", "p", float(p) >= 1, "be a real number >= 1", p)
    good = jnp.all(scores >= 0)
    q = scores / jnp.where(good, jnp.sum(scores), jnp.nan)
    rows = jax.random.categorical(key, jnp.log(q), shape=(m,)).astype(jnp.int32)
    return rows, (m * q[rows]) ** (-1 / jnp.asarray(p, q.dtype))
