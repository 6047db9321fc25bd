"""The m x m matrix through which gradients of any length are preconditioned: Woodbury's identity for F."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

# Measured on alike gradients and on fewer numbers than gradients, m to 512: above the first the relative error of
# K^-1 e stays near 1e-3 in float32, and with the second, in units of the mean squared norm, it comes back to there.
_PIVOT, _FLOOR = 64, 512

product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def factor(gram: jax.Array, damping: Any, count: Any) -> tuple[jax.Array, jax.Array]:
    """Cholesky factor of K = m λ I + G Gᵀ, and the λ in it: the damping, or a larger one where K is singular.

    With F = λ I + Gᵀ G / m the identities are F^-1 = (I - Gᵀ K^-1 G) / λ and F^-1 Gᵀ = m Gᵀ K^-1. Where gradients are
    alike, or fewer numbers than gradients, G Gᵀ is singular, and with a small λ so is K to working precision. A pivot
    of the factorisation below 64 m eps of its diagonal element shows it; λ is then at least 512 eps of the gradients'
    mean squared norm (6e-5 in float32). A λ above 64 eps of their largest squared norm is never changed.

    Args:
      gram: [m, m] floating, G Gᵀ.
      damping: λ >= 0.
      count: m of the definition of F, which may be below the number of rows where the others are 0.
    """
    eps, size = jnp.finfo(gram.dtype).eps, gram.shape[0]

    def lower(damping: jax.Array) -> jax.Array:
        return jnp.linalg.cholesky(gram + count * damping * jnp.eye(size, dtype=gram.dtype))

    given = jnp.asarray(damping).astype(gram.dtype)
    raised = jnp.maximum(given, (_FLOOR * eps * jnp.trace(gram) / count).astype(gram.dtype))
    plain = lower(given)
    left = jnp.square(jnp.diagonal(plain)) / (jnp.diagonal(gram) + count * given)
    # Of each pivot, since the minimum of NaNs is not always NaN on CPUs.
    regular = jnp.all(left >= _PIVOT * size * eps)
    used = jnp.where(regular, given, raised)
    return jax.lax.cond(regular, lambda _: plain, lower, raised), used


def solve(lower: jax.Array, b: jax.Array) -> jax.Array:
    """K^-1 b for the factor of K."""
    return jax.scipy.linalg.cho_solve((lower, True), b)


def factor_rows(rows: jax.Array, damping: Any) -> tuple[jax.Array, jax.Array]:
    """`factor` for gradients G [m, d] instead of their Gram matrix."""
    return factor(product("md,nd->mn", rows, rows), damping, rows.shape[0])


def split(rows: jax.Array, block: int) -> jax.Array:
    """Rows [m, d] in blocks of their columns [blocks, m, block], the last filled up with zeros."""
    count, size = rows.shape
    blocks = -(-size // block)
    padded = jnp.pad(rows, ((0, 0), (0, blocks * block - size)))
    return jnp.moveaxis(padded.reshape(count, blocks, block), 1, 0)
